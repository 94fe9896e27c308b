"""Damped inputs: another operator, which sees less of some of its inputs."""

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
    r"""An operator that sees some of its inputs damped.

    .. math:: x \mapsto D(C(x P) M), \qquad P = (I - V V^T)\, F

    `input_damping` makes it from ordinary inputs of the layer: what these have most of,
    the adapter sees least of, and changes least. V takes away directions, and F is a
    diagonal matrix that scales each feature. The delta is P C M D, merged exactly.

    Attributes:
      inner: The operator, of the same widths and `square_rank`.
      directions: V, (in_features, k), or (*stack, in_features, k), kept in bfloat16.
        Its columns v are orthogonal; the part |v|^2 of an input along v is taken away.
        None takes away nothing.
      diagonal: F, (in_features, 1), or (*stack, in_features, 1), in float32: a number
        for each feature, not negative. None scales nothing.

    Raises:
      TypeError: `inner` is damped or not an operator; an array is not of concrete
        floating-point numbers.
      ValueError: Sizes do not fit, columns are not orthogonal or longer than 1, a
        number of F is negative, or neither array is given.

    Example::

      >>> from mora_jax.operators import Damped, Truncation
      >>> op = Damped(3, 3, 3, inner=Truncation(3, 3, 3), directions=0.5 * np.eye(3, 1))
      >>> op.delta_weight(jnp.eye(3)).tolist()[0]
      [0.75, 0.0, 0.0]
    """

    # Neither P nor x P is formed. An output is the inner operator's for x F, less
    # (x V) B, where B are its outputs for the rows of V^T F: the work of a LoRA of rank
    # k. The derivative by M likewise is the inner one's for x F, less the one for the
    # rows of V^T F. Where each feature meets a row of M of its own, F is multiplied
    # into M (`absorbed`), and costs nothing.
    inner: Operator = dataclasses.field(metadata={"nested": True})
    directions: ArrayLike | None = _pytree.given(
        lambda op: _checked_directions(op), default=None
    )
    diagonal: ArrayLike | None = _pytree.given(
        lambda op: _checked_diagonal(op), default=None
    )

    name = "damped"

    def __post_init__(self) -> None:
        inner = self.inner
        if not isinstance(inner, Operator) or isinstance(inner, Damped):
            raise TypeError(f"inner must be an operator, not damped, got {inner!r}")
        sizes_of = operator.attrgetter("in_features", "out_features", "square_rank")
        if (sizes := sizes_of(self)) != (got := sizes_of(inner)):
            raise ValueError(f"inner must have the sizes {sizes}, got {got}")
        if self.directions is None and self.diagonal is None:
            raise ValueError(
                "directions or diagonal must be an array, got None twice: the inner "
                "operator alone sees its inputs as they are"
            )
        super().__post_init__()

    def around(self, inner: Any) -> "Damped":
        """The same around another form of the inner map."""
        return self._with(inner=inner)

    def _with(self, **fields: Any) -> "Damped":
        """The same with other fields, which are not checked again."""
        new = copy.copy(self)
        vars(new).pop("digests", None)  # they are of the arrays before
        for name, value in fields.items():
            object.__setattr__(new, name, value)
        return new

    @property
    def label(self) -> str:
        """The inner operator's name, and how its inputs are damped."""
        parts = []
        if self.directions is not None:
            parts.append(str(self.directions.shape[-1]))
        if self.diagonal is not None:
            parts.append("diagonal")
        return f"{self.inner.name}, damped ({' + '.join(parts)})"

    def absorbed(self, m: Any, factor: Any) -> tuple[Operator, Any]:
        m = self.inner.scaled(m, factor)
        if self.diagonal is None:
            return self, m
        by_input = jnp.asarray(self.diagonal)[..., 0]
        scaled = self.inner.scaled_by_input(m, by_input.astype(m.dtype))
        if scaled is None:
            return self, m
        if self.directions is None:
            return self.inner, scaled
        return self._with(diagonal=None), scaled

    def along(self, x: Array) -> Array:
        """Coordinates of inputs along V, (..., k)."""
        return matmul(x, self.columns(x.dtype))

    def columns(self, dtype: DTypeLike) -> Array:
        """V, (in_features, k)."""
        return jnp.asarray(self.directions).astype(dtype)

    def scaled_inputs(self, x: Array) -> Array:
        """Rows x F: (..., in_features) to the same."""
        if self.diagonal is None:
            return x
        return x * jnp.asarray(self.diagonal).astype(x.dtype)[..., 0]

    def damped(self, x: Array) -> Array:
        """Rows x P: (..., in_features) to the same."""
        if self.directions is not None:
            x = x - matmul(self.along(x), self.columns(x.dtype).T)
        return self.scaled_inputs(x)

    def _compress(self, x: Array) -> Array:
        return self.inner._compress(self.damped(x))

    def enter(self, x: Array) -> Array:
        return self.inner.enter(self.damped(x))

    def rows(self, x: Array, m: Array, precision: Precision = None) -> Array:
        y = self.inner.rows(self.scaled_inputs(x), m, precision)
        if self.directions is None:
            return y
        return y - matmul(self.along(x), self.outputs(m, precision))

    def outputs(self, m: Array, precision: Precision = None) -> Array:
        """V^T F C M D, (k, out_features)."""
        return self.inner.rows(self._scaled_columns(m.dtype), m, precision)

    def _scaled_columns(self, dtype: DTypeLike) -> Array:
        """V^T F, (k, in_features)."""
        return self.scaled_inputs(self.columns(dtype).T)

    def kept(self, x: Array, m: Array, precision: Precision = None) -> Any:
        kept = [self._kept_of_inner(x, m, precision)]
        if self.directions is not None:
            columns = self._scaled_columns(x.dtype)
            kept += [self.inner.kept(columns, m, precision), self.along(x)]
        return kept

    def _kept_of_inner(self, x: Array, m: Array, precision: Precision) -> Any:
        """The part of x F that the derivative of the inner operator needs."""
        # Of blocks it is all of x F, which is computed again, since x is kept anyway.
        if self.inner.block:
            return x
        return self.inner.kept(self.scaled_inputs(x), m, precision)

    def _inner_kept(self, kept: Any) -> Any:
        """The same as the inner operator keeps it."""
        return self.scaled_inputs(kept) if self.inner.block else kept

    def tangent(self, kept: Any, tangent: Array, precision: Precision = None) -> Array:
        of_x, *of_directions = kept
        y = self.inner.tangent(self._inner_kept(of_x), tangent, precision)
        if not of_directions:
            return y
        of_columns, along = of_directions
        outputs = self.inner.tangent(of_columns, tangent, precision)
        return y - matmul(along, outputs, precision)

    def gradient(
        self, kept: Any, g: Array, precision: Precision = None, shards: int = 1
    ) -> Array:
        of_x, *of_directions = kept
        of_x = self._inner_kept(of_x)
        gradient = self.inner.gradient(of_x, g, precision, shards)
        if not of_directions:
            return gradient
        of_columns, along = of_directions
        by_outputs = rows_product(along, g, precision)
        return gradient - self.inner.gradient(of_columns, by_outputs, precision)

    def factors(self, m: Array) -> tuple[Array, Array]:
        c, d = self.inner.factors(m)
        return self.times(c), d

    def times(self, columns: Array) -> Array:
        """P times columns: (..., in_features, k) to the same."""
        columns = self._scaled_rows(columns)
        return columns - self._part_along(columns)

    def transposed_times(self, columns: Array) -> Array:
        """The transpose of P times columns: (..., in_features, k) to the same."""
        return self._scaled_rows(columns - self._part_along(columns))

    def _scaled_rows(self, columns: Array) -> Array:
        """F times columns."""
        if self.diagonal is None:
            return columns
        return columns * jnp.asarray(self.diagonal).astype(columns.dtype)

    def _part_along(self, columns: Array) -> Array | float:
        """V V^T times columns."""
        if self.directions is None:
            return 0.0
        v = self.columns(columns.dtype)
        return v @ (v.mT @ columns)

    def unit_rows(self, indices: Array, m: Array, precision: Precision = None) -> Array:
        rows = self.inner.unit_rows(indices, m, precision)
        if self.diagonal is not None:
            rows = rows * jnp.asarray(self.diagonal).astype(rows.dtype)[indices]
        if self.directions is None:
            return rows
        along = self.columns(rows.dtype)[indices]
        return rows - matmul(along, self.outputs(m, precision))

    def matrix(self, m: Array) -> Array:
        return self.matrix_by(self.inner.matrix(m), m)

    def matrix_by(self, inner: Array, m: Array) -> Array:
        """P C M D, given C M D: (in_features, out_features)."""
        delta = self.scaled_inputs(inner.T).T
        if self.directions is None:
            return delta
        return delta - matmul(self.columns(m.dtype), self.outputs(m))


