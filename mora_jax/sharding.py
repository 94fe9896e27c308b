"""Adapters on a mesh of devices, sharded as the base is.

Example::

  >>> import jax, jax.numpy as jnp, mora_jax
  >>> from jax.sharding import AxisType, PartitionSpec
  >>> mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  >>> where = {"fc": {"kernel": PartitionSpec("data", "model")}}
  >>> adapters = mora_jax.init(mora_jax.plan({"fc": {"kernel": jnp.ones((8, 8))}}))
  >>> shardings = mora_jax.sharding.adapter_shardings(adapters, where, mesh=mesh)
  >>> adapters = jax.device_put(adapters, shardings)
  >>> adapters["fc"]["kernel_mora"].m.is_fully_replicated
  True
  >>> placed = mora_jax.sharding.on_mesh(adapters, where, batch_axes="data", mesh=mesh)
  >>> placed["fc"]["kernel_mora"].spec.layout.mesh_axes
  (('data',), ('model',))
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

import flax.linen as nn
from flax import nnx
from flax.linen.spmd import logical_to_mesh_axes
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mora_jax._common.axes import sizes
from mora_jax._common.messages import nearest_paths, warn
from mora_jax._common.trees import located_leaves, unboxed
from mora_jax._common.types import Path
from mora_jax._mesh.on_mesh import OnMesh
from mora_jax._mesh.places import KernelLayout, mesh_axes
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree.paths import Found, Tree, adapters_in, replace_adapters
from mora_jax._tree.plan import Plan

__all__ = ["adapter_shardings", "on_mesh"]

PlanOrTree = TypeVar("PlanOrTree")


def adapter_shardings(
    adapters: Any, params_or_shardings: Any, *, mesh: Mesh | None = None
) -> Tree:
    """The shardings of a model's adapters, by the shardings of its kernels.

    Each device holds all of an M, but of a `BlockDiagonal` the blocks that its features
    need, if the adapters know where these are (`on_mesh`). Of a stack of layers or
    experts each M is where its layer or expert is, a trained copy where its array is.

    Args:
      adapters: The adapters, or their plan.
      params_or_shardings: The base's params, or a tree of their shardings. Its leaves
        may be arrays or shapes with a `NamedSharding`, or a `NamedSharding`, or a
        `PartitionSpec`. They may also have Flax's metadata: Linen's boxes with mesh
        axes or logical names (see `nn.logical_axis_rules`), and NNX's variables.
      mesh: The devices, if the leaves do not name them.

    Returns:
      A tree like the adapters, with a `NamedSharding` instead of each array.

    Raises:
      TypeError: A leaf does not say how it is sharded.
      ValueError: A kernel lacks a leaf, or metadata lack a mesh.
    """
    found = adapters.shapes if isinstance(adapters, Plan) else adapters_in(adapters)
    for path, sharding in _shardings(found, params_or_shardings, mesh).items():
        adapter = found[path]
        if adapter.of_kernel:
            sharding = adapter_sharding(adapter.spec, sharding)
        found[path] = adapter.replace(m=sharding)
    return found.tree()


def on_mesh(
    adapters: PlanOrTree,
    params_or_shardings: Any,
    *,
    batch_axes: str | Iterable[str],
    mesh: Mesh | None = None,
) -> PlanOrTree:
    """Adapters that know where the features of their kernels are.

    Results do not depend on this. Without it, XLA may move activations or kernels where
    devices share features (tensor parallelism) or kernels (FSDP). With it, the adapter
    of a dense layer adds a sum of (q, q) for M's gradient, and nothing else; an M for
    each block of features needs none over the axis that splits these.

    Call it before the first step: a function that JAX has compiled for arrays on this
    mesh stays as it is, and goes on without what the adapters know now.

    Args:
      adapters: The adapters; or a plan, whose adapters then know it from the start.
      params_or_shardings: As in `adapter_shardings`.
      batch_axes: The mesh axes that split the rows of inputs, in the order of their
        `PartitionSpec`; () for none. A kernel that they split is gathered before use;
        what other axes split stays split.
      mesh: The devices, if the leaves do not name them.

    Returns:
      Adapters, or a plan. `save` stores no layout: call this on what `load` returns.

    Raises:
      TypeError, ValueError: As `adapter_shardings`, or the mesh lacks a batch axis.

    Warns:
      MoRAWarning: XLA may compute wrong products of rows and kernels split like this.
    """
    if not isinstance(batch_axes, Iterable):
        rule = "batch_axes must be names of mesh axes, such as 'data' or ()"
        raise TypeError(f"{rule}, got {batch_axes!r}")
    batch = (batch_axes,) if isinstance(batch_axes, str) else tuple(batch_axes)
    found = adapters.shapes if isinstance(adapters, Plan) else adapters_in(adapters)
    unsafe: dict[tuple[str, ...], str] = {}
    for path, kernel in _shardings(found.kernels, params_or_shardings, mesh).items():
        spec = found[path].spec
        for axis in batch:
            if axis not in kernel.mesh.shape:
                rule = f"batch_axes must be of the mesh's {tuple(kernel.mesh.shape)}"
                raise ValueError(f"{rule}, got {axis!r}")
        layout = KernelLayout(kernel.mesh, tuple(mesh_axes_of(kernel, spec)), batch)
        if (safe := layout.safe_batch_axes) != batch:
            unsafe[safe] = f"{'/'.join(path)} by {kernel.spec}"
        found[path] = found[path].replace(spec=dataclasses.replace(spec, layout=layout))
    for safe, example in unsafe.items():
        warn(
            "XLA may compute wrong outputs or gradients, with adapters or without. It "
            f"does if rows are split by {batch}, a kernel such as {example}, and the "
            "features of both its inputs and its outputs. Split rows by PartitionSpec"
            f"({safe}), and give batch_axes={safe}: see docs/meshes.md"
        )
    if isinstance(adapters, Plan):
        return dataclasses.replace(adapters, parts={**adapters.parts, **found.specs})
    return replace_adapters(adapters, found)


def _shardings(
    found: Found, params_or_shardings: Any, mesh: Mesh | None
) -> dict[Path, NamedSharding]:
    """{path of what is trained: the sharding of the base's array there}."""
    tree, shardings = located_leaves(params_or_shardings, "params_or_shardings"), {}
    leaves = {"/".join(path): leaf for path, leaf in tree.items()}
    for path, spec in found.specs.items():
        name, kind, shape = "/".join(path), "array", spec.shape
        if isinstance(spec, AdapterSpec):
            kind, shape = "kernel", spec.kernel_shape
        if name not in leaves:
            near = nearest_paths(name, leaves)
            raise ValueError(f"params_or_shardings lack the {kind} {name!r}{near}")
        placed, axes = _read_sharding(leaves[name], name)
        if (devices := placed or mesh) is None:
            raise ValueError(f"mesh must be given: {name} has names of axes alone")
        try:
            shardings[path] = NamedSharding(devices, PartitionSpec(*axes))
            shardings[path].shard_shape(shape)
        except Exception as error:  # some of JAX's errors are not ValueErrors
            rule = f"{name} must be split evenly by axes of the mesh, each used once"
            raise ValueError(f"{rule}: {error}") from error
    return shardings


def _read_sharding(leaf: Any, name: str) -> tuple[Any, PartitionSpec]:
    """The mesh and the mesh axes that a leaf names: where it is, or is to be."""
    # Linen's `unbox` would constrain what is in the box, which may be a mere shape.
    value = leaf.value if isinstance(leaf, nn.Partitioned) else unboxed(leaf)
    placed = getattr(value, "sharding", value)
    if isinstance(placed, NamedSharding):
        return placed.mesh, placed.spec
    axes = mesh = None
    if isinstance(leaf, nnx.Variable):
        axes, mesh = nnx.spmd.get_var_pspec(leaf), leaf.get_metadata().get("mesh")
    elif isinstance(leaf, nn.Partitioned):
        axes, mesh = leaf.get_partition_spec(), leaf.mesh
        if isinstance(leaf, nn.LogicallyPartitioned):
            axes = logical_to_mesh_axes(tuple(axes), leaf.rules or None)
    if isinstance(value, PartitionSpec):
        axes = value
    if axes is None:
        kind = type(leaf).__name__
        raise TypeError(f"{name} must have a NamedSharding or mesh axes, got {kind}")
    return mesh, axes


def adapter_sharding(spec: AdapterSpec, kernel: NamedSharding) -> NamedSharding:
    """The sharding of an M by the sharding of its kernel; see `adapter_shardings`."""
    of_kernel, layout = mesh_axes_of(kernel, spec), spec.layout
    stack = [axes or None for axes in sizes(of_kernel, spec.axes, "s")]
    features = layout and layout.for_activations(spec.axes, spec.kernel_shape)
    own = OnMesh(spec.operator, features).m_spec if features else ()
    own = [*own, *[None] * len(spec.operator.m_shape)][: len(spec.operator.m_shape)]
    return NamedSharding(kernel.mesh, PartitionSpec(*stack, *own))


def mesh_axes_of(kernel: NamedSharding, spec: AdapterSpec) -> list[tuple[str, ...]]:
    """The mesh axes that split each axis of the kernel."""
    entries = [mesh_axes(entry) for entry in kernel.spec]
    return [*entries, *[()] * (len(spec.axes) - len(entries))]
