"""Adapters of one base mixed: scaled and added.

A delta is linear in its M (paper equation 3), so a sum of M's with one meaning is the
sum of their deltas, exactly.

Example::

  >>> import jax, jax.numpy as jnp, mora_jax
  >>> plan = mora_jax.plan({"kernel": jnp.ones((4, 4))}, mora_jax.MoRAConfig(rank=1))
  >>> ones = jax.tree.map(jnp.ones_like, mora_jax.init(plan))
  >>> mora_jax.mixing.scaled(ones, -0.5)["kernel_mora"].m[0, 0]
  Array([-0.5, -0.5], dtype=float32)
  >>> mora_jax.mixing.weighted_sum([ones] * 2, [0.5, 0.25])["kernel_mora"].m[0, 0]
  Array([0.75, 0.75], dtype=float32)
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from mora_jax._common.checks import check_finite, check_number
from mora_jax._layer.adapter import Adapter, wide
from mora_jax._tree import paths
from mora_jax.operators import Damped, LowRank, Operator

__all__ = ["scaled", "weighted_sum"]

NO_DELTA = "and is no delta, which this needs; merge puts it into a base"


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
    found, factor = paths.checked_adapters(adapters), _factor(factor, "factor")
    found.refuse_trained(NO_DELTA)
    for path, adapter in found.items():
        m = adapter.operator.scaled(wide(adapter.m), factor).astype(adapter.m.dtype)
        check_finite(m, "the result", f" in {m.dtype}")
        found[path] = adapter.replace(m=m)
    return paths.replace_adapters(adapters, found)


def weighted_sum(
    adapters: Sequence[Any], weights: Sequence[ArrayLike] | jax.Array
) -> paths.Tree:
    r"""The adapters whose deltas are :math:`\sum_i w_i \Delta_i`, of one meaning.

    The ranks of LoRAs ("low_rank") add up, as by PEFT's "cat"; `remora.learned` cuts
    them to those that a bound needs, as "svd" does. Adapters on damped inputs must have
    the same directions.

    Args:
      adapters: Adapters of the same kernels, operators and factors.
      weights: A real number for each, or an array of them.

    Returns:
      Adapters, with their dtypes; each M is summed in float32 or wider.

    Raises:
      TypeError, ValueError: Meanings, bases or numbers of adapters and weights differ;
        an M, a weight or the sum is not finite; deltas are not linear in what is
        trained; or an array is trained itself.
    """
    found = paths.alike_adapters(adapters)
    _check_weights(weights)
    if len(weights) != len(found):
        got = f"got {len(weights)} for {len(found)}"
        raise ValueError(f"weights must be one for each adapter, {got}")
    factors = [_factor(w, f"weights[{k}]") for k, w in enumerate(weights)]
    why = "so that sums of adapters are not sums of deltas: merge one after another"
    found[0].refuse_trained(NO_DELTA)
    loras = {p for p, a in found[0].items() if isinstance(_inner(a), LowRank)}
    squares = paths.Found({p: a for p, a in found[0].items() if p not in loras})
    squares.refuse_nonlinear(why)
    sums = paths.Found()
    for path, adapter in found[0].items():
        arrays, spec = [one[path].m for one in found], adapter.spec
        pairs = zip(factors, arrays, strict=True)
        moves = [spec.operator.scaled(wide(a), factor) for factor, a in pairs]
        if path in loras:  # [A1 A2] times B1 above B2 is A1 B1 + A2 B2
            total = jnp.concatenate(moves, -1)
            op = _of_rank(spec.operator, total.shape[-1])
            spec = dataclasses.replace(spec, operator=op, rank=None)
        else:
            total = jnp.asarray(sum(moves))
        total = total.astype(jnp.result_type(*arrays))
        place = "/".join(paths.place_of(path, spec))
        check_finite(total, f"the mixture's {place}", f" in {total.dtype}")
        sums[path] = Adapter(total, spec)
    return sums.tree()


def _inner(adapter: Adapter) -> Operator:
    """The operator, or the one that sees its damped inputs."""
    return getattr(adapter.operator, "inner", adapter.operator)


def _of_rank(op: Operator, rank: int) -> Operator:
    """The same LoRA of another rank; P (A1 B1 + A2 B2) is one on the same P x."""
    if isinstance(op, Damped):
        inner = _of_rank(op.inner, rank)
        return dataclasses.replace(op, inner=inner, square_rank=rank)
    return dataclasses.replace(op, square_rank=rank)


def _check_weights(weights: Any) -> None:
    """Raise unless `weights` are a sequence, or an array of one axis."""
    rule = "weights must be a sequence of real numbers, or an array of one axis"
    if isinstance(weights, jax.Array | np.ndarray):
        if weights.ndim != 1:
            raise TypeError(f"{rule}, got an array of shape {tuple(weights.shape)}")
    elif not isinstance(weights, Sequence) or isinstance(weights, str | bytes):
        raise TypeError(f"{rule}, got {weights!r:.80}")


def _factor(value: Any, name: str) -> Any:
    """A real number, or an array of one, which a trace may have made."""
    if isinstance(value, jax.Array | np.ndarray | np.generic) and not value.shape:
        if isinstance(value, Tracer):
            # An argument of the program, whose number nobody knows yet.
            kinds = jnp.floating, jnp.integer
            if not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
                raise TypeError(f"{name} must be real, got {value.dtype}")
            return value
        value = value.item()
    return check_number(name, value)
