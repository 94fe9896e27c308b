"""Sums of a kernel and its delta, rounded to the kernel's own dtype.

The numbers of a 16-bit kernel lie on a coarse grid. Where a delta is smaller than half
a step of it, rounding to nearest gives the kernel back and the delta is lost, in all
numbers at once. A dither rounds some of them away from zero, as many as the delta is a
share of the step. Each number then has an error of up to one step, but the errors
cancel in a sum over many inputs, which is what a layer computes.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mora_jax._common.axes import features, kernel_from_rows, sizes
from mora_jax._common.checks import check_choice
from mora_jax._common.types import ArrayLike, Shape

Rounding = Literal["dither", "nearest"]
Start = tuple[ArrayLike | int, ArrayLike | int]
"""The first input and the first output feature of a part of a kernel."""


def check_rounding(rounding: object) -> None:
    """Raise unless `rounding` names a way to round."""
    check_choice("rounding", rounding, get_args(Rounding))


def add_rounded(
    kernel: ArrayLike,
    delta: ArrayLike,
    axes: str,
    dtype: jnp.dtype,
    rounding: Rounding,
    start: Start = (0, 0),
) -> Array:
    """`kernel + delta` in `dtype`, computed in the delta's, float32 or float64."""
    kernel = jnp.asarray(kernel)
    total = kernel.astype(delta.dtype) + delta
    if rounding == "nearest" or jnp.finfo(dtype).bits >= 32:
        return total.astype(dtype)
    # A number whose kernel is not on the grid of `dtype` is rounded to nearest in both
    # ways: what the kernel has beyond the grid is a dither already. Where the delta is
    # zero, a kernel on the grid stays as it is.
    on_grid = kernel.astype(dtype).astype(delta.dtype) == kernel.astype(delta.dtype)
    return _dithered(total, on_grid, start, axes, dtype)


@functools.partial(jax.jit, static_argnames=("axes", "dtype"))
def _dithered(
    total: Array, where: Array, start: Start, axes: str, dtype: jnp.dtype
) -> Array:
    """`total` rounded with a dither `where` that is True, and to nearest elsewhere."""
    numbers = _random_numbers(total.shape, start, axes)
    if (total.dtype, dtype) == (jnp.float32, jnp.bfloat16):
        # bfloat16 is the first half of float32: a carry from the second half rounds.
        bits = jax.lax.bitcast_convert_type(total, jnp.uint32)
        bits = (bits + (numbers >> np.uint32(16))) & np.uint32(0xFFFF0000)
        dithered = jax.lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)
    else:
        grid = jnp.finfo(dtype)
        # frexp gives mantissas from 1/2 on. XLA takes numbers below 2**-126 for zero.
        exponent = jnp.maximum(jnp.frexp(total)[1] - 1, grid.minexp) - grid.nmant
        step = jnp.ldexp(jnp.ones_like(total), jnp.maximum(exponent, -126))
        steps = jnp.floor(jnp.abs(total) / step + _shares(numbers))
        dithered = jnp.copysign(steps * step, total).astype(dtype)
    nearest = total.astype(dtype)
    where &= jnp.isfinite(nearest) & jnp.isfinite(dithered)
    where &= nearest.astype(total.dtype) != total
    return jnp.where(where, dithered, nearest)


@functools.partial(jax.jit, static_argnames="axes")
def dithered_steps(steps: Array, start: Start, axes: str) -> Array:
    """Integers, which are numbers of steps in the mean."""
    return jnp.floor(steps + _shares(_random_numbers(steps.shape, start, axes)))


def _shares(numbers: Array) -> Array:
    """Random bits as numbers in [0, 1)."""
    return (numbers >> np.uint32(8)).astype(jnp.float32) * np.float32(2**-24)


def _random_numbers(shape: Shape, start: Start, axes: str) -> Array:
    """Random 32 bits for each number of a kernel, the same in each run."""
    # They are a hash of an input and an output feature. So a merge gives the same
    # numbers if a kernel is stored transposed, or as one index of a stack; a fold in
    # training gives the numbers of the merge; and nothing is stored. A step folds each
    # kernel twice, so the hash is short: a sum of two products, its bits mixed twice.
    ins, outs = features(shape, axes)
    iota = functools.partial(jax.lax.broadcasted_iota, jnp.uint32, (ins, outs))
    first_in, first_out = (jnp.asarray(k).astype(jnp.uint32) for k in start)
    rows, columns = first_in + iota(0), first_out + iota(1)
    bits = rows * np.uint32(0x9E3779B1) + columns * np.uint32(0x85EBCA77)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    bits ^= bits >> np.uint32(16)
    rows_shape = (*sizes(shape, axes, "s"), ins, outs)
    return kernel_from_rows(jnp.broadcast_to(bits, rows_shape), shape, axes)


# Compiled, so that no array of the kernel's size is made on the way.
@jax.jit
def share_lost(change: ArrayLike, delta: ArrayLike) -> Array:
    """The share of a delta that a change, merged - base, lacks along it; 0 of zeros."""
    # Divided first, since the squares of small numbers are zero in float32.
    size = jnp.linalg.norm(jnp.ravel(delta))
    above_zero = jnp.where(size > 0, size, 1)
    # Exact products: accelerators would round what they multiply to 16 bits.
    scaled, exact = delta / above_zero, jax.lax.Precision.HIGHEST
    return jnp.abs(size - jnp.vdot(change, scaled, precision=exact)) / above_zero
