"""Where a kernel's features are on a mesh."""

import dataclasses
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mora_jax._linear import LinearMap
from mora_jax._mesh import Axes, FeatureMesh
from mora_jax._types import Shape
from mora_jax.operators import Operator
from mora_jax.operators._distributed import Distributed


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a mesh splits a kernel, and what of that its layer's inputs share.

    Attributes:
      mesh: the devices.
      axes: mesh axes that split the kernel's axes, from its last one backwards; a
        lifted transformation takes off axes in front.
      batch_axes: mesh axes that split the rows of inputs. Where they split a kernel, it
        is gathered before it is used (FSDP); by other axes features stay split.
    """

    mesh: Mesh | AbstractMesh
    axes: tuple[Axes, ...]
    batch_axes: Axes = ()

    @property
    def gathers(self) -> bool:
        """Whether the kernel is gathered before it is used."""
        return any(axis in self.batch_axes for axes in self.axes for axis in axes)

    def gather_m(self, m: jax.Array) -> jax.Array:
        """`m` as it is used on the mesh, see `gather_m`."""
        if isinstance(self.mesh, AbstractMesh):  # explicit: its type says the same
            return m
        return _whole(m, self.mesh)

    def of_rows(self, axes: str, shape: Shape) -> FeatureMesh:
        """How inputs and outputs are split, by the features of a kernel."""
        return self._features(axes, shape, self.batch_axes)

    def of_kernel(self, axes: str, shape: Shape) -> FeatureMesh:
        """How the kernel itself is split, as (in_features, out_features)."""
        return self._features(axes, shape, ())

    def _features(self, axes: str, shape: Shape, without: Axes) -> FeatureMesh:
        ins, outs = (self._run(axes, shape, letter, without) for letter in "io")
        return FeatureMesh(self.mesh, ins, outs)

    def _run(self, axes: str, shape: Shape, letter: str, without: Axes) -> Axes:
        """Mesh axes that split all features of one kind into runs, if any do.

        Of several axes of a kind (heads and their features) the first must be the one
        that is split. Else nothing is said, and XLA's partitioner finds a way.
        """
        found: list[Axes] = []
        for k in range(1, len(axes) + 1):
            if axes[-k] == letter and shape[-k] > 1:
                split = self.axes[k - 1] if k <= len(self.axes) else ()
                # An axis of one device splits nothing, and XLA fails to add up over it.
                axis_sizes = self.mesh.shape
                some = (a for a in split if a not in without and axis_sizes[a] > 1)
                found.append(tuple(some))
        *inner, first = found or [()]
        return () if any(inner) else first


def gather_m(m: jax.Array, layout: Layout | None, x: jax.Array) -> jax.Array:
    """All of each M, wherever it is kept, and all of its gradient.

    Else XLA might spread a split of M to others. And it would split the gradient as it
    likes, with it the new M, and the next step would be compiled again.

    Args:
      m: M, (*stack, q, q).
      layout: where the kernel's features are; None if it is not said.
      x: the layer's input.
    """
    if layout is not None:
        return layout.gather_m(m)
    return m if _mesh_of(m) is _mesh_of(x) is None else _Whole()((), m)


@dataclasses.dataclass(frozen=True)
class _Whole(LinearMap):
    """The identity, for arrays that a mesh has by the type of the array itself.

    In a program's own steps a type tells of the mesh; a cotangent that was made
    outside of one, on one device, has none.
    """

    def forward(self, residuals: Any, x: jax.Array) -> jax.Array:
        mesh = _mesh_of(x)
        return x if mesh is None else _whole(x, mesh)

    def backward(self, residuals: Any, y: jax.Array) -> jax.Array:
        return self.forward(residuals, y)


def _mesh_of(x: jax.Array) -> AbstractMesh | None:
    """The mesh that `x` is on, if XLA decides how it splits `x`."""
    mesh = jax.typeof(x).sharding.mesh
    auto = not mesh.empty and set(mesh.axis_types) == {AxisType.Auto}
    return mesh if auto else None


def _whole(m: jax.Array, mesh: Mesh | AbstractMesh) -> jax.Array:
    stack = [PartitionSpec.UNCONSTRAINED] * (m.ndim - 2)
    spec = PartitionSpec(*stack, None, None)
    return jax.lax.with_sharding_constraint(m, NamedSharding(mesh, spec))


def on_rows(op: Operator, layout: Layout | None, axes: str, shape: Shape) -> Operator:
    """`op` for rows of inputs to a layer whose kernel has `axes` and `shape`."""
    return Distributed.of(op, layout.of_rows(axes, shape)) if layout else op


def on_kernel(op: Operator, layout: Layout | None, axes: str, shape: Shape) -> Operator:
    """`op` for updates of such a kernel itself."""
    # Types say where things are on explicit axes, and the sum with the kernel decides.
    if layout is None or AxisType.Explicit in layout.mesh.axis_types:
        return op
    return Distributed.of(op, layout.of_kernel(axes, shape))
