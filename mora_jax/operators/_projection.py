"""Projection on orthonormal directions: what two operators have in common."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mora_jax._jax.qwix_guard import matmul
from mora_jax.operators._base import Operator, Side


class Projection(Operator):
    """Projection on K q orthonormal directions of the inputs, and back along others.

    A subclass has both as its arrays: `in_basis`, (in_features, K q), and `out_basis`,
    (out_features, K q).
    """

    in_basis: jax.Array | np.ndarray
    out_basis: jax.Array | np.ndarray

    arrays = ("in_basis", "out_basis")

    @property
    def isometry(self) -> bool:
        return True

    def _compress(self, x: jax.Array) -> jax.Array:
        return matmul(x, jnp.asarray(self.in_basis).astype(x.dtype))

    def _decompress(self, h: jax.Array) -> jax.Array:
        return matmul(h, jnp.asarray(self.out_basis).astype(h.dtype).T)

    def _rows(self, side: Side, indices: jax.Array, dtype: DTypeLike) -> jax.Array:
        basis = self.in_basis if side == "in" else self.out_basis
        return jnp.asarray(basis)[indices].astype(dtype)
