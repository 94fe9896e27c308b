"""Decoupling: M on every block of q features."""

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._types import Shape
from mora_jax.operators._base import Operator
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
    fold_from = 1.0

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
        (n, q), outs = self.compressed_shape, self.out_features
        columns = self._turned(m)[:, :, None, :]
        tiles = jnp.where(self._feeds[:, None, :, None], columns, 0)
        weight = tiles.reshape(n * q, self._places * q)[:, :outs]
        return wrap_rows(weight, self.in_features)

    @property
    def _feeds(self) -> np.ndarray:
        """Whether input block k has an effect on output block j, (n, p)."""
        n, count = self.compressed_shape[0], self._places
        feeds = np.subtract.outer(np.arange(n), np.arange(count)) % min(n, count) == 0
        if self.truncate:
            feeds &= np.arange(n)[:, None] < count
        return feeds

    def _turned(self, m: jax.Array) -> jax.Array:
        """What block k of x is multiplied with: (q, q) -> (n, q, q), or (1, q, q)."""
        return m[None]

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
        h = jnp.matmul(h, m, precision=precision)
        feeds = jnp.asarray(self._feeds)[block]
        y = jnp.where(feeds[..., None], h[..., None, :], 0).sum(-3)
        return from_blocks(y, self.out_features)

    def _turn(self, h: jax.Array, block: jax.Array) -> jax.Array:
        """What `_compress` does to (..., q) numbers of the blocks (...)."""
        return h
