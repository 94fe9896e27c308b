"""Orthogonal: a fixed random subspace."""

from mora_jax._common.types import ArrayLike
from mora_jax.operators._projection import Projection
from mora_jax.operators._pytree import operator, seeded
from mora_jax.operators._random import orthonormal


@operator
class Orthogonal(Projection):
    """Projection on q fixed random orthonormal directions, and the transpose back.

    The AiDotNet document's operator, and CoSA's (https://arxiv.org/abs/2602.05148).
    Each width has its directions, (features, q), which are stored once for all layers
    of that width and seed.

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
    in_basis: ArrayLike = seeded(
        lambda op: orthonormal(op.in_features, op.square_rank, op.seed)
    )
    out_basis: ArrayLike = seeded(
        lambda op: orthonormal(op.out_features, op.square_rank, op.seed)
    )

    name = "orthogonal"
