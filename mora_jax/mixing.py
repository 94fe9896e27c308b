"""Adapters of one base mixed: scaled, added, cut back to a plan.

A delta is linear in its M (paper equation 3), so a sum of M's of one plan is the sum of
their deltas, exactly. Here an adapter is a pair (adapters, plan), as `load` returns it
and `save(directory, *pair)` takes it: only a plan says what an M means.

Adapters as numbers::

  scaled                adapters whose deltas are some factor as large
  weighted_sum          the sum of adapters of one plan, exactly
  project               the adapter of a plan that is nearest to a sum of any adapters

Example::

  >>> import jax, jax.numpy as jnp, mora_jax
  >>> from mora_jax import mixing
  >>> small, large = (mora_jax.plan({"kernel": jnp.ones((4, 4))}, mora_jax.MoRAConfig(
  ...     operator="truncation", square_rank=q)) for q in (2, 4))
  >>> ones = jax.tree.map(jnp.ones_like, mora_jax.init(small))
  >>> mixing.scaled(ones, -0.5)["kernel_mora"][0]
  Array([-0.5, -0.5], dtype=float32)
  >>> mixing.weighted_sum([(ones, small)] * 2, [0.5, 0.25])[0]["kernel_mora"][0]
  Array([0.75, 0.75], dtype=float32)
  >>> mixing.project([(ones, small)], [1.0], large)[1]
  {'kernel': 0.0}
"""

import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from mora_jax._common.checks import check_array, check_finite, check_number
from mora_jax._layer.equation import delta_kernel
from mora_jax._layer.rounding import ratio
from mora_jax._plan.plan import Plan, check_plan, refuse_other_plan
from mora_jax._plan.spec import SUFFIX, AdapterSpec, refuse_trained
from mora_jax._tree.adapters import Tree, nest, trained_in_base, trained_items
from mora_jax._tree.merge import array_items, wide
from mora_jax._tree.paths import adapter_path, located_leaves

__all__ = ["project", "scaled", "weighted_sum"]

Adapters = Sequence[tuple[Any, Plan]]
"""Pairs of adapters, as `init` makes them, and the plan that they follow."""

Weights = Sequence[ArrayLike] | jax.Array
"""A real number for each adapter, or an array of them."""

NO_DELTA = (
    "and is no delta, which this needs: mixing.weighted_sum takes such arrays with "
    "params=, and merge puts them into a base"
)
"""The reason to refuse arrays that train themselves."""


def scaled(adapters: Any, factor: ArrayLike) -> Any:
    """Adapters whose deltas are `factor` times as large; 0 turns them off.

    A jitted function may take `factor` as an argument; each alpha is another program.
    -1 takes away what was learned (task arithmetic, https://arxiv.org/abs/2212.04089).

    Args:
      adapters: The adapters, as `init` makes them, or `nnx.state(model, MoRAParam)`.
        Deltas must be linear in M (`Operator.linear`), which only the latter can check.
      factor: A real number, or an array of one.

    Returns:
      A tree like `adapters`, with its dtypes.

    Raises:
      TypeError: `factor` is not a real number, or a leaf is not an array.
      ValueError: A number is not finite, a delta not linear in M, or a leaf not an M.
    """
    for path, leaf in located_leaves(adapters, "adapters").items():
        if not path[-1].endswith(SUFFIX):
            raise ValueError(f"{'/'.join(path)} is not an M, {NO_DELTA}")
        if isinstance(spec := getattr(leaf, "spec", None), AdapterSpec):
            _refuse_nonlinear([spec])
    factor = _factor(factor, "factor")

    def times(m: Any) -> jax.Array:
        m = check_array("each M of the adapters", m)
        result = (wide(m) * factor).astype(m.dtype)
        check_finite(result, "the result", f" in {m.dtype}")
        return result

    return jax.tree.map(times, adapters)


