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
from mora_jax._jax.qwix_guard import matmul
from mora_jax._jax.tiles import sum_tiles, tile_to
from mora_jax._layer.squares import times_squares_in_runs
from mora_jax.operators import (
    Decoupling,
    Hadamard,
    Operator,
    Permutation,
    Sharing,
    SignedSharing,
)
from mora_jax.operators._base import Side
from mora_jax.operators._blocks import num_blocks
from mora_jax.operators._projection import Projection


@dataclasses.dataclass(frozen=True)
class OperatorPart(abc.ABC):
    """The part of an operator for some of its inputs and outputs.

    Attributes:
      operator: The whole operator.
      in_start: The first input that is here, ().
      out_start: The first output that is here, ().
      in_features: How many inputs are here.
      out_features: How many outputs are here.
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
    def compressed_rows(self, x: jax.Array) -> tuple[Any, ...]:
        """C of the inputs that are here, and D for the outputs that are here.

        Args:
          x: (..., in_features).

        Returns:
          The fields of a `Compressed`: C(x), or blocks of it; a function of as many
          numbers that returns (..., out_features); and how several squares multiply
          the blocks, if these are not the first ones.
        """

    @property
    def m_shape(self) -> Shape:
        """Shape of M."""
        return self.operator.m_shape

    @property
    def block(self) -> bool:
        """Whether M acts on several blocks."""
        return self.operator.block

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

    def compressed_rows(self, x: jax.Array) -> tuple[Any, ...]:
        return self.operator._compress(self.pad_inputs(x)), self.decompress

    def decompress(self, h: jax.Array) -> jax.Array:
        """D for the outputs that are here: (..., q) -> (..., out_features)."""
        return self.take_outputs(self.operator._decompress(h))


class SharingPart(PaddedPart):
    """The part of sharing.

    A device that has each group equally often sums and repeats its own features alone.
    """

    def compressed_rows(self, x: jax.Array) -> tuple[Any, ...]:
        op = self.operator
        if op.compress_groups != "strided" or self.in_features % op.width:
            return super().compressed_rows(x)
        return sum_tiles(x, op.width) * op._scale("in", x.dtype), self.decompress

    def decompress(self, h: jax.Array) -> jax.Array:
        op = self.operator
        if op.decompress_groups != "strided" or self.out_features % op.width:
            return super().decompress(h)
        return tile_to(h * op._scale("out", h.dtype), self.out_features)


class BasisPart(OperatorPart):
    """The part of an operator whose C and D are dense matrices: some of their rows."""

    def rows(self, side: Side, dtype: Any) -> jax.Array:
        """The rows of C, or of D's transpose, that belong to the features here."""
        start, size = (
            (self.in_start, self.in_features)
            if side == "in"
            else (self.out_start, self.out_features)
        )
        return self.operator._rows(side, start + jnp.arange(size), dtype)

    def compressed_rows(self, x: jax.Array) -> tuple[Any, ...]:
        return matmul(x, self.rows("in", x.dtype)), self.decompress

    def decompress(self, h: jax.Array) -> jax.Array:
        """D for the outputs that are here: (..., q) -> (..., out_features)."""
        return matmul(h, self.rows("out", h.dtype).T)


class PermutationPart(OperatorPart):
    """The part of a permutation, each of whose blocks has features from everywhere."""

    def compressed_rows(self, x: jax.Array) -> tuple[Any, ...]:
        op = self.operator
        h = op._compress(self.pad_inputs(x))
        h = op.sum_groups(h) if op.sums_first else h
        return h, lambda h: self.take_outputs(op._decompress(h))


class BlockPart(OperatorPart):
    """The part of a block operator.

    The device computes with the blocks that hold features of its own, and with the
    groups of blocks that its outputs want. Neighbouring features touch whole blocks
    where q divides their number; otherwise M multiplies up to two blocks more.
    """

    def compressed_rows(self, x: jax.Array) -> tuple[Any, ...]:
        op, groups = self.operator, self.operator.num_groups
        blocks, firsts = self._touched_blocks(x)
        start, wanted = self._wanted_groups()

        def sum_wanted(blocks: Sequence[jax.Array]) -> jax.Array:
            """The sums of the groups that outputs here want: (..., wanted, q)."""
            placed = (
                _place(op.sum_groups(h), first - start, groups)[..., :wanted, :]
                for h, first in zip(blocks, firsts, strict=True)
            )
            return functools.reduce(jnp.add, placed)

        # M multiplies whichever are fewer: the blocks from here, or those for here. Of
        # several squares it must be the same one for a group after all rounds.
        sizes = [h.shape[-2] for h in blocks]
        if groups % op.squares == 0 and sum(sizes) > wanted:
            times = times_squares_in_runs([(wanted, start)])
            return sum_wanted(blocks), self._outputs_of_groups, times
        ends = list(itertools.accumulate(sizes))[:-1]

        def decompress(h: jax.Array) -> jax.Array:
            return self._outputs_of_groups(sum_wanted(jnp.split(h, ends, axis=-2)))

        times = times_squares_in_runs(list(zip(sizes, firsts, strict=True)))
        return jnp.concatenate(blocks, axis=-2), decompress, times

    def _touched_blocks(self, x: jax.Array) -> tuple[list[jax.Array], list[Any]]:
        """The blocks that hold features of this device, and where they belong.

        Returns:
          Arrays (..., k, q), and for each the number of its first block. The groups of
          the blocks follow each other, and after the last group comes the first again.
          Blocks of one group are summed where one square multiplies them.
        """
        op, q, size = self.operator, self.operator.square_rank, self.in_features

        def sum_early(h: jax.Array) -> jax.Array:
            return op.sum_groups(h) if op.sums_first else h

        if op.truncate or q > op.in_features or not self._shared("in"):
            return [sum_early(op._compress(self.pad_inputs(x)))], [0]
        first, touched = self.in_start // q, _max_blocks_touched(size, q)
        h = _put(x, touched * q, self.in_start % q)
        h = h.reshape(*x.shape[:-1], touched, q)
        h = op.rotate_rows(h, first + jnp.arange(touched))
        blocks, firsts = [sum_early(h)], [first]
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
        if wanted == op.num_groups and not self._shared("out"):
            return op.decompress_groups(h)
        y = h.reshape(*batch, wanted * q)
        y = tile_to(y, _max_blocks_touched(size, q) * q)
        return jax.lax.dynamic_slice_in_dim(y, self.out_start % q, size, axis=-1)

    def _wanted_groups(self) -> tuple[Any, int]:
        """The first group that outputs here take, and how many follow each other."""
        groups, q = self.operator.num_groups, self.operator.square_rank
        if not self._shared("out"):
            return 0, groups
        wanted = min(groups, _max_blocks_touched(self.out_features, q))
        return self.out_start // q, wanted

    def _shared(self, side: Side) -> bool:
        """Whether there are features of this side elsewhere."""
        name = f"{side}_features"
        return getattr(self, name) < getattr(self.operator, name)


part_of.register(Projection, BasisPart)
part_of.register(Hadamard, BasisPart)
part_of.register(Decoupling, BlockPart)
part_of.register(Permutation, PermutationPart)
part_of.register(Sharing, SharingPart)
part_of.register(SignedSharing, PaddedPart)


def _max_blocks_touched(size: int, q: int) -> int:
    """How many blocks `size` neighbouring features touch at most.

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
