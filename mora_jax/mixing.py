"""Adapters of one base mixed: scaled, added, cleaned of each other, cut back to a plan.

A delta is linear in its M (paper equation 3), so a sum of M's of one plan is the sum of
their deltas, exactly. Here an adapter is a pair (adapters, plan), as `load` returns it
and `save(directory, *pair)` takes it: only a plan says what an M means.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import PRNGKeyArray

from mora_jax._adapters import Tree, nest
from mora_jax._checks import check_key, check_number
from mora_jax._compute.delta import delta_kernel
from mora_jax._merge import finite_items
from mora_jax._paths import adapter_path, located_leaves
from mora_jax._plan import Plan, check_plan, refuse_other_plan
from mora_jax._spec import SUFFIX, AdapterSpec
from mora_jax._trained import refuse_trained

Adapter = tuple[Any, Plan]
"""Adapters, as `init` makes them, and the plan that they follow."""

Weights = Sequence[ArrayLike] | jax.Array
"""A real number for each adapter, or an array of them."""

STEPS = 100
"""The most steps of `project`. Isometric operators take one, others about ten."""

_UNMIXED = "mixing is for M's alone; merge such an adapter into a base of its own"


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
      ValueError: `factor` is not finite, or the adapters hold arrays that train
        themselves.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> mora_jax.mixing.scaled({"kernel_mora": jnp.ones((1, 1))}, -0.5)
      {'kernel_mora': Array([[-0.5]], dtype=float32)}
    """
    if isinstance(adapters, tuple) and any(isinstance(x, Plan) for x in adapters):
        raise TypeError("adapters must be a tree of M's, got a pair: give pair[0]")
    for path in located_leaves(adapters, "adapters"):
        if not path[-1].endswith(SUFFIX):
            raise ValueError(
                f"adapters hold {'/'.join(path)!r}, which is not an M but trains "
                f"itself, and is no delta: {_UNMIXED}"
            )
    factor = _factor(factor, "factor")

    def times(m: Any) -> jax.Array:
        dtype = getattr(m, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"adapters must hold floating-point arrays, got {m!r}")
        wide = jnp.promote_types(dtype, jnp.float32)
        return (jnp.asarray(m, wide) * factor).astype(dtype)

    return jax.tree.map(times, adapters)


def weighted_sum(adapters: Sequence[Adapter], weights: Weights) -> tuple[Tree, Plan]:
    r"""The adapter whose delta is :math:`\sum_i w_i \Delta_i`, of adapters of one plan.

    This is exact, since deltas are linear in M. `project` adds adapters of different
    plans.

    Args:
      adapters: Pairs (adapters, plan), as `load` returns them.
      weights: A real number for each, or an array of them.

    Returns:
      (adapters, plan). Each M is summed in float32 or wider and has the dtype of the
      M's.

    Raises:
      TypeError: An argument is not such a sequence, or a weight is not a real number.
      ValueError: There is none, plans differ or train arrays themselves, bases differ,
        the number of weights is another, or an M or a weight is not finite.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> plan = mora_jax.plan({"kernel": jnp.ones((4, 4))})
      >>> ones = jax.tree.map(jnp.ones_like, mora_jax.init(plan))
      >>> mixed, _ = mora_jax.mixing.weighted_sum([(ones, plan)] * 2, [0.5, 0.25])
      >>> float(mixed["kernel_mora"][0, 0])
      0.75
    """
    plan, found = _of_one_plan(adapters)
    factors = _weights(weights, len(adapters))

    def total(ms: Sequence[jax.Array], spec: AdapterSpec) -> jax.Array:
        del spec
        return sum(f * m for f, m in zip(factors, ms, strict=True))  # pyright: ignore

    return _mixed(plan, found, total)


