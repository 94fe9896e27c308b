"""Products that functions of JAX compute, by the arguments of a call."""

import inspect
import string
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mora_jax.products._base import Product
from mora_jax.products.contraction import Contraction
from mora_jax.products.convolution import Convolution


def of_dot_general(
    kernel_first: bool, lhs: Any, rhs: Any, *, dimension_numbers: Any, **_: Any
) -> Contraction:
    """The einsum of a `dot_general`."""
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = dimension_numbers
    left = list(string.ascii_letters[: lhs.ndim])
    right = list(string.ascii_letters[lhs.ndim : lhs.ndim + rhs.ndim])
    for here, there in zip((*lhs_sum, *lhs_batch), (*rhs_sum, *rhs_batch), strict=True):
        right[there] = left[here]
    batch = [left[k] for k in lhs_batch]
    shared = {left[k] for k in (*lhs_sum, *lhs_batch)}
    free = [letter for letter in (*left, *right) if letter not in shared]
    equation = f"{''.join(left)},{''.join(right)}->{''.join([*batch, *free])}"
    return of_einsum(kernel_first, equation, lhs, rhs)


def of_einsum(
    kernel_first: bool, equation: str, *operands: Any, **_: Any
) -> Contraction:
    """The einsum of an input and a kernel, the input first."""
    terms, arrow, outputs = equation.replace(" ", "").partition("->")
    x, kernel = terms.split(",")[:: -1 if kernel_first else 1]
    return Contraction.parse(
        f"{x},{kernel}{arrow}{outputs}", operands[kernel_first].ndim
    )


def of_convolution(
    kernel_first: bool,
    lhs: Any,
    rhs: Any,
    *,
    dimension_numbers: Any = None,
    **settings: Any,
) -> Convolution:
    """The product of a `conv_general_dilated`, whose second operand is the kernel.

    Raises:
      ValueError: The output features are not the last axis of kernel and output.
    """
    numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    last = len(rhs.shape) - 1
    if kernel_first or numbers.rhs_spec[0] != last or numbers.out_spec[1] != last:
        raise ValueError(
            "a convolution has an adapter if its output features are the last axis of "
            f"kernel and output, got {numbers}"
        )

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        kernel = kernel.astype(x.dtype)
        return jax.lax.conv_general_dilated(
            x, kernel, dimension_numbers=numbers, **settings
        )

    groups = "feature_group_count", "batch_group_count"
    any_outputs = all(settings.get(name, 1) == 1 for name in groups)
    return Convolution("i" * last + "o", convolve, any_outputs)


class Operation(NamedTuple):
    """A function of JAX that multiplies two operands.

    Attributes:
      plain: The function.
      product: A function of True if the kernel is the first operand, and of the
        arguments of a call, that returns the product of an input and a kernel.
    """

    plain: Callable[..., jax.Array]
    product: Callable[..., Product]


OPERATIONS = {
    "dot_general": Operation(jax.lax.dot_general, of_dot_general),
    "einsum": Operation(jnp.einsum, of_einsum),
    "conv_general_dilated": Operation(jax.lax.conv_general_dilated, of_convolution),
}
"""The operations by name."""

_SIGNATURES = {name: inspect.signature(op.plain) for name, op in OPERATIONS.items()}


def named_settings(name: str, *args: Any, **settings: Any) -> dict[str, Any]:
    """The arguments of an operation after its two operands, by name."""
    bound = _SIGNATURES[name].bind(None, None, *args, **settings)
    return dict(list(bound.arguments.items())[2:])
