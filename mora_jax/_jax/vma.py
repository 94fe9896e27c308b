"""Along which axes of a `jax.shard_map` arrays differ, which is part of their types.

JAX adds what its own functions need. It cannot do so for a primitive that is not its
own, for zeros that a loop adds to, and for the shapes that a function is transposed by.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

Axes = frozenset[Any]


def axes_of(*arrays: Any) -> Axes:
    """The axes along which any of the arrays differ."""
    axes: Axes = frozenset()
    for x in arrays:
        kind = jax.typeof(x)
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


def zeros_for(shape: tuple[int, ...], dtype: DTypeLike, *arrays: Any) -> jax.Array:
    """Zeros that a loop may add numbers to that are computed from `arrays`."""
    return varying(jnp.zeros(shape, dtype), axes_of(*arrays))
