"""Measures of what adapters do to a model, and of what a merge loses.

Example::

  >>> import jax.numpy as jnp, mora_jax
  >>> params = {"kernel": jnp.ones((4, 4), jnp.bfloat16)}
  >>> config = mora_jax.MoRAConfig(operator="truncation", square_rank=4, scale="paper")
  >>> plan = mora_jax.plan(params, config)
  >>> adapters = plan.adapters({"kernel_mora": jnp.full((4, 4), 2.0**-10)})
  >>> mora_jax.diagnostics.merge_loss(params, adapters, rounding="nearest")
  {'kernel': 1.0}
  >>> mora_jax.diagnostics.relative_norm(params, adapters)
  {'kernel': 0.0009765625}
  >>> values = mora_jax.diagnostics.spectrum(adapters)["kernel"]
  >>> values.shape, float(mora_jax.diagnostics.effective_rank(values).round(3))
  ((4,), 1.0)
"""

import math
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from mora_jax._common.axes import rows_from_kernel
from mora_jax._layer.adapter import delta_of
from mora_jax._layer.rounding import Rounding, check_rounding, share_lost
from mora_jax._tree.merge import merged_kernel
from mora_jax._tree.paths import checked_adapters

__all__ = ["effective_rank", "merge_loss", "relative_norm", "spectrum"]


def merge_loss(
    params: Any,
    adapters: Any,
    dtype: DTypeLike | None = None,
    *,
    rounding: Rounding = "dither",
) -> dict[str, float]:
    """The share of each delta that rounding loses in the mean when it is merged.

    What arrives is measured along the delta itself: errors that cancel in sums over
    many inputs, as a dither's do, do not count. The arguments are as in `merge`.

    Returns:
      {path: abs(1 - <merged - base, delta> / <delta, delta>)}; 0 for a zero delta.

    Raises:
      TypeError, ValueError: As `merge`.
    """
    check_rounding(rounding)
    found, loss = checked_adapters(adapters).kernels, {}
    for path, (_, kernel) in found.in_base(params).items():
        merged = merged_kernel(found[path], kernel, dtype=dtype, rounding=rounding)
        delta = delta_of(found[path])
        change = merged.astype(delta.dtype) - kernel.astype(delta.dtype)
        loss["/".join(path)] = float(share_lost(change, delta))
    return loss


def spectrum(adapters: Any) -> dict[str, np.ndarray]:
    """The singular values of the deltas of adapters, the largest first.

    Returns:
      {path: (*stack, min(in, out))}, in float64.

    Raises:
      TypeError, ValueError: They are not adapters, or an M is not finite.
    """
    values = {}
    for path, adapter in checked_adapters(adapters).kernels.items():
        rows = rows_from_kernel(delta_of(adapter), adapter.spec.axes)
        delta = np.asarray(rows, np.float64)
        if delta.shape[-2] > delta.shape[-1]:
            delta = delta.swapaxes(-2, -1)
        # Ten times as fast as an SVD; in float64 exact enough for a delta in float32.
        squares = np.linalg.eigvalsh(delta @ delta.swapaxes(-2, -1))
        values["/".join(path)] = np.sqrt(squares.clip(0)[..., ::-1])
    return values


def effective_rank(values: Float[np.ndarray, "*stack k"]) -> np.ndarray | np.floating:
    r"""The number of directions that a delta spreads over, as a real number.

    .. math:: \exp(-\sum_i p_i \log p_i), \qquad p_i = \sigma_i / \sum_j \sigma_j

    (Roy and Vetterli, "The effective rank", 2007.) It is k where k singular values are
    equal and the rest is zero, and 0 where all are zero. Of `values` of shape (..., k)
    the ranks have the shape (...).

    Raises:
      ValueError: `values` are a single number, or one is negative or not finite.
    """
    values = np.asarray(values, np.float64)
    if not values.ndim or not (np.isfinite(values) & (values >= 0)).all():
        rule = "values must be finite and not negative, of shape (..., k)"
        raise ValueError(f"{rule}, got {values!r}")
    total = values.sum(-1, keepdims=True)
    p = np.divide(values, total, out=np.zeros_like(values), where=total > 0)
    entropy = -np.sum(p * np.log(p, out=np.zeros_like(p), where=p > 0), -1)
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)[()]


def relative_norm(params: Any, adapters: Any) -> dict[str, float]:
    """The Frobenius norm of each delta over its kernel's; arguments as in `merge`.

    Returns:
      {path: norm(delta) / norm(kernel)}; infinity where a kernel is zero.

    Raises:
      TypeError, ValueError: As `merge`.
    """
    found, shares = checked_adapters(adapters).kernels, {}
    for path, (_, kernel) in found.in_base(params).items():
        arrays = (np.asarray(a, np.float64) for a in (delta_of(found[path]), kernel))
        change, whole = map(float, map(np.linalg.norm, arrays))
        shares["/".join(path)] = change / whole if whole else math.inf
    return shares
