"""Decoupling: M on every block of q features, with signs that tell them apart."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mora_jax._common.types import ArrayLike, Shape
from mora_jax._jax.tiles import sum_tiles, tile_to
from mora_jax.operators._base import Operator, Precision
from mora_jax.operators._pytree import operator, seeded, signs


def block_positions(
    indices: np.ndarray | Array, features: int, square_rank: int
) -> tuple[Any, Any]:
    """Places where single features come to lie: blocks and offsets, (..., t)."""
    # A feature that starts over has up to t positions; an offset from q on is for none.
    # NumPy arrays stay such, and are constants of a program.
    size = -(-features // square_rank) * square_rank
    starts = features * np.arange(-(-size // features), dtype=np.uint32)
    at = indices.astype(np.uint32)[..., None] + starts
    block, offset = divide(at, square_rank)
    return block, offset + np.uint32(square_rank) * (at >= size)


def divide(indices: np.ndarray | Array, by: int) -> tuple[Any, Any]:
    """Quotients and remainders of indices, which are not negative."""
    # Unsigned, or XLA would compile a dozen more operations that look at the sign.
    indices = indices.astype(np.uint32)
    return indices // np.uint32(by), indices % np.uint32(by)


@operator
class Decoupling(Operator):
    """M acts on each block of q features on its own (paper equation 8).

    Input block k feeds output block k mod p, p = ceil(out / q); outputs beyond the n
    input blocks repeat them, so every input has an effect whatever the two widths. The
    input blocks that feed the same output block are a *group*; there are min(n, p).

    Attributes:
      truncate: Leave out the input blocks beyond the p-th instead, as the reference
        does. Its files need it; most inputs of a narrowing layer then do nothing.

    Example::

      >>> op = Decoupling(in_features=4, out_features=4, square_rank=2)
      >>> op.delta_weight(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
      Array([[1., 2., 0., 0.],
             [3., 4., 0., 0.],
             [0., 0., 1., 2.],
             [0., 0., 3., 4.]], dtype=float32)
    """

    truncate: bool = False

    name = "decoupling"
    work = "blocks"
    block = True
    bounded = False

    @property
    def compressed_shape(self) -> Shape:
        return -(-self.in_features // self.square_rank), self.square_rank

    @property
    def num_groups(self) -> int:
        """Number of groups of input blocks: min(n, p), with p blocks of outputs."""
        return min(self.compressed_shape[0], -(-self.out_features // self.square_rank))

    @property
    def gains(self) -> tuple[float, float]:
        """1 each, since C and D move numbers; an output adds up n / p if p < n."""
        # Their changes have either sign, so that the squares of the changes add up.
        return 1.0, math.sqrt(self.num_feeding / self.num_groups)

    def _compress(self, x: Array) -> Array:
        n, q = self.compressed_shape
        return self.rotate_rows(tile_to(x, n * q).reshape(*x.shape[:-1], n, q))

    def _decompress(self, h: Array) -> Array:
        return self.leave(self.sum_groups(h))

    def sum_groups(self, h: Array) -> Array:
        """(..., n, q) -> (..., groups, q): the sum of the blocks in each group."""
        (*batch, n, q), groups = h.shape, self.num_groups
        if n == groups:
            return h
        if self.truncate:
            return h[..., :groups, :]
        h = sum_tiles(h.reshape(*batch, n * q), groups * q)
        return h.reshape(*batch, groups, q)

    # D sums the blocks of a group, so M may multiply their sum: n become min(n, p).

    def enter(self, x: Array) -> Array:
        return self.sum_groups(self._compress(x))

    def leave(self, h: Array) -> Array:
        """D of blocks whose groups are summed: (..., groups, q) -> (..., out)."""
        *batch, groups, q = h.shape
        return tile_to(h.reshape(*batch, groups * q), self.out_features)

    def unit_rows(self, indices: Array, m: Array, precision: Precision = None) -> Array:
        # A unit vector is in t blocks of the n, so that M multiplies t rows.
        block, offset = block_positions(indices, self.in_features, self.square_rank)
        unit = jax.nn.one_hot(offset, self.square_rank, dtype=m.dtype)
        h = self.product(self.rotate_rows(unit, block), m, precision)
        groups = np.arange(self.num_groups, dtype=np.uint32)
        feeds = self.in_group(block)[..., None] == groups
        return self.leave(jnp.where(feeds[..., None], h[..., None, :], 0).sum(-3))

    def matrix(self, m: Array) -> Array:
        # In whole rows, which compilers vectorise: in tiles it took four times as long.
        (n, q), outs = self.compressed_shape, self.out_features
        columns = tile_to(m, outs)
        # XLA is to write it to memory once. It fuses nothing with what it updates in
        # place, here the first row. A concatenation takes its CPU compiler 8 ms.
        columns = jax.lax.dynamic_update_slice(columns, tile_to(m[:1], outs), (0, 0))
        group = jnp.asarray(self.in_group(np.arange(n)))
        wanted = jnp.asarray(np.arange(outs) // q % self.num_groups)
        rows = jnp.where(group[:, None, None] == wanted, self.rotate_m(columns), 0)
        # Rows past the end are added to the first ones.
        return sum_tiles(rows.reshape(n * q, outs).T, self.in_features).T

    def rotate_rows(self, h: Array, block: Array | None = None) -> Array:
        """Rows h of the blocks k times R_k: (..., q) and (...), or all, (..., n, q)."""
        # R_k is a fixed matrix for block k, which subclasses give here and in
        # `rotate_m`: since (x_k R_k) M = x_k (R_k M), M may be multiplied instead.
        return h

    def rotate_m(self, m: Array) -> Array:
        """R_k M for all blocks: (q, c) -> (n, q, c), or (1, q, c) if all are alike."""
        return m[None]

    @property
    def aligned(self) -> bool:
        """True if blocks are slices of features, and none is left out."""
        q, n = self.square_rank, self.compressed_shape[0]
        divides = self.in_features % q == self.out_features % q == 0
        return divides and self.num_feeding == n

    @property
    def num_feeding(self) -> int:
        """Number of input blocks that feed an output block: all, or those kept."""
        return self.num_groups if self.truncate else self.compressed_shape[0]

    def in_group(self, block: Any) -> Any:
        """The group of each input block, (...), or one without outputs if left out."""
        groups = np.uint32(self.num_groups)
        return block % groups + groups * (block >= self.num_feeding)


@operator
class SignedDecoupling(Decoupling):
    """Decoupling with a fixed random sign on each number of each block before M.

    Signs tell blocks apart as the angles of `Rotation` do, and cost one multiplication.
    What all blocks have in common cancels in the gradient of M instead of adding up.

    Attributes:
      seed: The seed of the signs; equal widths with the same q share them.

    Example::

      >>> op = SignedDecoupling(in_features=4, out_features=4, square_rank=2)
      >>> op.decompress(op.compress(op.decompress(op.compress(jnp.arange(4.0)))))
      Array([0., 1., 2., 3.], dtype=float32)
    """

    seed: int = 0
    in_signs: ArrayLike = seeded(
        lambda op: signs(math.prod(s := op.compressed_shape), op.seed).reshape(s)
    )

    name = "signed_decoupling"

    def rotate_rows(self, h: Array, block: Array | None = None) -> Array:
        signs = jnp.asarray(self.in_signs, h.dtype)
        return h * (signs if block is None else signs[block])

    def rotate_m(self, m: Array) -> Array:
        return m * jnp.asarray(self.in_signs, m.dtype)[..., None]


@operator
class Rotation(Decoupling):
    r"""Decoupling with block k rotated before M (paper equations 9-11).

    .. math:: (x_j, x_{j + q/2}) \mapsto R(k\,\theta_j) (x_j, x_{j + q/2}), \qquad
        \theta_j = 10000^{-2j/q}

    as in rotary position embeddings, with the block's index for the position. Block 0
    stays as it is. The reference's type 6 is `truncate=True`.

    Example::

      >>> op = Rotation(in_features=4, out_features=4, square_rank=2)
      >>> op.compress(jnp.array([1.0, 0.0, 1.0, 0.0])).round(3)
      Array([[1.   , 0.   ],
             [0.54 , 0.841]], dtype=float32)
    """

    name = "rotation"
    q_multiple_of = 2

    def rotate_rows(self, h: Array, block: Array | None = None) -> Array:
        cos, sin = self._tables(h.dtype)
        if block is not None:
            cos, sin = jnp.asarray(cos)[block], jnp.asarray(sin)[block]
        return h * cos + _swap_halves(h, axis=-1) * sin

    def rotate_m(self, m: Array) -> Array:
        # x R = x * cos + swap(x) * sin, where swap exchanges the halves of a row, so
        # R = diag(cos) + P diag(sin) with the permutation P of swap. Hence
        # R M = cos * M + P (sin * M): here sin is swapped with the rows of M, and the
        # sign of an angle in one half is the opposite of that in the other.
        cos, sin = (table[..., None] for table in self._tables(m.dtype))
        return m * cos - _swap_halves(m, axis=-2) * sin

    def _tables(self, dtype: jax.typing.DTypeLike) -> tuple[np.ndarray, np.ndarray]:
        """Cosine and signed sine of the angle of each block and feature, (n, q)."""
        n, q = self.compressed_shape
        angle = np.outer(np.arange(n), 10000.0 ** (-2 * np.arange(q // 2) / q))
        cos, sin = np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)
        return np.concatenate([cos, cos], -1), np.concatenate([-sin, sin], -1)


def _swap_halves(h: Array, axis: int) -> Array:
    # The two halves in reverse order; a concatenation of them would need a copy.
    axis %= h.ndim
    halves = (*h.shape[:axis], 2, h.shape[axis] // 2, *h.shape[axis + 1 :])
    return jnp.flip(h.reshape(halves), axis).reshape(h.shape)
