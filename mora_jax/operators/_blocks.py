"""Features as blocks of q; past the end, features start over at index 0."""

from typing import Any

import jax
import numpy as np


def num_blocks(features: int, square_rank: int) -> int:
    """Number of blocks of q that cover `features`: ceil(features / q)."""
    return -(-features // square_rank)


def block_positions(
    indices: np.ndarray | jax.Array, features: int, square_rank: int
) -> tuple[Any, Any]:
    """Places where single features come to lie: blocks and offsets, (..., t).

    A feature that starts over has up to t positions; an offset from q on is for none.
    """
    # NumPy arrays stay such, and are constants of a program.
    size = num_blocks(features, square_rank) * square_rank
    starts = features * np.arange(-(-size // features), dtype=np.uint32)
    at = indices.astype(np.uint32)[..., None] + starts
    block, offset = divide(at, square_rank)
    return block, offset + np.uint32(square_rank) * (at >= size)


def divide(indices: np.ndarray | jax.Array, by: int) -> tuple[Any, Any]:
    """Quotients and remainders of indices, which are not negative."""
    # Unsigned, or XLA would compile a dozen more operations that look at the sign.
    indices = indices.astype(np.uint32)
    return indices // np.uint32(by), indices % np.uint32(by)
