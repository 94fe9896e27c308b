r"""Operators: the linear map D(C(x) M) of an adapter, with its derivative by M.

.. math::

    y = D(C(x) M), \qquad dy = D(C(x)\, dM), \qquad dM = \sum_{rows} C(x)^T D^T(g)

Here g is the gradient of y, and the sum runs over rows. Blocks of C(x) are rows like
any other, so that it goes over both. An operator is such a map. What computes the same
otherwise replaces it as a whole: a form for a chip, one device's part, many devices.
"""

import dataclasses
import functools
import hashlib
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, PRNGKeyArray

from mora_jax._common import checks
from mora_jax._common.types import ArrayLike, Precision, Shape
from mora_jax._jax.linear_algebra import last_with_first, rows_product, transposed
from mora_jax._jax.tracing import undisturbed
from mora_jax.operators._pytree import by_layer

Side = Literal["in", "out"]
Work = Literal["products", "sums", "blocks", "factors"]
"""The work: products with C and D, sums and copies, moves of blocks; thin factors."""
Trained = Float[ArrayLike, "..."]
Inputs = Float[ArrayLike, "*batch ins"]


class DeltaMap:
    """D(C(x) M) as a map of x, with its derivative by M.

    It follows from `enter`, `leave` and, where rows of C(x) are not multiplied by an M
    as they are, `product`. A map that knows a faster way gives it as well.
    """

    block: ClassVar[bool] = False
    """True if M acts on several blocks of the input, so that C(x) is as large as x."""

    @property
    def m_shape(self) -> Shape:
        """Shape of M."""
        raise NotImplementedError

    def enter(self, x: Array) -> Array:
        """C(x), or a sum of its blocks where M may multiply the sum."""
        raise NotImplementedError

    def leave(self, h: Array) -> Array:
        """D, of what M has made of `enter(x)`."""
        raise NotImplementedError

    def product(self, h: Array, m: Array, precision: Precision = None) -> Array:
        """The rows of h times M."""
        return jax.lax.dot_general(h, m, last_with_first(h), precision=precision)

    def product_by_m(self, h: Array, g: Array, precision: Precision = None) -> Array:
        """The transpose of `product` by M: the sum of h^T g over rows."""
        return rows_product(h, g, precision)

    def rows(self, x: Array, m: Array, precision: Precision = None) -> Array:
        """D(C(x) M), row by row: (..., in_features) -> (..., out_features)."""
        return self.leave(self.product(self.enter(x), m, precision))

    def kept(self, x: Array, m: Array, precision: Precision = None) -> Any:
        """The part of x that the derivative needs: C(x), unless it is as large as x."""
        # Of blocks x itself is kept: once for queries, keys and values, which share it.
        return x if self.block else self.enter(x)

    def kept_of(self, h: Array, m: Array) -> Any:
        """The same where C(x) is known already, for a map of one block."""
        return h

    def tangent(self, kept: Any, tangent: Array, precision: Precision = None) -> Array:
        """The derivative dy = D(C(x) dM) of `rows` by M."""
        h = self.enter(kept) if self.block else kept
        return self.leave(self.product(h, tangent, precision))

    def gradient(
        self, kept: Any, g: Array, precision: Precision = None, shards: int = 1
    ) -> Array:
        """dM, the transpose of `tangent`. So many `shards` may split the first axis."""
        h = self.enter(kept) if self.block else kept
        back = transposed(self.leave, (*h.shape[:-1], self.m_shape[-1]), g)
        return self.product_by_m(h, back, precision)


