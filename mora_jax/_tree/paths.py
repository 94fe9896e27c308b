"""Leaves of trees by their paths: arrays of a base, and adapters."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import nnx
from flax.traverse_util import unflatten_dict

from mora_jax._common import trees
from mora_jax._common.checks import LEAVE_OUT, check_leaf
from mora_jax._common.suggestions import lacking
from mora_jax._common.trees import is_boxed as is_boxed
from mora_jax._common.trees import is_end as is_end
from mora_jax._common.trees import key_name as key_name
from mora_jax._common.trees import refuse_variables as refuse_variables
from mora_jax._common.trees import replace_leaves as replace_leaves
from mora_jax._common.trees import unboxed as unboxed
from mora_jax._common.types import Path
from mora_jax._layer.adapter import Adapter, check_adapter
from mora_jax._layer.per_row import Selected
from mora_jax._plan.spec import SUFFIX, AdapterSpec, Spec

Tree = dict[str, Any]


class NoTree:
    """A pytree that is no tree of arrays of a model; `instead` says which is."""

    instead: ClassVar[str]


trees.count_whole(Adapter, NoTree, Selected)


def nest(items: Mapping[Path, Any]) -> Tree:
    """{path: leaf} as nested dicts."""
    return unflatten_dict(items)


def located_leaves(tree: Any, what: str = "params") -> dict[Path, Any]:
    """{path: leaf} of any pytree but a model; arrays stay in boxes and adapters."""
    return trees.located_leaves(tree, what, refuse_model)


def named_leaves(tree: Any, what: str = "params") -> dict[str, tuple[Path, Any]]:
    """{slash-joined path: (path, leaf)} of a tree of arrays or shapes, unboxed."""
    leaves: dict[str, tuple[Path, Any]] = {}
    for path, leaf in located_leaves(tree, what).items():
        name, leaf = "/".join(path), unboxed(leaf)
        if isinstance(leaf, Adapter):
            rule = "give the base alone, as split(params)[0]"
            raise ValueError(f"{what} hold the adapter {name}: {rule}")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"{what} must hold arrays only, got {type(leaf).__name__} at {name!r}"
            )
        leaves[name] = path, leaf
    if not leaves:
        raise ValueError(f"{what} holds no array")
    return leaves


def adapters_in(tree: Any, *, by_row: bool = False) -> dict[Path, Adapter]:
    """{path of its array in the base: adapter} of a tree of adapters, checked.

    These may be variables of NNX that hold M's. With `by_row` each row of a batch may
    have an M.
    """
    found: dict[Path, Adapter] = {}
    for place, leaf in located_leaves(tree, "adapters").items():
        name, adapter = "/".join(place), adapter_of(leaf)
        if adapter is None:
            raise TypeError(
                f"adapters must hold adapters, got {type(leaf).__name__} at {name!r}: "
                "plan.adapters(tree) makes them of plain arrays; are params swapped?"
            )
        adapter = check_adapter(name, adapter, by_row)
        path = (*place[:-1], place[-1].removesuffix(SUFFIX))
        if place != place_of(path, adapter.spec):
            raise ValueError(
                f"adapters hold one of a kernel at {name!r}: its name must end with "
                f"{SUFFIX!r}"
            )
        found[path] = adapter
    if not found:
        raise ValueError("adapters hold no adapter")
    return found


def adapter_of(leaf: Any) -> Adapter | None:
    """The adapter that a leaf is, or that a variable of NNX holds; None for others."""
    if isinstance(leaf, Adapter):
        return leaf
    spec = getattr(leaf, "spec", None) if isinstance(leaf, nnx.Variable) else None
    return None if spec is None else Adapter(unboxed(leaf), spec)


def kernels_in(adapters: Any, *, by_row: bool = False) -> dict[Path, Adapter]:
    """The adapters of kernels among `adapters_in`."""
    found = adapters_in(adapters, by_row=by_row).items()
    return {p: a for p, a in found if isinstance(a.spec, AdapterSpec)}


def trained_in(adapters: Any) -> dict[Path, Adapter]:
    """The arrays that train themselves among `adapters_in`."""
    found = adapters_in(adapters, by_row=True).items()
    return {p: a for p, a in found if not isinstance(a.spec, AdapterSpec)}


def place_of(path: Path, spec: Spec) -> Path:
    """The path in a tree of adapters of what belongs to the base's array at `path`."""
    is_kernel = isinstance(spec, AdapterSpec)
    return (*path[:-1], path[-1] + SUFFIX) if is_kernel else path


def find_array(
    leaves: Mapping[str, tuple[Path, Any]], path: Path, spec: Spec
) -> tuple[Path, Any]:
    """The path and the array of the base that a trained array belongs to, checked."""
    name = "/".join(path)
    if isinstance(spec, AdapterSpec):
        what, shape, otherwise = f"the kernel {name!r}", spec.kernel_shape, LEAVE_OUT
    else:
        what, shape, otherwise = f"{name!r}, which is trained itself", spec.shape, ""
    if name not in leaves:  # or it is quantized: several arrays, below its path
        raise ValueError(f"params lack {what}{lacking(name, leaves)}")
    path, leaf = leaves[name]
    check_leaf(leaf, f"{name} in params", shape, otherwise)
    return path, leaf


def replace_adapters(tree: Any, new: Mapping[Path, Adapter]) -> Any:
    """A tree of adapters with others, by the paths of their arrays in the base."""
    return put_adapters(tree, {place_of(p, a.spec): a for p, a in new.items()})


def put_adapters(tree: Any, new: Mapping[Path, Adapter]) -> Any:
    """A tree with adapters at some paths of leaves."""

    def put(keys: Any, leaf: Any) -> Any:
        path = tuple(map(key_name, keys))
        return reboxed(leaf, new[path]) if path in new else leaf

    return jax.tree.map_with_path(put, tree, is_leaf=is_end)


def reboxed(box: Any, value: Any) -> Any:
    """`value`, an array or an adapter, where `box` is: in a variable, or as a node."""
    if isinstance(box, Adapter) and not isinstance(value, Adapter):
        return box.replace(m=value)
    if not isinstance(value, Adapter):
        return trees.reboxed(box, value)
    if isinstance(box, nnx.Variable):
        return box.replace(value.m, spec=value.spec)
    return value  # Linen's metadata are of arrays


def refuse_model(leaf: Any, what: str) -> None:
    """Raise if `leaf` is a model or a plan, which may be pytrees as well."""
    if isinstance(leaf, NoTree):
        kind = type(leaf).__name__
        told = f"{what} must be a tree of arrays, got the {kind}"
        raise TypeError(f"{told}: {leaf.instead}")
    hint = "; mora_jax.linen's plan and wrap take models"
    if isinstance(leaf, nnx.Module):
        hint = ", and its adapters nnx.state(model, MoRAParam); mora_jax.nnx's plan, "
        hint += "wrap and merge_adapters take models"
    trees.refuse_model(leaf, what, hint)
