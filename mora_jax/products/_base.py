"""What a product is: how a layer multiplies its input with its kernel."""

import abc
from typing import ClassVar, Protocol, runtime_checkable

import jax

from mora_jax._common.types import Shape
from mora_jax.operators import Operator


@runtime_checkable
class Delta(Protocol):
    r"""What an adapter adds to a kernel, :math:`\alpha\, C M D`, as a linear map.

    A product asks it for what its layer would do if this were the kernel. The delta is
    not formed unless `kernel` is called.

    Attributes:
      operator: C and D.
      axes: The kernel's axes, a letter each (see `MoRAConfig.overrides`).
      kernel_shape: The kernel's shape.
    """

    @property
    def operator(self) -> Operator: ...
    @property
    def axes(self) -> str: ...
    @property
    def kernel_shape(self) -> Shape: ...

    def rows(self, x: jax.Array) -> jax.Array:
        """(*stack, *batch, in_features) -> (*stack, *batch, out_features)."""
        ...

    def transposed_rows(self, y: jax.Array) -> jax.Array:
        """(*stack, *batch, out_features) -> (*stack, *batch, in_features)."""
        ...

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Integers (...) -> rows of the delta (..., out_features)."""
        ...

    def kernel(self) -> jax.Array:
        """The delta as an array of the kernel's shape."""
        ...

    def compress_kernel(self) -> jax.Array:
        """C as a kernel, with K q in place of the output features."""
        ...

    def decompress(self, h: jax.Array) -> jax.Array:
        r""":math:`\alpha\, D(h M)`: (..., K q) -> (..., out_features)."""
        ...


class Product(abc.ABC):
    """How a layer multiplies its input with its kernel; linear in both.

    Attributes:
      primitive: The primitive of JAX that multiplies, by which a trace recognises the
        product; "" for any.
      passes: The primitives that the kernel or the product may pass besides. They are
        as linear as the product itself, and `delta` must pass them as well.
    """

    primitive: ClassVar[str] = ""

    @property
    def passes(self) -> frozenset[str]:
        return frozenset()

    @property
    @abc.abstractmethod
    def axes(self) -> str:
        """The kernel's axes as letters s, i and o (see `MoRAConfig.overrides`)."""

    @property
    @abc.abstractmethod
    def adapted_by_default(self) -> bool:
        """Whether such layers are adapted if a config names no targets."""

    @abc.abstractmethod
    def fits(self, axes: str) -> bool:
        """Whether the layer can use a kernel that is planned with `axes`."""

    @abc.abstractmethod
    def delta(self, delta: Delta, x: jax.Array) -> jax.Array:
        """The output of the layer if the delta were its kernel.

        Args:
          delta: What the adapter adds to the kernel.
          x: The layer's input.

        Returns:
          An array of the layer's output shape.
        """
