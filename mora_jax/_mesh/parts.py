"""One device's part of an operator, where devices share the features.

A device has neighbouring inputs and wants neighbouring outputs. Its part of an operator
is the pair of maps from the first to the second; the sum over all devices that share
the inputs is the operator. `part_of` finds the part by the operator's type: there is a
general one for every operator, and others that do less work.
"""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._common.types import Shape
from mora_jax._jax.qwix_guard import last_with_first, matmul
from mora_jax._jax.tiles import sum_tiles, tile_to
from mora_jax._jax.vma import shape_for
from mora_jax.operators import (
    Decoupling,
    Operator,
    Permutation,
    Sharing,
    SignedSharing,
)
from mora_jax.operators._base import Side, Split
from mora_jax.operators._blocks import num_blocks
from mora_jax.operators._projection import Projection


@dataclasses.dataclass(frozen=True)
class OperatorPart(abc.ABC):
    """The part of an operator for some of its inputs and outputs.

    Attributes:
      operator: The whole operator.
      in_start: The first input that is here, ().
      out_start: The first output that is here, ().
      in_features: The number of inputs that are here.
      out_features: The number of outputs that are here.
    """

    operator: Any  # an Operator; subclasses know which
    in_start: jax.Array
    out_start: jax.Array
    in_features: int
    out_features: int

    def __init_subclass__(cls) -> None:
        jax.tree_util.register_dataclass(
            cls,
            data_fields=["operator", "in_start", "out_start"],
            meta_fields=["in_features", "out_features"],
        )

    @abc.abstractmethod
    def split(self, x: jax.Array) -> Split:
        """Split of the product of the inputs that are here, for the outputs here.

        Args:
          x: (..., in_features).
        """

    @property
    def m_shape(self) -> Shape:
        """Shape of M."""
        return self.operator.m_shape

    @property
    def linear(self) -> bool:
        """True if the delta is linear in what is trained."""
        return self.operator.linear

    @property
    def is_whole(self) -> bool:
        """True if all features are here."""
        op = self.operator
        here = self.in_features, self.out_features
        return here == (op.in_features, op.out_features)

    def rows(
        self, x: jax.Array, m: jax.Array, precision: jax.lax.PrecisionLike = None
    ) -> jax.Array:
        """Share of the inputs here in the outputs here: (..., in) -> (..., out)."""
        h, decompress = self.split(x)
        axes = last_with_first(h)
        return decompress(jax.lax.dot_general(h, m, axes, precision=precision))

    def unit_rows(
        self, indices: jax.Array, m: jax.Array, precision: jax.lax.PrecisionLike = None
    ) -> jax.Array:
        """The outputs here of rows of the whole delta: (...) -> (..., out)."""
        return self.take_outputs(self.operator.unit_rows(indices, m, precision))

    def matrix(self, m: jax.Array) -> jax.Array:
        """The rows and columns of the delta that are here, (in, out)."""
        return self.take_inputs(self.take_outputs(self.operator.matrix(m)))

    def pad_inputs(self, x: jax.Array) -> jax.Array:
        """All inputs, those that are elsewhere zero: (..., whole in_features)."""
        if self.in_features == self.operator.in_features:
            return x
        return _put(x, self.operator.in_features, self.in_start)

    def take_inputs(self, rows: jax.Array) -> jax.Array:
        """The rows of the inputs that are here, (whole, ...) -> (in_features, ...)."""
        size = self.in_features
        return jax.lax.dynamic_slice_in_dim(rows, self.in_start, size, axis=0)

    def take_outputs(self, y: jax.Array) -> jax.Array:
        """The outputs that are here, (..., whole out_features) -> (..., here)."""
        if self.out_features == self.operator.out_features:
            return y
        size = self.out_features
        return jax.lax.dynamic_slice_in_dim(y, self.out_start, size, axis=-1)


@functools.singledispatch
def part_of(
    op: Operator,
    in_start: jax.Array,
    out_start: jax.Array,
    in_features: int,
    out_features: int,
) -> OperatorPart:
    """The part of `op` for neighbouring inputs and outputs."""
    return PaddedPart(op, in_start, out_start, in_features, out_features)


