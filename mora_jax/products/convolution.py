"""Convolutions."""

import dataclasses
from collections.abc import Callable

import jax

from mora_jax._trace_check import Claim
from mora_jax.products._product import KernelDelta, Product


@dataclasses.dataclass(frozen=True)
class Convolution(Product):
    r"""A convolution: a dense layer on each window of the input.

    The kernel is (*window, in, out), and the numbers in a window are the input
    features. So :math:`x * (C M D) = D((x * C) M)`. If C(x) is a single vector of q
    numbers, the input is convolved with C, a kernel of q outputs; otherwise with the
    delta itself.

    Attributes:
      axes: The kernel's axes as letters, such as "iiio".
      convolve: A function of (x, kernel) that returns the layer's output without bias.
      any_outputs: True if `convolve` takes any number of outputs: no groups, no mask.
      masked: True if `convolve` multiplies the kernel by a mask.
    """

    axes: str
    convolve: Callable[[jax.Array, jax.Array], jax.Array]
    any_outputs: bool = True
    masked: bool = False

    label = "a convolution"

    @property
    def claim(self) -> Claim:
        # Some paddings change the kernel or the output by these; so does `convolve`.
        steps = {"concatenate", "pad", "reduce_sum", "rev", "slice"}
        passes = frozenset(steps | {"mul"} if self.masked else steps)
        return Claim(primitive="conv_general_dilated", passes=passes)

    def delta(self, delta: KernelDelta, x: jax.Array) -> jax.Array:
        # With several blocks C(x) is not one vector of q numbers.
        if delta.operator.block or not self.any_outputs:
            return self.convolve(x, delta.kernel())
        return delta.decompress(self.convolve(x, delta.compress_kernel()))
