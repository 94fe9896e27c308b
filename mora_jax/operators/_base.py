"""What an operator is: the fixed pair of linear maps around M."""

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Integer, PRNGKeyArray

from mora_jax._common.checks import check_array, check_seed, positive_integer
from mora_jax._common.types import ArrayLike, Shape
from mora_jax._jax.qwix_guard import undisturbed

Side = Literal["in", "out"]


@dataclasses.dataclass(frozen=True)
class Operator(abc.ABC):
    r"""The two fixed linear maps around the trained square matrix M.

    .. math:: x \mapsto D(C(x) M), \qquad C: in \to (n, q), \quad D: (n, q) \to out

    M may be K squares of the same width instead of one. C(x) is then a sequence of
    blocks of q numbers, of which block k is multiplied by square k mod K: the blocks of
    a block operator, or the K blocks of C(x) of another one, which has K q numbers.

    A subclass is decorated with `operator` and gives `name`, its settings as fields,
    and three methods: `_compress` and `_decompress`, which are C and D, and `_rows`,
    which gives rows of both as matrices. All else follows from these. Equality and hash
    are those of the settings. Arrays that a seed determines are pytree leaves, so that
    a jitted function that is handed an operator takes them as arguments.

    Attributes:
      in_features: The length of the vectors that `compress` takes.
      out_features: The length of the vectors that `decompress` returns.
      square_rank: q, the width of M (r-hat in the paper).
      squares: K, how many squares M is.
    """

    in_features: int
    out_features: int
    square_rank: int
    squares: int = dataclasses.field(default=1, kw_only=True)

    name: ClassVar[str]
    """The word for it in `MoRAConfig(operator=...)`."""
    arrays: ClassVar[tuple[str, ...]] = ()
    """The names of the fields that hold arrays, which `_seeded_arrays` gives."""
    bounded: ClassVar[bool] = True
    """Whether q may not exceed `min(in_features, out_features)`."""
    given: ClassVar[bool] = False
    """Whether the arrays are given, not determined by settings; it has a `digest`."""
    block: ClassVar[bool] = False
    """Whether M acts on several blocks of the input, one after another."""
    q_multiple_of: ClassVar[int] = 1
    """What q must be divisible by."""
    linear: ClassVar[bool] = True
    """True if the delta is linear in what is trained, so that weighted sums of what is
    trained are exact."""
    tiles: ClassVar[bool] = False
    """Whether C and D cut features into pieces of q, the last of which may be short."""

    def __post_init__(self) -> None:
        for field in ("in_features", "out_features", "square_rank", "squares"):
            positive_integer(field, getattr(self, field))
        q, limit = self.square_rank, min(self.in_features, self.out_features)
        if self.bounded and q > limit:
            raise ValueError(
                f"square_rank of {self.name} must be at most "
                f"min(in_features, out_features) = {limit}, got {q}"
            )
        if self.squares > self.most_squares:
            raise ValueError(
                f"squares of {self.name} must be at most {self.most_squares} for "
                f"{self.in_features} -> {self.out_features} features and square_rank="
                f"{q}, so that each multiplies something; got {self.squares}"
            )
        step = self.q_multiple_of
        if q % step:
            raise ValueError(
                f"square_rank of {self.name} must be a multiple of {step}, "
                f"got {q}; the nearest is {q + step - q % step}"
            )
        if self.arrays:
            check_seed(getattr(self, "seed", 0))
            for field, array in self._seeded_arrays().items():
                object.__setattr__(self, field, array)

    @property
    def compressed_shape(self) -> Shape:
        """Shape of one compressed vector: (K q,), or (n, q) for a block operator."""
        return (self.width,)

    @property
    def width(self) -> int:
        """The width of all squares together, K q."""
        return self.squares * self.square_rank

    @property
    def m_shape(self) -> Shape:
        """Shape of M: (q, q), or (K, q, q) for K squares."""
        squares = (self.squares,) if self.squares > 1 else ()
        return (*squares, self.square_rank, self.square_rank)

    @property
    def most_squares(self) -> int:
        """The largest K with which each square multiplies something."""
        return max(1, min(self.in_features, self.out_features) // self.square_rank)

    @property
    def isometry(self) -> bool:
        """Whether C and D are orthonormal: C^T C = I and D D^T = I on (n, q).

        The delta then has the Frobenius norm of M, times sqrt(n) with n blocks, at
        every width.
        """
        return False

    @property
    def gains(self) -> tuple[float, float]:
        r"""How large C and D make numbers: c and d, each a root mean square.

        .. math:: c = \|C\|_F / \sqrt{n q}, \qquad d = \|D\|_F / \sqrt{out}

        c is the size of a number of C(x) if those of x are independent and of size 1,
        and d is the norm of the weights that an output has. An isometry has c = 1, and
        the n q numbers of C(x) share the norms of its outputs.

        Raises:
          NotImplementedError: The operator is none, and does not give its own.
        """
        if not self.isometry:
            raise NotImplementedError(
                f"{type(self).__name__} is no isometry: give it a property `gains`, "
                "the root mean squares (c, d), or use scale='paper'"
            )
        numbers = math.prod(self.compressed_shape)
        return 1.0, math.sqrt(numbers / self.out_features)

    @property
    def fine_tuning_scale(self) -> float:
        r"""The factor with which M learns at the learning rate of full fine-tuning.

        .. math:: s = \frac{in}{q\, c\, d} \, K^{-1/4}

        Adam changes each trained number by about the rate, eta, whatever its gradient.
        Let the numbers of x be of size 1. If the kernel is trained, an output changes
        by up to eta in: all `in` changes can have the sign that counts. If M is
        trained, the numbers of C(x) have the size c. Each number of C(x) M changes by
        up to eta q c, and an output, which adds them up with weights of norm d and of
        either sign, by eta q c d. So s makes the two alike (see `gains`).

        Each of K squares sees 1 / K of what one square would, so that its gradient is
        noisier and more of its steps are in vain. The exponent is measured, see
        docs/learning-rates.md.
        """
        c, d = self.gains
        return self.in_features / (self.square_rank * c * d) * self.squares**-0.25

    def start(
        self, stack: Shape, init: str, key: PRNGKeyArray | None, dtype: DTypeLike
    ) -> jax.Array:
        """Trained array at its start, (*stack, *m_shape).

        Args:
          stack: The sizes of the kernel's stack axes.
          init: "zeros" for a delta of zero; "gaussian" for numbers of standard
            deviation 1/sqrt(q).
          key: The key for random numbers; None where none are drawn.
          dtype: The dtype of the array.

        Raises:
          ValueError: Random numbers are needed and there is no key.
        """
        shape = (*stack, *self.m_shape)
        if init == "zeros":
            return _zeros(shape, dtype)
        if key is None:
            raise ValueError(f"init={init!r} needs a key, got None")
        return _normal(key, shape, dtype) / math.sqrt(self.square_rank)

    @abc.abstractmethod
    def _compress(self, x: jax.Array) -> jax.Array:
        """C. `x`: (..., in_features) -> (..., *compressed_shape)."""

    @abc.abstractmethod
    def _decompress(self, h: jax.Array) -> jax.Array:
        """D. `h`: (..., *compressed_shape) -> (..., out_features)."""

    @abc.abstractmethod
    def _rows(self, side: Side, indices: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Rows of C, or of the transpose of D.

        Args:
          side: "in" for C, whose row i is C(e_i) for a unit vector e_i; "out" for the
            transpose of D, whose row j holds the weights of output j.
          indices: (...), each in range.
          dtype: The dtype of the result.

        Returns:
          (..., *compressed_shape).
        """

    def _seeded_arrays(self) -> Mapping[str, Any]:
        """The fields that `arrays` names, as the seed determines them."""
        return {}

    def compress(
        self, x: Float[ArrayLike, "*batch features"]
    ) -> Float[jax.Array, "..."]:
        """C(x).

        Args:
          x: (..., in_features).

        Returns:
          (..., K q), or (..., n, q) for a block operator.

        Raises:
          TypeError: `x` is not a floating-point array.
          ValueError: Its last axis is not `in_features` long.
        """
        check_array("x", x, (self.in_features,))
        return self._compress(jnp.asarray(x))

    def decompress(self, h: Float[ArrayLike, "..."]) -> Float[jax.Array, "*batch out"]:
        """D(h).

        Args:
          h: (..., K q), or (..., n, q) for a block operator.

        Returns:
          (..., out_features).

        Raises:
          TypeError: `h` is not a floating-point array.
          ValueError: Its last axes are not `compressed_shape`.
        """
        check_array("h", h, self.compressed_shape)
        return self._decompress(jnp.asarray(h))

    def compress_matrix(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """C itself: (in_features, K q), or (in_features, n q) for a block operator."""
        rows = self._rows("in", jnp.arange(self.in_features), dtype)
        return rows.reshape(self.in_features, math.prod(self.compressed_shape))

    def apply(
        self,
        m: Float[ArrayLike, "*squares q q"],
        x: Float[ArrayLike, "*batch features"],
        *,
        precision: jax.lax.PrecisionLike = None,
    ) -> Float[jax.Array, "*batch out"]:
        """D(C(x) M), the paper's equation 3 without alpha.

        Args:
          m: M, (q, q); or (K, q, q).
          x: (..., in_features).
          precision: The precision of the product with M, as in `jax.numpy.matmul`.

        Returns:
          (..., out_features).

        Raises:
          TypeError: `m` or `x` is not a floating-point array.
          ValueError: A shape does not fit.
        """
        check_array("x", x, (self.in_features,))
        return undisturbed(self._delta(m, precision).rows)(jnp.asarray(x))

    def apply_transpose(
        self,
        m: Float[ArrayLike, "*squares q q"],
        y: Float[ArrayLike, "*batch out"],
        *,
        precision: jax.lax.PrecisionLike = None,
    ) -> Float[jax.Array, "*batch features"]:
        r"""The transpose of `apply`, for a kernel that is used both ways.

        .. math:: ((y\, D^T)\, M^T)\, C^T

        Args:
          m: M, (q, q); or (K, q, q).
          y: (..., out_features).
          precision: The precision of the product with M.

        Returns:
          (..., in_features): the product of `y` with the transpose of
          `delta_weight(m)`, which is not formed.

        Raises:
          TypeError, ValueError: As `apply`.
        """
        check_array("y", y, (self.out_features,))
        delta = self._delta(m, precision)
        return undisturbed(delta.transposed_rows)(jnp.asarray(y))

    def lookup(
        self,
        m: Float[ArrayLike, "*squares q q"],
        indices: Integer[ArrayLike, "*batch"],
        *,
        precision: jax.lax.PrecisionLike = None,
    ) -> Float[jax.Array, "*batch out"]:
        """Rows of `delta_weight(m)`, without the others, which an embedding wants.

        Args:
          m: M, (q, q); or (K, q, q).
          indices: (...); negative ones count from the end, and beyond either end there
            is no meaningful row.
          precision: The precision of the product with M.

        Returns:
          (..., out_features).

        Raises:
          TypeError: `indices` holds no integers.
        """
        if not isinstance(indices, jax.Array | np.ndarray):
            raise TypeError(f"indices must be an array, got {type(indices).__name__}")
        if not jnp.issubdtype(indices.dtype, jnp.integer):
            raise TypeError(f"indices must be integers, got {indices.dtype}")
        delta = self._delta(m, precision)
        return undisturbed(delta.lookup)(jnp.asarray(indices))

    def delta_weight(
        self, m: Float[ArrayLike, "*squares q q"]
    ) -> Float[jax.Array, "features out"]:
        r"""The delta as a kernel: a product of `x` with it is `apply(m, x)`.

        .. math:: C (I_n \otimes M) D

        Args:
          m: M, (q, q); or (K, q, q).

        Returns:
          (in_features, out_features).

        Raises:
          TypeError, ValueError: As `apply`.
        """
        return undisturbed(self._delta(m).kernel)()

    def _delta(self, m: ArrayLike, precision: jax.lax.PrecisionLike = None) -> Any:
        """This operator with M between its maps."""
        check_array("m", m, self.m_shape)
        if m.ndim != len(self.m_shape):
            raise ValueError(
                f"m must have shape {self.m_shape}, got {m.shape}; use jax.vmap"
            )
        return delta_of(self, jnp.asarray(m), precision)


# A program for each shape takes a tenth of the time that JAX's own functions take
# outside of jit.
_zeros = jax.jit(jnp.zeros, static_argnums=(0, 1))
_normal = jax.jit(jax.random.normal, static_argnums=(1, 2))


@functools.singledispatch
def delta_of(op: Operator, m: jax.Array, precision: jax.lax.PrecisionLike) -> Any:
    """An operator with M between its maps, as a `mora_jax.products.KernelDelta`.

    Operators are C and D alone. How a product with M is computed is for the package
    above them, which registers it here.
    """
    raise NotImplementedError(f"nothing computes a {type(op).__name__}")
