"""Projection on orthonormal directions, and on fixed random ones."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mora_jax._common.types import ArrayLike
from mora_jax._jax.linear_algebra import matmul
from mora_jax.operators._base import Operator, Side
from mora_jax.operators._pytree import operator, seeded
from mora_jax.operators._random import orthonormal


class Projection(Operator):
    """Projection on q orthonormal directions of the inputs, and back along others.

    A subclass has `in_basis` and `out_basis`, (features, q), for fields, or `basis`.
    """

    @property
    def gains(self) -> tuple[float, float]:
        """Sizes c = 1 and d = sqrt(q / out) of orthonormal maps."""
        return 1.0, math.sqrt(self.square_rank / self.out_features)

    def basis(self, side: Side, dtype: DTypeLike) -> Array:
        """C, (in_features, q), or the transpose of D, (out_features, q)."""
        basis: Any = getattr(self, f"{side}_basis")
        return jnp.asarray(basis).astype(dtype)

    def _compress(self, x: Array) -> Array:
        return matmul(x, self.basis("in", x.dtype))

    def _decompress(self, h: Array) -> Array:
        return _times_transpose(h, self.basis("out", h.dtype))

    def matrix(self, m: Array) -> Array:
        # The product with the narrower side comes first: it is the smaller one. On TPUs
        # XLA would compute it again for each tile of the second without a barrier.
        c, d = self.basis("in", m.dtype), self.basis("out", m.dtype)
        if self.in_features < self.out_features:
            return _times_transpose(jax.lax.optimization_barrier(matmul(c, m)), d)
        return matmul(c, jax.lax.optimization_barrier(_times_transpose(m, d)))

    def _compress_units(self, indices: Array, dtype: DTypeLike) -> Array:
        return self.basis("in", dtype)[indices]


@operator
class Orthogonal(Projection):
    """Projection on q fixed random orthonormal directions, and the transpose back.

    The AiDotNet document's operator, and CoSA's (https://arxiv.org/abs/2602.05148).
    Each width has its directions, (features, q), which are stored once for all layers
    of that width and seed.

    Attributes:
      seed: The seed of the directions.

    Example::

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


def _times_transpose(h: Array, basis: Array) -> Array:
    """`h @ basis.T`, (..., q) and (features, q) to (..., features)."""
    # Not by a transpose: if the basis is a constant, XLA would compute its transpose
    # while it compiles, once for each layer.
    return jax.lax.dot_general(h, basis, (((h.ndim - 1,), (1,)), ((), ())))
