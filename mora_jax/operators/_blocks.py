"""Vectors as rows of q features, and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._types import ArrayLike


def blocks(features: int, square_rank: int) -> int:
    """How many blocks of q cover `features`: ceil(features / q)."""
    return -(-features // square_rank)


def to_blocks(x: jax.Array, square_rank: int) -> jax.Array:
    """(..., features) -> (..., n, q); past the end, features start over at index 0."""
    *batch, features = x.shape
    n = blocks(features, square_rank)
    missing = n * square_rank - features
    padded = jnp.pad(x, [(0, 0)] * len(batch) + [(0, missing)], mode="wrap")
    return padded.reshape(*batch, n, square_rank)


def wrap_rows(weight: jax.Array, features: int) -> jax.Array:
    """(n * q, out) -> (features, out): rows past the end are added to the first."""
    rounds = blocks(weight.shape[0], features)
    missing = rounds * features - weight.shape[0]
    parts = jnp.split(jnp.pad(weight, [(0, missing), (0, 0)]), rounds)
    return functools.reduce(jnp.add, parts)


def places(
    indices: ArrayLike, features: int, square_rank: int
) -> tuple[jax.Array, jax.Array]:
    """Where `to_blocks` puts single features: blocks and offsets, both (..., t).

    A feature that starts over has up to t places; an offset of q stands for none.
    """
    size = blocks(features, square_rank) * square_rank
    starts = features * np.arange(-(-size // features), dtype=np.uint32)
    at = jnp.asarray(indices, np.uint32)[..., None] + starts
    block, offset = divide(at, square_rank)
    return block, jnp.where(at < size, offset, np.uint32(square_rank))


def divide(indices: ArrayLike, by: int) -> tuple[jax.Array, jax.Array]:
    """Quotients and remainders of indices, which are not negative.

    Unsigned, or signs would be looked at in a dozen more operations for XLA to compile.
    """
    indices = jnp.asarray(indices, np.uint32)
    return indices // np.uint32(by), indices % np.uint32(by)


def from_blocks(h: jax.Array, features: int) -> jax.Array:
    """(..., n, q) -> (..., features): the blocks in a row, cut off at `features`."""
    *batch, n, square_rank = h.shape
    return h.reshape(*batch, n * square_rank)[..., :features]


def route(h: jax.Array, count: int) -> jax.Array:
    """(..., n, q) -> (..., count, q): block k goes to block k mod `count`.

    With more blocks than places the blocks that meet are added; with fewer, they are
    repeated, so that output block j holds block j mod n.
    """
    *batch, n, square_rank = h.shape
    if n <= count:
        repeats = [1] * len(batch) + [-(-count // n), 1]
        return jnp.tile(h, repeats)[..., :count, :]
    rounds = -(-n // count)
    missing = [(0, 0)] * len(batch) + [(0, rounds * count - n), (0, 0)]
    return jnp.pad(h, missing).reshape(*batch, rounds, count, square_rank).sum(-3)