@dataclasses.dataclass(frozen=True)
class Operator(DeltaMap):
    r"""The two fixed linear maps around the trained array M.

    .. math:: x \mapsto D(C(x) M), \qquad C: in \to (n, q), \quad D: (n, q) \to out

    A subclass is decorated with `operator` and gives `name`, its settings as fields,
    and C and D as `_compress` and `_decompress`. All else follows: the product `rows`,
    its derivative by M and the delta as a `matrix`, which it also gives where it knows
    a faster way. If M is not a square that multiplies the rows of C(x), it says which
    array it is, `m_shape`, and how rows are multiplied, `product`; and if the delta is
    not linear in it, the derivative, as `LowRank` does. Equality and hash go by the
    settings. Arrays that a seed determines are pytree leaves: arguments under jit.

    In all methods `x` is (..., in_features), `y` and `g` are (..., out_features), `h`
    is (..., *compressed_shape), `m` is M of `m_shape`, `indices` are numbers of inputs,
    and `precision` is for the products with M, as in `jax.numpy.matmul`. Public methods
    raise a TypeError unless arrays are floating-point, a ValueError for other shapes.

    Attributes:
      in_features, out_features: The lengths of the vectors x and y.
      square_rank: q, the width of M (r-hat in the paper).
    """

    # The rest of the library asks an operator only for what it trains (`m_shape`,
    # `start`, `scaled`, `linear`), for the map and its derivative (`DeltaMap`), and for
    # the delta as a matrix or by rows (`matrix`, `unit_rows`).
    in_features: int
    out_features: int
    square_rank: int

    name: ClassVar[str]
    """The word for it in `MoRAConfig(operator=...)`."""
    arrays: ClassVar[tuple[str, ...]] = ()
    """The names of the fields that hold arrays."""
    given: ClassVar[bool] = False
    """True if the arrays are given, not determined by settings."""
    bounded: ClassVar[bool] = True
    """False if `square_rank` may exceed `min(in_features, out_features)`, as where C
    and D cut features into pieces of q, and the last one may be short."""
    q_multiple_of: ClassVar[int] = 1
    """A divisor of q."""
    work: ClassVar[Work] = "products"
    """The work of C and D, by which it is chosen how a layer computes."""
    linear: ClassVar[bool] = True
    """True if the delta is linear in what is trained: weighted sums are exact. Products
    of trained arrays are not; as zeros lack a gradient, `start` always needs a key."""
    square: ClassVar[bool] = True
    """True if M is (q, q), so that q is as wide as a budget and both widths allow."""

    def __post_init__(self) -> None:
        for field in ("in_features", "out_features", "square_rank"):
            checks.positive_integer(field, getattr(self, field))
        q, limit = self.square_rank, min(self.in_features, self.out_features)
        if self.bounded and q > limit:
            most = f"at most min(in_features, out_features) = {limit}"
            raise ValueError(f"square_rank of {self.name} must be {most}, got {q}")
        step = self.q_multiple_of
        if q % step:
            rule = f"square_rank of {self.name} must be a multiple of {step}"
            raise ValueError(f"{rule}, got {q}; the nearest is {q + step - q % step}")
        checks.check_seed(getattr(self, "seed", 0))
        for field in self.arrays:
            compute = type(self).__dataclass_fields__[field].metadata["compute"]
            object.__setattr__(self, field, compute(self))

    @classmethod
    def widest(cls, rank: int, ins: int, outs: int, multiple: int | None = None) -> int:
        """The largest q that costs no more than a LoRA of `rank`."""
        return math.isqrt((ins + outs) * rank)

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256s of the arrays, by which given ones are compared, and are stored."""
        # They do not belong to the pytree: layers of one shape share their programs.
        arrays = {name: getattr(self, name) for name in self.arrays}
        return {name: _digest(a) for name, a in arrays.items() if a is not None}

    def at(self, index: tuple[int, ...]) -> Any:
        """The operator of one layer of a stack, where each has arrays of its own."""
        arrays, with_arrays = by_layer(self)
        return with_arrays([array[index] for array in arrays])

    @property
    def label(self) -> str:
        """The operator in tables."""
        return self.name

    @property
    def compressed_shape(self) -> Shape:
        """Shape of one compressed vector: (q,), or (n, q) for a block operator."""
        return self.m_shape[:-1]

    @property
    def m_shape(self) -> Shape:
        """Shape of M: (q, q)."""
        return (self.square_rank, self.square_rank)

    @property
    def gains(self) -> tuple[float, float]:
        r"""Sizes c and d that C and D give to numbers, each a root mean square.

        .. math:: c = \|C\|_F / \sqrt{n q}, \qquad d = \|D\|_F / \sqrt{out}

        c is the size of a number of C(x) if the numbers of x are independent and of
        size 1, and d is the norm of the weights of an output.

        Raises:
          NotImplementedError: The operator lacks gains.
        """
        what = "has no property `gains`: give sizes (c, d), or scale='paper'"
        raise NotImplementedError(f"{type(self).__name__} {what}")

    @property
    def fine_tuning_scale(self) -> float:
        r"""The factor with which M learns at full fine-tuning's rate.

        .. math:: \left(\frac{in}{q}\right)^{3/4} \frac{1}{c\,d}

        Adam changes each trained number by about its rate. A trained kernel then
        changes an output by rate * in if all inputs pull in one direction, and by
        rate * sqrt(in) if each pulls in a direction of its own. M changes it by
        rate * q c d and by rate * sqrt(q) c d. The factor is the geometric mean of
        in / (q c d) and sqrt(in / q) / (c d), since inputs lie between the two.
        See docs/learning-rates.md.
        """
        c, d = self.gains
        return (self.in_features / self.m_shape[-2]) ** 0.75 / (c * d)

    def start(
        self, stack: Shape, init: str, key: PRNGKeyArray | None, dtype: DTypeLike
    ) -> Array:
        """Trained array at its start, (*stack, *m_shape): see `MoRAConfig.init`."""
        shape = (*stack, *self.m_shape)
        if init != "gaussian":
            return _zeros(shape, dtype)
        if key is None:
            raise ValueError(f"init={init!r} needs a key, got None")
        return _normal(key, shape, dtype) / math.sqrt(self.m_shape[-1])

    def scaled(self, m: Any, factor: Any) -> Any:
        """Trained array that stands for `factor` times the delta of `m`."""
        return factor * m

    def scaled_by_input(self, m: Any, by_input: Any) -> Any | None:
        """Trained array whose delta is the delta of `m` with its rows scaled, or None.

        `by_input` is (..., in_features), with the axes of a stack as `m` has them or
        without. None says that no such array exists, since inputs share rows of M.
        """
        return None

    def absorbed(self, m: Any, factor: Any) -> tuple["Operator", Any]:
        """An operator and its array, whose delta is `factor` times the delta of `m`.

        The operator is this one, or one with less to compute.
        """
        return self, self.scaled(m, factor)

    def _compress(self, x: Array) -> Array:
        """C: (..., in_features) -> (..., *compressed_shape)."""
        raise NotImplementedError

    def _decompress(self, h: Array) -> Array:
        """D: (..., *compressed_shape) -> (..., out_features)."""
        raise NotImplementedError

    def _compress_units(self, indices: Array, dtype: DTypeLike) -> Array:
        """C of unit vectors by their numbers: (...) -> (..., *compressed_shape)."""
        # Subclasses need not make `in_features` numbers for each.
        return self._compress(jax.nn.one_hot(indices, self.in_features, dtype=dtype))

    def enter(self, x: Array) -> Array:
        return self._compress(x)

    def leave(self, h: Array) -> Array:
        return self._decompress(h)

    def factors(self, m: Array) -> tuple[Array, Array]:
        """C, (in, q), and M D, (q, out), of one block: the delta is their product."""
        units = jnp.arange(self.in_features)
        return self._compress_units(units, m.dtype), self._decompress(m)

    def unit_rows(self, indices: Array, m: Array, precision: Precision = None) -> Array:
        """Rows of the delta by their numbers: (...) -> (..., out_features)."""
        h = self._compress_units(indices, m.dtype)
        return self._decompress(self.product(h, m, precision))

    def matrix(self, m: Array) -> Array:
        """Delta C (I_n x M) D as a matrix: M -> (in_features, out_features)."""
        # Of one block, D is applied to the rows of M, and the transpose of C to the
        # columns of the result. Of several, each unit vector is multiplied.
        if self.block or not self.linear:
            return self.rows(jnp.eye(self.in_features, dtype=m.dtype), m)
        column = functools.partial(transposed, self._compress, (self.in_features,))
        return jax.vmap(column, in_axes=-1, out_axes=-1)(self._decompress(m))

    def compress(self, x: Inputs) -> Float[Array, "..."]:
        """C(x): (..., in_features) -> (..., q), or (..., n, q) with several blocks."""
        return self._compress(self._fitting("x", x, self.in_features))

    def decompress(self, h: Float[ArrayLike, "..."]) -> Float[Array, "*batch out"]:
        """D(h): (..., q), or (..., n, q) with several blocks -> (..., out_features)."""
        blocks = self.compressed_shape[:-1]
        return self._decompress(self._fitting("h", h, *blocks, self.m_shape[-1]))

    def apply(
        self, m: Trained, x: Inputs, *, precision: Precision = None
    ) -> Float[Array, "*batch outs"]:
        """D(C(x) M), the paper's equation 3 without alpha: (..., out_features)."""
        x = self._fitting("x", x, self.in_features)
        return undisturbed(self.rows)(x, self._checked(m), precision)

    def delta_weight(self, m: Trained) -> Float[Array, "ins out"]:
        r"""The delta :math:`C (I_n \otimes M) D`, (in, out): `apply` is its product."""
        return undisturbed(self.matrix)(self._checked(m))

    def _checked(self, m: ArrayLike) -> Array:
        array = self._fitting("m", m, *(shape := self.m_shape))
        if array.ndim != len(shape):
            raise ValueError(f"m must have shape {shape}, got {m.shape}; use jax.vmap")
        return array

    def _fitting(self, name: str, array: ArrayLike, *end: int) -> Array:
        if by_layer(self)[0]:
            raise ValueError(f"{self.name} differs from layer to layer: take at(index)")
        checks.check_floating(array := checks.as_jax_array(name, array), name)
        if array.shape[array.ndim - len(end) :] != end:
            must = f"{name} must have shape (..., {', '.join(map(str, end))})"
            raise ValueError(f"{must}, got {array.shape}")
        return array


# A program for each shape takes a tenth of the time of JAX's functions outside of jit.
_zeros = jax.jit(jnp.zeros, static_argnums=(0, 1))
_normal = jax.jit(jax.random.normal, static_argnums=(1, 2))


def _digest(array: Any) -> str:
    # In a `remora.State` shapes stand for arrays that are data.
    if isinstance(array, jax.ShapeDtypeStruct):
        return f"{array}"
    shape = f"{array.dtype}{array.shape}".encode()
    return hashlib.sha256(shape + np.asarray(array).tobytes()).hexdigest()
