"""Adapters of one base mixed: scaled, added, cut back to a plan.

A delta is linear in its M (paper equation 3), so a sum of M's with one meaning is the
sum of their deltas, exactly.

Adapters as numbers::

  scaled                adapters whose deltas are some factor as large
  weighted_sum          the sum of adapters with one meaning, exactly
  project               the adapter of a plan that is nearest to a sum of any adapters

Example::

  >>> import jax, jax.numpy as jnp, mora_jax
  >>> from mora_jax import mixing
  >>> small, large = (mora_jax.plan({"kernel": jnp.ones((4, 4))}, mora_jax.MoRAConfig(
  ...     operator="truncation", square_rank=q)) for q in (2, 4))
  >>> ones = jax.tree.map(jnp.ones_like, mora_jax.init(small))
  >>> mixing.scaled(ones, -0.5)["kernel_mora"].m[0]
  Array([-0.5, -0.5], dtype=float32)
  >>> mixing.weighted_sum([ones] * 2, [0.5, 0.25])["kernel_mora"].m[0]
  Array([0.75, 0.75], dtype=float32)
  >>> mixing.project([ones], [1.0], large)[1]
  {'kernel': 0.0}
"""

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from mora_jax._common.checks import check_finite, check_number
from mora_jax._common.types import Path
from mora_jax._layer.adapter import Adapter, delta_of, wide
from mora_jax._layer.equation import delta_kernel
from mora_jax._layer.rounding import ratio
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree.adapters import (
    base_array,
    base_leaves,
    check_same_meaning,
    checked_adapters,
    checked_sequence,
    refuse_nonlinear,
    refuse_trained,
)
from mora_jax._tree.paths import Found, Tree, place_of, replace_adapters
from mora_jax._tree.plan import Plan, check_plan

__all__ = ["project", "scaled", "weighted_sum"]

Weights = Sequence[ArrayLike] | jax.Array
"""A real number for each adapter, or an array of them."""

NO_DELTA = (
    "and is no delta, which this needs: mixing.weighted_sum takes such arrays with "
    "params=, and merge puts them into a base"
)
"""The reason to refuse arrays that train themselves."""

NO_SUM = "so that sums of adapters are not sums of deltas: merge one after another"
"""The reason to refuse deltas that are not linear."""


def scaled(adapters: Any, factor: ArrayLike) -> Any:
    """Adapters whose deltas are `factor` times as large; 0 turns them off.

    A jitted function may take `factor` as an argument; each alpha is another program.
    -1 takes away what was learned (task arithmetic, https://arxiv.org/abs/2212.04089).

    Args:
      adapters: The adapters, as `init` makes them, or `nnx.state(model, MoRAParam)`.
      factor: A real number, or an array of one.

    Returns:
      A tree like `adapters`, with its dtypes.

    Raises:
      TypeError: `factor` is not a real number, or a leaf is not an adapter.
      ValueError: A number is not finite, or an array is trained itself.
    """
    found, factor = checked_adapters(adapters), _factor(factor, "factor")
    refuse_trained(found, NO_DELTA)
    for path, adapter in found.items():
        dtype = adapter.m.dtype
        m = adapter.operator.scaled(wide(adapter.m), factor).astype(dtype)
        check_finite(m, "the result", f" in {dtype}")
        found[path] = adapter.replace(m=m)
    return replace_adapters(adapters, found)


def weighted_sum(
    adapters: Sequence[Any],
    weights: Weights,
    params: Any = None,
    *,
    any_base: bool = False,
) -> Tree:
    r"""The adapters whose deltas are :math:`\sum_i w_i \Delta_i`, of one meaning.

    This is exact, since deltas are linear in M. `project` adds adapters between
    different maps. Of an array that trains itself the delta is what it has moved from
    the base's :math:`b`, so that the sum is :math:`b + \sum_i w_i (a_i - b)`.

    Args:
      adapters: Adapters of the same kernels, operators and factors.
      weights: A real number for each, or an array of them.
      params: The base's params, which are needed if arrays of them are trained.
      any_base: As in `merge`.

    Returns:
      Adapters. Each M, and each array that trains itself, is summed in float32 or wider
      and has the dtype that it has in the adapters.

    Raises:
      TypeError, ValueError: Meanings, bases or numbers of adapters and weights differ;
        an M, a weight or the sum is not finite; deltas are not linear in what is
        trained; or `params` lack an array that is trained, or are not the base alone.
    """
    found, factors = _checked(adapters, weights)
    for other in found[1:]:
        hint = "; mixing.project adds adapters between different maps"
        check_same_meaning(other, found[0], hint)
    known = _check_one_base(found)
    refuse_nonlinear(found[0].specs, NO_SUM)
    like = Found({p: a.replace(spec=known.get(p, a.spec)) for p, a in found[0].items()})
    starts, sums = {}, Found()
    if trained := like.trained:
        if params is None:
            raise ValueError(
                f"params must be given, since {'/'.join([*trained][0])!r} is trained "
                "itself, and its delta is what it has moved from the base's array"
            )
        leaves = base_leaves(params, None if any_base else like)
        for path, adapter in trained.items():
            starts[path] = wide(base_array(leaves, path, adapter.spec)[1])
    for path, adapter in like.items():
        arrays, start = [one[path].m for one in found], starts.get(path, 0.0)
        # An M starts at zero, and an array that trains itself where the base has it.
        moves = (f * (wide(a) - start) for f, a in zip(factors, arrays, strict=True))
        total = jnp.asarray(sum(moves, start)).astype(jnp.result_type(*arrays))
        place = "/".join(place_of(path, adapter.spec))
        check_finite(total, f"the mixture's {place}", f" in {total.dtype}")
        sums[path] = adapter.replace(m=total)
    return sums.tree()


