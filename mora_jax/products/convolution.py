"""Convolutions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

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
      masked: whether `convolve` multiplies the kernel by a mask.
    """

    kernel_axes: str
    convolve: Convolve
    any_outputs: bool = True
    masked: bool = False

    primitive = "conv_general_dilated"

    @property
    def axes(self) -> str:
        return self.kernel_axes

    @property
    def dense(self) -> bool:
        return False

    @property
    def passes(self) -> frozenset[str]:
        # How paddings are made of the kernel and the output; `convolve` does the same.
        steps = {"concatenate", "pad", "reduce_sum", "rev", "slice"}
        return frozenset(steps | {"mul"} if self.masked else steps)

    def fits(self, axes: str) -> bool:
        return axes == self.axes

    def update(self, kernel: KernelUpdate, x: jax.Array) -> jax.Array:
        if kernel.operator.block or not self.any_outputs:
            return self.convolve(x, kernel.kernel())
        return kernel.decompress(self.convolve(x, kernel.compress_kernel()))

    @classmethod
    def of(cls, layer: Any, *_: Any, **__: Any) -> "Convolution":
        """The product of Flax's `Conv`, Linen's or NNX's."""
        plain = layer.feature_group_count == 1 and layer.mask is None
        settings = "input_dilation", "feature_group_count"
        return cls._of(layer, nn.Conv, settings, "io", plain)

    @classmethod
    def transposed(cls, layer: Any, *_: Any, **__: Any) -> "Convolution":
        """The product of Flax's `ConvTranspose`, Linen's or NNX's."""
        features = "oi" if layer.transpose_kernel else "io"
        settings = ("transpose_kernel",)
        return cls._of(layer, nn.ConvTranspose, settings, features, layer.mask is None)

    @classmethod
    def _of(
        cls,
        layer: Any,
        kind: Any,
        fields: tuple[str, ...],
        features: str,
        any_outputs: bool,
    ) -> "Convolution":
        size = layer.kernel_size
        window = (size,) if isinstance(size, int) else tuple(size)
        shared = "strides", "padding", "kernel_dilation", "mask", "precision"
        copied = {name: getattr(layer, name) for name in (*shared, *fields)}

        def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
            outputs = kernel.shape[len(window) + features.index("o")]
            # A module of its own, not a part of the one that is running.
            settings = {**copied, "use_bias": False, "dtype": kernel.dtype}
            own = kind(outputs, window, parent=None, **settings)
            return own.apply({"params": {"kernel": kernel}}, x)

        masked = layer.mask is not None
        return cls("i" * len(window) + features, convolve, any_outputs, masked)
