"""Base class of products: how a layer multiplies its input with its kernel."""

import abc
from typing import ClassVar

import jax
import jax.numpy as jnp

from mora_jax._common.types import ArrayLike, Shape
from mora_jax._trace_check import Claim
from mora_jax.operators._base import Operator


class KernelDelta(abc.ABC):
    r"""Delta that an adapter adds to a kernel, :math:`\alpha\, C M D`, as a linear map.

    A product asks it for what its layer would do if this were the kernel. The delta is
    not formed unless `kernel` is called.

    Attributes:
      operator: C and D.
      axes, kernel_shape: The kernel's axes, a letter each, and its shape.
    """

    operator: Operator
    axes: str
    kernel_shape: Shape

    @abc.abstractmethod
    def rows(self, x: jax.Array) -> jax.Array:
        """(*stack, *batch, in_features) -> (*stack, *batch, out_features)."""

    @abc.abstractmethod
    def transposed_rows(self, y: jax.Array) -> jax.Array:
        """(*stack, *batch, out_features) -> (*stack, *batch, in_features)."""

    @abc.abstractmethod
    def lookup(self, indices: jax.Array) -> jax.Array:
        """Integers (...) -> rows of the delta (..., out_features)."""

    @abc.abstractmethod
    def kernel(self) -> jax.Array:
        """The delta as an array of the kernel's shape."""

    @abc.abstractmethod
    def compress_kernel(self) -> jax.Array:
        """C as a kernel, with q outputs instead of the output features."""

    @abc.abstractmethod
    def decompress(self, h: jax.Array) -> jax.Array:
        r""":math:`\alpha\, D(h M)`: (..., q) -> (..., out_features)."""


Factors = tuple[jax.Array | None, jax.Array | None]
"""Factors of a product's input and output; None for no factor."""


class Product(abc.ABC):
    """Product of a layer's input with its kernel; linear in both.

    A product of your own needs `axes` and `delta`; all else has a default.

    Attributes:
      axes: The kernel's axes as letters s, i and o (see `MoRAConfig.overrides`).
      adapted_by_default: True if the default targets include such layers.
      label: A name of such layers for a plan's list of what it leaves out; "" if only
        the name of a kernel says why it is left out.
      takes_indices: True if the input is integers that number rows of the kernel.
    """

    axes: str
    adapted_by_default: bool = False
    label: ClassVar[str] = ""
    takes_indices: ClassVar[bool] = False

    @property
    def claim(self) -> Claim:
        """The product as a trace recognises it."""
        return Claim()

    def fits(self, axes: str) -> bool:
        """True if the layer can use a kernel that is planned with `axes`."""
        return axes == self.axes

    @abc.abstractmethod
    def delta(self, delta: KernelDelta, x: jax.Array) -> jax.Array:
        """The output of the layer for its input `x`, if the delta were its kernel."""

    def factors(self, scale: ArrayLike | float) -> Factors:
        """Factors of input and output that have the effect of scaling the kernel.

        Args:
          scale: The factor of the kernel, an array that broadcasts against it.

        Returns:
          Arrays that broadcast against the input and the output, or None for one.

        Raises:
          ValueError: No such factors exist, or the product does not know them.
        """
        raise ValueError(
            "scale= of register_layer must be of an einsum, or a number or one for "
            f"each feature of an embedding, got {type(self).__name__} scaled by shape "
            f"{jnp.shape(scale)}"
        )
