"""Places on a mesh: of the features of kernels, and of the arrays in a layer."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import Array
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mora_jax._common.axes import sizes
from mora_jax._common.types import Shape
from mora_jax._jax.linear_map import LinearMap

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
    """Split of a kernel by a mesh, and the axes that split the rows of inputs."""

    mesh: Mesh | AbstractMesh
    mesh_axes: tuple[MeshAxes, ...]  # for each axis of the kernel those that split it
    # The mesh axes that split the rows of inputs. Where they also split a kernel, it is
    # gathered before it is used (FSDP). Features that other axes split stay split.
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
        # On explicit axes types decide, and a delta gets its own by the sum with W.
        explicit = AxisType.Explicit in self.mesh.axis_types
        return None if explicit else self._features(axes, shape, without=())

    def of_directions(self, axes: str, shape: Shape) -> list[NamedSharding]:
        """Places of (*stack, features, q) for inputs and outputs, by their features."""
        features = self._features(axes, shape, without=())
        both = (features.in_axes, features.out_axes) if features else ((), ())
        stack = sizes(self.mesh_axes, axes, "s")
        specs = (PartitionSpec(*stack, split) for split in both)
        return [NamedSharding(self.mesh, spec) for spec in specs]

    def _features(
        self, axes: str, shape: Shape, without: MeshAxes
    ) -> FeatureSharding | None:
        def split(letter: str) -> MeshAxes:
            # An axis of one device splits nothing, and XLA fails to sum over it.
            first, *inner = [
                tuple(a for a in split if a not in without and self.mesh.shape[a] > 1)
                for axis, size, split in zip(axes, shape, self.mesh_axes, strict=True)
                if axis == letter and size > 1
            ] or [()]
            # Of several axes (heads and their features) only the first may be split,
            # or a device's features would not be neighbours. Others are left to XLA.
            return () if any(inner) else first

        both = split("i"), split("o")
        return FeatureSharding(self.mesh, *both) if any(both) else None


def row_shards(layout: KernelLayout | None, x: Array) -> int:
    """The number of shards into which devices may split the rows of a layer's input.

    It divides the first axis of x. It is 1 if x is on one device, or one vector. The
    layout is None if nobody has said where the kernel's features are.
    """
    mesh = mesh_of(x) if layout is None else layout.mesh
    if mesh is None or x.ndim < 2:
        return 1
    axes = mesh.axis_names if layout is None else layout.batch_axes
    return math.gcd(x.shape[0], math.prod(mesh.shape[axis] for axis in axes))


def gather_m(
    m: Array, layout: KernelLayout | None, x: Array, ndim: int, split: Iterable[Any]
) -> Array:
    """M and its gradient, replicated or `split`, wherever they are kept.

    M, (*stack, q, q), has `ndim` axes without the stack's. The layer's input is x.
    """
    # Without this constraint XLA may propagate a split of M to the activations. It may
    # also split the gradient, and with it the next M, and compile the next step again.
    if layout is None:  # only the types of arrays may name a mesh
        return m if mesh_of(m) is mesh_of(x) is None else _Replicated(ndim)((), m)
    if isinstance(layout.mesh, AbstractMesh):  # explicit: its type says the same
        return m
    return _replicate(m, layout.mesh, ndim, split)


@dataclasses.dataclass(frozen=True)
class _Replicated(LinearMap):
    """The identity, which replicates arrays whose type names a mesh."""

    ndim: int

    def forward(self, residuals: Any, operand: Array) -> Array:
        # A cotangent that was made outside of a program, on one device, lacks a mesh.
        mesh = mesh_of(operand)
        return operand if mesh is None else _replicate(operand, mesh, self.ndim)

    def backward(self, residuals: Any, cotangent: Array) -> Array:
        return self.forward(residuals, cotangent)


def mesh_of(x: Array) -> AbstractMesh | None:
    """The mesh that `x` is on, if XLA decides how it splits `x`."""
    mesh = jax.typeof(x).sharding.mesh
    return mesh if not mesh.empty and set(mesh.axis_types) == {AxisType.Auto} else None


def _replicate(
    m: Array, mesh: Mesh | AbstractMesh, ndim: int, split: Iterable[Any] = ()
) -> Array:
    stack = [PartitionSpec.UNCONSTRAINED] * (m.ndim - ndim)
    sharding = NamedSharding(mesh, PartitionSpec(*stack, *split))
    return jax.lax.with_sharding_constraint(m, sharding)


def explicit_sharding(x: Any) -> NamedSharding | None:
    """The sharding in the type of `x`, if JAX holds programs to it."""
    if not isinstance(x, Array):
        return None
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def explicit_layout(labels: tuple[str, ...], x: Any, y: Any) -> KernelLayout:
    """Layout of a layer, by the type of its input x and the sharding y of its output.

    `labels` are the letters of the einsum of input, kernel and output.
    """
    inputs, kernel, outputs = labels
    split: dict[str, MeshAxes] = {}
    for letters, spec in ((inputs, jax.typeof(x).sharding.spec), (outputs, y.spec)):
        split |= dict(zip(letters, map(mesh_axes, spec), strict=False))
    return KernelLayout(y.mesh, tuple(split.get(c, ()) for c in kernel))


def with_auto_axes(function: Callable[..., Any], y: NamedSharding, *args: Any) -> Any:
    """`function(*args)` with the sharding `y`; XLA decides how to split its steps."""
    return jax.sharding.auto_axes(function, out_sharding=y)(*args)
