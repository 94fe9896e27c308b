"""Folded kernels of layers that read their kernel, and use it in unknown ways."""

import dataclasses
import functools
from typing import Any

import jax

from mora_jax._common.types import ArrayLike
from mora_jax._jax.qwix_guard import undisturbed
from mora_jax._layer.equation import Delta
from mora_jax._layer.rounding import add_rounded
from mora_jax._layer.slots import Selected
from mora_jax._layer.ways import sum_dtype
from mora_jax._mesh.placement import explicit_sharding, with_auto_axes
from mora_jax._plan.spec import AdapterSpec


def folded_kernel(
    spec: AdapterSpec, m: ArrayLike | Selected, kernel: jax.Array
) -> jax.Array:
    """Kernel with the delta added, as `merge` adds it, for M with its stack axes."""
    if isinstance(m, Selected):
        raise ValueError(
            "the layer reads its kernel with one delta for all rows "
            "(products.Folded); leave it out of the plan to serve one for each row"
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
    # Rounding has a derivative of zero nearly everywhere. Unlike in a dense layer the
    # sum is kept for the backward pass, and M's gradient is taken from its gradient:
    # nothing is known of what the layer computes with it.
    return add_rounded(kernel, delta, axes, kernel.dtype, "dither")


@_rounded_sum.defjvp
def _(axes: str, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    y = _rounded_sum(axes, *primals)
    kernel, delta = tangents
    return y, kernel + delta.astype(y.dtype)