_OF_INNER = (  # what is the inner operator's
    *("linear", "square", "bounded", "block", "work", "m_shape", "compressed_shape"),
    *("gains", "fine_tuning_scale", "widest", "start", "scaled"),
    *("_decompress", "leave", "product", "product_by_m"),
)
for _name in _OF_INNER:
    setattr(Damped, _name, property(operator.attrgetter(f"inner.{_name}")))


def _checked_directions(op: Damped) -> np.ndarray | None:
    """The directions of `op` as a bfloat16 array of its own."""
    v = op.directions
    if v is None:
        return None
    *stack, _, k = np.shape(v) if np.ndim(v) > 1 else (1, 1)
    check_concrete(v, "directions", (*stack, op.in_features, max(1, k)))
    v = np.array(v, jnp.bfloat16)
    products = v.swapaxes(-2, -1).astype(np.float32) @ v.astype(np.float32)
    largest = np.abs(products).max(initial=0, where=np.eye(k, dtype=bool))
    others = np.abs(products).max(initial=0, where=~np.eye(k, dtype=bool))
    if not (others <= 0.02 and largest <= 1.01):
        raise ValueError(
            "directions must be orthogonal columns of lengths up to 1, got squares of "
            f"up to {largest:.3g} and products of up to {others:.3g}"
        )
    v.setflags(write=False)
    return v


def _checked_diagonal(op: Damped) -> np.ndarray | None:
    """The diagonal of `op` as a float32 array of its own."""
    f = op.diagonal
    if f is None:
        return None
    stack = np.shape(f)[:-2]
    check_concrete(f, "diagonal", (*stack, op.in_features, 1))
    f = np.array(f, np.float32)
    if not (np.isfinite(f) & (f >= 0)).all():
        raise ValueError(
            "diagonal must be of finite numbers that are not negative, got numbers "
            f"from {f.min():.3g} to {f.max():.3g}"
        )
    f.setflags(write=False)
    return f
