"""Hadamard: a random subspace that needs no stored matrix."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._types import ArrayLike
from mora_jax.operators._base import Operator, array_field, operator
from mora_jax.operators._random import check_seed, orthonormal, permutation, signs


@operator
class Hadamard(Operator):
    r"""Random signs, a fast orthogonal transform, then q of its coordinates.

    .. math:: C = S\, (H_{2^a} \otimes Q_b)\, P, \qquad in = 2^a b,\ b \text{ odd}

    S holds signs, H is the Walsh-Hadamard matrix scaled to be orthogonal, Q a random
    orthogonal matrix, and P picks coordinates. D is the transpose of the same for
    `out_features`. It costs in * (a + b) per token and stores b * b numbers; a width
    that is a large prime gains nothing over `Orthogonal`.

    Attributes:
      seed: of the signs, Q and the picked coordinates.

    Example::

      >>> import jax.numpy as jnp
      >>> from mora_jax.operators import Hadamard
      >>> op = Hadamard(in_features=12, out_features=12, square_rank=4)
      >>> op.compress(op.decompress(jnp.eye(4))).round(3) + 0.0
      Array([[1., 0., 0., 0.],
             [0., 1., 0., 0.],
             [0., 0., 1., 0.],
             [0., 0., 0., 1.]], dtype=float32)
    """

    seed: int = 0
    in_arrays: tuple[jax.Array | np.ndarray, ...] = array_field()
    out_arrays: tuple[jax.Array | np.ndarray, ...] = array_field()

    name = "hadamard"
    arrays = ("in_arrays", "out_arrays")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        for side in ("in", "out"):
            features = getattr(self, f"{side}_features")
            arrays = _arrays(features, self.square_rank, self.seed)
            object.__setattr__(self, f"{side}_arrays", arrays)

    @property
    def partition(self) -> bool:
        return False

    @property
    def isometry(self) -> bool:
        return True

    def _compress(self, x: jax.Array) -> jax.Array:
        return _project(x, *self.in_arrays)

    def _decompress(self, h: jax.Array) -> jax.Array:
        return _lift(h, *self.out_arrays)

    def _lookup(
        self, m: jax.Array, indices: jax.Array, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        rows = _rows(indices, *self.in_arrays).astype(m.dtype)
        return self._decompress(jnp.matmul(rows, m, precision=precision))


def _odd_part(features: int) -> int:
    return features // (features & -features)


def _arrays(features: int, square_rank: int, seed: int) -> tuple[np.ndarray, ...]:
    """Signs (features,), Q (b, b) and coordinates (q,)."""
    b = _odd_part(features)
    coordinates = permutation(features, seed)[:square_rank]
    return signs(features, seed), orthonormal(b, b, seed), coordinates


def _project(
    x: jax.Array, signs: ArrayLike, odd: ArrayLike, coordinates: ArrayLike
) -> jax.Array:
    """(..., features) -> (..., q)."""
    *batch, features = x.shape
    b = odd.shape[0]
    x = x * jnp.asarray(signs).astype(x.dtype)
    x = x.reshape(*batch, features // b, b) @ jnp.asarray(odd).astype(x.dtype)
    x = walsh_hadamard(x).reshape(*batch, features)
    return jnp.take(x, coordinates, axis=-1)


def _rows(
    indices: jax.Array, signs: ArrayLike, odd: ArrayLike, coordinates: ArrayLike
) -> jax.Array:
    """What `_project` makes of unit vectors, (...) -> (..., q), entry by entry."""
    b = odd.shape[0]
    high, low = indices[..., None] // b, indices[..., None] % b
    coordinates = jnp.asarray(coordinates)
    # The Walsh-Hadamard matrix holds -1 where its indices share an odd number of bits.
    shared = jax.lax.population_count(high & (coordinates // b))
    walsh = (1 - 2 * (shared % 2)) / math.sqrt(signs.shape[0] // b)
    sign = jnp.asarray(signs)[indices][..., None]
    return sign * walsh * jnp.asarray(odd)[low, coordinates % b]


def _lift(
    h: jax.Array, signs: ArrayLike, odd: ArrayLike, coordinates: ArrayLike
) -> jax.Array:
    """(..., q) -> (..., features): the transpose of `_project`."""
    *batch, _ = h.shape
    features, b = signs.shape[0], odd.shape[0]
    x = (
        jnp.zeros((*batch, features), h.dtype)
        .at[..., coordinates]
        .set(h, unique_indices=True)
    )
    x = walsh_hadamard(x.reshape(*batch, features // b, b))
    x = x @ jnp.asarray(odd).astype(x.dtype).T
    return x.reshape(*batch, features) * jnp.asarray(signs).astype(x.dtype)


def walsh_hadamard(x: jax.Array) -> jax.Array:
    """The orthogonal Walsh-Hadamard transform along axis -2, in O(d log d).

    Args:
      x: (..., 2**a, b).

    Returns:
      (..., 2**a, b).
    """
    *batch, size, b = x.shape
    # Scaled first, so that partial sums of float16 stay in range.
    x = x * np.asarray(1 / math.sqrt(size), x.dtype)
    half = b
    while half < size * b:
        pairs = x.reshape(*batch, size * b // (2 * half), 2, half)
        even, odd = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([even + odd, even - odd], axis=-2)
        half *= 2
    return x.reshape(*batch, size, b)
