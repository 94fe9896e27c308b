"""Projection on orthonormal directions: random, structured or given ones."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from mora_jax._common.checks import check_concrete
from mora_jax._common.types import ArrayLike
from mora_jax._jax.linear_algebra import matmul
from mora_jax.operators import _pytree
from mora_jax.operators._base import Operator, Side
from mora_jax.operators._pytree import given, operator, seeded
from mora_jax.operators.decoupling import divide

# A number that `in_eight_bits` rounds moves by at most 2**-4 of itself. So a column of
# length 1 moves by at most e = 2**-4, and a product of two by at most 2 e + e**2.
TOLERANCE = 1e-3 + 2**-3 + 2**-8
"""The largest distance of the products of a basis's columns from the unit matrix."""


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
        return jnp.asarray(getattr(self, f"{side}_basis")).astype(dtype)

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
    The directions, (features, q), are stored once for all layers of a width and seed.

    Attributes:
      seed: The seed of the directions.

    Example::

      >>> op = Orthogonal(in_features=6, out_features=6, square_rank=3)
      >>> round(float(jnp.linalg.norm(op.delta_weight(jnp.eye(3))) ** 2), 3)
      3.0
    """

    seed: int = 0
    in_basis: ArrayLike = seeded(
        lambda op: _pytree.orthonormal(op.in_features, op.square_rank, op.seed)
    )
    out_basis: ArrayLike = seeded(
        lambda op: _pytree.orthonormal(op.out_features, op.square_rank, op.seed)
    )

    name = "orthogonal"


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
        signs, odd, coordinates = map(jnp.asarray, getattr(self, f"{side}_arrays"))
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


@operator
class Subspace(Projection):
    r"""Projection on q given orthonormal directions, and back along others.

    `directions` makes it from a gradient: inputs of the layer lie in its leading
    directions, and outputs should move in them. No seed gives such directions, so they
    are stored with the adapter: q (in + out) numbers. Those that `in_eight_bits` rounds
    take a byte each in a file, and others two.

    Attributes:
      in_basis, out_basis: Directions, (features, q) or (*stack, features, q), bfloat16.

    Raises:
      TypeError: A basis is not a floating-point array, or is a tracer.
      ValueError: A basis has another shape, or its columns are not orthonormal.

    Example::

      >>> first_two = np.eye(6, 2)
      >>> op = Subspace(6, 6, 2, in_basis=first_two, out_basis=first_two[::-1])
      >>> op.delta_weight(np.eye(2)).tolist()[0]
      [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    """

    in_basis: ArrayLike = given(lambda op: _orthonormal(op, "in"))
    out_basis: ArrayLike = given(lambda op: _orthonormal(op, "out"))

    name = "subspace"

    @property
    def gains(self) -> tuple[float, float]:
        """Sizes c = sqrt(in / q) and d = sqrt(q / out) for numbers in the subspace."""
        # If all of x lies in the directions of C, then the q numbers of C(x) hold what
        # the `in` numbers of x held: their sum of squares is the same.
        c = math.sqrt(self.in_features / self.square_rank)
        return c, math.sqrt(self.square_rank / self.out_features)


EIGHT_BITS_FACTOR = 256
"""Files hold so many times the numbers that `in_eight_bits` rounds.

They are at most 1, and float8_e4m3fn holds 448 and less. An entry of a unit column of
16,384 features is about 2**-7, and so 2 there: far above the smallest, 2**-9.
"""


def in_eight_bits(basis: Array) -> Array:
    """Directions rounded to numbers that files hold in a byte each, as bfloat16."""
    scaled = (basis * EIGHT_BITS_FACTOR).astype(jnp.float8_e4m3fn)
    return scaled.astype(jnp.bfloat16) / EIGHT_BITS_FACTOR


def _times_transpose(h: Array, basis: Array) -> Array:
    """`h @ basis.T`, (..., q) and (features, q) to (..., features)."""
    # Not by a transpose: XLA would compute a constant's for each layer as it compiles.
    return jax.lax.dot_general(h, basis, (((h.ndim - 1,), (1,)), ((), ())))


def _seeded(op: Hadamard, features: int) -> tuple[np.ndarray, ...]:
    """Signs (features,), Q (b, b) and coordinates (q,)."""
    b = features // (features & -features)  # without its factors of two
    coordinates = _pytree.permutation(features, op.seed)[: op.square_rank]
    q = _pytree.orthonormal(b, b, op.seed)
    return _pytree.signs(features, op.seed), q, coordinates


def _orthonormal(op: Subspace, side: Side) -> np.ndarray:
    """A basis of `op` as a bfloat16 array of its own, checked."""
    name = f"{side}_basis"
    basis: Any = getattr(op, name)
    shape = getattr(op, f"{side}_features"), op.square_rank
    check_concrete(basis, name, (*np.shape(basis)[:-2], *shape))
    basis = np.array(basis, jnp.bfloat16)
    # Not by NumPy, whose threads keep the cores busy for a while after a product: the
    # directions of a model's gradient took twice as long beside them.
    with jax.ensure_compile_time_eval():
        wide = jnp.asarray(basis, np.float32)
        products = np.asarray(wide.mT @ wide)
    if not np.allclose(products, np.eye(op.square_rank), atol=TOLERANCE):
        raise ValueError(f"the columns of {name} must be orthonormal")
    basis.setflags(write=False)
    return basis
