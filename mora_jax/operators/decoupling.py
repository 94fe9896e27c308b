"""Decoupling: M on every block of q features."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mora_jax._common.types import Shape
from mora_jax._jax.tiles import sum_tiles
from mora_jax.operators._base import Operator, Side
from mora_jax.operators._blocks import (
    block_positions,
    from_blocks,
    num_blocks,
    to_blocks,
)
from mora_jax.operators._pytree import operator


@operator
class Decoupling(Operator):
    """M acts on each block of q features on its own (paper equation 8).

    Input block k feeds output block k mod p, p = ceil(out / q); outputs beyond the n
    input blocks repeat them, so every input has an effect whatever the two widths. The
    input blocks that feed the same output block are a *group*; there are min(n, p). Of
    K squares, input block k is multiplied by square k mod K.

    Attributes:
      truncate: Leave out the input blocks beyond the p-th instead, as the reference
        does. Its files need it; most inputs of a narrowing layer then have no effect.

    Example::

      >>> import jax.numpy as jnp
      >>> from mora_jax.operators import Decoupling
      >>> op = Decoupling(in_features=4, out_features=4, square_rank=2)
      >>> op.delta_weight(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
      Array([[1., 2., 0., 0.],
             [3., 4., 0., 0.],
             [0., 0., 1., 2.],
             [0., 0., 3., 4.]], dtype=float32)
    """

    truncate: bool = False

    name = "decoupling"
    bounded = False
    block = True
    tiles = True

    @property
    def most_squares(self) -> int:
        return self.num_feeding

    @property
    def compressed_shape(self) -> Shape:
        return (num_blocks(self.in_features, self.square_rank), self.square_rank)

    @property
    def isometry(self) -> bool:
        whole = self.in_features % self.square_rank == 0
        return self.in_features == self.out_features and whole

    @property
    def num_out_blocks(self) -> int:
        """How many blocks cover the outputs: p."""
        return num_blocks(self.out_features, self.square_rank)

    @property
    def num_groups(self) -> int:
        """How many groups of input blocks there are: min(n, p)."""
        return min(self.compressed_shape[0], self.num_out_blocks)

    @property
    def gains(self) -> tuple[float, float]:
        """1 each, since C and D move numbers; an output is the sum of a group of them.

        Where n input blocks feed p < n output blocks, n / p numbers are added, whose
        changes have either sign.
        """
        return 1.0, math.sqrt(self.num_feeding / self.num_groups)

    def _compress(self, x: jax.Array) -> jax.Array:
        return to_blocks(self.order_inputs(x), self.square_rank)

    def _decompress(self, h: jax.Array) -> jax.Array:
        return self.decompress_groups(self.sum_groups(h))

    def sum_groups(self, h: jax.Array) -> jax.Array:
        """(..., n, q) -> (..., groups, q): the sum of the blocks in each group."""
        *batch, n, q = h.shape
        if n <= self.num_out_blocks:
            return h
        if self.truncate:
            return h[..., : self.num_out_blocks, :]
        h = sum_tiles(h.reshape(*batch, n * q), self.num_out_blocks * q)
        return h.reshape(*batch, self.num_out_blocks, q)

    def decompress_groups(self, h: jax.Array) -> jax.Array:
        """D of blocks whose groups are summed: (..., groups, q) -> (..., out)."""
        return self.outputs_in_place(from_blocks(h, self.out_features))

    def _rows(self, side: Side, indices: jax.Array, dtype: DTypeLike) -> jax.Array:
        n, q = self.compressed_shape
        if side == "in":
            block, entries = self.block_rows(indices, dtype)
            at_block = jax.nn.one_hot(block, n, dtype=dtype)
            return jnp.sum(at_block[..., None] * entries[..., None, :], axis=-3)
        block, offset = block_positions(indices, self.out_features, q)
        block, offset = block[..., :1], offset[..., :1]  # each output is in one block
        feeds = self.in_group(np.arange(n, dtype=np.uint32)) == self.out_group(block)
        return feeds[..., None] * jax.nn.one_hot(offset, q, dtype=dtype)

    def block_rows(
        self, indices: jax.Array, dtype: DTypeLike
    ) -> tuple[jax.Array, jax.Array]:
        """C of unit vectors where it is not zero: (...) -> (..., t) and (..., t, q).

        A feature is in up to t blocks; this gives their numbers, and what they hold.
        """
        block, offset = block_positions(indices, self.in_features, self.square_rank)
        unit = jax.nn.one_hot(offset, self.square_rank, dtype=dtype)
        return block, self.rotate_rows(unit, block)

    def order_inputs(self, x: jax.Array) -> jax.Array:
        """The inputs in the order in which they are cut into blocks, (..., in)."""
        return x

    def order_outputs(self, y: jax.Array) -> jax.Array:
        """The outputs in the order of the blocks that they are made of, (..., out)."""
        return y

    def outputs_in_place(self, y: jax.Array) -> jax.Array:
        """Undo `order_outputs`."""
        return y

    def rotate_rows(self, h: jax.Array, block: jax.Array) -> jax.Array:
        """What `_compress` does to (..., q) numbers of the blocks (...)."""
        return h

    def square_of(self, block: Any) -> Any:
        """The number of the square that multiplies each input block, (...)."""
        return block % np.uint32(self.squares)

    @property
    def sums_first(self) -> bool:
        """Whether one square multiplies all blocks of a group, and so their sum."""
        single = self.num_groups >= self.num_feeding
        return single or self.num_groups % self.squares == 0

    def rotate_m(self, m: jax.Array) -> jax.Array:
        """What each block of x multiplies, (n, q, k) -> (n, q, k).

        One square may stand for n equal ones, (1, q, k); where nothing is rotated, it
        stands for the results as well.
        """
        return m

    @property
    def aligned(self) -> bool:
        """Whether q divides both widths, so that blocks are slices of features."""
        return not (
            self.in_features % self.square_rank + self.out_features % self.square_rank
        )

    @property
    def num_feeding(self) -> int:
        """How many input blocks feed an output block: all, unless some are left out."""
        return self.num_groups if self.truncate else self.compressed_shape[0]

    def in_group(self, block: Any) -> Any:
        """The group of each input block, (...); its outputs are those it feeds.

        Blocks that are left out, or beyond the n-th, are in a group without outputs.
        """
        groups = np.uint32(self.num_groups)
        last = groups if self.truncate else self.compressed_shape[0]
        return block % groups + groups * (block >= last)

    def out_group(self, block: Any) -> Any:
        """The group that feeds each output block, (...)."""
        return block % np.uint32(self.num_groups)
