"""Damped inputs: another operator, which sees less of some directions."""

import copy
import dataclasses
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from mora_jax._common.checks import check_concrete
from mora_jax._common.types import ArrayLike
from mora_jax._jax.linear_algebra import matmul, rows_product
from mora_jax.operators import _pytree
from mora_jax.operators._base import Operator, Precision


@_pytree.operator
class Damped(Operator):
    r"""An operator that sees its inputs damped along given directions.

    .. math:: x \mapsto D(C(P x) M), \qquad P = I - V V^T

    `input_damping` makes it from ordinary inputs of the layer: what these have most of,
    the adapter sees least of, and changes least. The delta is P C M D, merged exactly.

    Attributes:
      inner: The operator, of the same widths and `square_rank`.
      directions: V, (in_features, k), or (*stack, in_features, k), kept in bfloat16.
        Its columns v are orthogonal; the part |v|^2 of an input along v is taken away.

    Raises:
      TypeError: `inner` is damped or not an operator; `directions` not concrete floats.
      ValueError: Sizes do not fit, or columns are not orthogonal or longer than 1.

    Example::

      >>> from mora_jax.operators import Damped, Truncation
      >>> op = Damped(3, 3, 3, inner=Truncation(3, 3, 3), directions=0.5 * np.eye(3, 1))
      >>> op.delta_weight(jnp.eye(3)).tolist()[0]
      [0.75, 0.0, 0.0]
    """

    # Neither P nor P x is formed. An output is the inner operator's for x less (x V) B,
    # where B are its outputs for the rows of V^T: the work of a LoRA of rank k. The
    # derivative by M likewise is the inner one's for x, less the one for V^T.
    inner: Operator = dataclasses.field(metadata={"nested": True})
    directions: ArrayLike = _pytree.given(lambda op: _checked(op))

    name = "damped"

    def __post_init__(self) -> None:
        inner = self.inner
        if not isinstance(inner, Operator) or isinstance(inner, Damped):
            raise TypeError(f"inner must be an operator, not damped, got {inner!r}")
        sizes_of = operator.attrgetter("in_features", "out_features", "square_rank")
        if (sizes := sizes_of(self)) != (got := sizes_of(inner)):
            raise ValueError(f"inner must have the sizes {sizes}, got {got}")
        super().__post_init__()

    def around(self, inner: Any) -> "Damped":
        """The same around another form of the inner map."""
        new = copy.copy(self)  # not through __init__: the directions are checked
        object.__setattr__(new, "inner", inner)
        return new

    @property
    def label(self) -> str:
        """The inner operator's name, and the number of directions."""
        return f"{self.inner.name}, damped ({self.directions.shape[-1]})"

    def along(self, x: Array) -> Array:
        """Coordinates of inputs along V, (..., k)."""
        return matmul(x, self.columns(x.dtype))

    def damped(self, x: Array) -> Array:
        """P x: (..., in_features) to the same."""
        return x - matmul(self.along(x), self.columns(x.dtype).T)

    def columns(self, dtype: DTypeLike) -> Array:
        """V, (in_features, k)."""
        return jnp.asarray(self.directions).astype(dtype)

    def _compress(self, x: Array) -> Array:
        return self.inner._compress(self.damped(x))

    def enter(self, x: Array) -> Array:
        return self.inner.enter(self.damped(x))

    def rows(self, x: Array, m: Array, precision: Precision = None) -> Array:
        y = self.inner.rows(x, m, precision)
        return y - matmul(self.along(x), self.outputs(m, precision))

    def outputs(self, m: Array, precision: Precision = None) -> Array:
        """V^T C M D, (k, out_features)."""
        return self.inner.rows(self.columns(m.dtype).T, m, precision)

    def kept(self, x: Array, m: Array, precision: Precision = None) -> Any:
        columns = self.columns(x.dtype).T
        kept = self.inner.kept(x, m, precision), self.inner.kept(columns, m, precision)
        return *kept, self.along(x)

    def tangent(self, kept: Any, tangent: Array, precision: Precision = None) -> Array:
        of_x, of_columns, along = kept
        y = self.inner.tangent(of_x, tangent, precision)
        outputs = self.inner.tangent(of_columns, tangent, precision)
        return y - matmul(along, outputs, precision)

    def gradient(
        self, kept: Any, g: Array, precision: Precision = None, shards: int = 1
    ) -> Array:
        of_x, of_columns, along = kept
        by_outputs = rows_product(along, g, precision)
        less = self.inner.gradient(of_columns, by_outputs, precision)
        return self.inner.gradient(of_x, g, precision, shards) - less

    def factors(self, m: Array) -> tuple[Array, Array]:
        c, d = self.inner.factors(m)
        return self.damped(c.T).T, d

    def matrix(self, m: Array) -> Array:
        return self.inner.matrix(m) - matmul(self.columns(m.dtype), self.outputs(m))


_OF_INNER = (  # what is the inner operator's
    *("linear", "square", "bounded", "block", "work", "m_shape", "compressed_shape"),
    *("gains", "fine_tuning_scale", "widest", "start", "scaled"),
    *("_decompress", "leave", "product", "product_by_m"),
)
for _name in _OF_INNER:
    setattr(Damped, _name, property(operator.attrgetter(f"inner.{_name}")))


def _checked(op: Damped) -> np.ndarray:
    """The directions of `op` as a bfloat16 array of its own."""
    v = op.directions
    *stack, _, k = np.shape(v) if np.ndim(v) > 1 else (1, 1)
    check_concrete(v, "directions", (*stack, op.in_features, max(1, k)))
    v = np.array(v, jnp.bfloat16)
    products = v.swapaxes(-2, -1).astype(np.float32) @ v.astype(np.float32)
    largest = np.abs(products).max(initial=0, where=np.eye(k, dtype=bool))
    others = np.abs(products).max(initial=0, where=~np.eye(k, dtype=bool))
    if not (others <= 0.02 and largest <= 1.01):
        rule = "directions must be orthogonal columns of lengths up to 1"
        got = f"got squares of up to {largest:.3g} and products of up to {others:.3g}"
        raise ValueError(f"{rule}, {got}")
    v.setflags(write=False)
    return v
