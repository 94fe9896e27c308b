"""One device's part of an operator, where devices share the features.

A device has neighbouring inputs and wants neighbouring outputs. Its part of an operator
is the pair of maps from the first to the second; the sum over all devices that share
the inputs is the operator. `part_of` finds the part by the operator's type: there is a
general one for every operator, and others that do less work.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._jax.linear_algebra import matmul
from mora_jax._jax.tiles import pad_to, sum_tiles, tile_to
from mora_jax.operators._base import Operator
from mora_jax.operators._blocks import num_blocks
from mora_jax.operators._map import DeltaMap, Precision
from mora_jax.operators._projection import Projection
from mora_jax.operators.decoupling import Decoupling
from mora_jax.operators.permutation import Permutation
from mora_jax.operators.sharing import Sharing, SignedSharing

_part = functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["operator", "in_start", "out_start"],
    meta_fields=["in_features", "out_features"],
)


@_part
@dataclasses.dataclass(frozen=True)
class OperatorPart(DeltaMap):
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
    def is_whole(self) -> bool:
        """True if all features are here."""
        op = self.operator
        here = self.in_features, self.out_features
        return here == (op.in_features, op.out_features)

    def enter(self, x: jax.Array) -> jax.Array:
        return self.operator.enter(self.pad_inputs(x))

    def leave(self, h: jax.Array) -> jax.Array:
        return self.take_outputs(self.operator.leave(h))

    def product(
        self, h: jax.Array, m: jax.Array, precision: Precision = None
    ) -> jax.Array:
        return self.operator.product(h, m, precision)

    def unit_rows(
        self, indices: jax.Array, m: jax.Array, precision: Precision = None
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

    def enter(self, x: jax.Array) -> jax.Array:
        op, q = self.operator, self.operator.square_rank
        if op.compress_groups == "strided" and not self.in_features % q:
            return sum_tiles(x, q) * op._scale("in", x.dtype)
        return super().enter(x)

    def leave(self, h: jax.Array) -> jax.Array:
        op, outs = self.operator, self.out_features
        if op.decompress_groups == "strided" and not outs % op.square_rank:
            return tile_to(h * op._scale("out", h.dtype), outs)
        return super().leave(h)


@_part
class BasisPart(OperatorPart):
    """The part of an operator whose C and D are dense matrices: some of their rows."""

    def enter(self, x: jax.Array) -> jax.Array:
        return matmul(x, self._in_basis(x))

    def leave(self, h: jax.Array) -> jax.Array:
        return matmul(h, self.take_outputs(self.operator.basis("out", h.dtype).T))

    def matrix(self, m: jax.Array) -> jax.Array:
        return matmul(self._in_basis(m), self.leave(m))

    def _in_basis(self, like: jax.Array) -> jax.Array:
        return self.take_inputs(self.operator.basis("in", like.dtype))


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

    # M multiplies whichever are fewer: the blocks from here, or the groups for here.
    # Both orders give the same sum, since M is the same for all blocks of a group.

    def enter(self, x: jax.Array) -> jax.Array:
        blocks = self._blocks(x)
        if self._sums_first:
            return self._sum_wanted(blocks)
        return jnp.concatenate(blocks, axis=-2)

    def leave(self, h: jax.Array) -> jax.Array:
        if not self._sums_first:
            sizes = [size for _, size in self._runs]
            h = self._sum_wanted(jax.lax.split(h, sizes, axis=h.ndim - 2))
        return self._outputs_of_groups(h)

    @property
    def _sums_first(self) -> bool:
        return sum(size for _, size in self._runs) > self._wanted

    @property
    def _wanted(self) -> int:
        """The number of groups that outputs here want."""
        return min(self.operator.num_groups, self._max_blocks(self.out_features))

    def _sum_wanted(self, blocks: Sequence[jax.Array]) -> jax.Array:
        """The sums of the groups that outputs here want: (..., wanted, q)."""
        op, start = self.operator, 0
        if self.out_features < op.out_features:
            start = self.out_start // op.square_rank
        placed = (
            jnp.roll(pad_to(h, op.num_groups, axis=-2), first - start, axis=-2)
            for h, (first, _) in zip(blocks, self._runs, strict=True)
        )
        return functools.reduce(jnp.add, placed)[..., : self._wanted, :]

    @property
    def _has_all(self) -> bool:
        """True if all blocks are computed, from features here among zeros."""
        op = self.operator
        whole = self.in_features == op.in_features
        return whole or op.truncate or op.square_rank > op.in_features

    @property
    def _overlap(self) -> int:
        """The number of first features that complete the last block."""
        n, q = self.operator.compressed_shape
        return n * q - self.operator.in_features

    @property
    def _runs(self) -> list[tuple[Any, int]]:
        """Of each array in `_blocks`, the number of its first group, and of groups.

        The groups of the blocks follow each other, and after the last group comes the
        first again.
        """
        op = self.operator
        if self._has_all:
            return [(0, op.num_groups)]
        touched = self._max_blocks(self.in_features)
        runs = [(self.in_start // op.square_rank, min(touched, op.num_out_blocks))]
        return runs + [(op.compressed_shape[0] - 1, 1)] * (self._overlap > 0)

    def _blocks(self, x: jax.Array) -> list[jax.Array]:
        """Blocks that hold features of this device, (..., k, q); summed by groups."""
        op, q, size = self.operator, self.operator.square_rank, self.in_features
        if self._has_all:
            return [op.enter(self.pad_inputs(x))]
        # The features here begin within a block, at an offset that only the device
        # knows. Put at that offset among zeros, they are whole blocks, which are
        # rotated as such; what is elsewhere adds zeros.
        touched = self._max_blocks(size)
        h = _put(x, touched * q, self.in_start % q)
        h = h.reshape(*x.shape[:-1], touched, q)
        h = op.rotate_rows(h, self.in_start // q + jnp.arange(touched))
        blocks = [op.sum_groups(h)]
        if over := self._overlap:
            h = _put(x, over + size, jnp.minimum(self.in_start, over))
            h = h[..., None, :over]
            h = jnp.pad(h, [*[(0, 0)] * x.ndim, (q - over, 0)])
            last = jnp.array([op.compressed_shape[0] - 1])
            blocks.append(op.rotate_rows(h, last))
        return blocks

    def _outputs_of_groups(self, h: jax.Array) -> jax.Array:
        """(..., wanted, q) -> (..., out_features)."""
        op, size = self.operator, self.out_features
        *batch, wanted, q = h.shape
        if wanted == op.num_groups and size == op.out_features:
            return op.leave(h)
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
