"""Products with matrices, and transposes of linear functions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mora_jax._common.types import ArrayLike, Shape
from mora_jax._jax.vma import axes_of, zeros_for


def matmul(
    a: ArrayLike, b: ArrayLike, precision: jax.lax.PrecisionLike = None
) -> jax.Array:
    """`a @ b`, (..., k) and (k, n) to (..., n)."""
    # Not `jax.numpy.matmul`, which JAX compiles on its own. It keeps that program, and
    # one that was traced in a quantized model would then be used in a plain model, or
    # the other way round.
    dtype = jnp.result_type(a, b)
    a, b = jnp.asarray(a).astype(dtype), jnp.asarray(b).astype(dtype)
    return jax.lax.dot_general(a, b, last_with_first(a), precision=precision)


def last_with_first(a: jax.Array) -> tuple[Any, Any]:
    """The axes that a product of `a` with a matrix sums over, for `dot_general`."""
    return ((a.ndim - 1,), (0,)), ((), ())


def rows_product(
    h: jax.Array, g: jax.Array, precision: jax.lax.PrecisionLike = None
) -> jax.Array:
    """Sum of h^T g over all rows: (..., q) and (..., k) to (q, k)."""
    # One product of all rows: the one that JAX derives keeps their axes apart, and
    # XLA's CPU compiler writes h once more for it, in another order.
    h, g = h.reshape(-1, h.shape[-1]), g.reshape(-1, g.shape[-1])
    return matmul(h.T, g, precision)


def transposed(
    function: Callable[[jax.Array], jax.Array],
    shape: Shape,
    cotangent: jax.Array,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """The transpose of a linear function of an array of `shape`, at `cotangent`."""
    dtype = dtype or cotangent.dtype
    like = jax.ShapeDtypeStruct(shape, dtype)
    # Zeros that nothing reads where devices differ: versions of JAX differ in what says
    # that a shape differs.
    if axes_of(cotangent):
        like = zeros_for(shape, dtype, cotangent)
    (result,) = jax.linear_transpose(function, like)(cotangent)
    return result
