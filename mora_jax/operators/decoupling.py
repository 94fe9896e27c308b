"""Decoupling: M on every block of q features."""

import jax
import jax.numpy as jnp

from mora_jax._types import Shape
from mora_jax.operators._base import Operator, operator
from mora_jax.operators._blocks import blocks, from_blocks, places, route, to_blocks


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
        count = blocks(self.out_features, self.square_rank)
        if self.truncate:
            h = h[..., :count, :]
        return from_blocks(route(h, count), self.out_features)

    def _lookup(
        self, m: jax.Array, indices: jax.Array, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        n, q = self.compressed_shape
        count = blocks(self.out_features, q)
        block, offset = places(indices, self.in_features, q)
        h = self._turn(jax.nn.one_hot(offset, q, dtype=m.dtype), block)
        h = jnp.matmul(h, m, precision=precision)
        # `route` in reverse: output block j is fed by the blocks k = j mod this.
        period = min(n, count)
        feeds = (block[..., None] - jnp.arange(count)) % period == 0
        if self.truncate:
            feeds &= block[..., None] < count
        y = jnp.where(feeds[..., None], h[..., None, :], 0).sum(-3)
        return from_blocks(y, self.out_features)

    def _turn(self, h: jax.Array, block: jax.Array) -> jax.Array:
        """What `_compress` does to (..., q) numbers of the blocks (...)."""
        return h
