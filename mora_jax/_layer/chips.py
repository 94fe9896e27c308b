"""Forms for TPUs and GPUs: the one door to what is computed otherwise there.

Each function takes the faster form of an operator on the platform that is traced for,
or the operator's own method, which gives the same. Rooflines of compiled programs found
the forms (`make bench-chips`).

On a TPU an array is stored as tiles of 8 rows and 128 features. A slice of whole tiles
costs nothing, while an array of blocks, (rows, n, q), is written once more. So blocks
are cut from x, and M is rotated by R_k instead of each block of x: x_k (R_k M) = (x_k
R_k) M. The gradient of M, the sum of R_k^T (x_k^T g_k), then takes n products of
slices; on a GPU these are one product with an axis of blocks. Of blocks with an M each
several fill a tile, with zeros between them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mora_jax._common.types import Shape
from mora_jax._jax.linear_algebra import matmul, transposed, zeros_for
from mora_jax._jax.tiles import sum_tiles, tile_to
from mora_jax._jax.tracing import MAX_UNROLLED_SLICES, current_chip
from mora_jax._layer.rounding import add_rounded
from mora_jax._mesh.parts import BlockPart, DiagonalPart, OperatorPart, whole
from mora_jax.operators import BlockDiagonal, Damped, Decoupling, LowRank
from mora_jax.operators._base import DeltaMap, Precision
from mora_jax.operators._registry import LANES
from mora_jax.operators.decoupling import divide

# Products of the gradient of M in one step of a loop. XLA fetches what a product reads
# while it computes the ones before it, in one step of a loop. With 1, all and 8 a Llama
# cost 0.92, 0.87 and 0.87 of the frozen one on a TPU v5e, and took 32, 101 and 37
# seconds of two cores to compile (`make bench-chips`).
UNROLLED_PRODUCTS = 8

# The largest rank of a LoRA whose A B is not a product on a GPU. Such a product is
# written in float32, and read again where the kernel is added: a Llama of 8B's width
# with r = 8 cost 1.10 of the frozen one so, and costs 1.06 (`make bench-chips`).
THIN = 16

InBlocks = Decoupling | BlockDiagonal
"""Operators whose deltas are made of blocks; `aligned` ones are slices of features."""


def map_of(op: Any) -> Any:
    """The map of an operator in the form for the platform, or the operator itself."""
    if isinstance(op, Damped):
        return op.around(map_of(op.inner))
    if not (isinstance(op, InBlocks) and op.aligned):
        return op
    (n, *_), chip = _blocks_shape(op), current_chip()
    if chip == "tpu" and n <= MAX_UNROLLED_SLICES:
        return BlockMap(op, _sliced_rows, _sliced_products)
    if chip == "gpu" and n == getattr(op, "num_groups", 0) <= MAX_UNROLLED_SLICES:
        return BlockMap(op, type(op).rows, _batched_products)
    return op


def matrix_of(op: Any, m: Array) -> Array:
    """`op.matrix(m)`."""
    if isinstance(op, Damped):
        return op.matrix_by(matrix_of(op.inner, m), m)
    if current_chip() == "gpu" and isinstance(op, LowRank) and op.rank <= THIN:
        # A sum of outer products, which XLA fuses with all that follows.
        a, b = op.factors(m)
        outer = (jnp.outer(a[:, k], b[k]) for k in range(op.rank))
        return functools.reduce(jnp.add, outer)
    return op.matrix(m)


def add(op: Any, m: Array, kernel: Array) -> Array:
    """The sum of a kernel and the delta.

    The kernel is (in_features, out_features), or a part of one for a part of an
    operator. The sum has its dtype; 16 bits are rounded with a dither.
    """
    part = op if isinstance(op, OperatorPart) else whole(op)
    if current_chip() == "tpu" and isinstance(part, BlockPart | DiagonalPart):
        here = part.in_features, part.out_features
        sizes = zip(here, _blocks_shape(part.operator)[1:], strict=True)
        if all(a % b == 0 or b % a == 0 for a, b in sizes):
            return _add_copies(part, m, kernel)
    start, is_whole = (part.in_start, part.out_start), part.is_whole
    delta = matrix_of(part.operator if is_whole else part, m)
    return add_rounded(kernel, delta, "io", kernel.dtype, "dither", start)


def _blocks_shape(op: InBlocks) -> Shape:
    """Shape of `_blocks`."""
    if isinstance(op, Decoupling):
        return op.compressed_shape[0], op.square_rank, op.square_rank
    n, p, s = op.m_shape
    if current_chip() != "tpu":
        return op.m_shape
    # The fewest blocks that fill a tile, and if possible whole tiles on both sides.
    counts = [t for t in range(1, n + 1) if n % t == 0 and t * p >= LANES] or [n]
    t = min(counts, key=lambda t: ((t * p % LANES > 0) + (t * s % LANES > 0), t))
    return n // t, t * p, t * s


def _blocks(op: InBlocks, m: Array) -> Array:
    """The factor of each slice of x: R_k M, or several M's with zeros between."""
    # Where each slice has M's of its own, `m` may be of some neighbouring slices alone.
    (n, p, s), one = _blocks_shape(op), m.shape[-2:]
    if isinstance(op, Decoupling):
        return jnp.broadcast_to(op.rotate_m(m), (n, p, s))
    t = p // one[0]
    apart = jnp.eye(t, dtype=m.dtype)[:, None, :, None]
    return (m.reshape(-1, t, one[0], 1, one[1]) * apart).reshape(-1, p, s)