def ties(
    adapters: Sequence[Adapter],
    weights: Weights | None = None,
    *,
    density: float | int = 0.2,
) -> tuple[Tree, Plan]:
    r"""Adapters of one plan merged without those numbers in which they contradict.

    TIES (https://arxiv.org/abs/2306.01708), of each M: each adapter keeps the `density`
    of its numbers that are largest, each place gets the sign of their sum, and the
    result is the mean of the numbers that have that sign. The paper does this to all
    weights of a model; here it is done to M's, so it is not the same as TIES of the
    deltas.

    Args:
      adapters: As in `weighted_sum`.
      weights: A real number for each, by which its numbers are multiplied once they are
        trimmed; 1 by default.
      density: The share of the numbers that is kept, above 0 and at most 1.

    Returns:
      (adapters, plan), as of `weighted_sum`. `scaled` multiplies it, which the paper
      does by 0.8 to 1.8 and calls lambda.

    Raises:
      TypeError: As `weighted_sum`.
      ValueError: As `weighted_sum`, or `density` is out of its range.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> plan = mora_jax.plan({"kernel": jnp.ones((2, 2))}, mora_jax.MoRAConfig(
      ...     operator="truncation", square_rank=2))
      >>> a, b = ({"kernel_mora": jnp.array(m)} for m in (
      ...     [[3.0, 1.0], [2.0, 0.0]], [[1.0, -4.0], [2.0, 0.0]]))
      >>> mora_jax.mixing.ties([(a, plan), (b, plan)], density=0.75)[0]["kernel_mora"]
      Array([[ 2., -4.],
             [ 2.,  0.]], dtype=float32)
    """
    check_number("density", density)
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {density}")
    plan, found = _of_one_plan(adapters)
    weights = [1.0] * len(found) if weights is None else weights
    factors = _weights(weights, len(found))

    def merged(ms: Sequence[jax.Array], spec: AdapterSpec) -> jax.Array:
        trimmed = [
            factor * _largest(m, density, len(spec.operator.m_shape))
            for m, factor in zip(ms, factors, strict=True)
        ]
        stack = jnp.stack(trimmed)
        agree = (jnp.sign(stack) == jnp.sign(stack.sum(0))) & (stack != 0)
        return jnp.where(agree, stack, 0).sum(0) / jnp.maximum(agree.sum(0), 1)

    return _mixed(plan, found, merged)


def dare(adapter: Adapter, rate: float | int, key: PRNGKeyArray) -> tuple[Tree, Plan]:
    r"""An adapter of which a share of the numbers is dropped and the rest grows.

    DARE (https://arxiv.org/abs/2311.03099): each number of an M is 0 with probability
    `rate`, and otherwise :math:`1 / (1 - rate)` times itself, so that the mean over
    keys is the adapter. Adapters that are added after it disturb each other less. As
    with `ties`, the numbers are those of the M's.

    Args:
      adapter: A pair (adapters, plan).
      rate: The share that is dropped, at least 0 and below 1.
      key: The random key. What is dropped of an M depends on it and on its path.

    Raises:
      TypeError: An argument has another type.
      ValueError: `rate` is out of its range, or an M is not finite.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> plan = mora_jax.plan({"kernel": jnp.ones((8, 8))})
      >>> ones = jax.tree.map(jnp.ones_like, mora_jax.init(plan)), plan
      >>> dropped, _ = mora_jax.mixing.dare(ones, 0.75, jax.random.key(0))
      >>> sorted(set(dropped["kernel_mora"].ravel().tolist()))
      [0.0, 4.0]
    """
    check_number("rate", rate)
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be at least 0 and below 1, got {rate}")
    check_key(key)
    plan, found = _of_one_plan([adapter])

    def dropped(ms: Sequence[jax.Array], spec: AdapterSpec) -> jax.Array:
        own = jax.random.fold_in(key, np.uint32(crc32(spec.name.encode())))
        keep = jax.random.bernoulli(own, 1.0 - rate, ms[0].shape)
        return jnp.where(keep, ms[0] / (1 - rate), 0)

    return _mixed(plan, found, dropped)


def project(
    adapters: Sequence[Adapter], weights: Weights, plan: Plan
) -> tuple[Tree, dict[str, float]]:
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
      is lost and 1 where all is.

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
    refuse_trained(check_plan(plan).trained, f"and is no delta: {_UNMIXED}")
    pairs = _pairs(adapters)
    factors = _weights(weights, len(pairs))
    _check_one_base([*(made_for for _, made_for in pairs), plan])
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
            factor * delta_kernel(found[spec.name][0], _wide(found[spec.name][1]))
            for found, factor in zip(items, factors, strict=True)
            if spec.name in found
        ]
        goal = sum(terms, jnp.zeros(spec.kernel_shape, jnp.float32))
        m, lost[spec.name] = _nearest(spec, goal)
        result[adapter_path(spec)] = m.astype(spec.param_dtype)
    return nest(result), lost


