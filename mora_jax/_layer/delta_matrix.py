"""The delta as a matrix, C (I_n x M) D, in the faster form of each operator.

See `forms` for what a form is.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mora_jax._common.types import ArrayLike
from mora_jax._jax.qwix_guard import matmul
from mora_jax._jax.tiles import stored, tile_to
from mora_jax._jax.vma import shape_for
from mora_jax._layer.rounding import add_rounded
from mora_jax._layer.squares import block_diagonal
from mora_jax._layer.tuning import Tuning, by_platform
from mora_jax._mesh.parts import BasisPart, OperatorPart, PermutationPart, SharingPart
from mora_jax.operators import Decoupling, Hadamard, Operator, Permutation
from mora_jax.operators._blocks import add_wrapped_rows, block_positions, divide
from mora_jax.operators._projection import Projection


@functools.singledispatch
def delta_matrix(op: Operator, m: jax.Array) -> jax.Array:
    """C (I_n x M) D: M -> (in_features, out_features).

    Applies D to the rows of I_n (x) M, one block at a time, then the transpose of C to
    the columns. A fold does this in each step, so block operators have faster forms.
    """

    def block_rows(k: jax.Array) -> jax.Array:
        alone = jnp.zeros((op.square_rank, *op.compressed_shape), m.dtype)
        square = m if op.squares == 1 else m[k % op.squares]
        return op._decompress(alone.at[:, k].set(square))

    # One at a time: all n together would take n * q by n * q numbers.
    if op.block:
        rows = jax.lax.map(block_rows, jnp.arange(op.compressed_shape[0]))
    else:
        rows = op._decompress(block_diagonal(m))
    vector = shape_for((op.in_features,), rows.dtype, rows)
    transpose = jax.linear_transpose(op._compress, vector)
    (weight,) = jax.vmap(transpose, in_axes=-1, out_axes=-1)(rows)
    return weight


@delta_matrix.register
def _(op: Decoupling, m: jax.Array) -> jax.Array:
    # In whole rows, which compilers vectorise; in tiles of q columns it took four times
    # as long.
    (n, q), outs = op.compressed_shape, op.out_features
    columns = stored(lambda m: tile_to(m, outs), m)
    group = jnp.asarray(op.in_group(np.arange(n)))
    out_group = jnp.asarray(op.out_group(np.arange(outs) // q))
    feeds = group[:, None, None] == out_group
    rows = jnp.where(feeds, op.rotate_m(m_of_blocks(op, columns)), 0)
    return add_wrapped_rows(rows.reshape(n * q, outs), op.in_features)


@delta_matrix.register
def _(op: Permutation, m: jax.Array) -> jax.Array:
    return _permuted_matrix(op, m, op.in_inverse, op.out_inverse)


def _permuted_matrix(
    op: Permutation, m: jax.Array, in_inverse: ArrayLike, out_inverse: ArrayLike
) -> jax.Array:
    """Rows and columns of the delta, by where the two orders put them."""
    q = op.square_rank
    out_block, out_offset = divide(out_inverse, q)
    block, offset = block_positions(in_inverse, op.in_features, q)
    group, out_group = op.in_group(block), op.out_group(out_block)
    # An offset of q or more is in no group, whatever row of M it leads to.
    row = op.square_of(block) * np.uint32(q) + offset

    def delta(rows_of: Callable[[jax.Array], jax.Array]) -> jax.Array:
        parts = (
            jnp.where(group[:, t, None] == out_group, rows_of(row[:, t]), 0)
            for t in range(group.shape[1])
        )
        return functools.reduce(jnp.add, parts)

    def gathered(m: jax.Array) -> jax.Array:
        def order_columns(m: jax.Array) -> jax.Array:
            return m.at[:, out_offset].get(mode="promise_in_bounds")

        columns = stored(order_columns, m)  # not gathered again for each row
        return delta(lambda row: columns.at[row].get(mode="clip"))

    def multiplied(m: jax.Array) -> jax.Array:
        columns = matmul(m, _unit_rows(out_offset, q, m.dtype).T)
        columns = jax.lax.optimization_barrier(columns)
        return delta(lambda row: matmul(_unit_rows(row, len(m), m.dtype), columns))

    return by_platform(_multiplies, multiplied, gathered, m.reshape(-1, q))


def _multiplies(tuning: Tuning) -> bool:
    return tuning.orders_by_products


def _unit_rows(indices: ArrayLike, size: int, dtype: DTypeLike) -> jax.Array:
    """Unit vectors as the rows of a matrix, which picks these rows of another."""
    return jax.nn.one_hot(indices, size, dtype=dtype)


@delta_matrix.register
def _(op: Projection, m: jax.Array) -> jax.Array:
    c, d = (jnp.asarray(a).astype(m.dtype) for a in (op.in_basis, op.out_basis))
    return _between(c, m, d)


@delta_matrix.register
def _(op: Hadamard, m: jax.Array) -> jax.Array:
    return _between(op.matrix("in", m.dtype), m, op.matrix("out", m.dtype))


def _between(c: jax.Array, m: jax.Array, d: jax.Array) -> jax.Array:
    """C M D of (in, K q), M and the transpose of D, (out, K q).

    The product with the narrower side comes first: it is the smaller one. On TPUs XLA
    would compute it again for each tile of the second if there were no barrier.
    """
    m = block_diagonal(m)
    if len(c) < len(d):
        return matmul(jax.lax.optimization_barrier(matmul(c, m)), d.T)
    return matmul(c, jax.lax.optimization_barrier(matmul(m, d.T)))


@functools.singledispatch
def add_matrix(op: Operator, m: jax.Array, kernel: jax.Array) -> jax.Array:
    """The kernel plus the delta, (in_features, out_features), in the kernel's dtype.

    A kernel of 16 bits is rounded with a dither.

    Args:
      op: An operator.
      m: M, in float32 or float64.
      kernel: (in_features, out_features).
    """
    return add_rounded(kernel, delta_matrix(op, m), "io", kernel.dtype, "dither")


def folds_in_place(op: Operator) -> bool:
    """Whether `add_matrix` changes blocks of the kernel, on platforms that slice."""
    ordered = isinstance(op, Permutation)
    return isinstance(op, Decoupling) and op.aligned and not ordered


@add_matrix.register
def _(op: Decoupling, m: jax.Array, kernel: jax.Array) -> jax.Array:
    whole = add_matrix.dispatch(Operator)
    if not folds_in_place(op):
        return whole(op, m, kernel)
    return by_platform(
        lambda tuning: tuning.slices_blocks,
        functools.partial(_add_copies, op),
        functools.partial(whole, op),
        m,
        kernel,
    )


def _add_copies(op: Decoupling, m: jax.Array, kernel: jax.Array) -> jax.Array:
    """The kernel with the copies of M added one after another, in place.

    The rest of the kernel, 1 - 1/n of it, is only copied. XLA copies it to the chip's
    fast memory, where the product that follows reads it.
    """
    q = op.square_rank
    turned = turned_m(op, m)
    n, p = op.compressed_shape[0], op.num_out_blocks

    def add_copy(k: jax.Array, folded: jax.Array) -> jax.Array:
        block_in, block_out = (k.astype(jnp.uint32) % np.uint32(c) for c in (n, p))
        start = block_in * q, block_out * q
        block = jax.lax.dynamic_slice(kernel, start, (q, q))
        m = jax.lax.dynamic_index_in_dim(turned, block_in, keepdims=False)
        block = add_rounded(block, m, "io", kernel.dtype, "dither", start)
        return jax.lax.dynamic_update_slice(folded, block, start)

    copies = max(op.num_feeding, p)
    return jax.lax.fori_loop(0, copies, add_copy, kernel)


@add_matrix.register
def _(op: Permutation, m: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(add_matrix.dispatch(Operator)(op, m, kernel))


def m_of_blocks(op: Decoupling, m: jax.Array) -> jax.Array:
    """The square of each block: (K, q, k) -> (n, q, k), or (q, k) -> (1, q, k)."""
    if m.ndim == 2:
        return m[None]
    n, k = op.compressed_shape[0], op.squares
    return m if n == k else jnp.tile(m, (-(-n // k), 1, 1))[:n]


def turned_m(op: Decoupling, m: jax.Array) -> jax.Array:
    """What each block of x is multiplied by: M -> (n, q, q)."""
    turned = op.rotate_m(m_of_blocks(op, m))
    return jnp.broadcast_to(turned, (op.compressed_shape[0], *turned.shape[1:]))


@delta_matrix.register
def _(part: OperatorPart, m: jax.Array) -> jax.Array:
    return part.take_inputs(part.take_outputs(delta_matrix(part.operator, m)))


@delta_matrix.register
def _(part: BasisPart, m: jax.Array) -> jax.Array:
    return matmul(part.rows("in", m.dtype), part.decompress(block_diagonal(m)))


@delta_matrix.register
def _(part: SharingPart, m: jax.Array) -> jax.Array:
    rows = part.decompress(block_diagonal(m))
    vector = shape_for((part.in_features,), rows.dtype, rows)
    transpose = jax.linear_transpose(lambda x: part.compressed_rows(x)[0], vector)
    (weight,) = jax.vmap(transpose, in_axes=-1, out_axes=-1)(rows)
    return weight


@delta_matrix.register
def _(part: PermutationPart, m: jax.Array) -> jax.Array:
    op = part.operator
    rows = part.take_inputs(jnp.asarray(op.in_inverse))
    columns = part.take_outputs(jnp.asarray(op.out_inverse))
    return _permuted_matrix(op, m, rows, columns)