@dataclasses.dataclass(frozen=True)
class BlockMap(DeltaMap):
    """The map of an operator with few blocks, each with a factor, see `_blocks`."""

    # Products of blocks are kept apart by the devices that share the rows of x, until
    # they are rotated back: one array like M is summed over devices, not n.
    op: Any
    rows_of: Callable[[Any, Array, Array, Precision], Array]
    # The gradients of the factors, (n, shards, p, s).
    products_of: Callable[[Any, Array, Array, int, Precision], Array]

    block = True

    def rows(self, x: Array, m: Array, precision: Precision = None) -> Array:
        return self.rows_of(self.op, x, m, precision)

    def tangent(self, kept: Any, tangent: Array, precision: Precision = None) -> Array:
        return self.rows(kept, tangent, precision)

    def gradient(
        self, kept: Any, g: Array, precision: Precision = None, shards: int = 1
    ) -> Array:
        products = self.products_of(self.op, kept, g, shards, precision)
        blocks = functools.partial(_blocks, self.op)
        of_m = functools.partial(transposed, blocks, self.op.m_shape)
        parts = jax.vmap(of_m, in_axes=1)(products)  # or devices sum products
        return jax.lax.optimization_barrier(parts).sum(0).astype(g.dtype)


def _sliced_rows(op: InBlocks, x: Array, m: Array, precision: Precision) -> Array:
    """The form for TPUs: a product for each slice of x."""
    factors = _blocks(op, m)
    slices = jax.lax.split(x, factors.shape[1:2] * len(factors), axis=-1)
    groups: list[Any] = [None] * getattr(op, "num_groups", len(slices))
    for k, block in enumerate(slices):
        h, group = matmul(block, factors[k], precision), k % len(groups)
        groups[group] = h if groups[group] is None else groups[group] + h
    return tile_to(jnp.concatenate(groups, axis=-1), op.out_features)


def _sliced_products(
    op: InBlocks, x: Array, g: Array, shards: int, precision: Precision
) -> Array:
    """The same for products of a slice of x and one of the gradient."""
    n, p, s = _blocks_shape(op)
    groups = getattr(op, "num_groups", n)
    y = sum_tiles(g, groups * s)
    x, y = (a.reshape(shards, -1, a.shape[-1]) for a in (x, y))

    def put_product(k: Array, products: Array) -> Array:
        # Unsigned, or XLA would not see that the slices are whole tiles.
        k = k.astype(jnp.uint32)
        h = jax.lax.dynamic_slice_in_dim(x, k * p, p, axis=2)
        back = jax.lax.dynamic_slice_in_dim(y, k % groups * s, s, axis=2)
        gradient = _products_of_rows(h, back, ((0,), (0,)), precision)
        return jax.lax.dynamic_update_index_in_dim(products, gradient, k, axis=0)

    # A loop, since XLA takes as long for n products as for n layers.
    wide = jnp.promote_types(y.dtype, jnp.float32)
    products = zeros_for((n, shards, p, s), wide, x, y)
    return jax.lax.fori_loop(0, n, put_product, products, unroll=UNROLLED_PRODUCTS)


