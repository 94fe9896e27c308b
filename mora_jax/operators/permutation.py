"""Permutation: decoupling over shuffled features."""

import jax

from mora_jax.operators._base import Precision
from mora_jax.operators._order import Ordered
from mora_jax.operators._pytree import operator
from mora_jax.operators.decoupling import Decoupling


@operator
class Permutation(Ordered, Decoupling):
    """A fixed random order of the features, then decoupling, then the order undone.

    Example::

      >>> import jax.numpy as jnp
      >>> from mora_jax.operators import Permutation
      >>> op = Permutation(in_features=6, out_features=6, square_rank=3, seed=1)
      >>> op.decompress(op.compress(jnp.arange(6.0)))
      Array([0., 1., 2., 3., 4., 5.], dtype=float32)
    """

    name = "permutation"

    @property
    def aligned(self) -> bool:
        """False, since blocks gather features from everywhere."""
        return False

    def _compress(self, x: jax.Array) -> jax.Array:
        return super()._compress(self.ordered(x))

    def leave(self, h: jax.Array) -> jax.Array:
        return self.restored(super().leave(h))

    def matrix(self, m: jax.Array) -> jax.Array:
        return self.restored(super().matrix(m))[self.places(slice(None))]

    def unit_rows(
        self, indices: jax.Array, m: jax.Array, precision: Precision = None
    ) -> jax.Array:
        return super().unit_rows(self.places(indices), m, precision)
