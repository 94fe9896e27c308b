"""Orthogonal: a fixed random subspace."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mora_jax._interception import matmul
from mora_jax.operators._base import Operator, Side
from mora_jax.operators._pytree import array_field, operator
from mora_jax.operators._random import orthonormal


@operator
class Orthogonal(Operator):
    """Projection on K q fixed random orthonormal directions, and the transpose back.

    The AiDotNet document's operator. A layer with in != out has two sets of directions,
    otherwise one. Each is stored, (features, K q), once for all layers of its width and
    seed.

    Attributes:
      seed: The seed of the directions.

    Example::

      >>> import jax.numpy as jnp
      >>> from mora_jax.operators import Orthogonal
      >>> op = Orthogonal(in_features=6, out_features=6, square_rank=3)
      >>> round(float(jnp.linalg.norm(op.delta_weight(jnp.eye(3))) ** 2), 3)
      3.0
    """

    seed: int = 0
    in_basis: jax.Array | np.ndarray = array_field()
    out_basis: jax.Array | np.ndarray = array_field()

    name = "orthogonal"
    arrays = ("in_basis", "out_basis")

    def _seeded_arrays(self) -> Mapping[str, Any]:
        width, seed = self.width, self.seed
        return {
            "in_basis": orthonormal(self.in_features, width, seed),
            "out_basis": orthonormal(self.out_features, width, seed),
        }

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
