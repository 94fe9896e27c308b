r"""A dense product with the delta in the kernel: x (W + alpha C M D).

The kernel is folded again in the backward pass, so that no folded kernel is kept. The
gradient of M is taken from x and y, so that no gradient of a kernel's shape is formed.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._compute.delta import Delta
from mora_jax._linear_map import LinearMap, Static
from mora_jax._types import Shape
from mora_jax.products import Product


def folded_product(
    delta: Delta, x: jax.Array, kernel: jax.Array, product: Product, multiply: Static
) -> jax.Array:
    """`multiply(x, kernel + delta)`.

    Args:
      delta: What the adapter adds to the kernel, M in the dtype of its parameter.
      x: The layer's input.
      kernel: W, without the stack axes that a lifted transformation takes off.
      product: What `multiply` computes.
      multiply: The layer's own product of x and W, linear in both.

    Returns:
      An array of the shape and dtype of the layer's output.
    """
    folded = _Folded(
        multiply,
        DeltaOfTangent(product, delta.settings, result_dtype(multiply, x, kernel)),
        x.shape,
        x.dtype,
    )
    return folded((delta.operator, delta.m, kernel), x)


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
class _Folded(LinearMap):
    """x (W + alpha C M D) as a map of x. The residuals are (operator, alpha M, W)."""

    multiply: Static
    by_m: DeltaOfTangent
    x_shape: Shape
    x_dtype: Any

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        return self.multiply(operand, self._fold(residuals, operand))

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        kernel = self._fold(residuals, cotangent)
        x = jax.ShapeDtypeStruct(self.x_shape, self.x_dtype)
        (x,) = jax.linear_transpose(lambda x: self.multiply(x, kernel), x)(cotangent)
        return x

    def derivatives(self) -> Mapping[int, Callable[[Any, Any, Any], jax.Array]]:
        return {1: self.by_m}

    def _fold(self, residuals: Any, after: jax.Array) -> jax.Array:
        """W + alpha C M D, summed in the wider dtype of M and W, rounded to W's."""
        operator, m, kernel = residuals
        dtype = jnp.result_type(m, kernel)
        m = _schedule_after(after, m).astype(dtype)
        delta = Delta(operator, m, *self.by_m.settings).kernel()
        return (kernel.astype(dtype) + delta).astype(kernel.dtype)


def _schedule_after(x: jax.Array, m: jax.Array) -> jax.Array:
    """`m` with a dependency on `x`.

    Without it nothing that a fold needs depends on the layers before it, so XLA would
    fold every kernel of a model at its start and keep them all in memory.
    """
    if x.size == 0:
        return m
    # An optimization barrier says just this, but XLA's CPU compiler drops barriers
    # before it decides the order of the program.
    return jax.lax.platform_dependent(x, m, cpu=_add_zero, default=_barrier)


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


def _barrier(x: jax.Array, m: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier((x, m))[1]


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