class PaddedPart(OperatorPart):
    """The part of any operator: zeros for inputs that are elsewhere."""

    def split(self, x: jax.Array) -> Split:
        h, decompress = self.operator.split(self.pad_inputs(x))
        return Split(h, lambda h: self.take_outputs(decompress(h)))


class SharingPart(PaddedPart):
    """The part of sharing.

    A device that has each group equally often sums and repeats its own features alone.
    """

    def split(self, x: jax.Array) -> Split:
        op, (h, decompress) = self.operator, super().split(x)
        if op.compress_groups == "strided" and not self.in_features % op.square_rank:
            h = sum_tiles(x, op.square_rank) * op._scale("in", x.dtype)
        return Split(h, self._repeat if self._repeats else decompress)

    def matrix(self, m: jax.Array) -> jax.Array:
        rows = (
            self._repeat(m)
            if self._repeats
            else self.take_outputs(self.operator._decompress(m))
        )
        vector = shape_for((self.in_features,), rows.dtype, rows)
        transpose = jax.linear_transpose(lambda x: self.split(x).h, vector)
        (weight,) = jax.vmap(transpose, in_axes=-1, out_axes=-1)(rows)
        return weight

    @property
    def _repeats(self) -> bool:
        op = self.operator
        whole_groups = not self.out_features % op.square_rank
        return op.decompress_groups == "strided" and whole_groups

    def _repeat(self, h: jax.Array) -> jax.Array:
        return tile_to(h * self.operator._scale("out", h.dtype), self.out_features)


class BasisPart(OperatorPart):
    """The part of an operator whose C and D are dense matrices: some of their rows."""

    def split(self, x: jax.Array) -> Split:
        return Split(matmul(x, self._basis("in", x.dtype)), self._decompress)

    def matrix(self, m: jax.Array) -> jax.Array:
        return matmul(self._basis("in", m.dtype), self._decompress(m))

    def _decompress(self, h: jax.Array) -> jax.Array:
        return matmul(h, self._basis("out", h.dtype).T)

    def _basis(self, side: Side, dtype: Any) -> jax.Array:
        """The rows of C, or of D's transpose, that belong to the features here."""
        start, size = (
            (self.in_start, self.in_features)
            if side == "in"
            else (self.out_start, self.out_features)
        )
        return self.operator._matrix_rows(side, start + jnp.arange(size), dtype)


class PermutationPart(PaddedPart):
    """The part of a permutation, each of whose blocks has features from everywhere."""

    @property
    def places(self) -> tuple[jax.Array, jax.Array]:
        """The places of the features here in the orders of inputs and outputs."""
        op = self.operator
        rows = self.take_inputs(jnp.asarray(op.in_inverse))
        return rows, self.take_outputs(jnp.asarray(op.out_inverse))

    def matrix(self, m: jax.Array) -> jax.Array:
        return self.operator.matrix_part(m, *self.places)


