"""Where a kernel's features are on a mesh."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mora_jax._common.types import Shape
from mora_jax._jax.linear_map import LinearMap

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


def row_shards(layout: KernelLayout | None, x: jax.Array) -> int:
    """Into how many shards devices may split the first axis of a layer's input.

    Args:
      layout: Where the kernel's features are; None if nobody has said.
      x: The layer's input.

    Returns:
      A number that divides the axis; 1 if x is on one device, or one vector.
    """
    mesh = mesh_of(x) if layout is None else layout.mesh
    if mesh is None or x.ndim < 2:
        return 1
    axes = mesh.axis_names if layout is None else layout.batch_axes
    return math.gcd(x.shape[0], math.prod(mesh.shape[axis] for axis in axes))


# --- M, which each device needs whole ---


def gather_m(
    m: jax.Array, layout: KernelLayout | None, x: jax.Array, ndim: int = 2
) -> jax.Array:
    """M and its gradient, replicated wherever they are kept.

    Without this constraint XLA may propagate a split of M to the activations. It may
    also split the gradient as it likes, and with it the next M, so that the next step
    is compiled again.

    Args:
      m: M, (*stack, q, q).
      layout: Where the kernel's features are; None if nobody has said.
      x: The layer's input.
      ndim: How many of M's axes are not a stack's: 3 for several squares.
    """
    if layout is None:
        return m if mesh_of(m) is mesh_of(x) is None else _Replicated(ndim)((), m)
    if isinstance(layout.mesh, AbstractMesh):  # explicit: its type says the same
        return m
    return _replicate(m, layout.mesh, ndim)


@dataclasses.dataclass(frozen=True)
class _Replicated(LinearMap):
    """The identity, which replicates arrays whose type names a mesh.

    Within a program a type names the mesh; a cotangent that was made outside of one, on
    one device, has none.
    """

    ndim: int

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        mesh = mesh_of(operand)
        return operand if mesh is None else _replicate(operand, mesh, self.ndim)

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        return self.forward(residuals, cotangent)


def mesh_of(x: jax.Array) -> AbstractMesh | None:
    """The mesh that `x` is on, if XLA decides how it splits `x`."""
    mesh = jax.typeof(x).sharding.mesh
    auto = not mesh.empty and set(mesh.axis_types) == {AxisType.Auto}
    return mesh if auto else None


def _replicate(m: jax.Array, mesh: Mesh | AbstractMesh, ndim: int) -> jax.Array:
    stack = [PartitionSpec.UNCONSTRAINED] * (m.ndim - ndim)
    spec = PartitionSpec(*stack, *[None] * ndim)
    return jax.lax.with_sharding_constraint(m, NamedSharding(mesh, spec))


# --- Explicit sharding: the type of an array says how a mesh splits it ---


def explicit_sharding(x: Any) -> NamedSharding | None:
    """The sharding in the type of `x`, if JAX holds programs to it."""
    if not isinstance(x, jax.Array):
        return None
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def explicit_layout(labels: tuple[str, str, str], x: Any, y: Any) -> KernelLayout:
    """Where the features of a layer are, by the types of its input and output.

    Args:
      labels: The letters of the einsum of input, kernel and output.
      x: The layer's input.
      y: The explicit sharding of its output.
    """
    inputs, kernel, outputs = labels
    split: dict[str, MeshAxes] = {}
    for letters, spec in ((inputs, jax.typeof(x).sharding.spec), (outputs, y.spec)):
        split |= dict(zip(letters, map(mesh_axes, spec), strict=False))
    return KernelLayout(y.mesh, tuple(split.get(c, ()) for c in reversed(kernel)))


def with_auto_axes(
    function: Callable[..., jax.Array], y: NamedSharding, *args: Any
) -> jax.Array:
    """`function(*args)` with the sharding `y`; XLA decides how to split its steps."""
    free: Any = jax.sharding.auto_axes(function, out_sharding=y)
    return free(*args)