def _nearest(spec: AdapterSpec, goal: jax.Array) -> tuple[jax.Array, float]:
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
    return m, float(rest / size) if size else 0.0


def _pairs(adapters: Any) -> list[Adapter]:
    """`adapters`, if they are pairs of adapters and a plan."""
    rule = "adapters must be pairs (adapters, plan), as load returns them"
    if isinstance(adapters, dict) or not isinstance(adapters, Iterable):
        raise TypeError(f"{rule}, got {type(adapters).__name__}")
    found = list(adapters)
    if not found:
        raise ValueError(f"{rule}, got none")
    for pair in found:
        fits = isinstance(pair, tuple | list) and len(pair) == 2
        if not fits or not isinstance(pair[1], Plan):
            raise TypeError(f"{rule}, got {type(pair).__name__} among them")
        refuse_trained(pair[1].trained, f"and is no delta: {_UNMIXED}")
    return found


def _of_one_plan(
    adapters: Any,
) -> tuple[Plan, list[list[tuple[AdapterSpec, jax.Array]]]]:
    """The plan of all `adapters`, and the specs and M's of each."""
    pairs = _pairs(adapters)
    plans = [check_plan(plan) for _, plan in pairs]
    for other in plans[1:]:
        try:
            refuse_other_plan(other, plans[0])
        except ValueError as error:
            raise ValueError(f"{error}; mixing.project adds different plans") from None
    _check_one_base(plans)
    knows = [plan for plan in plans if any(s.base_digest for s in plan.specs)]
    return (knows or plans)[0], [finite_items(tree, plan) for tree, plan in pairs]


def _check_one_base(plans: Sequence[Plan]) -> None:
    """Raise if two plans know that they were trained on different bases."""
    known: dict[str, tuple[str, ...]] = {}
    for plan in plans:
        for spec in plan.specs:
            digest = spec.base_digest
            if digest and known.setdefault(spec.name, digest) != digest:
                raise ValueError(
                    f"adapters must be of one base, and two of them were trained on "
                    f"different weights of {spec.name!r}"
                )


def _weights(weights: Any, count: int) -> list[Any]:
    """`weights` as factors, one for each of `count` adapters."""
    if isinstance(weights, jax.Array | np.ndarray) and weights.ndim == 1:
        weights = [weights[k] for k in range(len(weights))]
    if not isinstance(weights, list | tuple):
        raise TypeError(
            f"weights must be a sequence of numbers, got {type(weights).__name__}"
        )
    if len(weights) != count:
        raise ValueError(
            f"weights must be one for each adapter, got {len(weights)} for {count}"
        )
    return [_factor(weight, f"weights[{k}]") for k, weight in enumerate(weights)]


def _factor(value: Any, name: str) -> Any:
    """A real number, or an array of one, which a trace may have made."""
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        return check_number(name, value)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be a real number, got {value.dtype}{list(value.shape)}"
        )
    if not isinstance(value, Tracer) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def _mixed(
    plan: Plan,
    found: Sequence[Sequence[tuple[AdapterSpec, jax.Array]]],
    mix: Callable[[Sequence[jax.Array], AdapterSpec], jax.Array],
) -> tuple[Tree, Plan]:
    """`mix` of the M's of each kernel, in float32 or wider, then in their dtype."""
    result = {}
    for column in zip(*found, strict=True):
        spec, ms = column[0][0], [m for _, m in column]
        wide = [_wide(m) for m in ms]
        result[adapter_path(spec)] = mix(wide, spec).astype(jnp.result_type(*ms))
    return nest(result), plan


def _largest(m: jax.Array, density: float, axes: int) -> jax.Array:
    """The M's with zeros in place of all but the largest numbers of each of them."""
    rows = m.reshape(-1, math.prod(m.shape[-axes:]))
    count = max(1, int(density * rows.shape[1]))
    _, places = jax.lax.top_k(jnp.abs(rows), count)
    kept = jnp.zeros(rows.shape, bool)
    kept = jnp.put_along_axis(kept, places, True, axis=1, inplace=False)
    return jnp.where(kept, rows, 0).reshape(m.shape)


def _wide(m: jax.Array) -> jax.Array:
    """An M in float32, or in float64 where it is."""
    return m.astype(jnp.promote_types(m.dtype, jnp.float32))
