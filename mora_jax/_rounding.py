"""Sums of a kernel and its delta, rounded to the kernel's own dtype.

The numbers of a 16-bit kernel lie on a coarse grid. Where a delta is smaller than half
a step of it, rounding to nearest gives the kernel back and the delta is lost, in all
numbers at once. A dither rounds some of them away from zero, as many as the delta is a
share of the step. Each number then has an error of up to one step, but the errors
cancel in a sum over many inputs, which is what a layer computes.
"""

import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from mora_jax._axes import kernel_from_rows
from mora_jax._checks import check_choice
from mora_jax._types import ArrayLike, Shape

Rounding = Literal["dither", "nearest"]


def check_rounding(rounding: object) -> None:
    """Raise unless `rounding` names a way to round."""
    check_choice("rounding", rounding, get_args(Rounding))


def add_rounded(
    kernel: ArrayLike, delta: ArrayLike, axes: str, dtype: jnp.dtype, rounding: Rounding
) -> jax.Array:
    """`kernel + delta` in `dtype`, computed in the dtype of `delta`.

    A number whose kernel is not on the grid of `dtype` is rounded to nearest in either
    way: what the kernel has beyond the grid is a dither already. Where the delta is
    zero, a kernel on the grid stays as it is.

    Args:
      kernel: The kernel, of any floating-point dtype.
      delta: The delta, with the kernel's shape, in float32 or float64.
      axes: The kernel's axes, a letter each.
      dtype: The dtype of the result.
      rounding: "dither" or "nearest"; they differ for dtypes of less than 32 bits.
    """
    kernel = jnp.asarray(kernel)
    total = kernel.astype(delta.dtype) + delta
    if rounding == "nearest" or jnp.finfo(dtype).bits >= 32:
        return total.astype(dtype)
    on_grid = kernel.astype(dtype).astype(delta.dtype) == kernel.astype(delta.dtype)
    return _dithered(total, on_grid, axes, dtype)


def share_lost(change: ArrayLike, delta: ArrayLike) -> float:
    """The share of a delta that is missing from the change of a kernel, along it.

    Args:
      change: The merged kernel minus the base's.
      delta: The delta, of the same shape.
    """
    # Exact products: accelerators would round what they multiply to 16 bits.
    dot = functools.partial(jnp.vdot, precision=jax.lax.Precision.HIGHEST)
    size = dot(delta, delta)
    return float(abs(1 - dot(change, delta) / size)) if size else 0.0


@functools.partial(jax.jit, static_argnames=("axes", "dtype"))
def _dithered(
    total: jax.Array, where: jax.Array, axes: str, dtype: jnp.dtype
) -> jax.Array:
    """`total` rounded with a dither `where` that is True, and to nearest elsewhere."""
    grid, nearest = jnp.finfo(dtype), total.astype(dtype)
    # frexp gives mantissas from 1/2 on. XLA takes numbers below 2**-126 for zero.
    exponent = jnp.maximum(jnp.frexp(total)[1] - 1, grid.minexp) - grid.nmant
    step = jnp.ldexp(jnp.ones_like(total), jnp.maximum(exponent, -126))
    steps = jnp.floor(jnp.abs(total) / step + _thresholds(total.shape, axes))
    largest = float(grid.max)
    dithered = jnp.clip(jnp.copysign(steps * step, total), -largest, largest)
    where &= jnp.isfinite(nearest) & (nearest.astype(total.dtype) != total)
    return jnp.where(where, dithered.astype(dtype), nearest)


def _thresholds(shape: Shape, axes: str) -> jax.Array:
    """Random numbers from [0, 1), the same in each run, of the shape of a kernel.

    They belong to an input and an output feature. So a merge gives the same numbers if
    a kernel is stored transposed, or as one index of a stack.
    """
    pairs = list(zip(shape, axes, strict=True))
    ins, outs = (math.prod(n for n, kind in pairs if kind == k) for k in "io")
    stack = [n for n, kind in pairs if kind == "s"]
    key = jax.random.key(0, impl="threefry2x32")
    numbers = jax.random.uniform(key, (ins, outs), jnp.float32)
    return kernel_from_rows(jnp.broadcast_to(numbers, (*stack, ins, outs)), shape, axes)
