"""Convolutions."""

import dataclasses
from collections.abc import Callable

import jax

from mora_jax.products._base import Delta, Product

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
    def adapted_by_default(self) -> bool:
        return False

    @property
    def passes(self) -> frozenset[str]:
        # How paddings are made of the kernel and the output; `convolve` does the same.
        steps = {"concatenate", "pad", "reduce_sum", "rev", "slice"}
        return frozenset(steps | {"mul"} if self.masked else steps)

    def fits(self, axes: str) -> bool:
        return axes == self.axes

    def delta(self, delta: Delta, x: jax.Array) -> jax.Array:
        if delta.operator.block or not self.any_outputs:
            return self.convolve(x, delta.kernel())
        return delta.decompress(self.convolve(x, delta.compress_kernel()))
