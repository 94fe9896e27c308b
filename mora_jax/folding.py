r"""A dense product with the update in the kernel: x (W + alpha C M D).

The kernel is folded anew in the backward pass, so that no folded kernel is kept, and
the gradient of M is taken from x and y: none of a kernel's shape is ever formed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._linear import LinearMap, with_derivatives
from mora_jax._types import ArrayLike, Shape
from mora_jax.layout import Layout, gather_m, on_kernel, on_rows
from mora_jax.operators import Operator
from mora_jax.products import KernelUpdate, Product
from mora_jax.spec import AdapterSpec

Multiply = Callable[[jax.Array, jax.Array], jax.Array]
"""(x, kernel) -> their product, linear in both; hashable."""


def folded_product(
    spec: AdapterSpec,
    m: ArrayLike,
    x: jax.Array,
    kernel: jax.Array,
    product: Product,
    multiply: Multiply,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """`multiply(x, kernel + update)`.

    Args:
      spec: the adapter.
      m: M, (q, q).
      x: the layer's input.
      kernel: W, without the stack axes that a lifted transformation takes off.
      product: what `multiply` computes.
      multiply: the layer's own product.
      precision: of products with M.

    Returns:
      The shape and dtype of the layer's output.

    Raises:
      ValueError: the layer multiplies by another shape than the plan's.
    """
    settings = Settings.of(spec, x, kernel, product, multiply, precision)
    maps = {1: UpdateByM(settings), 3: _ByX(settings)}
    folded = with_derivatives(_Folded(settings), maps)
    m = gather_m(jnp.asarray(m), spec.layout, x)
    return folded(spec.operator, m, kernel, x)


@functools.lru_cache(maxsize=1024)
def _result_dtype(
    multiply: Multiply, x_shape: Shape, x_dtype: Any, shape: Shape, dtype: Any
) -> Any:
    x = jax.ShapeDtypeStruct(x_shape, x_dtype)
    kernel = jax.ShapeDtypeStruct(shape, dtype)
    return jax.eval_shape(multiply, x, kernel).dtype


@dataclasses.dataclass(frozen=True)
class Settings:
    """All of an adapted product but its arrays.

    Without the operator, which may hold some: it is an argument.
    """

    multiply: Multiply
    product: Product
    shape: Shape
    axes: str
    alpha: float
    layout: Layout | None
    precision: jax.lax.PrecisionLike
    x_shape: Shape
    x_dtype: Any
    y_dtype: Any

    @classmethod
    def of(
        cls,
        spec: AdapterSpec,
        x: jax.Array,
        kernel: jax.Array,
        product: Product,
        multiply: Multiply,
        precision: jax.lax.PrecisionLike,
    ) -> "Settings":
        """What a call settles."""
        inner = slice(len(spec.axes) - len(product.axes), None)
        shape, axes = spec.kernel_shape[inner], spec.axes[inner]
        if kernel.shape != shape:
            raise ValueError(
                f"{spec.name}: the layer multiplies by a kernel of shape "
                f"{kernel.shape}, the plan's has {shape}; "
                "say execution='activation' in overrides for it"
            )
        return cls(
            multiply,
            product,
            shape,
            axes,
            spec.alpha,
            spec.layout,
            precision,
            x.shape,
            x.dtype,
            _result_dtype(multiply, x.shape, x.dtype, kernel.shape, kernel.dtype),
        )

    def update(self, operator: Operator, m: jax.Array) -> KernelUpdate:
        """The update as a map of rows."""
        operator = on_rows(operator, self.layout, self.axes, self.shape)
        return KernelUpdate(operator, m, self.shape, self.axes, self.precision)

    def fold(self, operator: Operator, m: jax.Array, kernel: jax.Array) -> jax.Array:
        """W + alpha C M D, summed in the wider dtype of M and W, rounded to W's."""
        dtype = jnp.result_type(m, kernel)
        operator = on_kernel(operator, self.layout, self.axes, self.shape)
        delta = KernelUpdate(operator, m.astype(dtype), self.shape, self.axes).kernel()
        delta = delta * jnp.asarray(self.alpha, dtype)
        return (kernel.astype(dtype) + delta).astype(kernel.dtype)


@dataclasses.dataclass(frozen=True)
class _Folded:
    """x (W + alpha C M D)."""

    settings: Settings

    def __call__(
        self, operator: Operator, m: jax.Array, kernel: jax.Array, x: jax.Array
    ) -> jax.Array:
        kernel = self.settings.fold(operator, _after(x, m), kernel)
        return self.settings.multiply(x, kernel)


@dataclasses.dataclass(frozen=True)
class _ByX(LinearMap):
    """x (W + alpha C M D) as a map of x, which folds again in its transpose."""

    settings: Settings

    def forward(self, residuals: Any, x: jax.Array) -> jax.Array:
        operator, m, kernel = residuals
        return self.settings.multiply(x, self.settings.fold(operator, m, kernel))

    def backward(self, residuals: Any, y: jax.Array) -> jax.Array:
        operator, m, kernel = residuals
        kernel = self.settings.fold(operator, _after(y, m), kernel)
        x = jax.ShapeDtypeStruct(self.settings.x_shape, self.settings.x_dtype)
        by_x = jax.linear_transpose(lambda x: self.settings.multiply(x, kernel), x)
        return by_x(y)[0]


@dataclasses.dataclass(frozen=True)
class UpdateByM:
    """The update as a map of M."""

    settings: Settings

    def __call__(self, residuals: Any, m: jax.Array) -> jax.Array:
        """The derivative of the product, of M's tangent."""
        (operator, _, x), one = residuals, self.settings
        dtype = one.y_dtype
        y = one.product.update(one.update(operator, m.astype(dtype)), x.astype(dtype))
        return y * jnp.asarray(one.alpha, dtype)


def _after(x: jax.Array, m: jax.Array) -> jax.Array:
    """`m`, but not to be used before `x` is known.

    Else XLA would fold all kernels of a model at its start, and hold them all.
    """
    if x.size == 0:
        return m
    # On CPUs XLA drops barriers before it orders the program.
    return jax.lax.platform_dependent(x, m, cpu=_add_zero, default=_barrier)


def _add_zero(x: jax.Array, m: jax.Array) -> jax.Array:
    bits = jnp.finfo(x.dtype).bits
    first = jax.lax.bitcast_convert_type(x[(0,) * x.ndim], f"uint{bits}")
    one = jnp.ones((), first.dtype)
    zero = (first >> (bits - 1) * one) >> one  # in two steps, or XLA sees that it is 0
    return m + zero.astype(m.dtype)


def _barrier(x: jax.Array, m: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier((x, m))[1]