def weighted_sum(
    adapters: Adapters, weights: Weights, params: Any = None, *, any_base: bool = False
) -> tuple[Tree, Plan]:
    r"""The adapter whose delta is :math:`\sum_i w_i \Delta_i`, of adapters of one plan.

    This is exact, since deltas are linear in M. `project` adds adapters of different
    plans. Of an array that trains itself the delta is what it has moved from the
    base's :math:`b`, so that the sum is :math:`b + \sum_i w_i (a_i - b)`.

    Args:
      adapters: Pairs (adapters, plan), as `load` returns them.
      weights: A real number for each, or an array of them.
      params: The base's params, which are needed if the plan trains arrays of them.
      any_base: As in `merge`.

    Returns:
      (adapters, plan). Each M, and each array that trains itself, is summed in float32
      or wider and has the dtype that it has in the adapters.

    Raises:
      TypeError, ValueError: Plans, bases or numbers of adapters and weights differ; an
        M, a weight or the sum is not finite; deltas are not linear in what is trained;
        or `params` lack an array that the plan trains, or are not the base alone.
    """
    pairs, factors = _pairs_of(adapters, weights)
    plans, trees = [plan for _, plan in pairs], []
    for tree, plan in pairs:
        try:
            refuse_other_plan(plan, plans[0])
        except ValueError as error:
            raise ValueError(f"{error}; mixing.project adds different plans") from None
        trees.append({adapter_path(spec): m for spec, m in array_items(tree, plan)})
        trees[-1] |= {array.path: copy for array, copy in trained_items(tree, plan)}
    _check_one_base(plans)
    _refuse_nonlinear(plans[0].specs)
    # The one that knows the base, if any does: the others compare equal to it.
    plan = max(plans, key=lambda plan: any(s.base_digest for s in plan.specs))
    why = "and its delta is what it has moved from the base's array"
    in_base = trained_in_base(plan, params, why, any_base)
    starts, sums = {array.path: wide(leaf) for array, leaf in in_base}, {}
    for path in trees[0]:
        arrays, start = [tree[path] for tree in trees], starts.get(path, 0.0)
        # An M starts at zero, and an array that trains itself where the base has it.
        moves = (f * (wide(a) - start) for f, a in zip(factors, arrays, strict=True))
        total = jnp.asarray(sum(moves, start)).astype(jnp.result_type(*arrays))
        check_finite(total, f"the mixture's {'/'.join(path)}", f" in {total.dtype}")
        sums[path] = total
    return nest(sums), plan


def _pairs_of(adapters: Any, weights: Any) -> tuple[list[Any], list[Any]]:
    """The adapters with their plans, and the factor of each of them, checked."""
    rule = "adapters must be pairs (adapters, plan), as load returns them"
    if isinstance(adapters, dict) or not isinstance(adapters, Iterable):
        raise TypeError(f"{rule}, got {type(adapters).__name__}")
    pairs = list(adapters)
    if not pairs:
        raise ValueError(f"{rule}, got none")
    for pair in pairs:
        fits = isinstance(pair, tuple | list) and len(pair) == 2
        if not fits or not isinstance(pair[1], Plan):
            raise TypeError(f"{rule}, got {type(pair).__name__} among them")
    if not isinstance(weights, list | tuple) and np.ndim(weights) != 1:
        kind = type(weights).__name__
        raise TypeError(f"weights must be a sequence of numbers, got {kind}")
    if len(weights) != len(pairs):
        got = f"got {len(weights)} for {len(pairs)}"
        raise ValueError(f"weights must be one for each adapter, {got}")
    return pairs, [_factor(w, f"weights[{k}]") for k, w in enumerate(weights)]


