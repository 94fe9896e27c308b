"""Hadamard: a random subspace whose directions take little memory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from mora_jax._common.types import ArrayLike
from mora_jax.operators._base import Side
from mora_jax.operators._pytree import operator, seeded
from mora_jax.operators._random import orthonormal, permutation, signs
from mora_jax.operators.decoupling import divide
from mora_jax.operators.orthogonal import Projection


@operator
class Hadamard(Projection):
    r"""Projection on q columns of a structured orthogonal matrix with random signs.

    .. math:: C = S\, (H_{2^a} \otimes Q_b)\, P, \qquad in = 2^a b,\ b \text{ odd}

    S holds signs, H is the Walsh-Hadamard matrix scaled to be orthogonal, Q a random
    orthogonal matrix, and P picks coordinates. D is the transpose of the same for
    `out_features`. It computes as `Orthogonal` does and stores b * b numbers instead of
    q * in: C is made of them whenever it is used.

    Attributes:
      seed: The seed of the signs, Q and the picked coordinates.

    Example::

      >>> from mora_jax.operators import Hadamard
      >>> op = Hadamard(in_features=12, out_features=12, square_rank=2)
      >>> op.compress(op.decompress(jnp.eye(2))).round(3) + 0.0
      Array([[1., 0.],
             [0., 1.]], dtype=float32)
    """

    seed: int = 0
    in_arrays: tuple[ArrayLike, ...] = seeded(lambda op: _seeded(op, op.in_features))
    out_arrays: tuple[ArrayLike, ...] = seeded(lambda op: _seeded(op, op.out_features))

    name = "hadamard"

    def basis(self, side: Side, dtype: DTypeLike) -> Array:
        arrays = self.in_arrays if side == "in" else self.out_arrays
        signs, odd, coordinates = (jnp.asarray(a) for a in arrays)
        size = len(signs) // len(odd)
        column, entry = divide(coordinates, len(odd))
        row = np.arange(size, dtype=np.uint32)[:, None]
        # An entry of H is negative where its indices share an odd number of bits.
        shared = jax.lax.population_count(row & column)
        scale = np.asarray(1 / math.sqrt(size), jnp.promote_types(dtype, np.float32))
        walsh = jnp.where(shared % 2 == 1, -scale, scale)
        picked = odd.at[:, entry].get(mode="promise_in_bounds")
        basis = (walsh[:, None, :] * picked).reshape(len(signs), -1)
        # Made once: XLA would compute it again for each tile of a product. A fast
        # transform was slower than that product from a few rows on, on CPUs and chips.
        return jax.lax.optimization_barrier((signs[:, None] * basis).astype(dtype))


def _seeded(op: Hadamard, features: int) -> tuple[np.ndarray, ...]:
    """Signs (features,), Q (b, b) and coordinates (q,)."""
    b = features // (features & -features)  # without its factors of two
    coordinates = permutation(features, op.seed)[: op.square_rank]
    return signs(features, op.seed), orthonormal(b, b, op.seed), coordinates
