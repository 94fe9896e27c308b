"""Decoupling: M on every block of q features."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._interception import matmul
from mora_jax._types import Shape
from mora_jax.operators._base import Operator
from mora_jax.operators._block_shard import BlockShard
from mora_jax.operators._blocks import (
    add_cycles,
    blocks,
    from_blocks,
    places,
    to_blocks,
    wrap_rows,
)
from mora_jax.operators._pytree import operator


@operator
class Decoupling(Operator):
    """M acts on each block of q features on its own (paper equation 8).

    Input block k feeds output block k mod p, p = ceil(out / q); outputs beyond the n
    input blocks repeat them, so every input has an effect whatever the two widths.

    Attributes:
      truncate: leave out the input blocks beyond the p-th instead, as the reference
        does. Its files need it; most inputs of a narrowing layer then have no effect.

    Example::

      >>> import jax.numpy as jnp
      >>> from mora_jax.operators import Decoupling
      >>> op = Decoupling(in_features=4, out_features=4, square_rank=2)
      >>> op.delta_weight(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
      Array([[1., 2., 0., 0.],
             [3., 4., 0., 0.],
             [0., 0., 1., 2.],
             [0., 0., 3., 4.]], dtype=float32)
    """

    truncate: bool = False

    name = "decoupling"
    bounded = False
    shard_type = BlockShard
    fold_from = 0.6

    @property
    def compressed_shape(self) -> Shape:
        return (blocks(self.in_features, self.square_rank), self.square_rank)

    @property
    def partition(self) -> bool:
        return self.in_features % self.square_rank == 0

    @property
    def isometry(self) -> bool:
        return self.in_features == self.out_features and self.partition

    def _compress(self, x: jax.Array) -> jax.Array:
        return to_blocks(x, self.square_rank)

    def _decompress(self, h: jax.Array) -> jax.Array:
        return self._spread(self._add_up(h))

    def _meet(self, x: jax.Array) -> jax.Array:
        return self._add_up(self._compress(x))

    def _spread(self, h: jax.Array) -> jax.Array:
        return from_blocks(h, self.out_features)

    def _add_up(self, h: jax.Array) -> jax.Array:
        """(..., n, q) -> (..., min(n, p), q): blocks that meet are added."""
        if h.shape[-2] <= self._places:
            return h
        if self.truncate:
            return h[..., : self._places, :]
        *batch, n, q = h.shape
        h = add_cycles(h.reshape(*batch, n * q), self._places * q)
        return h.reshape(*batch, self._places, q)

    def _delta(self, m: jax.Array) -> jax.Array:
        # In whole rows, which compilers vectorise; in tiles of q columns it took four
        # times as long. A concatenation is what XLA does not redo for each block.
        (n, q), outs = self.compressed_shape, self.out_features
        columns = jnp.concatenate([m] * self._places, axis=1)[:, :outs]
        group = jnp.asarray(self._in_group(np.arange(n)))
        out_group = jnp.asarray(self._out_group(np.arange(outs) // q))
        feeds = group[:, None, None] == out_group
        rows = jnp.where(feeds, self._turned(columns), 0)
        return wrap_rows(rows.reshape(n * q, outs), self.in_features)

    def _turned(self, m: jax.Array) -> jax.Array:
        """What each block of x multiplies, (q, k) -> (n, q, k), or (1, q, k)."""
        return m[None]

    def _in_group(self, block: Any) -> Any:
        """Inputs have an effect on the outputs of their group. `block`: (...) indices.

        Blocks that are left out, or beyond the n-th, are in a group without outputs.
        """
        n, meeting = self.compressed_shape[0], self._meeting
        return block % meeting + meeting * (block >= (meeting if self.truncate else n))

    def _out_group(self, block: Any) -> Any:
        return block % self._meeting

    @property
    def _meeting(self) -> np.uint32:
        """How many blocks are left when those that meet are added: min(n, p)."""
        return np.uint32(min(self.compressed_shape[0], self._places))

    @property
    def _places(self) -> int:
        """How many blocks cover the outputs: p."""
        return blocks(self.out_features, self.square_rank)

    def _lookup(
        self, m: jax.Array, indices: jax.Array, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        q = self.square_rank
        block, offset = places(indices, self.in_features, q)
        h = self._turn(jax.nn.one_hot(offset, q, dtype=m.dtype), block)
        h = matmul(h, m, precision)
        feeds = self._in_group(block)[..., None] == self._out_group(
            np.arange(self._places)
        )
        y = jnp.where(feeds[..., None], h[..., None, :], 0).sum(-3)
        return from_blocks(y, self.out_features)

    def _turn(self, h: jax.Array, block: jax.Array) -> jax.Array:
        """What `_compress` does to (..., q) numbers of the blocks (...)."""
        return h
