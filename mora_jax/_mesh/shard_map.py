"""Linear maps that devices compute in parts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mora_jax._common.types import Shape
from mora_jax._jax.linear_map import LinearMap, Static
from mora_jax._mesh.layout import FeatureSharding, MeshAxes, mesh_axes
from mora_jax._mesh.parts import OperatorPart, part_of

REPLICATED = PartitionSpec()


def last_axis(axes: MeshAxes, ndim: int) -> PartitionSpec:
    """PartitionSpec of an array of `ndim` axes, the last one split by `axes`."""
    return PartitionSpec(*[None] * (ndim - 1), axes) if axes else REPLICATED


@dataclasses.dataclass(frozen=True)
class ShardMappedMap(LinearMap):
    """A linear map around an operator that devices compute in parts.

    The first residual is the operator. The result is the sum of the parts over those
    axes of `features` that do not split it. Other axes of the mesh, such as those that
    split a batch, are left to XLA.

    Attributes:
      features: The axes that split something, or whose devices have parts of a sum.
      forward_here: The function that one device computes, of its residuals and its
        operand. Its first residual is its part of the operator.
      shape: The shape of the whole operand.
      dtype: The dtype of the operand.
      operand_spec: The split of the operand.
      result_spec: The split of the result.
      residual_specs: The splits of the residuals behind the operator.
      gathers_last: Whether other axes may split the last residual as well, so that it
        has to be gathered from them: XLA might gather the operand instead. It is
        gathered again in the backward pass instead of being saved.
    """

    features: FeatureSharding
    forward_here: Static
    shape: Shape
    dtype: Any
    operand_spec: PartitionSpec
    result_spec: PartitionSpec
    residual_specs: tuple[PartitionSpec, ...] = ()
    gathers_last: bool = False

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        function, settings = self.forward_here.function, self.forward_here.settings

        def local(
            in_shard: Any, out_shard: Any, x: jax.Array, op: Any, *rest: Any
        ) -> Any:
            part = self._part(op, in_shard[0], out_shard[0])
            return self._sum(function(*settings, (part, *rest), x), self.result_spec)

        mapped = self._shard_map(local, self.operand_spec, self.result_spec)
        return mapped(operand, *self._gather(residuals))

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        shape = self.features.local_shape(self.shape, self.operand_spec)
        like = jax.ShapeDtypeStruct(shape, self.dtype)

        def local(
            in_shard: Any, out_shard: Any, y: jax.Array, op: Any, *rest: Any
        ) -> Any:
            here = self._part(op, in_shard[0], out_shard[0]), *rest
            transposed = jax.linear_transpose(
                lambda x: self.forward_here(here, x), like
            )
            return self._sum(transposed(y)[0], self.operand_spec)

        mapped = self._shard_map(local, self.result_spec, self.operand_spec)
        return mapped(cotangent, *self._gather(residuals))

    def _part(self, op: Any, in_shard: jax.Array, out_shard: jax.Array) -> OperatorPart:
        """The part of `op` on the device with these numbers of inputs and outputs."""
        features = self.features
        ins = op.in_features // features.num_shards(features.in_axes)
        outs = op.out_features // features.num_shards(features.out_axes)
        return part_of(op, in_shard * ins, out_shard * outs, ins, outs)

    def _shard_map(
        self, local: Callable[..., Any], in_spec: PartitionSpec, out_spec: PartitionSpec
    ) -> Callable[..., jax.Array]:
        """`local` on each device, given the numbers of its inputs and outputs."""
        features = self.features
        both = features.in_axes, features.out_axes
        # The numbers are data: with some axes mapped and others left to XLA, a device
        # cannot ask for its index along the first.
        numbers = [jnp.arange(features.num_shards(axes)) for axes in both]
        context = jax.sharding.get_abstract_mesh()
        mapped = jax.shard_map(
            local,
            mesh=features.mesh if context.empty else context,
            in_specs=(
                *map(PartitionSpec, both),
                *(in_spec, REPLICATED, *self.residual_specs),
            ),
            out_specs=out_spec,
            axis_names={axis for axes in both for axis in axes},
            check_vma=False,
        )
        # Compiled, since JAX maps some axes of a mesh and not others only in a program.
        return functools.partial(jax.jit(mapped), *numbers)

    def _sum(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        """The sum over the devices that do not split it."""
        split = {axis for entry in spec for axis in mesh_axes(entry)}
        names = (*self.features.in_axes, *self.features.out_axes)
        axes = tuple(axis for axis in names if axis not in split)
        if not axes:
            return x
        # XLA's CPU compiler crashes on sums of 16-bit numbers over some axes alone.
        mesh = self.features.mesh
        device = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else None
        if (device or jax.default_backend()) == "cpu":
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            return jax.lax.psum(wide, axes).astype(x.dtype)
        return jax.lax.psum(x, axes)

    def _gather(self, residuals: Any) -> Any:
        if not self.gathers_last:
            return residuals
        *others, last = residuals
        sharding = NamedSharding(self.features.mesh, self.residual_specs[-1])
        return *others, jax.lax.with_sharding_constraint(last, sharding)
