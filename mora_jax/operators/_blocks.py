"""Vectors as rows of q features, and back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._linear import LinearMap

MANY = 64
"""More slices than this are not written out."""


def blocks(features: int, square_rank: int) -> int:
    """How many blocks of q cover `features`: ceil(features / q)."""
    return -(-features // square_rank)


def to_blocks(x: jax.Array, square_rank: int) -> jax.Array:
    """(..., features) -> (..., n, q); past the end, features start over at index 0."""
    n = blocks(x.shape[-1], square_rank)
    return cycle(x, n * square_rank).reshape(*x.shape[:-1], n, square_rank)


def places(
    indices: np.ndarray | jax.Array, features: int, square_rank: int
) -> tuple[Any, Any]:
    """Where `to_blocks` puts single features: blocks and offsets, both (..., t).

    A feature that starts over has up to t places; an offset of q or more stands for
    none. Of numpy arrays these are numpy arrays, constants of a program.
    """
    size = blocks(features, square_rank) * square_rank
    starts = features * np.arange(-(-size // features), dtype=np.uint32)
    at = indices.astype(np.uint32)[..., None] + starts
    block, offset = divide(at, square_rank)
    return block, offset + np.uint32(square_rank) * (at >= size)


def divide(indices: np.ndarray | jax.Array, by: int) -> tuple[Any, Any]:
    """Quotients and remainders of indices, which are not negative.

    Unsigned, or signs would be looked at in a dozen more operations for XLA to compile.
    """
    indices = indices.astype(np.uint32)
    return indices // np.uint32(by), indices % np.uint32(by)


def from_blocks(h: jax.Array, features: int) -> jax.Array:
    """(..., n, q) -> (..., features): the blocks in a row, over and over."""
    *batch, n, square_rank = h.shape
    return cycle(h.reshape(*batch, n * square_rank), features)


def cycle(x: jax.Array, features: int) -> jax.Array:
    """(..., width) -> (..., features): entry j is entry j mod width of `x`."""
    return _Cycle(x.shape[-1], features)((), x)


def add_cycles(x: jax.Array, width: int) -> jax.Array:
    """(..., features) -> (..., width): the transpose of `cycle`."""
    return _Cycle(width, x.shape[-1]).transpose((), x)


def wrap_rows(weight: jax.Array, features: int) -> jax.Array:
    """(n * q, out) -> (features, out): rows past the end are added to the first."""
    total = _pad(weight[:features], features, axis=0)
    starts = range(features, weight.shape[0], features)
    parts = (_pad(weight[k : k + features], features, axis=0) for k in starts)
    return sum(parts, total)


@dataclasses.dataclass(frozen=True)
class _Cycle(LinearMap):
    """`cycle`, whose transpose JAX would compute by padding to whole cycles."""

    width: int
    features: int

    def forward(self, residuals: Any, x: jax.Array) -> jax.Array:
        whole, rest = divmod(self.features, self.width)
        if not whole:
            return x[..., :rest]
        if whole == 1:
            return jnp.concatenate([x, x[..., :rest]], axis=-1) if rest else x
        tiled = jnp.tile(x, [1] * (x.ndim - 1) + [whole + bool(rest)])
        return tiled[..., : self.features]

    def backward(self, residuals: Any, y: jax.Array) -> jax.Array:
        width, features = self.width, self.features
        if features > MANY * width:
            y = _pad(y, blocks(features, width) * width)
            return y.reshape(*y.shape[:-1], -1, width).sum(-2)
        # Slices that are added in one pass; a sum over an axis took thrice the time.
        wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        first, *others = (wide[..., k : k + width] for k in range(0, features, width))
        total = sum((_pad(one, width) for one in others), _pad(first, width))
        return total.astype(y.dtype)


def _pad(x: jax.Array, features: int, axis: int = -1) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, features - x.shape[axis])
    return jnp.pad(x, widths) if widths[axis][1] else x
