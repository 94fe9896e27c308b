"""One device's part of an operator, where devices share the features.

A device has neighbouring inputs and wants neighbouring outputs. Its part of an operator
is the pair of maps from the first to the second; the sum over all devices that share
the inputs is the operator. `part_of` finds the part by the operator's type: there is a
general one for every operator, and others that do less work.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from mora_jax._jax.linear_algebra import matmul
from mora_jax._jax.tiles import pad_to, sum_tiles, tile_to
from mora_jax.operators import BlockDiagonal, Damped, Decoupling, Sharing, SignedSharing
from mora_jax.operators._base import DeltaMap, Operator, Precision
from mora_jax.operators.low_rank import LowRank
from mora_jax.operators.orthogonal import Projection


@register_dataclass
@dataclasses.dataclass(frozen=True)
class OperatorPart(DeltaMap):
    """The part of any operator for some of its inputs and outputs.

    It computes with zeros for the inputs that are elsewhere. Subclasses do less work.
    The first input and the first output that are here are `in_start` and `out_start`,
    (), and `in_features` and `out_features` are as many as are here.
    """

    operator: Any  # an Operator; subclasses know which
    in_start: Array
    out_start: Array
    in_features: int = dataclasses.field(metadata={"static": True})
    out_features: int = dataclasses.field(metadata={"static": True})

    @property
    def is_whole(self) -> bool:
        """True if all features are here."""
        op, here = self.operator, (self.in_features, self.out_features)
        return here == (op.in_features, op.out_features)

    def enter(self, x: Array) -> Array:
        if self.in_features < self.operator.in_features:
            x = _put(x, self.operator.in_features, self.in_start)
        return self.operator.enter(x)

    def leave(self, h: Array) -> Array:
        return self.take_outputs(self.operator.leave(h))

    def product(self, h: Array, m: Array, precision: Precision = None) -> Array:
        return self.operator.product(h, m, precision)

    def matrix(self, m: Array) -> Array:
        """The rows and columns of the delta that are here, (in, out)."""
        return self.take_inputs(self.take_outputs(self.operator.matrix(m)))

    def take_inputs(self, rows: Array) -> Array:
        """The rows of the inputs that are here, (whole, ...) -> (in_features, ...)."""
        return jax.lax.dynamic_slice_in_dim(rows, self.in_start, self.in_features)

    def take_outputs(self, y: Array) -> Array:
        """The outputs that are here, (..., whole out_features) -> (..., here)."""
        if (size := self.out_features) == self.operator.out_features:
            return y
        return jax.lax.dynamic_slice_in_dim(y, self.out_start, size, axis=-1)


@register_dataclass
class SharingPart(OperatorPart):
    """The part of sharing; only groups that a device has unequally often take more."""

    def enter(self, x: Array) -> Array:
        op, q = self.operator, self.operator.square_rank
        if op.compress_groups == "strided" and not self.in_features % q:
            return sum_tiles(x, q) * op._scale("in", x.dtype)
        return super().enter(x)

    def leave(self, h: Array) -> Array:
        op, outs = self.operator, self.out_features
        if op.decompress_groups == "strided" and not outs % op.square_rank:
            return tile_to(h * op._scale("out", h.dtype), outs)
        return super().leave(h)


@register_dataclass
class BasisPart(OperatorPart):
    """The part of an operator whose C and D are dense matrices: some of their rows."""

    def enter(self, x: Array) -> Array:
        return matmul(x, self.take_inputs(self.operator.basis("in", x.dtype)))

    def leave(self, h: Array) -> Array:
        return matmul(h, self.take_outputs(self.operator.basis("out", h.dtype).T))

    def matrix(self, m: Array) -> Array:
        c = self.take_inputs(self.operator.basis("in", m.dtype))
        return matmul(c, self.leave(m))


@register_dataclass
class BlockPart(OperatorPart):
    """The part of a block operator that devices cut evenly: see `_blocks_or_all`.

    The device computes with the blocks that hold features of its own, and with the
    groups of blocks that its outputs want.
    """

    # M multiplies whichever are fewer: the groups from here, or the groups for here.
    # Both orders give the same sum, since M is the same for all blocks of a group.

    def enter(self, x: Array) -> Array:
        # A part of a block is put among zeros, since blocks are rotated as a whole.
        q, groups = self.operator.square_rank, self._groups(self.in_features)
        width = max(self.in_features, q)
        h = x if width == x.shape[-1] else _put(x, width, self.in_start % q)
        h = h.reshape(*x.shape[:-1], width // q, q)
        h = self.operator.rotate_rows(h, self.in_start // q + jnp.arange(width // q))
        h = sum_tiles(h.reshape(*x.shape[:-1], width), groups * q)
        h = h.reshape(*x.shape[:-1], groups, q)
        return self._sum_wanted(h) if self._sums_first else h

    def leave(self, h: Array) -> Array:
        h = h if self._sums_first else self._sum_wanted(h)
        q, size = h.shape[-1], self.out_features
        y = tile_to(h.reshape(*h.shape[:-2], -1), max(size, q))
        if size >= q:
            return y
        return jax.lax.dynamic_slice_in_dim(y, self.out_start % q, size, axis=-1)

    def _groups(self, features: int) -> int:
        """The number of groups that so many inputs here feed, or outputs want."""
        blocks = max(features // self.operator.square_rank, 1)
        return min(self.operator.num_groups, blocks)

    @property
    def _sums_first(self) -> bool:
        return self._groups(self.in_features) > self._groups(self.out_features)

    def _sum_wanted(self, h: Array) -> Array:
        """Of groups from here the ones that outputs here want: (..., wanted, q)."""
        # The groups of blocks follow each other, and after the last comes the first.
        q = self.operator.square_rank
        h = pad_to(h, self.operator.num_groups, axis=-2)
        shift = self.in_start // q - self.out_start // q
        return jnp.roll(h, shift, axis=-2)[..., : self._groups(self.out_features), :]


@register_dataclass
class DiagonalPart(OperatorPart):
    """The part of blocks with an M each, where a device has whole blocks.

    Blocks whose inputs or outputs are elsewhere add zeros, and M may lack theirs.
    """

    def rows(self, x: Array, m: Array, precision: Precision = None) -> Array:
        _, p, s = self.operator.m_shape
        ins, outs = self.in_features // p, self.out_features // s
        first_in, first_out = self.in_start // p, self.out_start // s
        first, count = (first_in, ins) if ins <= outs else (first_out, outs)
        # The side with fewer blocks here is all within the other one, or all outside.
        here = (first_in <= first) & (first < first_in + ins)
        here &= (first_out <= first) & (first < first_out + outs)
        h = x.reshape(*x.shape[:-1], ins, p)
        h = jax.lax.dynamic_slice_in_dim(h, first - first_in, count, axis=-2)
        if len(m) > count:
            m = jax.lax.dynamic_slice_in_dim(m, first, count)
        y = jnp.where(here, self.operator.product(h, m, precision), 0)
        y = y.reshape(*y.shape[:-2], count * s)
        return y if count == outs else _put(y, outs * s, first * s - self.out_start)


@register_dataclass
class FactorsPart(OperatorPart):
    """The part of a LoRA: some rows of A, and some columns of B."""

    def rows(self, x: Array, m: Array, precision: Precision = None) -> Array:
        a, b = self._factors(m)
        return matmul(matmul(x, a, precision), b, precision)

    def matrix(self, m: Array) -> Array:
        return matmul(*self._factors(m))

    def _factors(self, m: Array) -> tuple[Array, Array]:
        a, b = self.operator.factors(m)
        return self.take_inputs(a), self.take_outputs(b)


@register_dataclass
class DampedPart(OperatorPart):
    """The part of a damped operator, by the part of the inner one.

    What inputs have along the directions is summed with all else.
    """

    def rows(self, x: Array, m: Array, precision: Precision = None) -> Array:
        op, here = self.operator, (self.in_features, self.out_features)
        inner = part_of(op.inner, self.in_start, self.out_start, *here)
        scaled = x
        if op.diagonal is not None:
            scaled = x * self.take_inputs(jnp.asarray(op.diagonal, x.dtype))[:, 0]
        y = inner.rows(scaled, m, precision)
        if op.directions is None:
            return y
        outputs = self.take_outputs(op.outputs(m, precision))
        return y - matmul(matmul(x, self.take_inputs(op.columns(x.dtype))), outputs)


def _whole_blocks_or_all(op: BlockDiagonal, *place: Any) -> OperatorPart:
    """The part of blocks with an M each, whose `place` is all else of the record."""
    few, many = sorted(n / m for n, m in zip(place[2:], op.m_shape[1:], strict=True))
    whole = op.aligned and few % 1 == many % few == 0  # and one place in the other
    return DiagonalPart(op, *place) if whole else OperatorPart(op, *place)


def _blocks_or_all(op: Decoupling, *place: Any) -> OperatorPart:
    """The part of blocks that share an M, whose `place` is all else of the record."""
    # Evenly cut: a device has whole blocks, or blocks are on whole devices.
    q, sizes = op.square_rank, place[2:]
    evenly = op.aligned and all(n % q == 0 or q % n == 0 for n in sizes)
    return BlockPart(op, *place) if evenly else OperatorPart(op, *place)


def whole(op: Operator) -> OperatorPart:
    """The part that is all of an operator."""
    start = jnp.zeros((), jnp.uint32)
    return part_of(op, start, start, op.in_features, op.out_features)


part_of = functools.singledispatch(OperatorPart)
"""The part of an operator, by its type, with the arguments of `OperatorPart`."""
part_of.register(Projection, BasisPart)
part_of.register(Decoupling, _blocks_or_all)
part_of.register(BlockDiagonal, _whole_blocks_or_all)
part_of.register(LowRank, FactorsPart)
part_of.register(Damped, DampedPart)
part_of.register(Sharing, SharingPart)
part_of.register(SignedSharing, OperatorPart)  # whose signs differ by feature


def _put(x: Array, size: int, start: Any) -> Array:
    """`x` among zeros: (..., k) -> (..., size), from `start` on."""
    zeros = jnp.zeros((*x.shape[:-1], size), x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(zeros, x, start, axis=-1)
