"""An operator whose features the devices of a mesh share.

A device that has some of the inputs has a part of C(x), and the parts are added up: q
numbers a row. Outputs need no sum on the way there, and that one on the way back. What
a block operator compresses to is as long as its inputs; there whole results are added.
The gradient of M is a sum of (q, q) over all axes that split anything.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec

from mora_jax._linear import with_derivatives
from mora_jax._mesh import WHOLE, FeatureMesh, OnShards, last
from mora_jax.operators._around import Around
from mora_jax.operators._base import Operator
from mora_jax.operators._product import rows_product
from mora_jax.operators._shard import shard


@dataclasses.dataclass(frozen=True)
class Distributed(Around):
    """An operator, with products that leave features where they are.

    Attributes:
      whole: the operator.
      mesh: who has which features.
    """

    mesh: FeatureMesh

    @classmethod
    def of(cls, op: Operator, mesh: FeatureMesh) -> Operator:
        """`op` on a mesh, or itself if nothing is split."""
        if not mesh.ins and not mesh.outs:
            return op
        return cls(op.in_features, op.out_features, op.square_rank, op, mesh)

    @property
    def isometry(self) -> bool:
        return self.whole.isometry

    def _compress(self, x: jax.Array) -> jax.Array:
        return self.whole._compress(x)

    def _decompress(self, h: jax.Array) -> jax.Array:
        return self.whole._decompress(h)

    def _product(
        self, m: jax.Array, x: jax.Array, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        op, mesh = self.whole, self.mesh
        ins, outs = last(mesh.ins, x.ndim), last(mesh.outs, x.ndim)
        if op.block:
            parts = _ProductByM(mesh, precision), _ProductByX(mesh, precision)
            by_m = OnShards.of(mesh, parts[0], m, WHOLE, outs, (WHOLE, ins))
            by_x = OnShards.of(mesh, parts[1], x, ins, outs, (WHOLE, WHOLE))
            return with_derivatives(_ByM(by_m), {1: by_m, 2: by_x})(op, m, x)
        if mesh.ins:
            meet = OnShards.of(mesh.by_ins, _Meet(mesh.by_ins), x, ins, WHOLE)
            h = rows_product(meet((op,), x), m, precision)
        else:
            h = rows_product(op._meet(x), m, precision)
        if not mesh.outs:
            return op._spread(h)
        spread = OnShards.of(mesh.by_outs, _Spread(mesh.by_outs), h, WHOLE, outs)
        return spread((op,), h)

    def _delta(self, m: jax.Array) -> jax.Array:
        spec = PartitionSpec(self.mesh.ins or None, self.mesh.outs or None)
        delta = OnShards.of(self.mesh, _Delta(self.mesh), m, WHOLE, spec)
        return delta((self.whole,), m)

    def _lookup(
        self, m: jax.Array, indices: jax.Array, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        # An index is one of all inputs, wherever the kernel's rows are.
        mesh = self.mesh.by_outs
        if not mesh.outs:
            return self.whole._lookup(m, indices, precision)
        outs = last(mesh.outs, indices.ndim + 1)
        part = _Lookup(mesh, precision)
        lookup = OnShards.of(mesh, part, m, WHOLE, outs, (WHOLE, WHOLE))
        return lookup((self.whole, indices), m)


jax.tree_util.register_dataclass(
    Distributed,
    data_fields=["whole"],
    meta_fields=["in_features", "out_features", "square_rank", "mesh"],
)


@dataclasses.dataclass(frozen=True)
class _ByM:
    """A product as a function of all that it multiplies."""

    # By M, since a fold takes the transpose of that without asking for derivatives.
    by_m: OnShards

    def __call__(self, op: Operator, m: jax.Array, x: jax.Array) -> jax.Array:
        return self.by_m((op, x), m)


@dataclasses.dataclass(frozen=True)
class _Part:
    """What one device does; the first array is what it is linear in."""

    mesh: FeatureMesh
    precision: jax.lax.PrecisionLike = None


class _Meet(_Part):
    def __call__(self, k_in: Any, k_out: Any, x: jax.Array, op: Operator) -> jax.Array:
        return shard(op, self.mesh, k_in, k_out)._meet(x)


class _Spread(_Part):
    def __call__(self, k_in: Any, k_out: Any, h: jax.Array, op: Operator) -> jax.Array:
        return shard(op, self.mesh, k_in, k_out)._spread(h)


class _Delta(_Part):
    def __call__(self, k_in: Any, k_out: Any, m: jax.Array, op: Operator) -> jax.Array:
        return shard(op, self.mesh, k_in, k_out)._delta(m)


class _ProductByX(_Part):
    def __call__(
        self, k_in: Any, k_out: Any, x: jax.Array, op: Operator, m: jax.Array
    ) -> jax.Array:
        return shard(op, self.mesh, k_in, k_out)._product(m, x, self.precision)


class _ProductByM(_Part):
    def __call__(
        self, k_in: Any, k_out: Any, m: jax.Array, op: Operator, x: jax.Array
    ) -> jax.Array:
        return shard(op, self.mesh, k_in, k_out)._product(m, x, self.precision)


class _Lookup(_Part):
    def __call__(
        self, k_in: Any, k_out: Any, m: jax.Array, op: Operator, indices: jax.Array
    ) -> jax.Array:
        here = shard(op, self.mesh, k_in, k_out)
        return here._lookup(m, indices, self.precision)