class BlockPart(OperatorPart):
    """The part of a block operator.

    The device computes with the blocks that hold features of its own, and with the
    groups of blocks that its outputs want. Neighbouring features touch whole blocks
    where q divides their number; otherwise M multiplies up to two blocks more.
    """

    @property
    def is_cut_evenly(self) -> bool:
        """True if a device has whole blocks, or blocks are on whole devices."""
        q = self.operator.square_rank
        sizes = self.in_features, self.out_features
        return self.operator.aligned and all(n % q == 0 or q % n == 0 for n in sizes)

    def split(self, x: jax.Array) -> Split:
        groups = self.operator.num_groups
        blocks, firsts = self._touched_blocks(x)
        start, wanted = self._wanted_groups()

        def sum_wanted(blocks: Sequence[jax.Array]) -> jax.Array:
            """The sums of the groups that outputs here want: (..., wanted, q)."""
            placed = (
                _place(self.operator.sum_groups(h), first - start, groups)
                for h, first in zip(blocks, firsts, strict=True)
            )
            return functools.reduce(jnp.add, placed)[..., :wanted, :]

        # M multiplies whichever are fewer: the blocks from here, or those for here.
        # Both orders give the same sum, since M is the same for all blocks of a group.
        sizes = [h.shape[-2] for h in blocks]
        if sum(sizes) > wanted:
            return Split(sum_wanted(blocks), self._outputs_of_groups)
        ends = list(itertools.accumulate(sizes))[:-1]

        def decompress(h: jax.Array) -> jax.Array:
            return self._outputs_of_groups(sum_wanted(jnp.split(h, ends, axis=-2)))

        return Split(jnp.concatenate(blocks, axis=-2), decompress)

    def _touched_blocks(self, x: jax.Array) -> tuple[list[jax.Array], list[Any]]:
        """The blocks that hold features of this device, and where they belong.

        Returns:
          Arrays (..., k, q), and for each the number of its first block. The groups of
          the blocks follow each other, and after the last group comes the first again.
          Blocks of one group are summed.
        """
        op, q, size = self.operator, self.operator.square_rank, self.in_features
        if op.truncate or q > op.in_features or size == op.in_features:
            return [op.sum_groups(op._compress(self.pad_inputs(x)))], [0]
        # The features here begin within block `first`, at an offset that only the
        # device knows. Put at that offset among zeros, they are whole blocks, which are
        # rotated as such; what is elsewhere adds zeros.
        first, touched = self.in_start // q, _max_blocks_touched(size, q)
        h = _put(x, touched * q, self.in_start % q)
        h = h.reshape(*x.shape[:-1], touched, q)
        h = op.rotate_rows(h, first + jnp.arange(touched))
        blocks, firsts = [op.sum_groups(h)], [first]
        n = op.compressed_shape[0]
        if over := n * q - op.in_features:  # the first features complete the last block
            h = _put(x, over + size, jnp.minimum(self.in_start, over))
            h = h[..., None, :over]
            h = jnp.pad(h, [*[(0, 0)] * x.ndim, (q - over, 0)])
            blocks.append(op.rotate_rows(h, jnp.array([n - 1])))
            firsts.append(n - 1)
        return blocks, firsts

    def _outputs_of_groups(self, h: jax.Array) -> jax.Array:
        """(..., wanted, q) -> (..., out_features)."""
        op, size = self.operator, self.out_features
        *batch, wanted, q = h.shape
        if wanted == op.num_groups and size == op.out_features:
            return op.decompress_groups(h)
        y = h.reshape(*batch, wanted * q)
        y = tile_to(y, _max_blocks_touched(size, q) * q)
        return jax.lax.dynamic_slice_in_dim(y, self.out_start % q, size, axis=-1)

    def _wanted_groups(self) -> tuple[Any, int]:
        """The first group that outputs here take, and how many follow each other."""
        groups, q = self.operator.num_groups, self.operator.square_rank
        if self.out_features == self.operator.out_features:
            return 0, groups
        wanted = min(groups, _max_blocks_touched(self.out_features, q))
        return self.out_start // q, wanted


def whole(op: Operator) -> OperatorPart:
    """The part that is all of an operator."""
    start = jnp.zeros((), jnp.uint32)
    return part_of(op, start, start, op.in_features, op.out_features)


part_of.register(Projection, BasisPart)
part_of.register(Decoupling, BlockPart)
part_of.register(Permutation, PermutationPart)
part_of.register(Sharing, SharingPart)
part_of.register(SignedSharing, PaddedPart)


def _max_blocks_touched(size: int, q: int) -> int:
    """Largest number of blocks that `size` neighbouring features touch.

    The devices' features begin at multiples of `size`.
    """
    return size // q if size % q == 0 else num_blocks(size - 1, q) + 1


def _put(x: jax.Array, size: int, start: Any) -> jax.Array:
    """`x` among zeros: (..., k) -> (..., size), from `start` on."""
    zeros = jnp.zeros((*x.shape[:-1], size), x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(zeros, x, start, axis=-1)


def _place(h: jax.Array, first: Any, groups: int) -> jax.Array:
    """(..., k, q) among zeros as (..., groups, q), from group `first` on, around."""
    before = [(0, 0)] * (h.ndim - 2)
    h = jnp.pad(h, [*before, (0, groups - h.shape[-2]), (0, 0)])
    return h if isinstance(first, int) and first == 0 else jnp.roll(h, first, axis=-2)
