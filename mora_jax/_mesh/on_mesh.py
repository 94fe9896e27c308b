"""An operator where the devices of a mesh share the features.

If inputs are split, a device has part of C(x), and the parts are summed: q numbers for
each row. If outputs are split, the forward pass needs no communication and the backward
pass one sum of (rows, q). If C(x) is as large as x, or M is two factors, the outputs
are summed instead; and so they are for every operator where the layer's own output is
summed with them (see `ways.Fused`). The derivative by M always is of such parts of the
output, so that M's gradient needs a sum of arrays like M over all axes that split
anything, and nothing else. Blocks that one device needs are its own, without a sum.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from mora_jax._jax.linear_algebra import transposed, varying
from mora_jax._jax.linear_map import LinearMap
from mora_jax._jax.tracing import current_platform
from mora_jax._mesh.parts import part_of
from mora_jax._mesh.places import FeatureSharding, MeshAxes, mesh_axes
from mora_jax.operators import BlockDiagonal, Operator, Subspace
from mora_jax.operators._base import DeltaMap

REPLICATED = PartitionSpec()

Here = Callable[..., Array]
"""A function on one device, of the part of an operator there, and of arrays."""


@dataclasses.dataclass(frozen=True)
class _Sum(LinearMap):
    """The sum over devices, or their own arrays as one that differs between them.

    Each is the transpose of the other one.
    """

    # JAX derives the same, but up to 0.8 cannot map its sum over a batch (`jax.vmap`).
    # And each gradient is summed once, not once for each use of an array.
    axes: MeshAxes

    elementwise = True

    def forward(self, residuals: Any, operand: Array) -> Array:
        if not self.axes:
            return operand
        dtype = operand.dtype
        # XLA's CPU compiler crashes on sums of 16-bit numbers over some axes alone.
        if current_platform() == "cpu":
            operand = operand.astype(jnp.promote_types(dtype, jnp.float32))
        return jax.lax.psum(operand, self.axes).astype(dtype)

    def backward(self, residuals: Any, cotangent: Array) -> Array:
        return varying(cotangent, self.axes)


@dataclasses.dataclass(frozen=True)
class OnMesh(DeltaMap):
    """The map of an operator, where devices share features."""

    operator: Operator
    features: FeatureSharding

    def enter(self, x: Array) -> Array:
        """C(x), the same on all devices."""
        if not (axes := self.features.in_axes):
            return self.operator.enter(x)
        specs = [last_axis(axes, x.ndim)], REPLICATED
        return self.shared(lambda own, x: own[0].enter(x), [x], *specs, out_axes=())

    def leave(self, h: Array) -> Array:
        """D(h) in parts."""
        if not (axes := self.features.out_axes):
            return self.operator.leave(h)
        specs = [REPLICATED], last_axis(axes, h.ndim)
        return self.shared(lambda own, h: own[0].leave(h), [h], *specs, in_axes=())

    def product(self, h: Array, m: Array, precision: Any = None) -> Array:
        return self.operator.product(h, m, precision)

    def rows(self, x: Array, m: Array, precision: Any = None) -> Array:
        if self.operator.linear and not self.operator.block:
            return super().rows(x, m, precision)
        return self._in_parts(x, m, precision)

    def kept(self, x: Array, m: Array, precision: Any = None) -> Any:
        return x, m

    def tangent(self, kept: Any, tangent: Array, precision: Any = None) -> Array:
        x, m = kept
        rows = functools.partial(self._in_parts, x, precision=precision)
        return jax.jvp(rows, (m,), (tangent.astype(m.dtype),))[1]

    def gradient(
        self, kept: Any, g: Array, precision: Any = None, shards: int = 1
    ) -> Array:
        tangent = functools.partial(self.tangent, kept, precision=precision)
        return transposed(tangent, self.operator.m_shape, g)

    def matrix(self, m: Array, matrix_of: Here) -> Array:
        """The rows and columns of the delta that each device has, (in, out)."""
        spec = self._kernel_spec
        return self.shared(lambda own, m: matrix_of(*own, m), [m], [REPLICATED], spec)

    def added(self, m: Array, kernel: Array, add: Here) -> Array:
        """A kernel with its delta, (in, out), split as the kernel is."""
        # Where a kernel is gathered before it is used, the sum is what is gathered.
        specs = [self._kernel_spec, REPLICATED], self._kernel_spec
        return self.shared(lambda own, kernel: add(*own, kernel), [kernel, m], *specs)

    def _in_parts(self, x: Array, m: Array, precision: Any) -> Array:
        """The rows of x, where the output is what devices sum."""

        def here(own: Any, x: Array) -> Array:
            return own[0].rows(x, own[1], precision)

        both = self.features.in_axes, self.features.out_axes
        x_spec, y_spec = (last_axis(axes, x.ndim) for axes in both)
        return self.shared(here, [x, m], [x_spec, self.m_spec], y_spec)

    def shared(
        self, here: Here, arrays: Any, specs: Any, out_spec: PartitionSpec, **axes: Any
    ) -> Array:
        """`here((part, *others), first)` of arrays on each device that shares features.

        It is summed over the axes of the features that do not split it, where some may
        be given as other `axes`. Other axes of the mesh, such as those that split a
        batch, are left to XLA. `specs` split the arrays, and `out_spec` the result.
        """
        op, features = self.operator, dataclasses.replace(self.features, **axes)
        both, mesh = (features.in_axes, features.out_axes), features.mesh
        names = (*both[0], *both[1])
        shards = [math.prod(mesh.shape[a] for a in axes) for axes in both]
        widths = zip((op.in_features, op.out_features), shards, strict=True)
        sizes = [width // n for width, n in widths]

        def sum_to(spec: PartitionSpec) -> _Sum:
            split = {axis for entry in spec for axis in mesh_axes(entry)}
            return _Sum(tuple(axis for axis in names if axis not in split))

        def local(operator: Operator, starts: Any, *arrays: Array) -> Array:
            part = part_of(operator, *(start[0] for start in starts), *sizes)
            pairs = zip(arrays, specs, strict=True)
            first, *others = (sum_to(spec)((), x, transposed=True) for x, spec in pairs)
            return sum_to(out_spec)((), here((part, *others), first))

        # Not `jax.lax.axis_index`, which XLA's CPU compiler refuses in larger programs.
        counts = zip(sizes, shards, strict=True)
        starts = [size * np.arange(n, dtype=np.int32) for size, n in counts]
        own_specs, by_features = REPLICATED, [*map(PartitionSpec, both)]
        if isinstance(op, Subspace):  # its directions are where their features are
            own_specs = jax.tree.unflatten(jax.tree.structure(op), by_features)
        context = jax.sharding.get_abstract_mesh()
        mapped = jax.shard_map(
            local,
            mesh=mesh if context.empty else context,
            in_specs=(own_specs, by_features, *specs),
            out_specs=out_spec,
            axis_names=set(names),
        )
        return mapped(op, starts, *arrays)

    @property
    def m_spec(self) -> PartitionSpec:
        """The split of M: by blocks if each is needed on one device, or none."""
        op, axes = self.operator, (self.features.in_axes, self.features.out_axes)
        if not isinstance(op, BlockDiagonal) or all(axes) or not op.aligned:
            return REPLICATED
        shards = math.prod(self.features.mesh.shape[a] for a in (*axes[0], *axes[1]))
        evenly = op.m_shape[0] % shards == 0
        return PartitionSpec(axes[0] or axes[1]) if evenly else REPLICATED

    @property
    def _kernel_spec(self) -> PartitionSpec:
        return PartitionSpec(self.features.in_axes, self.features.out_axes)


def last_axis(axes: MeshAxes, ndim: int) -> PartitionSpec:
    """PartitionSpec of an array of `ndim` axes, the last one split by `axes`."""
    return PartitionSpec(*[None] * (ndim - 1), axes)
