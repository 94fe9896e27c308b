"""Adapters on a mesh of devices: their shardings follow from the base's."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.core import spmd
from flax.linen.spmd import logical_to_mesh_axes
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mora_jax._adapters import Tree, nest
from mora_jax._mesh.layout import KernelLayout, mesh_axes
from mora_jax._paths import Path, adapter_path, is_boxed, key_name, nearest
from mora_jax._plan import Plan
from mora_jax._spec import AdapterSpec
from mora_jax._types import Shape


def adapter_shardings(
    plan: Plan,
    params_or_shardings: Any,
    *,
    mesh: Mesh | None = None,
    square: tuple[str | None, str | None] = (None, None),
) -> Tree:
    """How to lay out the adapters of a model whose kernels are laid out so.

    Each device holds all of an M, but for the layers and experts of a stacked kernel:
    those are where their kernels are.

    Args:
      plan: the adapters.
      params_or_shardings: the base's params, or the same tree of shardings: arrays or
        shapes with a `NamedSharding`, `NamedSharding`s, `PartitionSpec`s, or Flax's
        metadata: boxes of Linen with mesh axes or logical names, whose rules are those
        of `nn.logical_axis_rules`, or the state of an NNX model.
      mesh: the devices, where leaves do not say.
      square: mesh axes that split the two axes of M, which then is gathered in each
        step; none by default, since M is small.

    Returns:
      A tree of `NamedSharding`s as `init` makes one of M's, for `jax.device_put`, the
      `out_shardings` of `jax.jit`, or a checkpoint's target.

    Raises:
      TypeError: a leaf that says nothing of a sharding.
      ValueError: no leaf for a kernel, metadata without a mesh, or `square` with axes
        that do not divide q.

    Example::

      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> from mora_jax import init, plan, sharding
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> mesh = jax.make_mesh((1,), ("model",))
      >>> shardings = {"fc": {"kernel": PartitionSpec(None, "model")}}
      >>> layers = plan(params)
      >>> found = sharding.adapter_shardings(layers, shardings, mesh=mesh)
      >>> found["fc"]["kernel_mora"].is_fully_replicated
      True
      >>> adapters = jax.device_put(init(layers), found)
    """
    found: dict[Path, NamedSharding] = {}
    for spec, base in _kernel_shardings(plan, params_or_shardings, mesh):
        found[adapter_path(spec)] = adapter_sharding(spec, base, square)
    return nest(found)


def adapter_sharding(
    spec: AdapterSpec,
    kernel: NamedSharding,
    square: tuple[str | None, str | None] = (None, None),
) -> NamedSharding:
    """The sharding of one M by that of its kernel, see `adapter_shardings`."""
    axes = zip(spec.axes, _entries(kernel, spec), strict=True)
    stack = [entry or None for letter, entry in axes if letter == "s"]
    name = f"square, with q of {spec.operator.square_rank},"
    return _named_sharding(kernel.mesh, [*stack, *square], spec.shape, name)


def plan_on_mesh(
    plan: Plan,
    params_or_shardings: Any,
    *,
    batch_axes: str | Iterable[str],
    mesh: Mesh | None = None,
) -> Plan:
    """A plan that knows where the features of each kernel are.

    Without it results are the same; but where devices share features (tensor
    parallelism), or an update is folded into a kernel that they share (FSDP), XLA's
    partitioner would move activations or kernels about for the adapters. With it, an
    adapter adds sums of (q, q) for M's gradient and, except for block operators, of
    (rows, q).

    Args:
      plan: the adapters, as `plan`, `linen.plan` or `nnx.plan` make it.
      params_or_shardings: as of `adapter_shardings`.
      batch_axes: mesh axes that split the rows of inputs, () for none. A kernel that
        these split is gathered before it is used; where others do, features stay split.
      mesh: as of `adapter_shardings`.

    Returns:
      A plan for `linen.wrap`, `nnx.wrap` and `merge`. Files know nothing of it: what
      `load` gives is for one device until it is sharded again.

    Raises:
      TypeError, ValueError: as `adapter_shardings`; batch axes that the mesh has not.

    Example::

      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec
      >>> from mora_jax import plan, sharding
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
      >>> shardings = {"fc": {"kernel": PartitionSpec("data", "model")}}
      >>> layers = sharding.plan_on_mesh(
      ...     plan(params), shardings, batch_axes="data", mesh=mesh)
      >>> layers["fc/kernel"].layout.mesh_axes
      (('model',), ('data',))
    """
    batch = (batch_axes,) if isinstance(batch_axes, str) else tuple(batch_axes)
    specs = []
    for spec, base in _kernel_shardings(plan, params_or_shardings, mesh):
        for axis in batch:
            if axis not in base.mesh.shape:
                raise ValueError(
                    f"batch_axes must be of the mesh's {tuple(base.mesh.shape)}, "
                    f"got {axis!r}"
                )
        axes = tuple(reversed(_entries(base, spec)))
        layout = KernelLayout(base.mesh, axes, batch)
        specs.append(dataclasses.replace(spec, layout=layout))
    return dataclasses.replace(plan, specs=tuple(specs))


def _entries(base: NamedSharding, spec: AdapterSpec) -> list[tuple[str, ...]]:
    """The mesh axes that split each axis of the kernel."""
    entries = [mesh_axes(entry) for entry in base.spec]
    return [*entries, *[()] * (len(spec.axes) - len(entries))]


def _kernel_shardings(
    plan: Plan, tree: Any, mesh: Mesh | None
) -> list[tuple[AdapterSpec, NamedSharding]]:
    """Each spec of `plan` with its kernel's sharding."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, got {type(plan).__name__}")
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)
    leaves = {"/".join(map(key_name, keys)): leaf for keys, leaf in flat}
    found = []
    for spec in plan.specs:
        if spec.name not in leaves:
            raise ValueError(
                f"params_or_shardings lack the kernel {spec.name!r}"
                + nearest(spec.name, leaves)
            )
        devices, axes = _read_sharding(leaves[spec.name], mesh, spec.name)
        if devices is None:
            raise ValueError(f"mesh must be given: {spec.name} has names of axes alone")
        sharding = _named_sharding(devices, axes, spec.kernel_shape, spec.name)
        found.append((spec, sharding))
    return found


