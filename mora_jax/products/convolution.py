"""Convolutions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax.products._base import KernelUpdate, Product

Convolve = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Convolution(Product):
    r"""A convolution: a dense layer on each window of the input.

    The kernel is (*window, in, out); a window's numbers are the input features. So
    :math:`x * (C M D) = D((x * C) M)`, and where C gives one vector of q numbers, the
    layer convolves with C, of q outputs; else, with the update itself.

    Attributes:
      kernel_axes: the kernel's axes as letters, such as "iiio".
      convolve: (x, kernel) to the layer's output without bias.
      any_outputs: whether `convolve` takes kernels of other output features than the
        layer's: not with groups of features or a mask.
    """

    kernel_axes: str
    convolve: Convolve
    any_outputs: bool = True

    @property
    def axes(self) -> str:
        return self.kernel_axes

    @property
    def dense(self) -> bool:
        return False

    def fits(self, axes: str) -> bool:
        return axes == self.axes

    def update(self, kernel: KernelUpdate, x: jax.Array) -> jax.Array:
        if kernel.operator.block or not self.any_outputs:
            return self.convolve(x, kernel.kernel())
        return kernel.decompress(self.convolve(x, kernel.compress_kernel()))

    @classmethod
    def of(cls, layer: Any, *_: Any) -> "Convolution":
        """The product of Flax's `Conv`, Linen's or NNX's."""

        def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return _convolve(layer, x, kernel)

        plain = layer.feature_group_count == 1 and layer.mask is None
        return cls("i" * _spatial(layer) + "io", convolve, plain)

    @classmethod
    def transposed(cls, layer: Any, *_: Any) -> "Convolution":
        """The product of Flax's `ConvTranspose`, Linen's or NNX's."""
        if layer.padding == "CIRCULAR":
            raise ValueError("a ConvTranspose with CIRCULAR padding cannot be adapted")

        def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return _convolve_transposed(layer, x, kernel)

        features = "oi" if layer.transpose_kernel else "io"
        return cls("i" * _spatial(layer) + features, convolve, layer.mask is None)


def _spatial(layer: Any) -> int:
    size = layer.kernel_size
    return 1 if isinstance(size, int) else len(size)


def _convolve(layer: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    spatial = _spatial(layer)
    dilation = _each(layer.kernel_dilation, spatial)
    x, batch = _flat_batch(x, spatial)
    padding = layer.padding
    width = [(n - 1) * d for n, d in zip(kernel.shape, dilation, strict=False)]
    if padding in ("CIRCULAR", "REFLECT"):
        pads = [(0, 0), *((w // 2, (w + 1) // 2) for w in width), (0, 0)]
        x = jnp.pad(x, pads, "wrap" if padding == "CIRCULAR" else "reflect")
        padding = "VALID"
    elif padding == "CAUSAL":
        padding = [(w, 0) for w in width]
    y = jax.lax.conv_general_dilated(
        x,
        _masked(kernel, layer.mask),
        _each(layer.strides, spatial),
        _pairs(padding, spatial),
        lhs_dilation=_each(layer.input_dilation, spatial),
        rhs_dilation=dilation,
        dimension_numbers=_channels_last(spatial),
        feature_group_count=layer.feature_group_count,
        precision=layer.precision,
    )
    return y.reshape(batch + y.shape[1:])


def _convolve_transposed(layer: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    spatial = _spatial(layer)
    x, batch = _flat_batch(x, spatial)
    y = jax.lax.conv_transpose(
        x,
        _masked(kernel, layer.mask),
        _each(layer.strides, spatial),
        _pairs(layer.padding, spatial),
        rhs_dilation=_each(layer.kernel_dilation, spatial),
        dimension_numbers=_channels_last(spatial),
        transpose_kernel=layer.transpose_kernel,
        precision=layer.precision,
    )
    return y.reshape(batch + y.shape[1:])


def _masked(kernel: jax.Array, mask: Any) -> jax.Array:
    return kernel if mask is None else kernel * jnp.asarray(mask, kernel.dtype)


def _each(value: Any, spatial: int) -> tuple[int, ...]:
    """A setting for every spatial axis; Flax takes one number for all, or None."""
    value = 1 if value is None else value
    return (value,) * spatial if isinstance(value, int) else tuple(value)


def _pairs(padding: Any, spatial: int) -> Any:
    """Padding as `jax.lax` wants it; Flax also takes a number for all or for each."""
    if isinstance(padding, str):
        return padding
    sides = (padding,) * spatial if isinstance(padding, int) else padding
    return [(side, side) if isinstance(side, int) else tuple(side) for side in sides]


def _flat_batch(x: jax.Array, spatial: int) -> tuple[jax.Array, tuple[int, ...]]:
    """All batch axes as one, and what they were."""
    batch = x.shape[: x.ndim - spatial - 1]
    return x.reshape(-1, *x.shape[len(batch) :]), batch


def _channels_last(spatial: int) -> jax.lax.ConvDimensionNumbers:
    axes = tuple(range(1, spatial + 1))
    window = tuple(range(spatial))
    return jax.lax.ConvDimensionNumbers(
        lhs_spec=(0, spatial + 1, *axes),
        rhs_spec=(spatial + 1, spatial, *window),
        out_spec=(0, spatial + 1, *axes),
    )
