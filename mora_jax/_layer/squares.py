"""Products of blocks with the squares of M, where M is several.

The blocks are C(x). Block k is multiplied by square k mod K. Each function takes blocks
h, M, (K, q, q), and the precision of the products, and returns an array of the shape of
h.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._jax.linear_map import LinearMap
from mora_jax._jax.qwix_guard import matmul
from mora_jax._layer.tuning import MAX_SQUARES_IN_ONE

TimesSquares = Callable[[jax.Array, jax.Array, jax.lax.PrecisionLike], jax.Array]


def times_squares(
    h: jax.Array, m: jax.Array, precision: jax.lax.PrecisionLike
) -> jax.Array:
    """The products of blocks 0, 1, 2 and so on: (..., n, q), or K blocks as (..., K q).

    The gradient of M is a sum over rows, and over the blocks of each square: on a mesh
    nothing larger than M is summed over devices.
    """
    k, q, _ = m.shape
    if h.shape[-1] != q and k <= MAX_SQUARES_IN_ONE:
        return _DiagonalProduct(k, precision)((h,), m)
    blocks = h if h.shape[-1] == q else h.reshape(*h.shape[:-1], k, q)
    *batch, n, _ = blocks.shape
    rounds = -(-n // k)
    if missing := rounds * k - n:
        blocks = jnp.pad(blocks, [*[(0, 0)] * len(batch), (0, missing), (0, 0)])
    blocks = blocks.reshape(*batch, rounds, k, q)
    last, square = len(batch) + 2, len(batch) + 1
    axes = ((last,), (1,)), ((square,), (0,))
    products = jax.lax.dot_general(blocks, m, axes, precision=precision)
    products = jnp.moveaxis(products, 0, -2).reshape(*batch, rounds * k, q)
    return products[..., :n, :].reshape(h.shape)


@dataclasses.dataclass(frozen=True)
class _DiagonalProduct(LinearMap):
    """(..., K q) by the squares on a diagonal, as a map of M.

    One product with zeros is faster than K products, for which a chip would have to
    rearrange h; but its gradient would be (K q, K q).
    """

    squares: int
    precision: jax.lax.PrecisionLike

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        (h,) = residuals
        return matmul(h, block_diagonal(operand), self.precision)

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        (h,) = residuals
        parts = (
            jnp.split(a.reshape(-1, a.shape[-1]), self.squares, axis=-1)
            for a in (h, cotangent)
        )
        pairs = zip(*parts, strict=True)
        return jnp.stack([matmul(h.T, y, self.precision) for h, y in pairs])


def times_squares_in_runs(runs: Sequence[tuple[int, Any]]) -> TimesSquares:
    """The products of blocks of which some follow each other, (..., n, q).

    Args:
      runs: The length of each run, and the number of its first block.
    """

    def times(
        h: jax.Array, m: jax.Array, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        products, start = [], 0
        for size, first in runs:
            blocks = jax.lax.slice_in_dim(h, start, start + size, axis=-2)
            turned = jnp.roll(m, -first, axis=0)
            products.append(times_squares(blocks, turned, precision))
            start += size
        return jnp.concatenate(products, axis=-2)

    return times


def times_squares_by_row(squares: jax.Array) -> TimesSquares:
    """The products of blocks whose squares differ from row to row, (..., q).

    Args:
      squares: The number of the square for each block, (...).
    """

    def times(
        h: jax.Array, m: jax.Array, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        k, q, _ = m.shape
        # A block among zeros, for all squares below each other.
        among = jax.nn.one_hot(squares, k, dtype=h.dtype)[..., None] * h[..., None, :]
        among = among.reshape(*h.shape[:-1], k * q)
        return matmul(among, m.reshape(k * q, q), precision)

    return times


def block_diagonal(m: Any) -> Any:
    """The squares on a diagonal, (K q, K q), by which all of C(x) is multiplied.

    One square, (q, q), is that already.
    """
    return m if m.ndim == 2 else jax.scipy.linalg.block_diag(*m)
