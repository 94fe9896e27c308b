"""Products with matrices, transposes of linear functions, and axes that vary."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mora_jax._common.types import ArrayLike, Precision, Shape


def matmul(a: ArrayLike, b: ArrayLike, precision: Precision = None) -> Array:
    """`a @ b`, (..., k) and (k, n) to (..., n)."""
    # Not `jax.numpy.matmul`, which JAX compiles on its own. It keeps that program, and
    # one that was traced in a quantized model would serve a plain one, or vice versa.
    dtype = jnp.result_type(a, b)
    a, b = jnp.asarray(a).astype(dtype), jnp.asarray(b).astype(dtype)
    return jax.lax.dot_general(a, b, last_with_first(a), precision=precision)


def last_with_first(a: Array) -> tuple[Any, Any]:
    """The axes that a product of `a` with a matrix sums over, for `dot_general`."""
    return ((a.ndim - 1,), (0,)), ((), ())


def rows_product(h: Array, g: Array, precision: Precision = None) -> Array:
    """Sum of h^T g over all rows: (..., q) and (..., k) to (q, k)."""
    # One product of all rows: the one that JAX derives keeps their axes apart, and
    # XLA's CPU compiler writes h once more for it, in another order.
    h, g = h.reshape(-1, h.shape[-1]), g.reshape(-1, g.shape[-1])
    return matmul(h.T, g, precision)


def transposed(
    function: Callable[[Array], Array],
    shape: Shape,
    cotangent: Array,
    dtype: DTypeLike | None = None,
) -> Array:
    """The transpose of a linear function of an array of `shape`, at `cotangent`."""
    dtype = dtype or cotangent.dtype
    like = jax.ShapeDtypeStruct(shape, dtype)
    # Zeros that nothing reads, since what says that a shape differs depends on JAX.
    if axes_of(cotangent):
        like = zeros_for(shape, dtype, cotangent)
    return jax.linear_transpose(function, like)(cotangent)[0]


def axes_of(*arrays: Any) -> frozenset[Any]:
    """The axes of a mesh along which arrays differ, inside of `jax.shard_map`."""
    axes: frozenset[Any] = frozenset()
    for kind in map(jax.typeof, arrays):
        if hasattr(kind, "manual_axis_type"):  # since JAX 0.10; `vma` before
            axes |= kind.manual_axis_type.varying
        else:
            axes |= getattr(kind, "vma", frozenset())
    return axes


def varying(x: Any, axes: Iterable[Any]) -> Any:
    """`x` as an array that differs along `axes`, and others."""
    more = tuple(sorted(frozenset(axes) - axes_of(x), key=str))
    if not more:
        return x
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, more, to="varying")
    lax: Any = jax.lax  # of JAX up to 0.8
    return lax.pvary(x, more)


def alike(*arrays: ArrayLike) -> list[Any]:
    """The arrays, as ones that differ along the same axes."""
    # The gradient of one that did not is then summed over devices, as it must be.
    axes = axes_of(*arrays)
    return [varying(x, axes) for x in arrays] if axes else [*arrays]


def zeros_for(shape: Shape, dtype: DTypeLike, *arrays: Any) -> Array:
    """Zeros that a loop may add numbers to that are computed from `arrays`."""
    return varying(jnp.zeros(shape, dtype), axes_of(*arrays))
