"""Leaves of trees by their paths, out of Flax's boxes and into them again."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.core.meta import AxisMetadata

from mora_jax._common.types import Path

_WHOLE: list[type] = [nnx.Module]


def count_whole(*classes: type) -> None:
    """Count instances of these pytrees as leaves, as arrays are."""
    # JAX would go on into them, and take what is in them for arrays of the tree.
    _WHOLE.extend(classes)


def refuse_model(leaf: Any, what: str, hint: str = "") -> None:
    """Raise if `leaf` is a model, which may be a pytree; `hint` ends the message."""
    if isinstance(leaf, nnx.Module | nn.Module):
        is_nnx = isinstance(leaf, nnx.Module)
        way = "nnx.state(model, nnx.Param)" if is_nnx else "model.init(...)['params']"
        raise TypeError(
            f"{what} must be a tree of arrays, got the model {type(leaf).__name__}: "
            f"its params are {way}{hint}"
        )


def refuse_variables(params: Any, what: str = "params") -> None:
    """Raise if `params`, the argument `what`, are all variables of a Linen model."""
    if isinstance(params, Mapping) and isinstance(params.get("params"), Mapping):
        if not isinstance(params, nnx.State):  # a model may have an attribute `params`
            raise ValueError(
                f"{what} must not hold 'params' at its top, got {sorted(params)}: "
                "pass variables['params'], not all variables"
            )


def located_leaves(
    tree: Any, what: str = "params", refuse: Callable[[Any, str], None] = refuse_model
) -> dict[Path, Any]:
    """{path: leaf} of any pytree but a model; arrays stay in their boxes.

    `refuse(leaf, what)` raises for a leaf that does not belong in such a tree.
    """
    leaves: dict[Path, Any] = {}
    names: set[str] = set()  # a key may hold a slash, and leaves go by joined paths
    for keys, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_end):
        path = tuple(map(key_name, keys))
        refuse(leaf, what)
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


def replace_leaves(
    tree: Any, new: Mapping[Path, Any], put: Callable[[Any, Any], Any] | None = None
) -> Any:
    """`tree` with values at their paths, each `put(box, value)` into its box there."""

    def replace(keys: Any, leaf: Any) -> Any:
        path = tuple(map(key_name, keys))
        return (put or reboxed)(leaf, new[path]) if path in new else leaf

    return jax.tree.map_with_path(replace, tree, is_leaf=is_end)


def is_end(node: Any) -> bool:
    """True where a tree is taken as a whole: at a box, and what counts as a leaf."""
    return is_boxed(node) or isinstance(node, tuple(_WHOLE))


def key_name(key: Any) -> str:
    """The name of a pytree key in a path."""
    return jax.tree_util.keystr((key,), simple=True)


def is_boxed(leaf: Any) -> bool:
    """True for an array in a box: Linen's metadata, or an NNX variable."""
    if not isinstance(leaf, nnx.Variable):
        return isinstance(leaf, AxisMetadata)
    # A variable that holds a structure, such as a quantized kernel, is not a box: the
    # parts of the structure are leaves themselves, unless it counts as a whole.
    held = leaf.get_raw_value()
    return jax.tree_util.all_leaves([held]) or isinstance(held, tuple(_WHOLE))


def unboxed(leaf: Any) -> Any:
    """The array in `leaf`, if that is a box; otherwise `leaf` itself."""
    if not is_boxed(leaf):
        return leaf
    return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf.unbox()


def reboxed(box: Any, value: Any) -> Any:
    """`value` in a box like `box`, if that is a box; otherwise `value` itself."""
    if not is_boxed(box):
        return value
    is_variable = isinstance(box, nnx.Variable)
    return box.replace(value) if is_variable else box.replace_boxed(value)
