"""What an operator is: the fixed pair around M."""

import abc
import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Integer

from mora_jax._interception import undisturbed
from mora_jax._types import ArrayLike, Shape
from mora_jax.operators._checks import check_array, positive_integer
from mora_jax.operators._product import product


@dataclasses.dataclass(frozen=True)
class Operator(abc.ABC):
    r"""The two fixed linear maps around the trained square matrix M.

    .. math:: x \mapsto D(C(x) M), \qquad C: in \to (n, q), \quad D: (n, q) \to out

    A subclass adds its settings, `_compress`, `_decompress` and what it claims; the
    forward product and the merged kernel both follow from the two maps. Equality and
    hash are those of the settings. Arrays that a seed determines are pytree leaves, so
    that a jitted function that is handed an operator takes them as arguments.

    Attributes:
      in_features: length of the vectors that `compress` takes.
      out_features: length of the vectors that `decompress` returns.
      square_rank: q, the width of M (r-hat in the paper).
    """

    in_features: int
    out_features: int
    square_rank: int

    name: ClassVar[str]
    """The word for it in `MoRAConfig(operator=...)`."""
    arrays: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that hold arrays."""
    bounded: ClassVar[bool] = True
    """Whether q may not exceed `min(in_features, out_features)`."""
    multiple_of: ClassVar[int] = 1
    """What q must be divisible by."""
    shard_type: ClassVar[type[Any] | None] = None
    """The class of its parts on a mesh, if not `_shard.Shard`, which serves all."""
    fold_from: ClassVar[float] = 2.0
    """From how many rows on it pays to fold the update into the kernel, in units of
    in * out / (in + out)."""

    def __post_init__(self) -> None:
        for field in ("in_features", "out_features", "square_rank"):
            positive_integer(field, getattr(self, field))
        q, limit = self.square_rank, min(self.in_features, self.out_features)
        if self.bounded and q > limit:
            raise ValueError(
                f"square_rank of {self.name} must be at most "
                f"min(in_features, out_features) = {limit}, got {q}"
            )
        if q % self.multiple_of:
            raise ValueError(
                f"square_rank of {self.name} must be a multiple of {self.multiple_of}, "
                f"got {q}; the nearest is {q + self.multiple_of - q % self.multiple_of}"
            )

    @property
    def compressed_shape(self) -> Shape:
        """Shape of one compressed vector: (q,), or (n, q) for a block operator."""
        return (self.square_rank,)

    @property
    def block(self) -> bool:
        """Whether M acts on several blocks of the input, one after another."""
        return len(self.compressed_shape) > 1

    @property
    @abc.abstractmethod
    def partition(self) -> bool:
        """Whether each input feature enters exactly one compressed coordinate."""

    @property
    @abc.abstractmethod
    def isometry(self) -> bool:
        """Whether C and D are orthonormal: C^T C = I and D D^T = I on (n, q).

        The update then has the Frobenius norm of M, times sqrt(n) with n blocks, at
        every width.
        """

    @abc.abstractmethod
    def _compress(self, x: jax.Array) -> jax.Array:
        """C. `x`: (..., in_features) -> (..., *compressed_shape)."""

    @abc.abstractmethod
    def _decompress(self, h: jax.Array) -> jax.Array:
        """D. `h`: (..., *compressed_shape) -> (..., out_features)."""

    def _meet(self, x: jax.Array) -> jax.Array:
        """C(x) for the product with M, (..., in_features) -> (..., *any, q).

        A block operator adds blocks that meet at an output, and leaves out those that
        have no effect: then M multiplies as few rows as it can.
        """
        return self._compress(x)

    def _spread(self, h: jax.Array) -> jax.Array:
        """D of what `_meet` left, (..., *any, q) -> (..., out_features)."""
        return self._decompress(h)

    def _product(
        self, m: jax.Array, x: jax.Array, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        """D(C(x) M). `x`: (..., in_features) -> (..., out_features)."""
        return product(self, m, x, precision)

    def _delta(self, m: jax.Array) -> jax.Array:
        """C (I_n x M) D. `m`: (q, q) -> (in_features, out_features).

        The rows of I_n x M go through D, block by block, the columns of what results
        through the transpose of C. Where kernels are folded it is made anew in each
        step, so block operators have a faster way of their own.
        """

        def block_rows(k: jax.Array) -> jax.Array:
            alone = jnp.zeros((self.square_rank, *self.compressed_shape), m.dtype)
            return self._decompress(alone.at[:, k].set(m))

        # One at a time: all n together would take n * q by n * q numbers.
        if self.block:
            rows = jax.lax.map(block_rows, jnp.arange(self.compressed_shape[0]))
        else:
            rows = self._decompress(m)
        return _transpose_compress(self, rows)

    @abc.abstractmethod
    def _lookup(
        self, m: jax.Array, indices: jax.Array, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        """D(C(e_i) M) for unit vectors e_i. `indices`: (...) -> (..., out_features)."""

    def compress(
        self, x: Float[ArrayLike, "*batch features"]
    ) -> Float[jax.Array, "..."]:
        """C(x).

        Args:
          x: (..., in_features).

        Returns:
          (..., q), or (..., n, q) for a block operator.

        Raises:
          TypeError: `x` is not a floating-point array.
          ValueError: its last axis is not `in_features` long.
        """
        check_array("x", x, (self.in_features,))
        return self._compress(jnp.asarray(x))

    def decompress(self, h: Float[ArrayLike, "..."]) -> Float[jax.Array, "*batch out"]:
        """D(h).

        Args:
          h: (..., q), or (..., n, q) for a block operator.

        Returns:
          (..., out_features).

        Raises:
          TypeError: `h` is not a floating-point array.
          ValueError: its last axes are not `compressed_shape`.
        """
        check_array("h", h, self.compressed_shape)
        return self._decompress(jnp.asarray(h))

    def apply(
        self,
        m: Float[ArrayLike, "q q"],
        x: Float[ArrayLike, "*batch features"],
        *,
        precision: jax.lax.PrecisionLike = None,
    ) -> Float[jax.Array, "*batch out"]:
        """D(C(x) M), the paper's equation 3.

        Args:
          m: (q, q).
          x: (..., in_features).
          precision: of the product with `m`, as in `jax.numpy.matmul`.

        Returns:
          (..., out_features).
        """
        self._check_m(m)
        check_array("x", x, (self.in_features,))
        return _apply(self, m, x, precision)

    def apply_transpose(
        self,
        m: Float[ArrayLike, "q q"],
        y: Float[ArrayLike, "*batch out"],
        *,
        precision: jax.lax.PrecisionLike = None,
    ) -> Float[jax.Array, "*batch features"]:
        r"""The transpose of `apply`, for a kernel that is used both ways.

        .. math:: ((y\, D^T)\, M^T)\, C^T

        Args:
          m: (q, q).
          y: (..., out_features).
          precision: of the product with `m`.

        Returns:
          (..., in_features): the product of `y` with the transpose of
          `delta_weight(m)`, which is not formed.
        """
        check_array("y", y, (self.out_features,))
        x = jax.ShapeDtypeStruct((*y.shape[:-1], self.in_features), y.dtype)
        forward = functools.partial(self.apply, m, precision=precision)
        (transposed,) = jax.linear_transpose(forward, x)(jnp.asarray(y))
        return transposed

    def lookup(
        self,
        m: Float[ArrayLike, "q q"],
        indices: Integer[ArrayLike, "*batch"],
        *,
        precision: jax.lax.PrecisionLike = None,
    ) -> Float[jax.Array, "*batch out"]:
        """Rows of `delta_weight(m)`, without the others: what an embedding wants.

        Args:
          m: (q, q).
          indices: (...); negative ones count from the end, and beyond either end there
            is no meaningful row.
          precision: of the product with `m`.

        Returns:
          (..., out_features).

        Raises:
          TypeError: `indices` are no integers.
        """
        self._check_m(m)
        if not isinstance(indices, jax.Array | np.ndarray):
            raise TypeError(f"indices must be an array, got {type(indices).__name__}")
        if not jnp.issubdtype(indices.dtype, jnp.integer):
            raise TypeError(f"indices must be integers, got {indices.dtype}")
        # Wide, or a vocabulary beyond the range of a small type would wrap around.
        indices = jnp.asarray(indices)
        indices = indices.astype(jnp.result_type(indices.dtype, jnp.int32))
        return self._lookup(jnp.asarray(m), indices % self.in_features, precision)

    def delta_weight(
        self, m: Float[ArrayLike, "q q"]
    ) -> Float[jax.Array, "features out"]:
        r"""The update as a kernel: a product of `x` with it is `apply(m, x)`.

        .. math:: C (I_n \otimes M) D

        Args:
          m: (q, q).

        Returns:
          (in_features, out_features).
        """
        self._check_m(m)
        return _delta_weight(self, m)

    def compress_matrix(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """C itself: (in_features, q), or (in_features, n * q) for a block operator."""
        shape = self.compressed_shape
        units = jnp.eye(math.prod(shape), dtype=dtype)
        return _transpose_compress(self, units.reshape(*shape, -1))

    def _check_m(self, m: ArrayLike) -> None:
        check_array("m", m, (self.square_rank,) * 2)
        if m.ndim != 2:
            raise ValueError(f"m must have two axes, got shape {m.shape}; use jax.vmap")


# Compiled as wholes: one program a shape, which all layers of that shape share.


@functools.partial(jax.jit, static_argnames="precision")
@undisturbed
def _apply(
    op: Operator, m: ArrayLike, x: ArrayLike, precision: jax.lax.PrecisionLike
) -> jax.Array:
    return op._product(jnp.asarray(m), jnp.asarray(x), precision)


@jax.jit
@undisturbed
def _delta_weight(op: Operator, m: ArrayLike) -> jax.Array:
    return op._delta(jnp.asarray(m))


def _transpose_compress(op: Operator, columns: jax.Array) -> jax.Array:
    """C as a matrix, times `columns`: (*compressed_shape, k) -> (in_features, k)."""
    vector = jax.ShapeDtypeStruct((op.in_features,), columns.dtype)
    transpose = jax.linear_transpose(op.compress, vector)
    (weight,) = jax.vmap(transpose, in_axes=-1, out_axes=-1)(columns)
    return weight
