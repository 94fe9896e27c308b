"""An operator where the devices of a mesh share the features.

If inputs are split, a device has part of C(x), and the parts are summed: q numbers for
each row. If outputs are split, the forward pass needs no communication and the backward
pass one sum of (rows, q). If C(x) is as large as x, the outputs are summed instead; and
so they are for every operator where the layer's own output is summed with them (see
`ways.fused`). The gradient of M is a sum of arrays like M over all axes that split
anything.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mora_jax._common.types import Shape
from mora_jax._jax.linear_map import LinearMap, Static, static
from mora_jax._mesh.layout import FeatureSharding, MeshAxes, mesh_axes
from mora_jax._mesh.parts import OperatorPart, part_of
from mora_jax.operators import Operator
from mora_jax.operators._base import Split

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


PartForm = Callable[[Any], Callable[..., jax.Array]]
"""A function that chooses how a part is computed, such as `chips.matrix_of`."""


@dataclasses.dataclass(frozen=True)
class OperatorOnMesh:
    """An operator with the methods of `Operator`, where devices compute their parts.

    Attributes:
      operator: The operator.
      features: The axes of the mesh that split inputs and outputs.
    """

    operator: Operator
    features: FeatureSharding

    def split(self, x: jax.Array) -> Split:
        """Split with a C(x) that is the same on all devices, and D(h) in parts."""
        split = self.operator.split(x)
        h = self._compress(x) if self.features.in_axes else split.h
        parts = self.features.out_axes
        return Split(h, self._decompress if parts else split.decompress)

    def rows(self, x: jax.Array, m: jax.Array, precision: Any = None) -> jax.Array:
        """D(C(x) M) as a map of x: (..., in_features) -> (..., out_features)."""
        return self._rows_map(x, precision)((self.operator, m), x)

    def rows_by_m(self, x: jax.Array, m: jax.Array, precision: Any = None) -> jax.Array:
        """D(C(x) M) as a map of M, of an operator that is linear in it.

        A fold takes its transpose by M alone.
        """
        of_x = self._rows_map(x, precision)
        of_m = _RowsByM(
            self.features,
            static(_rows_by_m, precision),
            *(m.shape, m.dtype, REPLICATED, of_x.result_spec, (of_x.operand_spec,)),
            of_x=of_x,
        )
        return of_m((self.operator, x), m)

    def unit_rows(
        self, indices: jax.Array, m: jax.Array, precision: Any = None
    ) -> jax.Array:
        """The outputs that each device has of single rows of the delta.

        The inputs are not split: an index may be any, wherever the kernel's rows are.
        """
        outs = last_axis(self.features.out_axes, indices.ndim + 1)
        of_m = ShardMappedMap(
            self.features.outputs_only,
            static(_unit_rows, precision),
            *(m.shape, m.dtype, REPLICATED, outs, (REPLICATED,)),
        )
        return of_m((self.operator, indices), m)

    def matrix(self, m: jax.Array, matrix_of: PartForm) -> jax.Array:
        """The rows and columns of the delta that each device has, (in, out)."""
        of_m = ShardMappedMap(
            self.features,
            static(_matrix, matrix_of),
            *(m.shape, m.dtype, REPLICATED, self._kernel_spec),
        )
        return of_m((self.operator,), m)

    def added(self, m: jax.Array, kernel: jax.Array, add_of: PartForm) -> jax.Array:
        """A kernel with its delta, (in, out), split as the kernel is.

        Each device adds its part of the delta to its part of the kernel. Where the
        kernel is gathered before it is used, the sum is what is gathered.
        """
        spec = self._kernel_spec
        sums = ShardMappedMap(
            self.features,
            static(_added, add_of),
            *(kernel.shape, kernel.dtype, spec, spec, (REPLICATED,)),
        )
        # Without a transpose, since it is not linear.
        return sums.forward((self.operator, m), kernel)

    @property
    def _kernel_spec(self) -> PartitionSpec:
        ins, outs = self.features.in_axes, self.features.out_axes
        return PartitionSpec(ins or None, outs or None)

    def _rows_map(self, x: jax.Array, precision: Any) -> ShardMappedMap:
        both = self.features.in_axes, self.features.out_axes
        ins, outs = (last_axis(axes, x.ndim) for axes in both)
        by_x = static(_rows, precision)
        return ShardMappedMap(
            self.features, by_x, x.shape, x.dtype, ins, outs, (REPLICATED,)
        )

    def _compress(self, x: jax.Array) -> jax.Array:
        ins = last_axis(self.features.in_axes, x.ndim)
        features, here = self.features.inputs_only, static(_compress)
        of_x = ShardMappedMap(features, here, x.shape, x.dtype, ins, REPLICATED)
        return of_x((self.operator,), x)

    def _decompress(self, h: jax.Array) -> jax.Array:
        outs = last_axis(self.features.out_axes, h.ndim)
        features, here = self.features.outputs_only, static(_decompress)
        of_h = ShardMappedMap(features, here, h.shape, h.dtype, REPLICATED, outs)
        return of_h((self.operator,), h)


@dataclasses.dataclass(frozen=True)
class _RowsByM(ShardMappedMap):
    """A product as a map of M, which is linear in x as well."""

    of_x: ShardMappedMap | None = None

    def derivatives(self) -> Mapping[int, Callable[[Any, Any, Any], jax.Array]]:
        of_x = self.of_x
        assert of_x is not None
        return {1: lambda residuals, m, tangent: of_x((residuals[0], m), tangent)}


# What one device computes, with its part of the operator as the first residual.


def _rows(precision: Any, residuals: Any, x: jax.Array) -> jax.Array:
    part, m = residuals
    return part.rows(x, m, precision)


def _rows_by_m(precision: Any, residuals: Any, m: jax.Array) -> jax.Array:
    part, x = residuals
    return part.rows(x, m, precision)


def _unit_rows(precision: Any, residuals: Any, m: jax.Array) -> jax.Array:
    part, indices = residuals
    return part.unit_rows(indices, m, precision)


def _matrix(matrix_of: PartForm, residuals: Any, m: jax.Array) -> jax.Array:
    (part,) = residuals
    return matrix_of(part)(m)


def _added(add_of: PartForm, residuals: Any, kernel: jax.Array) -> jax.Array:
    part, m = residuals
    return add_of(part)(m, kernel)


def _compress(residuals: Any, x: jax.Array) -> jax.Array:
    (part,) = residuals
    return part.split(x).h


def _decompress(residuals: Any, h: jax.Array) -> jax.Array:
    (part,) = residuals
    # D does not depend on x, and XLA drops what C would make of these zeros.
    nothing = jnp.zeros((*h.shape[:-1], part.in_features), h.dtype)
    return part.split(nothing).decompress(h)
