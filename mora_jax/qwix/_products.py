"""JAX's products as `mora_jax.products` has them."""

import inspect
import string
from typing import Any

import jax

from mora_jax.products import Contraction, Convolution

_CONVOLUTION = inspect.signature(jax.lax.conv_general_dilated)


def of_dot_general(
    lhs_ndim: int, rhs_ndim: int, dimension_numbers: Any, kernel_first: bool
) -> Contraction:
    """The einsum of a `dot_general` of operands with so many axes."""
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = dimension_numbers
    left = list(string.ascii_letters[:lhs_ndim])
    right = list(string.ascii_letters[lhs_ndim : lhs_ndim + rhs_ndim])
    for here, there in zip((*lhs_sum, *lhs_batch), (*rhs_sum, *rhs_batch), strict=True):
        right[there] = left[here]
    batch = [left[k] for k in lhs_batch]
    shared = {left[k] for k in (*lhs_sum, *lhs_batch)}
    free = [letter for letter in (*left, *right) if letter not in shared]
    x, kernel = (right, left) if kernel_first else (left, right)
    x, kernel, outputs = map("".join, (x, kernel, [*batch, *free]))
    return Contraction.parse(f"{x},{kernel}->{outputs}", len(x))


def of_einsum(equation: str, x_ndim: int, kernel_first: bool) -> Contraction:
    """The einsum of an input with so many axes and a kernel, the input first."""
    terms, arrow, outputs = equation.replace(" ", "").partition("->")
    x, kernel = terms.split(",")[:: -1 if kernel_first else 1]
    return Contraction.parse(f"{x},{kernel}{arrow}{outputs}", x_ndim)


def convolution_settings(*args: Any, **settings: Any) -> dict[str, Any]:
    """The arguments of `conv_general_dilated` after its operands, by name."""
    bound = dict(_CONVOLUTION.bind(None, None, *args, **settings).arguments)
    return {name: value for name, value in bound.items() if name not in ("lhs", "rhs")}


def of_convolution(lhs: Any, rhs: Any, settings: dict[str, Any]) -> Convolution:
    """The product of a `conv_general_dilated` with these settings.

    Raises:
      ValueError: The output features are not the last axis of kernel and output.
    """
    given = settings.get("dimension_numbers")
    numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, given)
    last = len(rhs.shape) - 1
    if numbers.rhs_spec[0] != last or numbers.out_spec[1] != last:
        raise ValueError(
            "a convolution has an adapter if its output features are the last axis of "
            f"kernel and output, got {numbers}"
        )
    settings = {**settings, "dimension_numbers": numbers}

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel.astype(x.dtype), **settings)

    groups = "feature_group_count", "batch_group_count"
    any_outputs = all(settings.get(name, 1) == 1 for name in groups)
    return Convolution("i" * last + "o", convolve, any_outputs)
