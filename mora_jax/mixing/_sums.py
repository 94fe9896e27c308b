"""Adapters scaled and summed, and sums cut back to a plan."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

from mora_jax._common.checks import as_jax_array, check_finite
from mora_jax._common.types import Path
from mora_jax._layer.delta import delta_kernel
from mora_jax._plan.plan import Plan, check_plan
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._plan.trained_arrays import find_trained, refuse_trained
from mora_jax._tree.adapters import Tree, nest, refuse_combined, trained_items
from mora_jax._tree.base_digest import check_base
from mora_jax._tree.merge import finite_items, wide
from mora_jax._tree.paths import adapter_path, located_leaves, named_leaves
from mora_jax.mixing._pairs import (
    NO_DELTA,
    Adapter,
    Weights,
    check_one_base,
    factor_of,
    factors_of,
    mixed,
    of_one_plan,
    pairs_of,
    refuse_no_deltas,
)

STEPS = 100
"""The most steps of `project`. It takes one for each singular value that the map from M
to the delta has, however often; operators have a few, isometric ones with equal blocks
one."""


def scaled(adapters: Any, factor: ArrayLike) -> Any:
    """Adapters whose deltas are `factor` times as large; 0 turns them off.

    The factor may be an argument of a compiled function, which then serves all factors,
    where another alpha in a plan would be another program. -1 takes away what the
    adapter has learned, as task arithmetic forgets (https://arxiv.org/abs/2212.04089).

    Args:
      adapters: The adapters, as `init` makes them, or `nnx.state(model, MoRAParam)`.
      factor: A real number, or an array of one.

    Returns:
      A tree like `adapters`, with its dtypes.

    Raises:
      TypeError: `factor` is not a real number, or a leaf is not an array.
      ValueError: `factor` is not finite, the result is infinite in its dtype, or the
        adapters hold arrays that train themselves.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> mora_jax.mixing.scaled({"kernel_mora": jnp.ones((1, 1))}, -0.5)
      {'kernel_mora': Array([[-0.5]], dtype=float32)}
    """
    if isinstance(adapters, tuple) and any(isinstance(x, Plan) for x in adapters):
        raise TypeError("adapters must be a tree of M's, got a pair: give pair[0]")
    for path in located_leaves(adapters, "adapters"):
        if not path[-1].endswith(SUFFIX):
            raise ValueError(f"{'/'.join(path)} is not an M, {NO_DELTA}")
    factor = factor_of(factor, "factor")

    def times(m: Any) -> jax.Array:
        dtype = getattr(m, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"adapters must hold floating-point arrays, got {m!r}")
        result = (wide(as_jax_array("adapters", m)) * factor).astype(dtype)
        check_finite(result, "the result", f" in {dtype}")
        return result

    return jax.tree.map(times, adapters)


def weighted_sum(
    adapters: Sequence[Adapter],
    weights: Weights,
    params: Any = None,
    *,
    any_base: bool = False,
) -> tuple[Tree, Plan]:
    r"""The adapter whose delta is :math:`\sum_i w_i \Delta_i`, of adapters of one plan.

    This is exact, since deltas are linear in M. `project` adds adapters of different
    plans. Of an array that trains itself the delta is what it has moved from the
    base's :math:`b`, so that the sum is :math:`b + \sum_i w_i (a_i - b)`.

    Args:
      adapters: Pairs (adapters, plan), as `load` returns them.
      weights: A real number for each, or an array of them.
      params: The base's params, which are needed if the plan trains arrays of them.
      any_base: Whether to take any params, also if the adapters were trained on others,
        as in `merge`.

    Returns:
      (adapters, plan). Each M, and each array that trains itself, is summed in float32
      or wider and has the dtype that it has in the adapters.

    Raises:
      TypeError: An argument is not such a sequence, or a weight is not a real number.
      ValueError: There is none, plans differ, bases differ, the number of weights is
        another, an M, a weight or the sum is not finite, or the plan trains arrays and
        `params` are not given, lack one, are of another base, or hold the adapters.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> plan = mora_jax.plan({"kernel": jnp.ones((4, 4))})
      >>> ones = jax.tree.map(jnp.ones_like, mora_jax.init(plan))
      >>> mixed, _ = mora_jax.mixing.weighted_sum([(ones, plan)] * 2, [0.5, 0.25])
      >>> float(mixed["kernel_mora"][0, 0])
      0.75
    """
    pairs = pairs_of(adapters)
    plan, found = of_one_plan(pairs)
    factors = factors_of(weights, len(found))

    def total(ms: Sequence[jax.Array], _: AdapterSpec) -> jax.Array:
        terms = (factor * m for factor, m in zip(factors, ms, strict=True))
        return sum(terms, jnp.zeros_like(ms[0]))

    leaves = _base_of(plan, params, any_base) if plan.trained else {}
    return mixed(plan, found, total, _moved(pairs, factors, leaves))


def _base_of(plan: Plan, params: Any, any_base: bool) -> dict[str, tuple[Path, Any]]:
    """The leaves of the base that the arrays were trained from."""
    if params is None:
        raise ValueError(
            f"params must be given, since the plan trains {plan.trained[0].name!r} "
            "itself, and its delta is what it has moved from the base's array"
        )
    leaves = named_leaves(params)
    refuse_combined(leaves, plan.specs)
    if not any_base:
        check_base(plan.specs, {name: leaf for name, (_, leaf) in leaves.items()})
    return leaves


def _moved(
    pairs: Sequence[Adapter],
    factors: Sequence[Any],
    leaves: Mapping[str, tuple[Path, Any]],
) -> dict[Path, jax.Array]:
    """{path: the base's array, moved by the sum of what each adapter has moved it}."""
    result = {}
    columns = zip(*(trained_items(tree, made) for tree, made in pairs), strict=True)
    for column in columns:
        trained, copies = column[0][0], [wide(copy) for _, copy in column]
        array = find_trained(leaves, trained)[1]
        base = wide(as_jax_array(f"{trained.name} in params", array))
        moved = (f * (copy - base) for f, copy in zip(factors, copies, strict=True))
        dtype = jnp.result_type(*(copy for _, copy in column))
        result[trained.path] = sum(moved, base).astype(dtype)
    return result


def project(
    adapters: Sequence[Adapter], weights: Weights, plan: Plan
) -> tuple[Tree, dict[str, Any]]:
    r"""The adapter of `plan` that is nearest to a weighted sum of any adapters.

    Their plans may have other operators, square ranks and kernels. Of each kernel this
    takes the M that minimises :math:`\lVert \sum_i w_i \Delta_i - \alpha s\, C M D
    \rVert` in the Frobenius norm, by conjugate gradients on the normal equations.
    Memory holds the deltas of one kernel at a time. It says what is lost, which may be
    most of it: a delta between other maps has little in common with those of `plan`.

    Args:
      adapters: Pairs (adapters, plan), of one base.
      weights: A real number for each, or an array of them.
      plan: The plan of the result. It has all kernels of the others.

    Returns:
      The adapters, and {path: norm(sum - delta) / norm(sum)}, which is 0 where nothing
      is lost and 1 where all is: numbers, or arrays in a compiled function.

    Raises:
      TypeError: An argument has another type.
      ValueError: `plan` lacks a kernel or has it in another shape, bases differ, or as
        `weighted_sum`.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> small, large = (mora_jax.plan(params, mora_jax.MoRAConfig(
      ...     operator="truncation", square_rank=q)) for q in (2, 4))
      >>> ones = jax.tree.map(jnp.ones_like, mora_jax.init(small))
      >>> mora_jax.mixing.project([(ones, small)], [1.0], large)[1]
      {'kernel': 0.0}
    """
    refuse_trained(check_plan(plan).trained, NO_DELTA)
    pairs = pairs_of(adapters)
    refuse_no_deltas(pairs)
    factors = factors_of(weights, len(pairs))
    check_one_base([*(made_for for _, made_for in pairs), plan])
    items = [
        {spec.name: (spec, m) for spec, m in finite_items(tree, made_for)}
        for tree, made_for in pairs
    ]
    for found in items:
        for name, (spec, _) in found.items():
            if name not in plan:
                raise ValueError(
                    f"plan must have all kernels of the adapters, and lacks {name!r}"
                )
            if plan[name].kernel_shape != spec.kernel_shape:
                raise ValueError(
                    f"plan must have {name!r} in the shape {spec.kernel_shape}, got "
                    f"{plan[name].kernel_shape}"
                )
    result, lost = {}, {}
    for spec in plan.specs:
        terms = [
            factor * delta_kernel(found[spec.name][0], wide(found[spec.name][1]))
            for found, factor in zip(items, factors, strict=True)
            if spec.name in found
        ]
        goal = sum(terms, jnp.zeros(spec.kernel_shape, jnp.float32))
        m, lost[spec.name] = _nearest(spec, goal)
        result[adapter_path(spec)] = m = m.astype(spec.param_dtype)
        check_finite(m, f"the M of {spec.name}", f" in {m.dtype}")
    return nest(result), lost


def _nearest(spec: AdapterSpec, goal: jax.Array) -> tuple[jax.Array, Any]:
    """The M whose delta is nearest to `goal`, and the share of `goal` that it lacks."""
    start = jnp.zeros(spec.shape, goal.dtype)
    with jax.default_matmul_precision("highest"):
        _, back = jax.vjp(lambda m: delta_kernel(spec, m), start)

        def normal(m: jax.Array) -> jax.Array:
            return back(delta_kernel(spec, m))[0]

        m, _ = jax.scipy.sparse.linalg.cg(
            normal, back(goal)[0], x0=start, tol=1e-7, maxiter=STEPS
        )
        rest = jnp.linalg.norm((goal - delta_kernel(spec, m)).ravel())
    size = jnp.linalg.norm(goal.ravel())
    lost = jnp.where(size > 0, rest / jnp.where(size > 0, size, 1), 0)
    return m, lost if isinstance(lost, Tracer) else float(lost)
