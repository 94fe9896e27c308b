"""One device's part of an operator, where devices share the features.

A device has neighbouring inputs and wants neighbouring outputs. Its part of an operator
is the pair of maps from the first to the second; the sum over all devices that share
the inputs is the operator. `part_of` finds the part by the operator's type: there is a
general one for every operator, and others that do less work.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._common.types import Shape
from mora_jax._jax.qwix_guard import matmul
from mora_jax._jax.tiles import pad_to, sum_tiles, tile_to
from mora_jax.operators import Decoupling, Operator, Permutation, Sharing, SignedSharing
from mora_jax.operators._base import Split, Times
from mora_jax.operators._blocks import num_blocks
from mora_jax.operators._projection import Projection

_part = functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["operator", "in_start", "out_start"],
    meta_fields=["in_features", "out_features"],
)


@_part
@dataclasses.dataclass(frozen=True)
class OperatorPart:
    """The part of any operator for some of its inputs and outputs.

    It computes with zeros for the inputs that are elsewhere. Subclasses do less work.
    The first input and the first output that are here are `in_start` and `out_start`,
    (), and `in_features` and `out_features` are as many as are here.
    """

    operator: Any  # an Operator; subclasses know which
    in_start: jax.Array
    out_start: jax.Array
    in_features: int
    out_features: int

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

    def split(self, x: jax.Array) -> Split:
        """Split of the product of the inputs that are here, for the outputs here."""
        h, decompress = self.operator.split(self.pad_inputs(x))
        return Split(h, lambda h: self.take_outputs(decompress(h)))

    def compress(self, x: jax.Array) -> jax.Array:
        """C of the inputs that are here, for an operator of one block."""
        return self.split(x).h

    def decompress(self, h: jax.Array) -> jax.Array:
        """D for the outputs that are here, for an operator of one block."""
        # D does not depend on x, and XLA drops what C would make of these zeros.
        nothing = jnp.zeros((*h.shape[:-1], self.in_features), h.dtype)
        return self.split(nothing).decompress(h)

    rows = Operator.rows

    def rows_with(self, times: Times, x: jax.Array, m: jax.Array) -> jax.Array:
        """Share of the inputs here in the outputs here: (..., in) -> (..., out)."""
        if not self.linear:
            y = self.operator.rows_with(times, self.pad_inputs(x), m)
            return self.take_outputs(y)
        h, decompress = self.split(x)
        return decompress(times(h, m))

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


@_part
class SharingPart(OperatorPart):
    """The part of sharing; only groups that a device has unequally often take more."""

    def split(self, x: jax.Array) -> Split:
        op, q = self.operator, self.operator.square_rank
        h, decompress = super().split(x)
        if op.compress_groups == "strided" and not self.in_features % q:
            h = sum_tiles(x, q) * op._scale("in", x.dtype)
        if op.decompress_groups == "strided" and not self.out_features % q:
            n = self.out_features
            return Split(h, lambda h: tile_to(h * op._scale("out", h.dtype), n))
        return Split(h, decompress)


@_part
class BasisPart(OperatorPart):
    """The part of an operator whose C and D are dense matrices: some of their rows."""

    def split(self, x: jax.Array) -> Split:
        return Split(matmul(x, self._in_basis(x)), self._decompress)

    def matrix(self, m: jax.Array) -> jax.Array:
        return matmul(self._in_basis(m), self._decompress(m))

    def _in_basis(self, like: jax.Array) -> jax.Array:
        return self.take_inputs(self.operator.basis("in", like.dtype))

    def _decompress(self, h: jax.Array) -> jax.Array:
        return matmul(h, self.take_outputs(self.operator.basis("out", h.dtype).T))


@_part
class PermutationPart(OperatorPart):
    """The part of a permutation, each of whose blocks has features from everywhere."""

    @property
    def places(self) -> tuple[jax.Array, jax.Array]:
        """The places of the features here in the orders of inputs and outputs."""
        op = self.operator
        rows = self.take_inputs(jnp.asarray(op.in_inverse))
        return rows, self.take_outputs(jnp.asarray(op.out_inverse))

    def matrix(self, m: jax.Array) -> jax.Array:
        return self.operator.matrix_part(m, *self.places)


@_part
class BlockPart(OperatorPart):
    """The part of a block operator.

    The device computes with the blocks that hold features of its own, and with the
    groups of blocks that its outputs want.
    """

    @property
    def is_cut_evenly(self) -> bool:
        """True if a device has whole blocks, or blocks are on whole devices."""
        q = self.operator.square_rank
        sizes = self.in_features, self.out_features
        return self.operator.aligned and all(n % q == 0 or q % n == 0 for n in sizes)

    def split(self, x: jax.Array) -> Split:
        op, groups = self.operator, self.operator.num_groups
        start, wanted = 0, groups
        if self.out_features < op.out_features:
            start = self.out_start // op.square_rank
            wanted = min(groups, self._max_blocks(self.out_features))
        blocks, firsts = self._touched_blocks(x)

        def sum_wanted(blocks: Sequence[jax.Array]) -> jax.Array:
            """The sums of the groups that outputs here want: (..., wanted, q)."""
            placed = (
                jnp.roll(pad_to(h, groups, axis=-2), first - start, axis=-2)
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
        first, touched = self.in_start // q, self._max_blocks(size)
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
        y = tile_to(h.reshape(*batch, wanted * q), self._max_blocks(size) * q)
        return jax.lax.dynamic_slice_in_dim(y, self.out_start % q, size, axis=-1)

    def _max_blocks(self, size: int) -> int:
        """Largest number of blocks that the `size` features of one device touch."""
        # Devices' features begin at multiples of `size`, so that the offsets in a block
        # are multiples of the common divisor: q - divisor is the last one.
        q = self.operator.square_rank
        return num_blocks(q - math.gcd(q, size) + size, q)


def whole(op: Operator) -> OperatorPart:
    """The part that is all of an operator."""
    start = jnp.zeros((), jnp.uint32)
    return part_of(op, start, start, op.in_features, op.out_features)


part_of = functools.singledispatch(OperatorPart)
"""The part of an operator, by its type, with the arguments of `OperatorPart`."""
part_of.register(Projection, BasisPart)
part_of.register(Decoupling, BlockPart)
part_of.register(Permutation, PermutationPart)
part_of.register(Sharing, SharingPart)
part_of.register(SignedSharing, OperatorPart)  # whose signs differ by feature


def _put(x: jax.Array, size: int, start: Any) -> jax.Array:
    """`x` among zeros: (..., k) -> (..., size), from `start` on."""
    zeros = jnp.zeros((*x.shape[:-1], size), x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(zeros, x, start, axis=-1)
