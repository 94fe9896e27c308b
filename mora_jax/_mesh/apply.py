"""An operator's maps where the devices of a mesh share the features.

If inputs are split, a device has part of C(x), and the parts are summed: q numbers for
each row. If outputs are split, the forward pass needs no communication and the backward
pass one sum of (rows, q). For a block operator C(x) is as large as x, so the outputs
are summed instead; and so they are for every operator where the layer's own output is
summed with them (see `fused`). The gradient of M is a sum of (q, q) over all axes that
split anything.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mora_jax._jax.linear_map import Static, static
from mora_jax._mesh.layout import FeatureSharding
from mora_jax._mesh.parts import OperatorPart
from mora_jax._mesh.shard_map import REPLICATED, ShardMappedMap, last_axis
from mora_jax.operators import Operator
from mora_jax.operators._base import Split


@dataclasses.dataclass(frozen=True)
class OperatorOnMesh:
    """An operator without blocks whose features are split.

    Attributes:
      operator: The operator.
      features: Where inputs and outputs are.
    """

    operator: Operator
    features: FeatureSharding

    def split(self, x: jax.Array) -> Split:
        """Split whose parts the devices compute together.

        C(x) is the same on all devices: (..., in_features) -> (..., q). D(h) is split
        as the outputs are: (..., q) -> (..., out_features).
        """
        split = self.operator.split(x)
        h = self._compress(x) if self.features.in_axes else split.h
        return Split(
            h, self._decompress if self.features.out_axes else split.decompress
        )

    def _compress(self, x: jax.Array) -> jax.Array:
        features = self.features.inputs_only
        ins = last_axis(features.in_axes, x.ndim)
        of_x = ShardMappedMap(
            features, static(_compress), x.shape, x.dtype, ins, REPLICATED
        )
        return of_x((self.operator,), x)

    def _decompress(self, h: jax.Array) -> jax.Array:
        features = self.features.outputs_only
        outs = last_axis(features.out_axes, h.ndim)
        of_h = ShardMappedMap(
            features, static(_decompress), h.shape, h.dtype, REPLICATED, outs
        )
        return of_h((self.operator,), h)


def _compress(here: tuple[OperatorPart], x: jax.Array) -> jax.Array:
    return here[0].split(x).h


def _decompress(here: tuple[OperatorPart], h: jax.Array) -> jax.Array:
    part = here[0]
    zeros = jnp.zeros((*h.shape[:-1], part.in_features), h.dtype)
    return part.split(zeros).decompress(h)


def rows(
    by_x: Static, op: Operator, features: FeatureSharding, m: jax.Array, x: jax.Array
) -> jax.Array:
    """A product of x with a delta, of which each device has a part.

    Args:
      by_x: The product on one device, a function of (part, M) and x.
      op: The operator.
      features: Where inputs and outputs are.
      m: M, of the shape `op.m_shape`.
      x: (..., in_features).

    Returns:
      (..., out_features).
    """
    ins, outs = (
        last_axis(axes, x.ndim) for axes in (features.in_axes, features.out_axes)
    )
    of_x = ShardMappedMap(features, by_x, x.shape, x.dtype, ins, outs, (REPLICATED,))
    return of_x((op, m), x)


def product(
    by_m: Static,
    by_x: Static,
    op: Operator,
    features: FeatureSharding,
    m: jax.Array,
    x: jax.Array,
) -> jax.Array:
    """A product that is linear in M and in x, of which each device has a part.

    Args:
      by_m: The product on one device, a function of (part, x) and M.
      by_x: The same as a function of (part, M) and x.
      op: The operator.
      features: Where inputs and outputs are.
      m: M, (q, q).
      x: (..., in_features).

    Returns:
      (..., out_features).
    """
    ins, outs = (
        last_axis(axes, x.ndim) for axes in (features.in_axes, features.out_axes)
    )
    of_x = ShardMappedMap(features, by_x, x.shape, x.dtype, ins, outs, (REPLICATED,))
    of_m = _ProductByM(
        features, by_m, m.shape, m.dtype, REPLICATED, outs, (ins,), of_x=of_x
    )
    return of_m((op, x), m)


@dataclasses.dataclass(frozen=True)
class _ProductByM(ShardMappedMap):
    """A product as a map of M, which is linear in x as well.

    It is a map of M and not of x, since a fold takes its transpose by M alone.
    """

    of_x: ShardMappedMap | None = None

    def derivatives(self) -> Mapping[int, Callable[[Any, Any, Any], jax.Array]]:
        of_x = self.of_x
        assert of_x is not None
        return {1: lambda residuals, m, tangent: of_x((residuals[0], m), tangent)}


def kernel(
    matrix: Static, op: Operator, features: FeatureSharding, m: jax.Array
) -> jax.Array:
    """The rows and columns of the delta that each device has, (in, out).

    Args:
      matrix: A function of (part,) and M that returns them.
      op: The operator.
      features: Where inputs and outputs are.
      m: M, (q, q).
    """
    spec = PartitionSpec(features.in_axes or None, features.out_axes or None)
    return ShardMappedMap(features, matrix, m.shape, m.dtype, REPLICATED, spec)(
        (op,), m
    )


def folded(
    add: Static,
    op: Operator,
    features: FeatureSharding,
    m: jax.Array,
    kernel: jax.Array,
) -> jax.Array:
    """A kernel with its delta, (in, out), split as the kernel is.

    Each device adds its part of the delta to its part of the kernel. Where the kernel
    is gathered before it is used, what is gathered is then the sum.

    Args:
      add: A function of (part, M) and a device's part of the kernel.
      op: The operator.
      features: Where the kernel's inputs and outputs are.
      m: M, (q, q).
      kernel: The kernel.
    """
    spec = PartitionSpec(features.in_axes or None, features.out_axes or None)
    sums = ShardMappedMap(
        features, add, kernel.shape, kernel.dtype, spec, spec, (REPLICATED,)
    )
    return sums.forward((op, m), kernel)  # which is not linear, so no transpose of it


def lookup(
    rows: Static,
    op: Operator,
    features: FeatureSharding,
    m: jax.Array,
    indices: jax.Array,
) -> jax.Array:
    """The outputs that each device has of single rows of the delta.

    The inputs are not split: an index may be any, wherever the kernel's rows are.

    Args:
      rows: A function of (part, indices) and M that returns the outputs.
      op: The operator.
      features: Where inputs and outputs are.
      m: M, (q, q).
      indices: (...).
    """
    features = features.outputs_only
    outs = last_axis(features.out_axes, indices.ndim + 1)
    of_m = ShardMappedMap(
        features, rows, m.shape, m.dtype, REPLICATED, outs, (REPLICATED,)
    )
    return of_m((op, indices), m)