def _is_leaf(node: Any) -> bool:
    return is_boxed(node) or isinstance(node, PartitionSpec | nnx.Variable)


def _read_sharding(
    leaf: Any, mesh: Mesh | None, name: str
) -> tuple[Mesh | AbstractMesh | None, PartitionSpec]:
    """The mesh and the axes of it that a leaf tells: where it is, or is wanted."""
    value, names = leaf, None
    if isinstance(leaf, nnx.Variable):
        (value,) = jax.tree.leaves(leaf)
        names = nnx.spmd.get_var_pspec(leaf)
        mesh = leaf.get_metadata().get("mesh") or mesh
    elif is_boxed(leaf):
        value, names, mesh = _unbox(leaf, mesh)
    placed = getattr(value, "sharding", value)
    if isinstance(placed, NamedSharding):
        return placed.mesh, placed.spec
    if isinstance(value, PartitionSpec):
        names = value
    if names is None:
        raise TypeError(
            f"{name} must have a NamedSharding or say which mesh axes split it, "
            f"got {type(leaf).__name__} without"
        )
    return mesh, names


def _named_sharding(mesh: Any, axes: Any, shape: Shape, name: str) -> NamedSharding:
    """A sharding of an array of `shape`; `name` is for messages."""
    try:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        sharding.shard_shape(shape)
    except Exception as error:  # not all of JAX's are ValueErrors
        raise ValueError(
            f"{name} must be split evenly by axes of the mesh, each used once: {error}"
        ) from error
    return sharding


def _unbox(
    box: Any, mesh: Mesh | None
) -> tuple[Any, PartitionSpec | None, Mesh | None]:
    """Value, mesh axes and mesh of one of Linen's boxes."""
    if not isinstance(box, nn.Partitioned):
        return box.unbox(), None, mesh
    names = box.get_partition_spec()
    if isinstance(box, nn.LogicallyPartitioned):
        rules = box.rules or spmd.get_logical_axis_rules()
        names = logical_to_mesh_axes(tuple(names), rules)
    return box.value, names, box.mesh or mesh
