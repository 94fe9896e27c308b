"""Calls of JAX's functions that multiply, and the products that they compute."""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax.products._product import Product
from mora_jax.products.contraction import Contraction, dot_general_equation
from mora_jax.products.convolution import Convolution

FUNCTIONS = {
    "dot_general": jax.lax.dot_general,
    "einsum": jnp.einsum,
    "conv_general_dilated": jax.lax.conv_general_dilated,
}
# Read at once: while a model runs, qwix replaces the code of these functions.
_SIGNATURES = {name: inspect.signature(f) for name, f in FUNCTIONS.items()}


@dataclasses.dataclass(frozen=True)
class Operation:
    """A call of a function of JAX that multiplies operands, one of `FUNCTIONS`."""

    name: str
    args: tuple[Any, ...]
    settings: dict[str, Any]

    def __call__(self) -> jax.Array:
        """The output of the function."""
        return FUNCTIONS[self.name](*self.args, **self.settings)

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """{name: argument} of all that were given."""
        bound = _SIGNATURES[self.name].bind(*self.args, **self.settings)
        return dict(bound.arguments)

    @property
    def operands(self) -> tuple[Any, ...]:
        """The arrays that are multiplied: two, or any number in an einsum."""
        if self.name == "einsum":
            return self.arguments["operands"]
        return self.arguments["lhs"], self.arguments["rhs"]

    def product(self, kernel_at: int) -> Product:
        """The product of two operands; the one at `kernel_at` is the kernel."""
        if self.name == "conv_general_dilated":
            return self._convolution(kernel_at)
        if self.name == "einsum":
            einsum = self.arguments["subscripts"].replace(" ", "")
        else:
            lhs, rhs = self.operands
            numbers = self.arguments["dimension_numbers"]
            einsum = dot_general_equation(lhs.ndim, rhs.ndim, numbers)
        # A product has the kernel last, whichever operand of the call it is.
        terms, arrow, outputs = einsum.partition("->")
        x, kernel = terms.split(",")[:: 1 if kernel_at else -1]
        ndim = self.operands[1 - kernel_at].ndim
        return Contraction.parse(f"{x},{kernel}{arrow}{outputs}", ndim)

    def _convolution(self, kernel_at: int) -> Convolution:
        lhs, rhs = self.operands
        settings = {k: v for k, v in self.arguments.items() if k not in ("lhs", "rhs")}
        numbers = settings.get("dimension_numbers")
        numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, numbers)
        settings["dimension_numbers"] = numbers
        # As Flax stores kernels, (*window, in, out), so that neither is transposed.
        last = rhs.ndim - 1
        if (kernel_at, numbers.rhs_spec[0], numbers.out_spec[1]) != (1, last, last):
            raise ValueError(
                "a convolution has an adapter if its output features are the last axis "
                f"of kernel and output, got {numbers}"
            )

        def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return jax.lax.conv_general_dilated(x, kernel.astype(x.dtype), **settings)

        groups = "feature_group_count", "batch_group_count"
        any_outputs = all(settings.get(name, 1) == 1 for name in groups)
        return Convolution("i" * last + "o", convolve, any_outputs)