def _checked(adapters: Any, weights: Any) -> tuple[list[Found], list[Any]]:
    """The adapters by path, and the factor of each of them, checked."""
    found = checked_sequence(adapters)
    if not isinstance(weights, list | tuple) and np.ndim(weights) != 1:
        kind = type(weights).__name__
        raise TypeError(f"weights must be a sequence of numbers, got {kind}")
    if len(weights) != len(found):
        got = f"got {len(weights)} for {len(found)}"
        raise ValueError(f"weights must be one for each adapter, {got}")
    return found, [_factor(w, f"weights[{k}]") for k, w in enumerate(weights)]


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


def _check_one_base(found: Sequence[Found]) -> dict[Path, AdapterSpec]:
    """{path: spec} of those that know their base; raise if two know different ones."""
    known: dict[Path, AdapterSpec] = {}
    for path, adapter in (item for one in found for item in one.items()):
        digest = getattr(adapter.spec, "base_digest", None)
        if digest and known.setdefault(path, adapter.spec).base_digest != digest:
            rule = "adapters must be of one base"
            raise ValueError(f"{rule}, got different weights of {'/'.join(path)!r}")
    return known


def project(
    adapters: Sequence[Any], weights: Weights, plan: Plan
) -> tuple[Tree, dict[str, Any]]:
    r"""The adapter of `plan` that is nearest to a weighted sum of any adapters.

    These may have other operators, square ranks and kernels. Each M minimises
    :math:`\lVert \sum_i w_i \Delta_i - \alpha s\, C M D \rVert` in the Frobenius norm,
    by conjugate gradients on the normal equations, one kernel at a time. Most of it may
    be lost: a delta between other maps has little in common with `plan`'s deltas.

    Args:
      adapters: Adapters of one base.
      weights: A real number for each, or an array of them.
      plan: The plan of the result. It has all kernels of the others.

    Returns:
      The adapters, and {path: norm(sum - delta) / norm(sum)}, which is 0 where nothing
      is lost and 1 where all is: numbers, or arrays in a compiled function.

    Raises:
      TypeError, ValueError: `plan` lacks a kernel or has it in another shape, or its
        deltas are not linear in what is trained; bases differ; or as `weighted_sum`.
    """
    found, factors = _checked(adapters, weights)
    for parts in (*found, check_plan(plan).parts):
        refuse_trained(parts, NO_DELTA)
    refuse_nonlinear(plan.specs, NO_SUM)
    planned = Found({path: Adapter(None, spec) for path, spec in plan.specs.items()})
    _check_one_base([*found, planned])
    terms = defaultdict(list)
    for one, factor in zip(found, factors, strict=True):
        for path, adapter in one.items():
            name, shape = "/".join(path), adapter.spec.kernel_shape
            if name not in plan:
                raise ValueError(f"plan lacks {name!r}, a kernel of the adapters")
            if (own := plan[name].kernel_shape) != shape:
                raise ValueError(f"plan must have {name!r} of shape {shape}, got {own}")
            terms[path].append((factor, adapter))
    made, lost = Found(), {}
    for path, spec in plan.specs.items():
        name = "/".join(path)
        deltas = (factor * delta_of(adapter) for factor, adapter in terms[path])
        goal = sum(deltas, jnp.zeros(spec.kernel_shape, jnp.float32))
        m, lost[name] = _nearest(spec, goal)
        m = m.astype(spec.param_dtype)
        check_finite(m, f"the M of {name}", f" in {m.dtype}")
        made[path] = Adapter(m, spec)
    return made.tree(), lost


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
