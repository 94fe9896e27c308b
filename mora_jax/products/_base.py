"""What a product is: how a layer multiplies its input with its kernel."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax

from mora_jax._interception import matmul
from mora_jax._types import Shape
from mora_jax.axes import kernel_from_rows
from mora_jax.operators import Operator


@dataclasses.dataclass(frozen=True)
class KernelUpdate:
    r"""A kernel's update :math:`C M D` as the linear map that it is; alpha is not in.

    Attributes:
      operator: C and D.
      m: M, (*stack, q, q).
      shape: of the kernel.
      axes: of the kernel, a letter each (see `mora_jax.axes`).
      precision: of the products with M.
    """

    operator: Operator
    m: jax.Array
    shape: Shape
    axes: str
    precision: jax.lax.PrecisionLike = None

    def rows(self, x: jax.Array) -> jax.Array:
        """(*stack, *batch, in_features) -> (*stack, *batch, out_features)."""
        return self._stacked(self.operator.apply, precision=self.precision)(self.m, x)

    def transposed_rows(self, y: jax.Array) -> jax.Array:
        """(*stack, *batch, out_features) -> (*stack, *batch, in_features)."""
        transpose = self.operator.apply_transpose
        return self._stacked(transpose, precision=self.precision)(self.m, y)

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Integers (...) -> the update's rows (..., out_features)."""
        return self.operator.lookup(self.m, indices, precision=self.precision)

    def kernel(self) -> jax.Array:
        """The update as an array of the kernel's shape."""
        weight = self._stacked(self.operator.delta_weight)(self.m)
        return kernel_from_rows(weight, self.shape, self.axes)

    def compress_kernel(self) -> jax.Array:
        """C as a kernel: of its shape, but for q in place of the output features."""
        q = self.operator.square_rank
        shape = tuple(
            q if a == "o" else n for a, n in zip(self.axes, self.shape, strict=True)
        )
        matrix = self.operator.compress_matrix(self.m.dtype)
        return kernel_from_rows(matrix, shape, self.axes)

    def decompress(self, h: jax.Array) -> jax.Array:
        """D(h M): (..., q) -> (..., out_features)."""
        h = matmul(h, self.m, self.precision)
        return self.operator.decompress(h)

    def _stacked(self, function: Callable[..., Any], **settings: Any) -> Any:
        def one(*args: jax.Array) -> Any:
            return function(*args, **settings)

        for _ in range(self.axes.count("s")):
            one = jax.vmap(one)
        return one


class Product(abc.ABC):
    """How a layer multiplies its input with its kernel; linear in both.

    Attributes:
      primitive: the primitive of JAX that multiplies, by which a trace recognises the
        product; "" for any.
      passes: other primitives that kernel or product may pass, as linear as the product
        itself, where `update` passes the same.
    """

    primitive: ClassVar[str] = ""

    @property
    def passes(self) -> frozenset[str]:
        return frozenset()

    @property
    @abc.abstractmethod
    def axes(self) -> str:
        """The kernel's axes as letters s, i and o (see `mora_jax.axes.check_axes`)."""

    @property
    @abc.abstractmethod
    def dense(self) -> bool:
        """Whether such layers are adapted by default."""

    @abc.abstractmethod
    def fits(self, axes: str) -> bool:
        """Whether a kernel that is planned with `axes` can be used so."""

    @abc.abstractmethod
    def update(self, kernel: KernelUpdate, x: jax.Array) -> jax.Array:
        """What the layer would give with the update for its kernel.

        Args:
          kernel: the update.
          x: the layer's input.

        Returns:
          An array of the layer's output shape.
        """
