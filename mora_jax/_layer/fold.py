"""Folded kernels: W + alpha C M D, rounded to the dtype of W."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._common.types import ArrayLike
from mora_jax._jax.qwix_guard import undisturbed
from mora_jax._jax.tuning import current_tuning
from mora_jax._layer.equation import Delta
from mora_jax._layer.rounding import add_rounded
from mora_jax._layer.slots import Selected
from mora_jax._mesh.placement import explicit_sharding, with_auto_axes
from mora_jax._plan.spec import AdapterSpec


def sum_dtype(m: ArrayLike, kernel: ArrayLike) -> Any:
    """The dtype of the sum of a kernel and its delta: float32, or a wider one."""
    return jnp.promote_types(jnp.result_type(m, kernel), jnp.float32)


def folded_kernel(
    spec: AdapterSpec, m: ArrayLike | Selected, kernel: jax.Array
) -> jax.Array:
    """Kernel with the delta added, for layers that use their kernel in unknown ways.

    The sum is the one that `merge` makes. It is kept for the backward pass, and M's
    gradient is taken from the gradient of the sum.

    Args:
      spec: The adapter.
      m: M, (*stack, *m_shape).
      kernel: W, with the stack axes of M.

    Raises:
      ValueError: Each row of a batch has an M of its own.
    """
    if isinstance(m, Selected):
        raise ValueError(
            f"{spec.name}: the layer reads its kernel with the delta in it "
            "(products.Folded), so that all rows of a batch share one adapter; leave "
            "it out of the plan to serve a different adapter for each row"
        )
    if (sharding := explicit_sharding(kernel)) is not None:
        spec = dataclasses.replace(spec, layout=None)
        return with_auto_axes(functools.partial(_fold, spec), sharding, m, kernel)
    return _fold(spec, m, kernel)


def _fold(spec: AdapterSpec, m: ArrayLike, kernel: jax.Array) -> jax.Array:
    dtype = sum_dtype(m, kernel)
    delta = Delta.of(spec, m, dtype=dtype, ndim=kernel.ndim, x=kernel)
    return _rounded_sum(delta.axes, kernel, undisturbed(delta.kernel)())


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rounded_sum(axes: str, kernel: jax.Array, delta: jax.Array) -> jax.Array:
    """The rounded sum, with the derivatives of the sum itself."""
    return add_rounded(kernel, delta, axes, kernel.dtype, "dither")


@_rounded_sum.defjvp
def _(axes: str, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    y = _rounded_sum(axes, *primals)
    kernel, delta = tangents
    return y, kernel + delta.astype(y.dtype)


def schedule_after(x: jax.Array, m: jax.Array) -> jax.Array:
    """`m` with a dependency on `x`.

    Without it nothing that a fold needs depends on the layers before it, so XLA would
    fold every kernel of a model at its start and keep them all in memory.
    """
    if x.size == 0:
        return m
    # An optimization barrier says just this, but XLA's CPU compiler drops barriers
    # before it decides the order of the program.
    return barrier(x, m) if current_tuning().chip else _add_zero(x, m)


def _add_zero(x: jax.Array, m: jax.Array) -> jax.Array:
    """`m` plus a zero that is computed from `x`.

    The zero is the sign bit of a number of x, shifted down to the last place, and then
    out: 0 or 1, and so 0. A product with 0 would be NaN where x is infinite. One shift
    by all bits, or a subtraction of a number from itself, XLA simplifies to the
    constant 0, and the dependency is gone; two shifts it leaves alone.
    """
    bits = jnp.finfo(x.dtype).bits
    first = jax.lax.bitcast_convert_type(x[(0,) * x.ndim], f"uint{bits}")
    one = jnp.ones((), first.dtype)
    zero = (first >> (bits - 1) * one) >> one
    return m + zero.astype(m.dtype)


def barrier(x: jax.Array, m: jax.Array) -> jax.Array:
    """`m`, which is computed unchanged and after `x`."""
    return jax.lax.optimization_barrier((x, m))[1]
