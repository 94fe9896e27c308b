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
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mora_jax._jax.linear_map import LinearMap, static
from mora_jax._mesh.layout import FeatureSharding, MeshAxes, mesh_axes
from mora_jax._mesh.parts import part_of
from mora_jax.operators._base import DeltaMap, Operator

REPLICATED = PartitionSpec()


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
      whole: The type of the whole operand: its shape and dtype.
      specs: The splits of the operand, of the result, and of the residuals behind the
        operator.
      gathers_last: True if other axes may split the last residual as well, so that it
        has to be gathered from them.
    """

    features: FeatureSharding
    forward_here: Callable[..., Any]
    whole: Any
    specs: tuple[PartitionSpec, ...]
    gathers_last: bool = False

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        mapped = self._mapped(self.forward_here, *self.specs[:2])
        return mapped(operand, *self._gathered(residuals))

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        (in_spec, out_spec), whole = self.specs[:2], self.whole
        place = NamedSharding(self.features.mesh, in_spec)
        like = jax.ShapeDtypeStruct(place.shard_shape(whole.shape), whole.dtype)

        def transposed(here: Any, y: jax.Array) -> jax.Array:
            of_x = functools.partial(self.forward_here, here)
            return jax.linear_transpose(of_x, like)(y)[0]

        mapped = self._mapped(transposed, out_spec, in_spec)
        return mapped(cotangent, *self._gathered(residuals))

    def _mapped(
        self, apply: Callable[..., Any], in_spec: PartitionSpec, out_spec: PartitionSpec
    ) -> Callable[..., jax.Array]:
        """The function of an array and residuals that is `apply` on each device."""
        features = self.features
        both = features.in_axes, features.out_axes
        shards = [math.prod(features.mesh.shape[a] for a in axes) for axes in both]

        def local(x: jax.Array, op: Any, *rest: Any) -> jax.Array:
            sizes = op.in_features // shards[0], op.out_features // shards[1]
            starts = (
                jax.lax.axis_index(axes) * n if axes else jnp.zeros((), jnp.int32)
                for axes, n in zip(both, sizes, strict=True)
            )
            part = part_of(op, *starts, *sizes)
            return self._sum(apply((part, *rest), x), out_spec)

        context = jax.sharding.get_abstract_mesh()
        return jax.shard_map(
            local,
            mesh=features.mesh if context.empty else context,
            in_specs=(in_spec, REPLICATED, *self.specs[2:]),
            out_specs=out_spec,
            axis_names={axis for axes in both for axis in axes},
            check_vma=False,
        )

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

    def _gathered(self, residuals: Any) -> Any:
        if not self.gathers_last:
            return residuals
        # XLA might gather the operand instead. The residual is gathered again in the
        # backward pass, so that it is not saved.
        *others, last = residuals
        sharding = NamedSharding(self.features.mesh, self.specs[-1])
        return *others, jax.lax.with_sharding_constraint(last, sharding)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _RowsInParts(ShardMappedMap):
    """The same with the derivative by M, whose residuals are the operand and M."""

    # JAX would transpose the sum over devices as well, to another sum.
    by_m: ShardMappedMap

    def derivative(self, residuals: Any, operand: Any) -> tuple[LinearMap, Any]:
        op, m = residuals
        return self.by_m, (op, operand, m)


PartForm = Callable[..., jax.Array]
"""A function of a part and of arrays, such as `chips.matrix_of`."""


@dataclasses.dataclass(frozen=True)
class OnMesh(DeltaMap):
    """The map of an operator, where devices share features.

    The sums over devices are of C(x), q numbers a row; or of the output, if C(x) is as
    large as x or M is two factors. The derivative by M always is of such parts of the
    output, so that M's gradient needs a sum of arrays like M, and nothing else.
    """

    operator: Operator
    features: FeatureSharding

    def enter(self, x: jax.Array) -> jax.Array:
        """C(x), the same on all devices."""
        if not (axes := self.features.in_axes):
            return self.operator.enter(x)
        here, in_spec = static(_here, "enter"), last_axis(axes, x.ndim)
        of_x = self._map(here, x, in_spec, REPLICATED, out_axes=())
        return of_x((self.operator,), x)

    def leave(self, h: jax.Array) -> jax.Array:
        """D(h) in parts."""
        if not (axes := self.features.out_axes):
            return self.operator.leave(h)
        here, out_spec = static(_here, "leave"), last_axis(axes, h.ndim)
        of_h = self._map(here, h, REPLICATED, out_spec, in_axes=())
        return of_h((self.operator,), h)

    def product(self, h: jax.Array, m: jax.Array, precision: Any = None) -> jax.Array:
        return self.operator.product(h, m, precision)

    def rows(self, x: jax.Array, m: jax.Array, precision: Any = None) -> jax.Array:
        if self.operator.linear and not self.operator.block:
            return super().rows(x, m, precision)
        of_x = _RowsInParts(
            self.features,
            static(_rows, precision),
            jax.typeof(x),
            (*self._specs(x), REPLICATED),
            by_m=self._by_m(x, m, precision),
        )
        return of_x((self.operator, m), x)

    def kept(self, x: jax.Array, m: jax.Array, precision: Any = None) -> Any:
        return x, m

    def tangent(
        self, kept: Any, tangent: jax.Array, precision: Any = None
    ) -> jax.Array:
        by_m = self._by_m(kept[0], tangent, precision)
        return by_m((self.operator, *kept), tangent)

    def gradient(
        self, kept: Any, g: jax.Array, precision: Any = None, shards: int = 1
    ) -> jax.Array:
        by_m = self._by_m(kept[0], g, precision)
        return by_m((self.operator, *kept), g, transposed=True)

    def unit_rows(
        self, indices: jax.Array, m: jax.Array, precision: Any = None
    ) -> jax.Array:
        """The outputs that each device has of single rows of the delta.

        The inputs are not split: an index may be any, wherever the kernel's rows are.
        """
        here = static(_here, "unit_rows", precision)
        out_spec = last_axis(self.features.out_axes, indices.ndim + 1)
        of_m = self._map(here, m, REPLICATED, out_spec, REPLICATED, in_axes=())
        return self._of_m(of_m, m, indices)

    def matrix(self, m: jax.Array, matrix_of: PartForm) -> jax.Array:
        """The rows and columns of the delta that each device has, (in, out)."""
        here = static(_here, matrix_of)
        return self._of_m(self._map(here, m, REPLICATED, self._kernel_spec), m)

    def added(self, m: jax.Array, kernel: jax.Array, add: PartForm) -> jax.Array:
        """A kernel with its delta, (in, out), split as the kernel is.

        Each device adds its part of the delta to its part of the kernel. Where the
        kernel is gathered before it is used, the sum is what is gathered.
        """
        here, spec = static(_here, add), self._kernel_spec
        sums = self._map(here, kernel, spec, spec, REPLICATED)
        # Without a transpose, since it is not linear.
        return sums.forward((self.operator, m), kernel)

    def _map(
        self, here: PartForm, like: Any, *specs: PartitionSpec, **axes: Any
    ) -> ShardMappedMap:
        """A map of an operand `like` that, with some other `axes` of the features."""
        features = dataclasses.replace(self.features, **axes)
        return ShardMappedMap(features, here, jax.typeof(like), specs)

    def _of_m(self, of_m: ShardMappedMap, m: jax.Array, *arrays: Any) -> jax.Array:
        # Of a delta that is not linear in M JAX takes the derivative.
        apply = of_m if self.operator.linear else of_m.forward
        return apply((self.operator, *arrays), m)

    def _by_m(self, x: jax.Array, m: Any, precision: Any) -> ShardMappedMap:
        """The derivative by M as a map of its tangent, in the dtype of `m`."""
        x_spec, y_spec = self._specs(x)
        specs = REPLICATED, y_spec, x_spec, REPLICATED
        here = static(_tangent, precision)
        whole = jax.ShapeDtypeStruct(self.operator.m_shape, m.dtype)
        return ShardMappedMap(self.features, here, whole, specs)

    def _specs(self, x: jax.Array) -> tuple[PartitionSpec, ...]:
        """The splits of x, and of the output."""
        both = self.features.in_axes, self.features.out_axes
        return tuple(last_axis(axes, x.ndim) for axes in both)

    @property
    def _kernel_spec(self) -> PartitionSpec:
        return PartitionSpec(self.features.in_axes, self.features.out_axes)


def last_axis(axes: MeshAxes, ndim: int) -> PartitionSpec:
    """PartitionSpec of an array of `ndim` axes, the last one split by `axes`."""
    return PartitionSpec(*[None] * (ndim - 1), axes)


def _here(method: str | PartForm, *args: Any) -> jax.Array:
    """A method of the operator's part on one device, or a function of the part.

    The arguments are the method's last ones, the residuals and the operand.
    """
    *settings, (part, *arrays), operand = args
    function = getattr(type(part), method) if isinstance(method, str) else method
    return function(part, *arrays, operand, *settings)


def _rows(precision: Any, residuals: Any, x: jax.Array) -> jax.Array:
    part, m = residuals
    return part.rows(x, m, precision)


def _tangent(precision: Any, residuals: Any, tangent: jax.Array) -> jax.Array:
    """The derivative of a part's rows by M."""
    part, x, m = residuals
    rows = functools.partial(part.rows, x, precision=precision)
    return jax.jvp(rows, (m,), (tangent.astype(m.dtype),))[1]
