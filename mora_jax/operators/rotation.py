"""Rotation: decoupling that tells its blocks apart."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mora_jax.operators._pytree import operator
from mora_jax.operators.decoupling import Decoupling

BASE = 10000.0


@operator
class Rotation(Decoupling):
    r"""Decoupling with block k rotated before M (paper equations 9-11).

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
    q_multiple_of = 2

    def rotate_rows(self, h: jax.Array, block: jax.Array | None = None) -> jax.Array:
        cos, sin = self._tables(h.dtype)
        if block is not None:
            cos, sin = jnp.asarray(cos)[block], jnp.asarray(sin)[block]
        return h * cos + _swap_halves(h, axis=-1) * sin

    def rotate_m(self, m: jax.Array) -> jax.Array:
        # x R = x * cos + swap(x) * sin, where swap exchanges the halves of a row, so
        # R = diag(cos) + P diag(sin) with the permutation P of swap. Hence
        # R M = cos * M + P (sin * M): here sin is swapped with the rows of M, and the
        # sign of an angle in one half is the opposite of that in the other.
        cos, sin = (table[..., None] for table in self._tables(m.dtype))
        return m * cos - _swap_halves(m, axis=-2) * sin

    def _tables(self, dtype: DTypeLike) -> tuple[np.ndarray, np.ndarray]:
        """Cosine and signed sine of the angle of each block and feature, (n, q)."""
        n, q = self.compressed_shape
        angle = np.outer(np.arange(n), BASE ** (-2 * np.arange(q // 2) / q))
        cos, sin = np.cos(angle), np.sin(angle)
        tables = np.concatenate([cos, cos], -1), np.concatenate([-sin, sin], -1)
        return tables[0].astype(dtype), tables[1].astype(dtype)


def _swap_halves(h: jax.Array, axis: int) -> jax.Array:
    # The two halves in reverse order; a concatenation of them would need a copy.
    axis %= h.ndim
    halves = (*h.shape[:axis], 2, h.shape[axis] // 2, *h.shape[axis + 1 :])
    return jnp.flip(h.reshape(halves), axis).reshape(h.shape)
