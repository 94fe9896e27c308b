"""D(C(x) M) as a map of M: the equation's second term, and the gradient of M."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._common.types import ArrayLike
from mora_jax._jax.linear_map import LinearMap
from mora_jax._jax.qwix_guard import last_with_first, matmul
from mora_jax._jax.tiles import pad_to, sum_tiles, tile_to
from mora_jax._jax.vma import shape_for, zeros_for
from mora_jax._layer.compressed import Compressed, compressed_rows
from mora_jax._layer.delta_matrix import turned_m
from mora_jax._layer.tuning import (
    MAX_UNROLLED_SLICES,
    ORDERED_ROWS,
    UNROLLED_PRODUCTS,
    Tuning,
    by_platform,
)
from mora_jax.operators import Decoupling, Permutation


@dataclasses.dataclass(frozen=True)
class ProductByM(LinearMap):
    """D(C(x) M) as a map of M.

    For the gradient it keeps x and no blocks of it. Layers that read the same x
    (queries, keys and values) then keep it once.

    Attributes:
      precision: The precision of the product with M.
      compressed: The function that gives C(x), and D for it, of an operator and x.
    """

    precision: jax.lax.PrecisionLike
    compressed: Callable[[Any, jax.Array], Compressed] = compressed_rows

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        (op, x), m = residuals, operand
        h, decompress, times_squares = self.compressed(op, x)
        if m.ndim > 2:
            return decompress(times_squares(h, m, self.precision))
        axes = last_with_first(h)
        return decompress(jax.lax.dot_general(h, m, axes, precision=self.precision))

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        op, x = residuals
        h, decompress, times_squares = self.compressed(op, x)
        (back,) = jax.linear_transpose(decompress, h)(cotangent)
        if len(op.m_shape) > 2:
            m = shape_for(op.m_shape, cotangent.dtype, cotangent)
            by_m = jax.linear_transpose(
                lambda m: times_squares(h, m, self.precision), m
            )
            return by_m(back)[0]
        # One product of all blocks of all rows, not one for each block.
        h, back = (a.reshape(-1, a.shape[-1]) for a in (h, back))
        return matmul(h.T, back, self.precision)


@dataclasses.dataclass(frozen=True)
class SlicedProduct(ProductByM):
    """The same for a block operator whose blocks are slices of x.

    Block k of x is turned, and multiplied with M. M may be turned instead: n small
    matrices, for which x stays as it is. Where slices cost nothing, neither x nor its
    gradient are then written again as arrays of blocks.

    Attributes:
      row_shards: How many devices share the rows of x, the first axis of which they
        split; 1 if that is not known. The products of blocks are kept apart by these
        shards until they are turned: so one (q, q) is summed over devices, and not n.
    """

    row_shards: int = 1

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        (op, x), m = residuals, operand
        sliced, general = self._sliced, functools.partial(ProductByM.forward, self)
        return by_platform(_slices, sliced, general, (op, x), m)

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        general = functools.partial(ProductByM.backward, self)
        op, _ = residuals
        if op.num_feeding == op.num_groups:  # no group is a sum of blocks
            batched = self._batched_m_gradient
            general = functools.partial(by_platform, _batches, batched, general)
        ordered = isinstance(op, Permutation)
        sliced = self._ordered_m_gradient if ordered else self._m_gradient
        return by_platform(_slices, sliced, general, residuals, cotangent)

    def _sliced(self, residuals: Any, m: jax.Array) -> jax.Array:
        op, x = residuals
        turned, q = turned_m(op, m), op.square_rank
        blocks = jax.lax.split(op.order_inputs(x), (q,) * len(turned), axis=-1)
        groups: list[Any] = [None] * op.num_groups
        for k, block in enumerate(blocks[: op.num_feeding]):
            h = jax.lax.dot_general(
                block, turned[k], last_with_first(x), precision=self.precision
            )
            group = k % op.num_groups
            groups[group] = h if groups[group] is None else groups[group] + h
        y = tile_to(jnp.concatenate(groups, axis=-1), op.out_features)
        return op.outputs_in_place(y)

    def _m_gradient(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        op, x = residuals
        n, q, groups = op.compressed_shape[0], op.square_rank, op.num_groups
        x, y = op.order_inputs(x), op.order_outputs(cotangent)
        y = sum_tiles(y, groups * q)
        x, y = (a.reshape(self.row_shards, -1, a.shape[-1]) for a in (x, y))
        wide = jnp.promote_types(y.dtype, jnp.float32)

        def put_product(k: jax.Array, products: jax.Array) -> jax.Array:
            # Unsigned, or XLA would not see that the slices are whole tiles.
            k = k.astype(jnp.uint32)
            h = jax.lax.dynamic_slice_in_dim(x, k * q, q, axis=2)
            back = jax.lax.dynamic_slice_in_dim(y, k % groups * q, q, axis=2)
            gradient = jax.lax.dot_general(
                h,
                back,
                (((1,), (1,)), ((0,), (0,))),
                precision=self.precision,
                preferred_element_type=wide,
            )
            return jax.lax.dynamic_update_index_in_dim(products, gradient, k, axis=0)

        # A loop, since XLA takes as long for n products as for n layers.
        products = zeros_for((n, self.row_shards, q, q), wide, x, y)
        products = jax.lax.fori_loop(
            0, op.num_feeding, put_product, products, unroll=UNROLLED_PRODUCTS
        )
        return _turned_back(op, products).astype(y.dtype)

    def _ordered_m_gradient(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        """The same where features are in another order, some rows at a time.

        To reorder features, a TPU transposes an array and moves whole rows of memory.
        Of some rows of x and y both fit in its fast memory, so that x and y are read
        once and nothing of their size is written.
        """
        op, x = residuals
        x, y = (a.reshape(self.row_shards, -1, a.shape[-1]) for a in (x, cotangent))
        rows = x.shape[1]
        steps = 1 if rows % ORDERED_ROWS else max(rows // ORDERED_ROWS, 1)
        # With an axis of steps. XLA would transpose all of x if it were to slice rows.
        x, y = (
            a.reshape(self.row_shards, steps, rows // steps, a.shape[-1])
            for a in (x, y)
        )
        wide = jnp.promote_types(y.dtype, jnp.float32)

        def products(step: ArrayLike) -> jax.Array:
            at = functools.partial(jax.lax.dynamic_index_in_dim, axis=1, keepdims=False)
            h, decompress, _ = compressed_rows(op, at(x, step))
            (back,) = jax.linear_transpose(decompress, h)(at(y, step))
            axes = ((1,), (1,)), ((2, 0), (2, 0))
            settings = {"precision": self.precision, "preferred_element_type": wide}
            return jax.lax.dot_general(h, back, axes, **settings)

        total = zeros_for(jax.eval_shape(products, 0).shape, wide, x, y)
        total = jax.lax.fori_loop(
            0, steps, lambda step, total: total + products(step), total
        )
        total = pad_to(total, op.compressed_shape[0], axis=0)
        return _turned_back(op, total).astype(y.dtype)

    def _batched_m_gradient(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        """One product with an axis of blocks, whose results are turned."""
        op, x = residuals
        q, n = op.square_rank, op.num_feeding
        x, y = op.order_inputs(x), op.order_outputs(cotangent)
        products = jax.lax.dot_general(
            x[..., : n * q].reshape(self.row_shards, -1, n, q),
            sum_tiles(y, n * q).reshape(self.row_shards, -1, n, q),
            (((1,), (1,)), ((2, 0), (2, 0))),
            precision=self.precision,
            preferred_element_type=jnp.promote_types(y.dtype, jnp.float32),
        )
        products = pad_to(products, op.compressed_shape[0], axis=0)
        return _turned_back(op, products).astype(y.dtype)


def _turned_back(op: Any, products: jax.Array) -> jax.Array:
    """The gradient of M by those of what each block multiplies, (n, shards, q, q)."""
    m = shape_for(op.m_shape, products.dtype, products)
    turn_back = jax.linear_transpose(lambda m: turned_m(op, m), m)
    return jax.vmap(turn_back, in_axes=1)(products)[0].sum(0)


def _slices(tuning: Tuning) -> bool:
    return tuning.slices_blocks


def _batches(tuning: Tuning) -> bool:
    return tuning.batches_blocks


def can_slice(op: Any) -> bool:
    """Whether the blocks of an operator are few slices of its features."""
    aligned = isinstance(op, Decoupling) and op.aligned
    return aligned and op.compressed_shape[0] <= MAX_UNROLLED_SLICES
