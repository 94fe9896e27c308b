"""Leaves of trees by their paths, out of their boxes and into them again."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
from flax import nnx
from flax.core.meta import AxisMetadata
from flax.traverse_util import unflatten_dict

from mora_jax._common.checks import LEAVE_OUT, check_leaf
from mora_jax._common.suggestions import lacking
from mora_jax._common.types import Path
from mora_jax._layer.adapter import Adapter, check_adapter
from mora_jax._layer.slots import Selected
from mora_jax._plan.spec import SUFFIX, AdapterSpec, Spec

Tree = dict[str, Any]


class NoTree:
    """A pytree that is no tree of arrays of a model; `instead` says which is."""

    instead: ClassVar[str]


def nest(items: Mapping[Path, Any]) -> Tree:
    """{path: leaf} as nested dicts."""
    return unflatten_dict(items)


def located_leaves(tree: Any, what: str = "params") -> dict[Path, Any]:
    """{path: leaf} of any pytree but a model; arrays stay in boxes and adapters."""

    def is_leaf(node: Any) -> bool:
        # JAX would go on into these, and take what is in them for arrays.
        return is_end(node) or isinstance(node, nnx.Module | NoTree)

    leaves: dict[Path, Any] = {}
    names: set[str] = set()  # a key may hold a slash, and plans go by joined paths
    for keys, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_leaf):
        path = tuple(map(key_name, keys))
        refuse_model(leaf, what)
        if not path:
            kind = type(leaf).__name__
            if hasattr(leaf, "shape"):
                kind = f"an array of shape {tuple(leaf.shape)} without a name"
            raise TypeError(f"{what} must be a tree of arrays, got {kind}")
        if (name := "/".join(path)) in names:
            raise ValueError(f"{what} must not have two leaves of the path {name!r}")
        names.add(name)
        leaves[path] = leaf
    return leaves


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
                "plan.adapters(tree) makes them of plain arrays, and params come first"
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
        path = tuple(map(key_name, keys))
        return reboxed(leaf, new[path]) if path in new else leaf

    return jax.tree.map_with_path(replace, tree, is_leaf=is_end)


def replace_adapters(tree: Any, new: Mapping[Path, Adapter]) -> Any:
    """A tree of adapters with others, by the paths of their arrays in the base."""
    return replace_leaves(tree, {place_of(p, a.spec): a for p, a in new.items()})


def is_end(node: Any) -> bool:
    """True where a tree is replaced as a whole: at a box, and at an adapter."""
    return isinstance(node, Adapter) or is_boxed(node)


def key_name(key: Any) -> str:
    """The name of a pytree key in a path."""
    return jax.tree_util.keystr((key,), simple=True)


def is_boxed(leaf: Any) -> bool:
    """True for an array in a box: Linen's metadata, or an NNX variable."""
    if not isinstance(leaf, nnx.Variable):
        return isinstance(leaf, AxisMetadata)
    # A variable that holds a structure, such as a quantized kernel, is not a box: the
    # parts of the structure are leaves themselves. But M's for rows count as one array.
    held = leaf.get_raw_value()
    return jax.tree_util.all_leaves([held]) or isinstance(held, Selected)


def unboxed(leaf: Any) -> Any:
    """The array in `leaf`, if that is a box; otherwise `leaf` itself."""
    if not is_boxed(leaf):
        return leaf
    return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf.unbox()


def reboxed(box: Any, value: Any) -> Any:
    """`value` in a box like `box`, if that is one, or an adapter; otherwise `value`."""
    if isinstance(box, Adapter) and not isinstance(value, Adapter):
        return box.replace(m=value)
    if not is_boxed(box):
        return value
    if not isinstance(box, nnx.Variable):  # metadata are of arrays
        return value if isinstance(value, Adapter) else box.replace_boxed(value)  # type: ignore[union-attr]
    if isinstance(value, Adapter):
        return box.replace(value.m, spec=value.spec)
    return box.replace(value)


def refuse_model(leaf: Any, what: str) -> None:
    """Raise if `leaf` is a model or a plan, which may be pytrees as well."""
    if isinstance(leaf, nnx.Module):
        kind = "adapters are nnx.state(model, MoRAParam)"
        kind = kind if what == "adapters" else "params are nnx.state(model, nnx.Param)"
        hint = f"its {kind}; mora_jax.nnx's plan, wrap and merge_adapters take models"
    elif isinstance(leaf, nn.Module):
        hint = "its params are model.init(...)['params']; mora_jax.linen's plan and "
        hint += "wrap take models"
    elif isinstance(leaf, NoTree):
        hint = leaf.instead
    else:
        return
    got = f"the {'' if isinstance(leaf, NoTree) else 'model '}{type(leaf).__name__}"
    raise TypeError(f"{what} must be a tree of arrays, got {got}: {hint}")
