"""Arrays on a mesh: where M, inputs and outputs are while a layer computes."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import Array
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mora_jax._jax.linear_map import LinearMap
from mora_jax._mesh.layout import KernelLayout, MeshAxes, mesh_axes


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
    # also split the gradient as it likes, and with it the next M, so that the next step
    # is compiled again.
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
        # Within a program a type names the mesh; a cotangent that was made outside of
        # one, on one device, has none.
        mesh = mesh_of(operand)
        return operand if mesh is None else _replicate(operand, mesh, self.ndim)

    def backward(self, residuals: Any, cotangent: Array) -> Array:
        return self.forward(residuals, cotangent)


def mesh_of(x: Array) -> AbstractMesh | None:
    """The mesh that `x` is on, if XLA decides how it splits `x`."""
    mesh = jax.typeof(x).sharding.mesh
    auto = not mesh.empty and set(mesh.axis_types) == {AxisType.Auto}
    return mesh if auto else None


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