def _batched_products(
    op: InBlocks, x: Array, g: Array, shards: int, precision: Precision
) -> Array:
    """The form for GPUs: one product with an axis of blocks."""
    n, p, s = _blocks_shape(op)
    h, back = x.reshape(shards, -1, n, p), sum_tiles(g, n * s).reshape(shards, -1, n, s)
    return _products_of_rows(h, back, ((2, 0), (2, 0)), precision)


def _products_of_rows(h: Array, g: Array, batch: Any, precision: Precision) -> Array:
    """Sums of h^T g over rows, (shards, rows, ..., q) twice, for each of `batch`."""
    axes, dtype = (((1,), (1,)), batch), jnp.promote_types(g.dtype, jnp.float32)
    return jax.lax.dot_general(h, g, axes, precision, dtype)


def _add_copies(part: BlockPart | DiagonalPart, m: Array, kernel: Array) -> Array:
    """The kernel with the copies of M added one after another, in place."""
    # The rest of the kernel, 1 - 1/n of it, is only copied, to the chip's fast memory,
    # where the product that follows reads it. A device has whole blocks, or a part of
    # one. It goes through its blocks of that side which has more of them in the whole
    # kernel; each meets one block of the other side, and adds zeros if that is away.
    op, (n, rows, columns) = part.operator, _blocks_shape(part.operator)
    p = op.out_features // columns
    ins, outs = min(rows, part.in_features), min(columns, part.out_features)
    starts = part.in_start.astype(jnp.uint32), part.out_start.astype(jnp.uint32)
    first_in, row_in_m = divide(starts[0], rows)
    first_out, column_in_m = divide(starts[1], columns)
    in_m = np.uint32(0), row_in_m, column_in_m
    here_in, here_out = part.in_features // ins, part.out_features // outs
    by_in = n > p or (n == p and here_in <= here_out)
    first, count = (first_in, here_in) if by_in else (first_out, here_out)
    first_of_m = np.uint32(0)
    if isinstance(op, BlockDiagonal):  # M's that are away would be laid out in vain
        first_of_m, each = first, len(m) // n
        m = jax.lax.dynamic_slice_in_dim(m, first * np.uint32(each), count * each)
    blocks = _blocks(op, m)
    blocks = jax.lax.dynamic_slice(blocks, in_m, (len(blocks), ins, outs))

    def add_copy(k: Array, folded: Array) -> Array:
        k = k.astype(jnp.uint32)
        if by_in:
            block_in = first_in + k
            block_out = block_in % np.uint32(p)
        else:
            block_out = first_out + k
            block_in = block_out % np.uint32(n)
        row, column = block_in - first_in, block_out - first_out  # wrap if before
        is_here = (row < here_in) & (column < here_out)
        row = jnp.minimum(row, np.uint32(here_in - 1)) * np.uint32(ins)
        column = jnp.minimum(column, np.uint32(here_out - 1)) * np.uint32(outs)
        # Of a whole kernel each block comes once. XLA keeps an array more for `folded`.
        source = kernel if part.is_whole else folded
        block = jax.lax.dynamic_slice(source, (row, column), (ins, outs))
        at = block_in - first_of_m
        copy = jax.lax.dynamic_index_in_dim(blocks, at, keepdims=False)
        copy = jnp.where(is_here, copy, 0)
        start = starts[0] + row, starts[1] + column
        block = add_rounded(block, copy, "io", kernel.dtype, "dither", start)
        return jax.lax.dynamic_update_slice(folded, block, (row, column))

    return jax.lax.fori_loop(0, count, add_copy, kernel)
