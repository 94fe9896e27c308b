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

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Float

from mora_jax._common.axes import rows_from_kernel
from mora_jax._common.checks import check_concrete, check_finite
from mora_jax._common.types import Path
from mora_jax._layer.adapter import delta_of
from mora_jax._layer.rounding import Rounding, check_rounding, share_lost
from mora_jax._tree.merge import merged_kernel
from mora_jax._tree.paths import Found, checked_adapters, place_of

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
    found, loss = _concrete(adapters), {}
    for path, (_, kernel) in found.in_base(params).items():
        _check_kernel(path, kernel)
        merged = merged_kernel(found[path], kernel, dtype=dtype, rounding=rounding)
        check_finite(merged, f"the merged {'/'.join(path)}", f" in {merged.dtype}")
        delta = delta_of(found[path])
        change = merged.astype(delta.dtype) - kernel.astype(delta.dtype)
        loss["/".join(path)] = float(share_lost(change, delta))
    return loss


def _concrete(adapters: Any) -> Found:
    """The adapters of kernels, whose numbers are known."""
    found = checked_adapters(adapters).kernels
    for path, adapter in found.items():
        name = "/".join(place_of(path, adapter.spec))
        check_concrete(adapter.m, name, adapter.spec.shape)
    return found


def _check_kernel(path: Path, kernel: Any) -> None:
    """Raise unless the kernel at `path` holds finite numbers that are known."""
    name = f"{'/'.join(path)} in params"
    check_concrete(kernel, name, tuple(kernel.shape))
    check_finite(kernel, name)


def spectrum(adapters: Any) -> dict[str, np.ndarray]:
    """The singular values of the deltas of adapters, the largest first.

    Returns:
      {path: (*stack, min(in, out))}, in float64.

    Raises:
      TypeError, ValueError: They are not adapters, or an M is not finite.
    """
    values = {}
    for path, adapter in _concrete(adapters).items():
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
    if isinstance(values, Tracer):
        raise TypeError(f"values must be concrete, outside of jit, got {values}")
    try:
        found = np.asarray(values)
    except ValueError:  # lists of several lengths
        raise TypeError(f"values must be real numbers, got {values!r:.80}") from None
    kinds = np.floating, np.integer
    if not any(jnp.issubdtype(found.dtype, kind) for kind in kinds):
        raise TypeError(f"values must be real numbers, got {values!r:.80}")
    values = found.astype(np.float64)
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
    found, shares = _concrete(adapters), {}
    for path, (_, kernel) in found.in_base(params).items():
        _check_kernel(path, kernel)
        arrays = (np.asarray(a, np.float64) for a in (delta_of(found[path]), kernel))
        change, whole = map(float, map(np.linalg.norm, arrays))
        shares["/".join(path)] = change / whole if whole else math.inf
    return shares
