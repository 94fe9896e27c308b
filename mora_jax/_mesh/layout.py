"""Where a kernel's features are on a mesh."""

import dataclasses
import math
from typing import Any

from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mora_jax._common.types import Shape

MeshAxes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class FeatureSharding:
    """Which axes of a mesh split the input and the output features of a layer.

    Each device has neighbouring features, in the order of the axes.

    Attributes:
      mesh: The devices.
      in_axes: The axes that split the inputs; none if each device has all of them.
      out_axes: The axes that split the outputs.
    """

    mesh: Mesh | AbstractMesh
    in_axes: MeshAxes = ()
    out_axes: MeshAxes = ()

    @property
    def splits(self) -> bool:
        """Whether any features are split."""
        return bool(self.in_axes or self.out_axes)

    @property
    def inputs_only(self) -> "FeatureSharding":
        """The same without the axes of the outputs."""
        return dataclasses.replace(self, out_axes=())

    @property
    def outputs_only(self) -> "FeatureSharding":
        """The same without the axes of the inputs."""
        return dataclasses.replace(self, in_axes=())

    def num_shards(self, axes: MeshAxes) -> int:
        """Into how many shards `axes` split what they split."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def local_shape(self, shape: Shape, spec: PartitionSpec) -> Shape:
        """The shape of one device's part of an array."""
        axes = [*map(mesh_axes, spec), *[()] * (len(shape) - len(spec))]
        return tuple(n // self.num_shards(a) for n, a in zip(shape, axes, strict=True))


def mesh_axes(entry: Any) -> MeshAxes:
    """The mesh axes in an entry of a `PartitionSpec`."""
    if entry is None:
        return ()
    if entry is PartitionSpec.UNCONSTRAINED:
        raise ValueError(
            "a kernel's PartitionSpec must say which mesh axes split it, got "
            "UNCONSTRAINED"
        )
    return (entry,) if isinstance(entry, str) else tuple(entry)


@dataclasses.dataclass(frozen=True)
class KernelLayout:
    """How a mesh splits a kernel, and which of its axes split the rows of inputs.

    Attributes:
      mesh: The devices.
      mesh_axes: For each axis of the kernel, its last one first, the mesh axes that
        split it. The order is reversed because `nn.scan` and `nn.vmap` remove leading
        axes.
      batch_axes: The mesh axes that split the rows of inputs. Where they also split a
        kernel, the kernel is gathered before it is used (FSDP). Features that other
        axes split stay split.
    """

    mesh: Mesh | AbstractMesh
    mesh_axes: tuple[MeshAxes, ...]
    batch_axes: MeshAxes = ()

    @property
    def gathers(self) -> bool:
        """Whether the kernel is gathered before it is used."""
        return any(axis in self.batch_axes for axes in self.mesh_axes for axis in axes)

    def gathered_sharding(self, ndim: int) -> NamedSharding:
        """Where a kernel is while it is used.

        Args:
          ndim: How many of the kernel's axes the layer sees, the last ones.
        """
        kept = (
            tuple(axis for axis in axes if axis not in self.batch_axes)
            for axes in reversed(self.mesh_axes[:ndim])
        )
        return NamedSharding(self.mesh, PartitionSpec(*(axes or None for axes in kept)))

    def for_activations(self, axes: str, shape: Shape) -> FeatureSharding:
        """How inputs and outputs are split, by the features of a kernel.

        Args:
          axes: The kernel's axes, a letter each.
          shape: The kernel's shape.
        """
        return self._features(axes, shape, without=self.batch_axes)

    def for_kernel(self, axes: str, shape: Shape) -> FeatureSharding:
        """How the kernel itself is split, as (in_features, out_features).

        On explicit axes the answer is not at all: there the types of arrays decide, and
        a delta gets its type from the sum with its kernel.
        """
        explicit = AxisType.Explicit in self.mesh.axis_types
        return FeatureSharding(self.mesh) if explicit else self._features(axes, shape)

    def _features(
        self, axes: str, shape: Shape, without: MeshAxes = ()
    ) -> FeatureSharding:
        ins, outs = (self._split(axes, shape, letter, without) for letter in "io")
        return FeatureSharding(self.mesh, ins, outs)

    def _split(
        self, axes: str, shape: Shape, letter: str, without: MeshAxes
    ) -> MeshAxes:
        """The mesh axes that split the features of one kind between devices.

        If a kind has several axes (heads and their features), only the first of them
        may be split. Otherwise the answer is none, and XLA's partitioner finds a way.
        """
        found: list[MeshAxes] = []
        for k in range(1, len(axes) + 1):
            if axes[-k] == letter and shape[-k] > 1:
                split = self.mesh_axes[k - 1] if k <= len(self.mesh_axes) else ()
                # An axis of one device splits nothing, and XLA fails to sum over it.
                sizes = self.mesh.shape
                kept = (a for a in split if a not in without and sizes[a] > 1)
                found.append(tuple(kept))
        *inner, first = found or [()]
        return () if any(inner) else first
