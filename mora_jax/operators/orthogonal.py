"""Orthogonal: a fixed random subspace."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._interception import matmul
from mora_jax.operators._base import Operator
from mora_jax.operators._basis_shard import BasisShard
from mora_jax.operators._pytree import array_field, operator
from mora_jax.operators._random import check_seed, orthonormal


@operator
class Orthogonal(Operator):
    """Projection on q fixed random orthonormal directions, and the transpose back.

    The AiDotNet document's operator. A layer with in != out has two sets of directions,
    else one. Each is stored, (features, q), once for all layers of its width and seed.

    Attributes:
      seed: of the directions.

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
    shard_type = BasisShard

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        basis = orthonormal(self.in_features, self.square_rank, self.seed)
        object.__setattr__(self, "in_basis", basis)
        basis = orthonormal(self.out_features, self.square_rank, self.seed)
        object.__setattr__(self, "out_basis", basis)

    @property
    def partition(self) -> bool:
        return False

    @property
    def isometry(self) -> bool:
        return True

    def _compress(self, x: jax.Array) -> jax.Array:
        return matmul(x, jnp.asarray(self.in_basis).astype(x.dtype))

    def _decompress(self, h: jax.Array) -> jax.Array:
        return matmul(h, jnp.asarray(self.out_basis).astype(h.dtype).T)

    def _basis(self, side: str, start: Any, size: int, dtype: Any) -> jax.Array:
        basis = jnp.asarray(getattr(self, f"{side}_basis"))
        return jax.lax.dynamic_slice_in_dim(basis, start, size).astype(dtype)

    def _lookup(
        self, m: jax.Array, indices: jax.Array, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        rows = jnp.asarray(self.in_basis)[indices].astype(m.dtype)
        return self._decompress(matmul(rows, m, precision))
