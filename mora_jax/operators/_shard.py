"""An operator's part on one device, where devices share the features."""

import dataclasses

import jax
import jax.numpy as jnp

from mora_jax._mesh import FeatureMesh
from mora_jax.operators._around import Around
from mora_jax.operators._base import Operator


@dataclasses.dataclass(frozen=True)
class Shard(Around):
    """What an operator makes of a run of its inputs, for a run of its outputs.

    Whatever the operator: inputs that are elsewhere are zeros here, and outputs that
    are elsewhere are left out. The sum over all runs of inputs is the whole. A subclass
    does with less work what it can for its operator.

    Attributes:
      whole: the operator.
      in_start: the first input that is here, ().
      out_start: the first output that is here, ().
    """

    in_start: jax.Array
    out_start: jax.Array

    def __init_subclass__(cls) -> None:
        register(cls)

    @property
    def isometry(self) -> bool:
        return False

    def _compress(self, x: jax.Array) -> jax.Array:
        return self.whole._compress(self._among_zeros(x))

    def _decompress(self, h: jax.Array) -> jax.Array:
        return self._here(self.whole._decompress(h))

    def _meet(self, x: jax.Array) -> jax.Array:
        return self.whole._meet(self._among_zeros(x))

    def _spread(self, h: jax.Array) -> jax.Array:
        return self._here(self.whole._spread(h))

    def _delta(self, m: jax.Array) -> jax.Array:
        delta, size = self._here(self.whole._delta(m)), self.in_features
        return jax.lax.dynamic_slice_in_dim(delta, self.in_start, size, axis=0)

    def _lookup(
        self, m: jax.Array, indices: jax.Array, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        return self._here(self.whole._lookup(m, indices, precision))

    def _among_zeros(self, x: jax.Array) -> jax.Array:
        if self.in_features == self.whole.in_features:
            return x
        zeros = jnp.zeros((*x.shape[:-1], self.whole.in_features), x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(zeros, x, self.in_start, axis=-1)

    def _here(self, y: jax.Array) -> jax.Array:
        size = self.out_features
        if size == self.whole.out_features:
            return y
        return jax.lax.dynamic_slice_in_dim(y, self.out_start, size, axis=-1)


def register(cls: type) -> None:
    """Make a class of shards a pytree; where it is, is data."""
    jax.tree_util.register_dataclass(
        cls,
        data_fields=["whole", "in_start", "out_start"],
        meta_fields=["in_features", "out_features", "square_rank"],
    )


register(Shard)


def shard(
    op: Operator, mesh: FeatureMesh, k_in: jax.Array, k_out: jax.Array
) -> Operator:
    """The part of `op` for one run of inputs and one of outputs, by their numbers."""
    ins = op.in_features // mesh.pieces(mesh.ins)
    outs = op.out_features // mesh.pieces(mesh.outs)
    cls = op.shard_type or Shard
    return cls(ins, outs, op.square_rank, op, k_in * ins, k_out * outs)
