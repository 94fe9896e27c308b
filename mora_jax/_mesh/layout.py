"""Layouts: the places of a kernel's features on a mesh."""

import dataclasses
from typing import Any

from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mora_jax._common.types import Shape

MeshAxes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class FeatureSharding:
    """Axes of a mesh that split the input and the output features of a layer.

    Each device has neighbouring features, in the order of the axes; all without axes.
    """

    mesh: Mesh | AbstractMesh
    in_axes: MeshAxes = ()
    out_axes: MeshAxes = ()


def mesh_axes(entry: Any) -> MeshAxes:
    """The mesh axes in an entry of a `PartitionSpec`."""
    if entry is None:
        return ()
    if entry is PartitionSpec.UNCONSTRAINED:
        raise ValueError("a spec must say which mesh axes split it, got UNCONSTRAINED")
    return (entry,) if isinstance(entry, str) else tuple(entry)


@dataclasses.dataclass(frozen=True)
class KernelLayout:
    """Split of a kernel by a mesh, and the axes that split the rows of inputs.

    Attributes:
      mesh: The devices.
      mesh_axes: For each axis of the kernel the mesh axes that split it.
      batch_axes: The mesh axes that split the rows of inputs. Where they also split a
        kernel, the kernel is gathered before it is used (FSDP). Features that other
        axes split stay split.
    """

    mesh: Mesh | AbstractMesh
    mesh_axes: tuple[MeshAxes, ...]
    batch_axes: MeshAxes = ()

    @property
    def gathers(self) -> bool:
        """True if the kernel is gathered before it is used."""
        return any(axis in self.batch_axes for axes in self.mesh_axes for axis in axes)

    @property
    def safe_batch_axes(self) -> MeshAxes:
        """Batch axes in an order for which XLA multiplies rows and kernel correctly."""
        # Let rows x (n, i) be split by (("data", "fsdp"), "model"), a kernel (i, o) by
        # ("model", "fsdp"), and their product as x is. XLA's partitioner moves the
        # shards of x into the order of the kernel's devices: those that split it, then
        # others as the mesh has them. It does not move the product's rows back.
        axes = [axis for axis, size in self.mesh.shape.items() if size > 1]
        batch = [axis for axis in self.batch_axes if axis in axes]
        split = {axis for entry in self.mesh_axes for axis in entry}.intersection(axes)
        safe = sorted(batch, key=lambda axis: (axis not in split, axes.index(axis)))
        moves = safe != batch and split.intersection(batch) and split.difference(batch)
        return tuple(safe) if moves else self.batch_axes

    @property
    def gathered_sharding(self) -> NamedSharding:
        """The sharding of the kernel while it is used."""
        split, batch = self.mesh_axes, self.batch_axes
        kept = (tuple(axis for axis in axes if axis not in batch) for axes in split)
        return NamedSharding(self.mesh, PartitionSpec(*(axes or None for axes in kept)))

    def for_activations(self, axes: str, shape: Shape) -> FeatureSharding | None:
        """Split of inputs and outputs, by the kernel's axes; None for no split."""
        return self._features(axes, shape, without=self.batch_axes)

    def for_kernel(self, axes: str, shape: Shape) -> FeatureSharding | None:
        """Split of the kernel itself, as (in_features, out_features)."""
        # On explicit axes the types of arrays decide, and a delta gets its type from
        # the sum with its kernel.
        explicit = AxisType.Explicit in self.mesh.axis_types
        return None if explicit else self._features(axes, shape, without=())

    def _features(
        self, axes: str, shape: Shape, without: MeshAxes
    ) -> FeatureSharding | None:
        def split(letter: str) -> MeshAxes:
            # An axis of one device splits nothing, and XLA fails to sum over it.
            kernel = zip(axes, shape, self.mesh_axes, strict=True)
            first, *inner = [
                tuple(a for a in split if a not in without and self.mesh.shape[a] > 1)
                for axis, size, split in kernel
                if axis == letter and size > 1
            ] or [()]
            # Of several axes (heads and their features) the first one alone may be
            # split, or a device's features would not be neighbours. XLA's partitioner
            # finds a way for others.
            return () if any(inner) else first

        both = split("i"), split("o")
        return FeatureSharding(self.mesh, *both) if any(both) else None
