"""Orthogonal: a fixed random subspace."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mora_jax.operators._projection import Projection
from mora_jax.operators._pytree import array_field, operator
from mora_jax.operators._random import orthonormal


@operator
class Orthogonal(Projection):
    """Projection on q fixed random orthonormal directions, and the transpose back.

    The AiDotNet document's operator. A layer with in != out has two sets of directions,
    otherwise one. Each is stored, (features, q), once for all layers of its width and
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
        q, seed = self.square_rank, self.seed
        return {
            "in_basis": orthonormal(self.in_features, q, seed),
            "out_basis": orthonormal(self.out_features, q, seed),
        }
