"""Adapters on a mesh of devices, whose shardings follow from those of the base."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.core import spmd
from flax.linen.spmd import logical_to_mesh_axes
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mora_jax._common.suggestions import nearest_paths
from mora_jax._common.types import Path, Shape
from mora_jax._mesh.layout import KernelLayout, mesh_axes
from mora_jax._plan.plan import Plan, check_plan
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree.adapters import Tree, nest
from mora_jax._tree.paths import adapter_path, is_boxed, key_name


def adapter_shardings(
    plan: Plan,
    params_or_shardings: Any,
    *,
    mesh: Mesh | None = None,
    square: tuple[str | None, str | None] = (None, None),
) -> Tree:
    """The shardings of a model's adapters, by those of its kernels.

    Each device holds all of an M. If a kernel is a stack of layers or experts, each M
    of the stack is on the devices that hold its layer or expert. The copy of an array
    that trains itself is where the base's array is.

    Args:
      plan: The plan of the adapters.
      params_or_shardings: The base's params, or a tree of shardings in their place. Its
        leaves may be arrays or shapes with a `NamedSharding`, or a `NamedSharding`, or
        a `PartitionSpec`. They may also have Flax's metadata: Linen's boxes with mesh
        axes, or with logical names for which `nn.logical_axis_rules` holds the rules,
        and the variables in the state of an NNX model.
      mesh: The devices, if the leaves do not name them.
      square: The mesh axes that split the last two axes of M, which is then gathered in
        each step. There are none by default, since M is small.

    Returns:
      A tree of `NamedSharding`s in place of the M's that `init` makes, for
      `jax.device_put`, the `out_shardings` of `jax.jit`, or a checkpoint's target.

    Raises:
      TypeError: A leaf does not say how it is sharded.
      ValueError: A kernel has no leaf, metadata has no mesh, or `square` names axes
        that do not divide q.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> mesh = jax.make_mesh((1,), ("model",))
      >>> shardings = {"fc": {"kernel": PartitionSpec(None, "model")}}
      >>> plan = mora_jax.plan(params)
      >>> found = mora_jax.sharding.adapter_shardings(plan, shardings, mesh=mesh)
      >>> found["fc"]["kernel_mora"].is_fully_replicated
      True
      >>> adapters = jax.device_put(mora_jax.init(plan), found)
    """
    found: dict[Path, NamedSharding] = {}
    for spec, base in _kernel_shardings(plan, params_or_shardings, mesh):
        found[adapter_path(spec)] = adapter_sharding(spec, base, square)
    if plan.trained:
        leaves = _leaves(params_or_shardings)
        for one in plan.trained:
            found[one.path] = _sharding_of(leaves, "array", one.name, one.shape, mesh)
    return nest(found)


def adapter_sharding(
    spec: AdapterSpec,
    kernel: NamedSharding,
    square: tuple[str | None, str | None] = (None, None),
) -> NamedSharding:
    """The sharding of an M by that of its kernel; see `adapter_shardings`."""
    axes = zip(spec.axes, _entries(kernel, spec), strict=True)
    stack = [entry or None for letter, entry in axes if letter == "s"]
    squares = [None] * (len(spec.shape) - len(spec.stack_shape) - 2)
    name = f"square, with q of {spec.operator.square_rank},"
    axes = [*stack, *squares, *square]
    return _named_sharding(kernel.mesh, axes, spec.shape, name)


def plan_on_mesh(
    plan: Plan,
    params_or_shardings: Any,
    *,
    batch_axes: str | Iterable[str],
    mesh: Mesh | None = None,
) -> Plan:
    """A plan that knows where the features of each kernel are.

    Results do not depend on this. Without it, XLA may insert further collectives for
    the adapters, of activations or kernels, where devices share features (tensor
    parallelism) or kernels (FSDP). With it, the adapter of a dense layer adds a sum of
    (q, q) for M's gradient, and nothing else.

    Args:
      plan: The plan of the adapters, as `plan`, `linen.plan` or `nnx.plan` makes it.
      params_or_shardings: The base's params or their shardings, as in
        `adapter_shardings`.
      batch_axes: The mesh axes that split the rows of inputs; () for none. A kernel
        that these axes split is gathered before it is used. Features that other axes
        split stay split.
      mesh: The devices, if the leaves do not name them.

    Returns:
      A plan for `linen.wrap`, `nnx.wrap` and `merge`. `save` does not store the layout,
      so a plan that `load` returns needs this function again.

    Raises:
      TypeError: As `adapter_shardings`.
      ValueError: As `adapter_shardings`, or the mesh does not have a batch axis.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> from jax.sharding import PartitionSpec
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
      >>> shardings = {"fc": {"kernel": PartitionSpec("data", "model")}}
      >>> plan = mora_jax.sharding.plan_on_mesh(
      ...     mora_jax.plan(params), shardings, batch_axes="data", mesh=mesh)
      >>> plan["fc/kernel"].layout.mesh_axes
      (('model',), ('data',))
    """
    if not isinstance(batch_axes, Iterable):
        raise TypeError(
            "batch_axes must be names of mesh axes, such as 'data' or (), got "
            f"{batch_axes!r}"
        )
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
    check_plan(plan)
    leaves = _leaves(tree)
    return [
        (spec, _sharding_of(leaves, "kernel", spec.name, spec.kernel_shape, mesh))
        for spec in plan.specs
    ]


def _leaves(tree: Any) -> dict[str, Any]:
    """{path: leaf} of a tree that says how its leaves are sharded."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)
    return {"/".join(map(key_name, keys)): leaf for keys, leaf in flat}


def _sharding_of(
    leaves: Mapping[str, Any], kind: str, name: str, shape: Shape, mesh: Mesh | None
) -> NamedSharding:
    """The sharding of the base's array of that name; `kind` is for the message."""
    if name not in leaves:
        raise ValueError(
            f"params_or_shardings lack the {kind} {name!r}{nearest_paths(name, leaves)}"
        )
    devices, axes = _read_sharding(leaves[name], mesh, name)
    if devices is None:
        raise ValueError(f"mesh must be given: {name} has names of axes alone")
    return _named_sharding(devices, axes, shape, name)


def _is_leaf(node: Any) -> bool:
    return is_boxed(node) or isinstance(node, PartitionSpec | nnx.Variable)


def _read_sharding(
    leaf: Any, mesh: Mesh | None, name: str
) -> tuple[Mesh | AbstractMesh | None, PartitionSpec]:
    """The mesh and the mesh axes that a leaf names: where it is, or is to be."""
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
    """The sharding of an array of `shape`; `name` is for error messages."""
    try:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        sharding.shard_shape(shape)
    except Exception as error:  # some of JAX's errors are not ValueErrors
        raise ValueError(
            f"{name} must be split evenly by axes of the mesh, each used once: {error}"
        ) from error
    return sharding


def _unbox(
    box: Any, mesh: Mesh | None
) -> tuple[Any, PartitionSpec | None, Mesh | None]:
    """The value, the mesh axes and the mesh in a box of Linen."""
    if not isinstance(box, nn.Partitioned):
        return box.unbox(), None, mesh
    names = box.get_partition_spec()
    if isinstance(box, nn.LogicallyPartitioned):
        rules = box.rules or spmd.get_logical_axis_rules()
        names = logical_to_mesh_axes(tuple(names), rules)
    return box.value, names, box.mesh or mesh
