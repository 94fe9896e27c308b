"""Layers whose features the devices of a mesh share."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from mora_jax._linear import LinearMap
from mora_jax._types import Shape

Axes = tuple[str, ...]
WHOLE = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class FeatureMesh:
    """Which axes of a mesh split the features of a layer.

    Each device has a run of neighbouring features, in the order of the axes.

    Attributes:
      mesh: the devices.
      ins: axes that split input features; none if each device has all of them.
      outs: axes that split output features.
    """

    mesh: Mesh | AbstractMesh
    ins: Axes = ()
    outs: Axes = ()

    @property
    def by_ins(self) -> "FeatureMesh":
        """Without the axes of outputs."""
        return dataclasses.replace(self, outs=())

    @property
    def by_outs(self) -> "FeatureMesh":
        """Without the axes of inputs."""
        return dataclasses.replace(self, ins=())

    def pieces(self, axes: Axes) -> int:
        """How many runs `axes` make of what they split."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def local(self, shape: Shape, spec: PartitionSpec) -> Shape:
        """The shape of one device's part of an array."""
        axes = [*map(axes_of, spec), *[()] * (len(shape) - len(spec))]
        return tuple(n // self.pieces(a) for n, a in zip(shape, axes, strict=True))

    def run(
        self,
        part: Callable[..., jax.Array],
        args: tuple[Any, ...],
        in_specs: tuple[PartitionSpec, ...],
        out_spec: PartitionSpec,
    ) -> jax.Array:
        """The sum of what `part` makes of each device's part of `args`.

        It is a sum over those axes of this mesh that do not split the result. Other
        axes, such as those that split a batch, are left to XLA's partitioner.

        Args:
          part: of (number of the run of inputs, of the run of outputs, *args).
          args: pytrees.
          in_specs: how `ins` and `outs` split them.
          out_spec: how they split the result.
        """
        names = (*self.ins, *self.outs)
        split = {axis for entry in out_spec for axis in axes_of(entry)}
        added = tuple(axis for axis in names if axis not in split)

        def local(k_in: jax.Array, k_out: jax.Array, *args: Any) -> jax.Array:
            result = part(k_in[0], k_out[0], *args)
            return self._sum(result, added) if added else result

        # Where a device is, as data: the partitioner has no index along some axes only.
        places = [jnp.arange(self.pieces(axes)) for axes in (self.ins, self.outs)]
        context = jax.sharding.get_abstract_mesh()
        mapped = jax.shard_map(
            local,
            mesh=self.mesh if context.empty else context,
            in_specs=(PartitionSpec(self.ins), PartitionSpec(self.outs), *in_specs),
            out_specs=out_spec,
            axis_names=set(names),
            check_vma=False,
        )
        # Compiled, or some axes alone could not be mapped.
        return jax.jit(mapped)(*places, *args)

    def _sum(self, x: jax.Array, axes: Axes) -> jax.Array:
        # XLA's CPU compiler crashes on sums of 16-bit numbers over some axes alone.
        mesh = self.mesh
        here = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else None
        if (here or jax.default_backend()) == "cpu":
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            return jax.lax.psum(wide, axes).astype(x.dtype)
        return jax.lax.psum(x, axes)


def axes_of(entry: Any) -> Axes:
    """The mesh axes in an entry of a `PartitionSpec`."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def last(axes: Axes, ndim: int) -> PartitionSpec:
    """Of an array of `ndim` axes of which `axes` split the last."""
    return PartitionSpec(*[None] * (ndim - 1), axes) if axes else WHOLE


@dataclasses.dataclass(frozen=True)
class OnShards(LinearMap):
    """A linear map of which each device computes its part.

    Attributes:
      mesh: whose axes split something, or have parts of a sum each.
      part: of (number of the run of inputs, of the run of outputs, x, *residuals).
      shape: of x, all of it.
      dtype: of x.
      x_spec: how the mesh splits x.
      y_spec: how it splits the result.
      specs: how it splits the residuals, of which there is a tuple.
    """

    mesh: FeatureMesh
    part: Callable[..., jax.Array]
    shape: Shape
    dtype: Any
    x_spec: PartitionSpec
    y_spec: PartitionSpec
    specs: tuple[PartitionSpec, ...]

    @classmethod
    def of(
        cls,
        mesh: FeatureMesh,
        part: Callable[..., jax.Array],
        x: Any,
        x_spec: PartitionSpec,
        y_spec: PartitionSpec,
        specs: tuple[PartitionSpec, ...] = (WHOLE,),
    ) -> "OnShards":
        """A map of arrays like `x`."""
        return cls(mesh, part, x.shape, x.dtype, x_spec, y_spec, specs)

    def forward(self, residuals: Any, x: jax.Array) -> jax.Array:
        specs = (self.x_spec, *self.specs)
        return self.mesh.run(self.part, (x, *residuals), specs, self.y_spec)

    def backward(self, residuals: Any, y: jax.Array) -> jax.Array:
        local = self.mesh.local(self.shape, self.x_spec)
        like = jax.ShapeDtypeStruct(local, self.dtype)

        def transposed(k_in: Any, k_out: Any, y: jax.Array, *rest: Any) -> jax.Array:
            def by_x(x: jax.Array) -> jax.Array:
                return self.part(k_in, k_out, x, *rest)

            return jax.linear_transpose(by_x, like)(y)[0]

        specs = (self.y_spec, *self.specs)
        return self.mesh.run(transposed, (y, *residuals), specs, self.x_spec)
