"""Rotation: decoupling whose blocks are told apart."""

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax.operators._base import operator
from mora_jax.operators.decoupling import Decoupling

BASE = 10000.0


@operator
class Rotation(Decoupling):
    r"""Decoupling with block k turned before M (paper equations 9-11).

    .. math:: (x_j, x_{j + q/2}) \mapsto R(k\,\theta_j) (x_j, x_{j + q/2}), \qquad
        \theta_j = 10000^{-2j/q}

    as in rotary position embeddings, with the block's index for the position. Block 0
    stays as it is. The reference's type 6 is `truncate=True`.

    Example::

      >>> from mora_jax.operators import Rotation
      >>> op = Rotation(in_features=4, out_features=4, square_rank=2)
      >>> op.compress(jnp.array([1.0, 0.0, 1.0, 0.0])).round(3)
      Array([[1.   , 0.   ],
             [0.54 , 0.841]], dtype=float32)
    """

    name = "rotation"
    multiple_of = 2

    @property
    def partition(self) -> bool:
        return False

    @property
    def isometry(self) -> bool:
        q = self.square_rank
        return self.in_features == self.out_features and self.in_features % q == 0

    def _compress(self, x: jax.Array) -> jax.Array:
        return self._turn_all(self._split(x))

    def _multiply(
        self, h: jax.Array, m: jax.Array, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        return jnp.matmul(self._turn_all(h), m, precision=precision)

    def _turn_all(self, h: jax.Array) -> jax.Array:
        """The first blocks of x, (..., n, q), each turned by its own angles."""
        return _rotate(h, *(table[: h.shape[-2]] for table in self._tables(h)))

    def _turn(self, h: jax.Array, block: jax.Array) -> jax.Array:
        return _rotate(h, *(jnp.asarray(table)[block] for table in self._tables(h)))

    def _tables(self, like: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """Cosine and sine of the angles of each block, (n, q / 2)."""
        n, q = self.compressed_shape
        angle = np.outer(np.arange(n), BASE ** (-2 * np.arange(q // 2) / q))
        return np.cos(angle).astype(like.dtype), np.sin(angle).astype(like.dtype)


def _rotate(
    h: jax.Array, cos: jax.Array | np.ndarray, sin: jax.Array | np.ndarray
) -> jax.Array:
    low, high = jnp.split(h, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1)
