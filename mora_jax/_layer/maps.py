"""An adapted product as a linear map of its input, whichever way it is computed."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from mora_jax._common.types import Shape
from mora_jax._jax.linear_map import LinearMap, Static
from mora_jax._jax.vma import shape_for
from mora_jax._layer.delta import Delta
from mora_jax._layer.tuning import by_platform
from mora_jax.products import Product


@dataclasses.dataclass(frozen=True)
class DeltaOfTangent:
    """The derivative of an adapted product by M, of M's tangent.

    It is the delta of the tangent, computed from x, whichever way the product was.

    Attributes:
      product: What the layer computes.
      settings: Those of the delta.
      dtype: The dtype of the layer's output.
    """

    product: Product
    settings: tuple[Any, ...]
    dtype: Any

    def __call__(self, residuals: Any, x: jax.Array, tangent: jax.Array) -> jax.Array:
        operator = residuals[0]
        delta = Delta(operator, tangent.astype(self.dtype), *self.settings)
        return self.product.delta(delta, x.astype(self.dtype))


@dataclasses.dataclass(frozen=True)
class AdaptedMap(LinearMap):
    """x (W + alpha C M D) as a map of x. The residuals are (operator, alpha M, W).

    Attributes:
      multiply: The layer's own product of x and W, linear in both.
      by_m: The derivative by M.
      x_shape: The shape of x.
      x_dtype: The dtype of x.
    """

    multiply: Static
    by_m: DeltaOfTangent
    x_shape: Shape
    x_dtype: Any

    @classmethod
    def of(
        cls,
        delta: Delta,
        x: jax.Array,
        kernel: jax.Array,
        product: Product,
        multiply: Static,
    ) -> "AdaptedMap":
        """The map of a layer.

        Args:
          delta: What the adapter adds to the kernel, M in the dtype of its parameter.
          x: The layer's input.
          kernel: W, without the stack axes that a lifted transformation takes off.
          product: What `multiply` computes.
          multiply: The layer's own product of x and W, linear in both.
        """
        dtype = result_dtype(multiply, x, kernel)
        by_m = DeltaOfTangent(product, delta.settings, dtype)
        return cls(multiply, by_m, x.shape, x.dtype)

    @abc.abstractmethod
    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        """The layer's output."""

    def derivatives(self) -> Mapping[int, Callable[[Any, Any, Any], jax.Array]]:
        return {1: self.by_m}

    def transposed(
        self, function: Callable[[jax.Array], jax.Array], cotangent: jax.Array
    ) -> jax.Array:
        """The transpose of a linear function of x."""
        x = shape_for(self.x_shape, self.x_dtype, cotangent)
        (x,) = jax.linear_transpose(function, x)(cotangent)
        return x


@dataclasses.dataclass(frozen=True)
class ActivationMap(AdaptedMap):
    """x W + alpha D(C(x) M): the equation as it stands."""

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        kernel, m = residuals[2], residuals[1]
        return self.multiply(operand, kernel) + self.by_m(residuals, operand, m)

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        return self.transposed(functools.partial(self.forward, residuals), cotangent)


@dataclasses.dataclass(frozen=True)
class ByPlatform(LinearMap):
    """One of two maps with the same result, by the platform that runs the program.

    Attributes:
      wanted: Whether a platform with this tuning is to use the first.
      first: A map.
      second: The map of other platforms, with the same derivatives.
    """

    wanted: Static
    first: LinearMap
    second: LinearMap

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        first, second = self.first.forward, self.second.forward
        return by_platform(self.wanted, first, second, residuals, operand)

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        first, second = self.first.backward, self.second.backward
        return by_platform(self.wanted, first, second, residuals, cotangent)

    def derivatives(self) -> Mapping[int, Callable[[Any, Any, Any], jax.Array]]:
        return self.first.derivatives()


def result_dtype(multiply: Static, x: jax.Array, kernel: jax.Array) -> Any:
    """The dtype of `multiply(x, kernel)`."""
    return _result_dtype(multiply, x.shape, x.dtype, kernel.shape, kernel.dtype)


@functools.lru_cache(maxsize=1024)  # a model's layers ask the same again and again
def _result_dtype(
    multiply: Static, x_shape: Shape, x_dtype: Any, shape: Shape, dtype: Any
) -> Any:
    x = jax.ShapeDtypeStruct(x_shape, x_dtype)
    kernel = jax.ShapeDtypeStruct(shape, dtype)
    return jax.eval_shape(multiply, x, kernel).dtype
