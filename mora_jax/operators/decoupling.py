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
        return self._split(x)

    def _decompress(self, h: jax.Array) -> jax.Array:
        return self._join(route(self._used(h), self._places))

    def _apply(
        self, m: jax.Array, x: jax.Array, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        h = self._multiply(self._used(self._split(x)), m, precision)
        return self._join(route(h, self._places))

    def _split(self, x: jax.Array) -> jax.Array:
        """(..., in_features) -> (..., n, q)."""
        return to_blocks(x, self.square_rank)

    def _join(self, h: jax.Array) -> jax.Array:
        """(..., p, q) -> (..., out_features)."""
        return from_blocks(h, self.out_features)

    def _multiply(
        self, h: jax.Array, m: jax.Array, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        """C(x) M of the blocks of x; those that meet may be added already."""
        if h.shape[-2] > self._places:  # one product for all blocks that meet
            h = route(h, self._places)
        return jnp.matmul(h, m, precision=precision)

    @property
    def _places(self) -> int:
        """How many blocks cover the outputs: p."""
        return blocks(self.out_features, self.square_rank)

    def _used(self, h: jax.Array) -> jax.Array:
        """The blocks that have an effect."""
        return h[..., : self._places, :] if self.truncate else h

    def _lookup(
        self, m: jax.Array, indices: jax.Array, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        (n, q), count = self.compressed_shape, self._places
        block, offset = places(indices, self.in_features, q)
        h = self._turn(jax.nn.one_hot(offset, q, dtype=m.dtype), block)
        h = jnp.matmul(h, m, precision=precision)
        # `route` in reverse: output block j is fed by the blocks k = j mod this.
        period = min(n, count)
        feeds = (block[..., None] - jnp.arange(count)) % period == 0
        if self.truncate:
            feeds &= block[..., None] < count
        y = jnp.where(feeds[..., None], h[..., None, :], 0).sum(-3)
        return self._join(y)

    def _turn(self, h: jax.Array, block: jax.Array) -> jax.Array:
        """What `_compress` does to (..., q) numbers of the blocks (...)."""
        return h
