"""Hadamard: a random subspace that needs no stored matrix."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mora_jax._common.types import ArrayLike
from mora_jax._jax.linear_map import LinearMap
from mora_jax._jax.qwix_guard import matmul
from mora_jax.operators._base import Operator, Side
from mora_jax.operators._blocks import divide
from mora_jax.operators._pytree import array_field, operator
from mora_jax.operators._random import orthonormal, permutation, signs


@operator
class Hadamard(Operator):
    r"""Random signs, a fast orthogonal transform, then K q of its coordinates.

    .. math:: C = S\, (H_{2^a} \otimes Q_b)\, P, \qquad in = 2^a b,\ b \text{ odd}

    S holds signs, H is the Walsh-Hadamard matrix scaled to be orthogonal, Q a random
    orthogonal matrix, and P picks coordinates. D is the transpose of the same for
    `out_features`. It costs in * (a + b) per token and stores b * b numbers; a width
    that is a large prime gains nothing over `Orthogonal`.

    Attributes:
      seed: The seed of the signs, Q and the picked coordinates.

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

    def _seeded_arrays(self) -> Mapping[str, Any]:
        width, seed = self.width, self.seed
        return {
            "in_arrays": _transform_arrays(self.in_features, width, seed),
            "out_arrays": _transform_arrays(self.out_features, width, seed),
        }

    @property
    def isometry(self) -> bool:
        return True

    def _compress(self, x: jax.Array) -> jax.Array:
        return _Projection()(self.in_arrays, x)

    def _decompress(self, h: jax.Array) -> jax.Array:
        return _Projection().transpose(self.out_arrays, h)

    def _rows(self, side: Side, indices: jax.Array, dtype: DTypeLike) -> jax.Array:
        arrays = self.in_arrays if side == "in" else self.out_arrays
        return _transform_rows(indices, arrays, dtype)

    def matrix(self, side: Side, dtype: DTypeLike) -> jax.Array:
        """All rows, (features, K q): sooner made than row by row."""
        arrays = self.in_arrays if side == "in" else self.out_arrays
        return jax.lax.optimization_barrier(_transform_matrix(arrays, dtype))

    def transform_steps(self, side: Side) -> int:
        """How many operations the transform of this side needs for each feature."""
        features = self.in_features if side == "in" else self.out_features
        odd = _odd_part(features)
        return (features // odd).bit_length() - 1 + odd


def _odd_part(features: int) -> int:
    return features // (features & -features)


def _transform_arrays(features: int, width: int, seed: int) -> tuple[np.ndarray, ...]:
    """Signs (features,), Q (b, b) and coordinates (width,)."""
    b = _odd_part(features)
    coordinates = permutation(features, seed)[:width]
    return signs(features, seed), orthonormal(b, b, seed), coordinates


def _project(
    x: jax.Array, signs: ArrayLike, odd: ArrayLike, coordinates: ArrayLike
) -> jax.Array:
    """(..., features) -> (..., width)."""
    *batch, features = x.shape
    b = odd.shape[0]
    x = x * jnp.asarray(signs).astype(x.dtype)
    x = x.reshape(*batch, features // b, b)
    x = matmul(x, jnp.asarray(odd).astype(x.dtype))
    x = walsh_hadamard(x).reshape(*batch, features)
    return jnp.take(x, coordinates, axis=-1, mode="clip")


def _lift(
    h: jax.Array, signs: ArrayLike, odd: ArrayLike, coordinates: ArrayLike
) -> jax.Array:
    """(..., width) -> (..., features): the transpose of `_project`."""
    *batch, width = h.shape
    features, b = signs.shape[0], odd.shape[0]
    # Which entry of h a feature takes; beyond the last one there is a zero.
    entry = jnp.full(features, width).at[coordinates].set(jnp.arange(width))
    h = jnp.pad(h, [(0, 0)] * len(batch) + [(0, 1)])
    x = jnp.take(h, entry, axis=-1, mode="clip")
    x = walsh_hadamard(x.reshape(*batch, features // b, b))
    x = matmul(x, jnp.asarray(odd).astype(x.dtype).T)
    return x.reshape(*batch, features) * jnp.asarray(signs).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class _Projection(LinearMap):
    """`_project`, whose transpose JAX would make a scatter."""

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        return _project(operand, *residuals)

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        return _lift(cotangent, *residuals)


def _transform_rows(
    indices: jax.Array, arrays: tuple[ArrayLike, ...], dtype: DTypeLike
) -> jax.Array:
    """What `_project` makes of unit vectors, (...) -> (..., width), entry by entry."""
    signs, odd, coordinates = (jnp.asarray(a) for a in arrays)
    high, low = divide(indices[..., None], len(odd))
    column, entry = divide(coordinates, len(odd))
    walsh = _walsh(high, column, len(signs) // len(odd), dtype)
    return (signs[indices][..., None] * walsh * odd[low, entry]).astype(dtype)


def _transform_matrix(arrays: tuple[ArrayLike, ...], dtype: DTypeLike) -> jax.Array:
    """C, or the transpose of D: (features, width)."""
    signs, odd, coordinates = (jnp.asarray(a) for a in arrays)
    size = len(signs) // len(odd)
    column, entry = divide(coordinates, len(odd))
    walsh = _walsh(np.arange(size, dtype=np.uint32)[:, None], column, size, dtype)
    picked = odd.at[:, entry].get(mode="promise_in_bounds")
    matrix = (walsh[:, None, :] * picked).reshape(len(signs), -1)
    return (signs[:, None] * matrix).astype(dtype)


def _walsh(row: ArrayLike, column: jax.Array, size: int, dtype: DTypeLike) -> jax.Array:
    """Entries of the scaled Walsh-Hadamard matrix, no narrower than float32."""
    scale = np.asarray(1 / math.sqrt(size), jnp.promote_types(dtype, np.float32))
    # It is negative where its indices share an odd number of bits.
    shared = jax.lax.population_count(row & column)
    return jnp.where(shared % 2 == 1, -scale, scale)


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
