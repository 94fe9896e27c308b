"""Adapters scaled and summed."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mora_jax._common.checks import check_finite
from mora_jax._layer.dense import as_jax_array
from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._plan.trained_arrays import find_trained
from mora_jax._tree.adapters import (
    Tree,
    nest,
    refuse_combined,
    refuse_nonlinear,
    trained_items,
)
from mora_jax._tree.base_digest import check_base
from mora_jax._tree.merge import finite_items, wide
from mora_jax._tree.paths import Path, adapter_path, located_leaves, named_leaves
from mora_jax.mixing._pairs import (
    NO_DELTA,
    NOT_LINEAR,
    Adapter,
    Weights,
    factor_of,
    factors_of,
    one_plan_of,
    pairs_of,
)


def scaled(adapters: Any, factor: ArrayLike) -> Any:
    """Adapters whose deltas are `factor` times as large; 0 turns them off.

    The factor may be an argument of a compiled function, which then serves all factors,
    where another alpha in a plan would be another program. -1 takes away what the
    adapter has learned, as task arithmetic forgets (https://arxiv.org/abs/2212.04089).

    The deltas must be linear in the M's (`Operator.linear`). Arrays alone do not tell
    their operator; NNX variables do, and are refused if their deltas are not linear.

    Args:
      adapters: The adapters, as `init` makes them, or `nnx.state(model, MoRAParam)`.
      factor: A real number, or an array of one.

    Returns:
      A tree like `adapters`, with its dtypes.

    Raises:
      TypeError: `factor` is not a real number, or a leaf is not an array.
      ValueError: `factor` is not finite, the result is infinite in its dtype, the
        adapters hold arrays that train themselves, or an NNX variable is of an operator
        whose deltas are not linear.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> mora_jax.mixing.scaled({"kernel_mora": jnp.ones((1, 1))}, -0.5)
      {'kernel_mora': Array([[-0.5]], dtype=float32)}
    """
    if isinstance(adapters, tuple) and any(isinstance(x, Plan) for x in adapters):
        raise TypeError("adapters must be a tree of M's, got a pair: give pair[0]")
    for path, leaf in located_leaves(adapters, "adapters").items():
        if not path[-1].endswith(SUFFIX):
            raise ValueError(f"{'/'.join(path)} is not an M, {NO_DELTA}")
        if isinstance(spec := getattr(leaf, "spec", None), AdapterSpec):
            refuse_nonlinear([spec], NOT_LINEAR)
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
      any_base: True to take any params, also if the adapters were trained on others, as
        in `merge`.

    Returns:
      (adapters, plan). Each M, and each array that trains itself, is summed in float32
      or wider and has the dtype that it has in the adapters.

    Raises:
      TypeError: An argument is not such a sequence, or a weight is not a real number.
      ValueError: There is none, plans differ, bases differ, the number of weights is
        another, an M, a weight or the sum is not finite, an operator's deltas are not
        linear in what is trained, or the plan trains arrays and `params` are not given,
        lack one, are of another base, or hold the adapters.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> plan = mora_jax.plan({"kernel": jnp.ones((4, 4))})
      >>> ones = jax.tree.map(jnp.ones_like, mora_jax.init(plan))
      >>> mixed, _ = mora_jax.mixing.weighted_sum([(ones, plan)] * 2, [0.5, 0.25])
      >>> float(mixed["kernel_mora"][0, 0])
      0.75
    """
    pairs = pairs_of(adapters)
    plan = one_plan_of(pairs)
    columns = list(zip(*(finite_items(*pair) for pair in pairs), strict=True))
    factors = factors_of(weights, len(pairs))
    sums = {adapter_path(column[0][0]): _sum(column, factors) for column in columns}
    if plan.trained:
        leaves = _base_leaves(plan, params, any_base)
        for column in zip(*(trained_items(*pair) for pair in pairs), strict=True):
            array = column[0][0]
            base = find_trained(leaves, array)[1]
            base = wide(as_jax_array(f"{array.name} in params", base))
            sums[array.path] = _sum(column, factors, base)
    for path, array in sums.items():
        check_finite(array, f"the mixture's {'/'.join(path)}", f" in {array.dtype}")
    return nest(sums), plan


def _sum(
    column: Sequence[tuple[Any, jax.Array]],
    factors: Sequence[Any],
    base: jax.Array | float = 0.0,
) -> jax.Array:
    r""":math:`b + \sum_i w_i (a_i - b)` in float32 or wider, then in the dtype of a.

    The column holds a specification and an array a for each adapter; b is the base.
    """
    arrays = [array for _, array in column]
    moves = (f * (wide(a) - base) for f, a in zip(factors, arrays, strict=True))
    return jnp.asarray(sum(moves, base)).astype(jnp.result_type(*arrays))


def _base_leaves(
    plan: Plan, params: Any, any_base: bool
) -> dict[str, tuple[Path, Any]]:
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
