"""What M multiplies: C(x) in the faster form of each operator, and D for it.

An operator's own methods define C and D. The functions here and in `matrix` compute
with them: in a general way that serves every operator, and in a faster way where one is
registered for its type. So an operator needs no more than its definition, and anyone
can register a form for an operator of their own::

    @compressed_rows.register
    def _(op: MyOperator, x):
        return Compressed(rows, decompress)

Each form must give what the general one gives, which the tests hold against the
matrices of C and D for every operator.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mora_jax._jax.qwix_guard import matmul
from mora_jax._layer.squares import TimesSquares, times_squares, times_squares_by_row
from mora_jax._layer.tuning import Tuning, by_platform
from mora_jax._mesh.apply import OperatorOnMesh
from mora_jax._mesh.parts import OperatorPart
from mora_jax.operators import Decoupling, Hadamard, Operator
from mora_jax.operators._base import Side


class Compressed(NamedTuple):
    """What M multiplies, and what is made of the product.

    Attributes:
      h: (..., K q), as an operator without blocks gives it; or blocks, (..., n, q).
      decompress: The function that makes D of h M, which has the shape of h.
      times_squares: The function that multiplies the blocks if M is several squares.
    """

    h: jax.Array
    decompress: Callable[[jax.Array], jax.Array]
    times_squares: TimesSquares = times_squares


@functools.singledispatch
def compressed_rows(op: Operator, x: jax.Array) -> Compressed:
    """C(x), and D. `x`: (..., in_features); D returns (..., out_features).

    Args:
      op: An operator, one device's part of one, or one on a mesh.
      x: (..., in_features).
    """
    return Compressed(op._compress(x), op._decompress)


@compressed_rows.register
def _(op: Decoupling, x: jax.Array) -> Compressed:
    # D sums the blocks of a group. If one square multiplies them all, it may multiply
    # the sum: n blocks become min(n, p).
    if not op.sums_first:
        return Compressed(op._compress(x), op._decompress)
    return Compressed(op.sum_groups(op._compress(x)), op.decompress_groups)


@compressed_rows.register
def _(op: Hadamard, x: jax.Array) -> Compressed:
    many = math.prod(x.shape[:-1])

    def by_matrix(x: jax.Array) -> jax.Array:
        return matmul(x, op.matrix("in", x.dtype))

    def to_outputs(h: jax.Array) -> jax.Array:
        return matmul(h, op.matrix("out", h.dtype).T)

    def decompress(h: jax.Array) -> jax.Array:
        wanted = functools.partial(_prefers_matrix, op, "out", many)
        return by_platform(wanted, to_outputs, op._decompress, h)

    wanted = functools.partial(_prefers_matrix, op, "in", many)
    return Compressed(by_platform(wanted, by_matrix, op._compress, x), decompress)


def _prefers_matrix(op: Hadamard, side: Side, rows: int, tuning: Tuning) -> bool:
    """Whether a product with C or D as a matrix is faster than the transform."""
    fast = op.width <= tuning.transform_step * op.transform_steps(side)
    known = isinstance(rows, int)  # and no symbol of jax.export
    return fast and known and rows > tuning.matrix_from_rows


@compressed_rows.register
def _(op: OperatorPart, x: jax.Array) -> Compressed:
    return Compressed(*op.compressed_rows(x))


@compressed_rows.register
def _(op: OperatorOnMesh, x: jax.Array) -> Compressed:
    h, decompress, _ = compressed_rows(op.operator, x)
    if op.features.in_axes:
        h = op.compress(x)
    return Compressed(h, op.decompress if op.features.out_axes else decompress)


@functools.singledispatch
def compressed_units(op: Operator, indices: jax.Array, dtype: DTypeLike) -> Compressed:
    """C of unit vectors e_i, and D.

    Args:
      op: An operator, or one device's part of one.
      indices: The numbers i, (...), each in range.
      dtype: The dtype of the computation.
    """
    return Compressed(op._rows("in", indices, dtype), op._decompress)


@compressed_units.register
def _(op: Decoupling, indices: jax.Array, dtype: DTypeLike) -> Compressed:
    # A unit vector is in t blocks of the n, so that M multiplies t rows.
    block, rows = op.block_rows(indices, dtype)

    def decompress(h: jax.Array) -> jax.Array:
        groups = np.arange(op.num_groups, dtype=np.uint32)
        feeds = op.in_group(block)[..., None] == groups
        h = jnp.where(feeds[..., None], h[..., None, :], 0).sum(-3)
        return op.decompress_groups(h)

    return Compressed(rows, decompress, times_squares_by_row(op.square_of(block)))


@compressed_units.register
def _(op: OperatorPart, indices: jax.Array, dtype: DTypeLike) -> Compressed:
    rows, decompress, times = compressed_units(op.operator, indices, dtype)
    return Compressed(rows, lambda h: op.take_outputs(decompress(h)), times)
