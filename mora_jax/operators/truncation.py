"""Truncation: the first q features."""

import jax
import jax.numpy as jnp

from mora_jax._interception import matmul
from mora_jax.operators._base import Operator
from mora_jax.operators._pytree import operator


@operator
class Truncation(Operator):
    """The first q input features move the first q outputs (paper equations 4-5).

    Example::

      >>> from mora_jax.operators import Truncation
      >>> op = Truncation(in_features=4, out_features=3, square_rank=2)
      >>> op.delta_weight(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
      Array([[1., 2., 0.],
             [3., 4., 0.],
             [0., 0., 0.],
             [0., 0., 0.]], dtype=float32)
    """

    name = "truncation"

    @property
    def partition(self) -> bool:
        return self.in_features == self.square_rank

    @property
    def isometry(self) -> bool:
        return True

    def _compress(self, x: jax.Array) -> jax.Array:
        return x[..., : self.square_rank]

    def _decompress(self, h: jax.Array) -> jax.Array:
        missing = self.out_features - self.square_rank
        return jnp.pad(h, [(0, 0)] * (h.ndim - 1) + [(0, missing)])

    def _lookup(
        self, m: jax.Array, indices: jax.Array, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        unit = jax.nn.one_hot(indices, self.square_rank, dtype=m.dtype)
        return self._decompress(matmul(unit, m, precision))
