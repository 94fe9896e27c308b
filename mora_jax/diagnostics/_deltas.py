"""Sizes and ranks of deltas, and the share of them that a merge loses."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from mora_jax._common.checks import floating_dtype
from mora_jax._layer.equation import delta_kernel
from mora_jax._layer.rounding import Rounding, check_rounding, share_lost
from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree.merge import finite_items, merged_kernel, wide, with_kernels


def merge_loss(
    params: Any,
    adapters: Any,
    plan: Plan,
    dtype: DTypeLike | None = None,
    *,
    rounding: Rounding = "dither",
) -> dict[str, float]:
    """The share of each delta that rounding loses in the mean when it is merged.

    The numbers of a 16-bit kernel are a coarse grid, and small deltas fall between its
    points. What arrives of a delta is measured along the delta itself. Errors that
    cancel in sums over many inputs, as the errors of a dither do, do not count. The
    arguments are as in `merge`.

    Returns:
      {path: the absolute value of 1 - <merged - base, delta> / <delta, delta>}, 0 where
      the delta is zero.

    Raises:
      TypeError, ValueError: As `merge`.
    """
    check_rounding(rounding)
    dtype = None if dtype is None else floating_dtype(dtype, "dtype")
    loss = {}
    for spec, m, _, kernel in with_kernels(params, finite_items(adapters, plan)):
        merged = merged_kernel(spec, m, kernel, dtype=dtype, rounding=rounding)
        delta = delta_kernel(spec, wide(m))
        change = merged.astype(delta.dtype) - kernel.astype(delta.dtype)
        loss[spec.name] = float(share_lost(change, delta))
    return loss


def spectrum(adapters: Any, plan: Plan) -> dict[str, np.ndarray]:
    """The singular values of every delta, the largest first.

    Where the operator allows it, they are computed from matrices of q rows and not from
    the delta at full size.

    Args:
      adapters: The adapters, as `init` makes them.
      plan: The plan of the adapters.

    Returns:
      {path: (*stack, min(in, out))}, in float64.

    Raises:
      TypeError, ValueError: Adapters do not fit the plan, or an M holds NaN or
        infinity.
    """
    values = {}
    for spec, m in finite_items(adapters, plan):
        stack = np.asarray(m, np.float64).reshape(-1, *spec.operator.m_shape)
        spectra = [_spectrum(spec, m) for m in stack]
        values[spec.name] = np.reshape(spectra, (*spec.stack_shape, -1))
    return values


def _spectrum(spec: AdapterSpec, m: np.ndarray) -> np.ndarray:
    """The singular values of one M's delta: M -> (min(in, out),)."""
    op = spec.operator
    is_square = op.linear and op.m_shape == (op.square_rank, op.square_rank)
    if is_square and op.block and op.isometry:
        # The singular values of M, once for each block.
        values = np.repeat(np.linalg.svdvals(m), op.compressed_shape[0])
    elif is_square and not op.block:
        # The delta is C times the rows of M as D maps them, and C = Q R: rotations by
        # Q leave singular values as they are.
        triangle = np.linalg.qr(np.asarray(op.compress_matrix(), np.float64), "r")
        values = np.linalg.svdvals(triangle @ np.asarray(op.decompress(m), np.float64))
    else:
        # The smaller Gram matrix is ten times as fast as an SVD, and in float64 it is
        # exact enough for a delta in float32.
        delta = np.asarray(op.matrix(jnp.asarray(m)), np.float64)
        delta = delta.T if op.in_features > op.out_features else delta
        values = np.sqrt(np.linalg.eigvalsh(delta @ delta.T).clip(0)[::-1])
    missing = min(op.in_features, op.out_features) - len(values)
    return abs(spec.factor) * np.pad(values, (0, missing))


def effective_rank(
    values: Float[np.ndarray, "*stack k"],
) -> np.ndarray | np.floating:
    r"""The number of directions that a delta spreads over, as a real number.

    .. math:: \exp(-\sum_i p_i \log p_i), \qquad p_i = \sigma_i / \sum_j \sigma_j

    (Roy and Vetterli, "The effective rank", 2007.) It is k where k singular values are
    equal and the rest is zero, and 0 where all are zero.

    Args:
      values: Singular values, (..., k).

    Returns:
      The effective ranks, (...).

    Raises:
      TypeError: `values` are what `spectrum` returns, and not one of its values.
      ValueError: `values` are a single number, or one is negative or not finite.
    """
    if isinstance(values, Mapping):
        rule = "values must be an array of singular values, got a mapping"
        raise TypeError(f"{rule}: give one of the values that spectrum returns")
    values = np.asarray(values, np.float64)
    if not values.ndim:
        raise ValueError(f"values must have shape (..., k), got {values!r}")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError("values must be finite and not negative")
    total = values.sum(-1, keepdims=True)
    p = np.divide(values, total, out=np.zeros_like(values), where=total > 0)
    entropy = -np.sum(p * np.log(p, out=np.zeros_like(p), where=p > 0), -1)
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)[()]


def relative_norm(params: Any, adapters: Any, plan: Plan) -> dict[str, float]:
    """The Frobenius norm of each delta, relative to the norm of its kernel.

    The arguments are as in `merge`.

    Returns:
      {path: norm(delta) / norm(kernel)}; infinity where a kernel is zero.

    Raises:
      TypeError, ValueError: As `merge`.
    """
    norms, shares = spectrum(adapters, plan), {}
    for spec, _, _, kernel in with_kernels(params, finite_items(adapters, plan)):
        delta_norm = float(np.linalg.norm(norms[spec.name]))
        # In float32, since squares of a float16 kernel overflow.
        kernel_norm = float(jnp.linalg.norm(wide(kernel).ravel()))
        shares[spec.name] = delta_norm / kernel_norm if kernel_norm else math.inf
    return shares
