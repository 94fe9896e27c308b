"""Slash-joined paths, which say where a leaf is in a tree."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.core.meta import AxisMetadata

from mora_jax._common.checks import check_kernel
from mora_jax._common.suggestions import lacking
from mora_jax._common.types import Path
from mora_jax._layer.slots import Selected, Slots
from mora_jax._plan.spec import SUFFIX, AdapterSpec, check_same
from mora_jax._tree.start import check_adapter


def located_leaves(tree: Any, what: str = "params") -> dict[Path, Any]:
    """{path: leaf} of a tree, whose arrays stay in their boxes.

    Args:
      tree: Any pytree, which may be an `nnx.State`.
      what: What error messages call the tree.

    Raises:
      TypeError: The tree is a model, or something that holds nothing under a name.
      ValueError: Two leaves have the same path.
    """
    leaves: dict[Path, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_end)[0]:
        path = tuple(key_name(key) for key in keys)
        refuse_model(leaf, what)
        if not path:
            raise TypeError(f"{what} must be a tree of arrays, got {_kind(leaf)}")
        if path in leaves:
            raise ValueError(f"{what} has two leaves of the path {'/'.join(path)!r}")
        leaves[path] = leaf
    return leaves


def named_leaves(params: Any) -> dict[str, tuple[Path, Any]]:
    """{slash-joined path: (path, leaf)} of a tree of arrays or shapes, unboxed."""
    leaves: dict[str, tuple[Path, Any]] = {}
    for path, leaf in located_leaves(params).items():
        name, leaf = "/".join(path), unboxed(leaf)
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"params must hold arrays only, got {type(leaf).__name__} at {name!r}"
            )
        if name in leaves:
            raise ValueError(f"params has two leaves of the path {name!r}")
        leaves[name] = path, leaf
    if not leaves:
        raise ValueError("params holds no array")
    return leaves


def find_kernel(
    leaves: Mapping[str, tuple[Path, Any]], spec: AdapterSpec
) -> tuple[Path, Any]:
    """The path and the array of the kernel that `spec` adapts, checked.

    Args:
      leaves: The leaves of the params, as `named_leaves` gives them.
      spec: The adapter.

    Raises:
      TypeError: The kernel is not a floating-point array.
      ValueError: There is no such kernel (a quantized kernel is several arrays, below
        its path), or it has another shape.
    """
    name = spec.name
    if name in leaves:
        path, kernel = leaves[name]
        check_kernel(kernel, name)
        if tuple(kernel.shape) != spec.kernel_shape:
            raise ValueError(
                f"{name} must have shape {spec.kernel_shape}, got {kernel.shape}"
            )
        return path, kernel
    raise ValueError(f"params lack the kernel {name!r}{lacking(name, leaves)}")


def refuse_variables(params: Any, what: str = "params") -> None:
    """Raise if `params`, the argument `what`, are all variables of a Linen model."""
    if isinstance(params, Mapping) and isinstance(params.get("params"), Mapping):
        if not isinstance(params, nnx.State):  # a model may have an attribute `params`
            raise ValueError(
                f"{what} must not hold 'params' at its top, got {sorted(params)}: "
                "pass variables['params'], not all variables"
            )


def replace_leaves(tree: Any, new: Mapping[Path, Any]) -> Any:
    """`tree` with the values of `new` at their paths, in the boxes that are there."""

    def replace(keys: Any, leaf: Any) -> Any:
        path = tuple(key_name(key) for key in keys)
        return reboxed(leaf, new[path]) if path in new else leaf

    return jax.tree_util.tree_map_with_path(replace, tree, is_leaf=is_boxed)


def key_name(key: Any) -> str:
    """The name of a pytree key in a path."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def is_boxed(leaf: Any) -> bool:
    """Whether `leaf` is an array in a box: Linen's metadata, or an NNX variable.

    A variable that holds a structure, such as a quantized kernel, is not a box: the
    parts of the structure are leaves themselves. But M's for rows count as one array.
    """
    if isinstance(leaf, nnx.Variable):
        inside = jax.tree.structure(leaf).children()
        if len(inside) != 1:
            return False
        kind = inside[0].node_data()
        one = jax.tree_util.treedef_is_leaf(inside[0])
        return one or (kind is not None and kind[0] is Selected)
    return isinstance(leaf, AxisMetadata)


def unboxed(leaf: Any) -> Any:
    """The array in `leaf`, if that is a box; otherwise `leaf` itself."""
    if not is_boxed(leaf):
        return leaf
    # A variable's attribute had several names in Flax's versions; its leaf has none.
    if not isinstance(leaf, nnx.Variable):
        return leaf.unbox()
    return jax.tree.leaves(leaf, is_leaf=lambda node: isinstance(node, Selected))[0]


def reboxed(box: Any, value: Any) -> Any:
    """`value` in a box like `box`, if that is a box; otherwise `value` itself."""
    if not is_boxed(box):
        return value
    is_variable = isinstance(box, nnx.Variable)
    return box.replace(value) if is_variable else box.replace_boxed(value)


def adapter_of(box: Any, spec: AdapterSpec, by_row: bool = False) -> Any:
    """The M that `box` holds or is, checked against `spec`.

    A variable of an NNX model knows the adapter that its M was made for, whose delta
    must be that of `spec`.

    Args:
      box: The M, perhaps in a box.
      spec: The adapter.
      by_row: Whether each row of a batch may have an M of its own.
    """
    m = unboxed(box)
    if isinstance(m, Slots):
        raise TypeError(
            f"{spec.name}{SUFFIX} must be an M, got those of {m.number} slots: say "
            "which row of the batch has which, by serving.select(stacked, index)"
        )
    if isinstance(m, Selected) and not by_row:
        raise TypeError(
            f"{spec.name}{SUFFIX} must be an M, got one for each row of a batch, which "
            "only linen.wrap and nnx.set_adapters take"
        )
    check_adapter(m, spec)
    made_for = getattr(box, "spec", None)
    if isinstance(made_for, AdapterSpec):
        stack = tuple(m.shape[: m.ndim - len(made_for.shape)])
        check_same(made_for.stacked(stack, spec.path), spec)
    return m


def _is_end(node: Any) -> bool:
    return is_boxed(node) or isinstance(node, nnx.Module | Slots | Selected)


def refuse_model(leaf: Any, what: str) -> None:
    """Raise if `leaf` is a whole model: NNX's models are pytrees as well."""
    if isinstance(leaf, nnx.Module):
        hint = "its params are nnx.state(model, nnx.Param)"
        if what == "adapters":
            hint = "its adapters are nnx.state(model, MoRAParam)"
        hint += "; mora_jax.nnx's plan, wrap and merge_adapters take models"
    elif isinstance(leaf, nn.Module):
        hint = "its params are model.init(...)['params']"
        hint += "; mora_jax.linen's plan and wrap take models"
    else:
        return
    raise TypeError(
        f"{what} must be a tree of arrays, got the model {type(leaf).__name__}: {hint}"
    )


def _kind(leaf: Any) -> str:
    if hasattr(leaf, "shape"):
        return f"an array of shape {tuple(leaf.shape)} without a name"
    return type(leaf).__name__


def adapter_path(spec: AdapterSpec) -> Path:
    """The path of M, in the adapters and in a combined tree."""
    return (*spec.path[:-1], spec.path[-1] + SUFFIX)