def _factor(value: Any, name: str) -> Any:
    """A real number, or an array of one, which a trace may have made."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            kind = f"{value.dtype}{list(value.shape)}"
            raise TypeError(f"{name} must be a real number, got {kind}")
        if isinstance(value, Tracer):
            return value  # an argument of the program, whose number nobody knows yet
        value = value.item()
    return check_number(name, value)


def _refuse_nonlinear(specs: Iterable[AdapterSpec]) -> None:
    """Raise if a delta is not linear in what is trained."""
    for spec in specs:
        if not spec.operator.linear:
            raise ValueError(
                f"{spec.name}: the delta of {spec.operator.name!r} is not linear in "
                "what is trained, so that sums of adapters are not sums of deltas: "
                "merge one after another"
            )


def _check_one_base(plans: Sequence[Plan]) -> None:
    """Raise if two plans know that they were trained on different bases."""
    known: dict[str, tuple[str, ...]] = {}
    for spec in (spec for plan in plans for spec in plan.specs):
        digest = spec.base_digest
        if digest and known.setdefault(spec.name, digest) != digest:
            rule = "adapters must be of one base"
            raise ValueError(f"{rule}, got different weights of {spec.name!r}")


def project(
    adapters: Adapters, weights: Weights, plan: Plan
) -> tuple[Tree, dict[str, Any]]:
    r"""The adapter of `plan` that is nearest to a weighted sum of any adapters.

    Their plans may have other operators, square ranks and kernels. Each M minimises
    :math:`\lVert \sum_i w_i \Delta_i - \alpha s\, C M D \rVert` in the Frobenius norm,
    by conjugate gradients on the normal equations, one kernel at a time. Most of it may
    be lost: a delta between other maps has little in common with `plan`'s deltas.

    Args:
      adapters: Pairs (adapters, plan), of one base.
      weights: A real number for each, or an array of them.
      plan: The plan of the result. It has all kernels of the others.

    Returns:
      The adapters, and {path: norm(sum - delta) / norm(sum)}, which is 0 where nothing
      is lost and 1 where all is: numbers, or arrays in a compiled function.

    Raises:
      TypeError, ValueError: `plan` lacks a kernel or has it in another shape, or its
        deltas are not linear in what is trained; bases differ; or as `weighted_sum`.
    """
    pairs, factors = _pairs_of(adapters, weights)
    plans = [*(made_for for _, made_for in pairs), check_plan(plan)]
    for other in plans:
        refuse_trained(other.trained, NO_DELTA)
    _refuse_nonlinear(plan.specs)
    _check_one_base(plans)
    terms = defaultdict(list)
    for pair, factor in zip(pairs, factors, strict=True):
        for spec, m in array_items(*pair):
            name, shape = spec.name, spec.kernel_shape
            if name not in plan:
                raise ValueError(f"plan lacks {name!r}, a kernel of the adapters")
            if (own := plan[name].kernel_shape) != shape:
                raise ValueError(f"plan must have {name!r} of shape {shape}, got {own}")
            terms[name].append((factor, spec, m))
    ms, lost = {}, {}
    for spec in plan.specs:
        deltas = (f * delta_kernel(s, wide(m)) for f, s, m in terms[spec.name])
        goal = sum(deltas, jnp.zeros(spec.kernel_shape, jnp.float32))
        m, lost[spec.name] = _nearest(spec, goal)
        ms[adapter_path(spec)] = m = m.astype(spec.param_dtype)
        check_finite(m, f"the M of {spec.name}", f" in {m.dtype}")
    return nest(ms), lost


def _nearest(spec: AdapterSpec, goal: jax.Array) -> tuple[jax.Array, Any]:
    """The M whose delta is nearest to `goal`, and the share of `goal` that it lacks."""
    delta = functools.partial(delta_kernel, spec)
    with jax.default_matmul_precision("highest"):
        # The delta is A m with a linear map A, so the nearest m has A^T A m = A^T goal.
        # Conjugate gradients take a step for each different eigenvalue of A^T A, until
        # they are exact. Operators have a few, isometric ones with equal blocks one.
        _, transpose = jax.vjp(delta, jnp.zeros(spec.shape, goal.dtype))
        m, _ = jax.scipy.sparse.linalg.cg(
            lambda m: transpose(delta(m))[0], transpose(goal)[0], tol=1e-7, maxiter=100
        )
        missing = jnp.linalg.norm((goal - delta(m)).ravel())
    return m, ratio(missing, jnp.linalg.norm(goal.ravel()))
