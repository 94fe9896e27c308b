"""Leaves of trees: by their paths, out of Flax's boxes, and those that are traced."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.core.meta import AxisMetadata

from mora_jax._common.types import Path

WHOLE: tuple[type, ...] = (nnx.Module,)
"""The pytrees that are leaves here; JAX would take what is in them for arrays."""

REFUSED = {  # class that cannot stand for a tree of arrays: what to give instead
    nnx.Module: "the model {}: its params are nnx.state(model, nnx.Param)",
    nn.Module: "the model {}: its params are model.init(...)['params']",
}


def refuse_model(leaf: Any, what: str) -> None:
    """Raise if `leaf` is a model, or something else that is `REFUSED`."""
    for kind, why in REFUSED.items():
        if isinstance(leaf, kind):
            got = why.format(type(leaf).__name__)
            raise TypeError(f"{what} must be a tree of arrays, got {got}")


def refuse_variables(params: Any, what: str = "params") -> None:
    """Raise if `params`, the argument `what`, are all variables of a Linen model."""
    if isinstance(params, Mapping) and isinstance(params.get("params"), Mapping):
        if not isinstance(params, nnx.State):  # a model may have an attribute `params`
            rule = f"{what} must not hold 'params' at its top, got {sorted(params)}"
            raise ValueError(f"{rule}: pass variables['params'], not all variables")


def located_leaves(tree: Any, what: str = "params") -> dict[Path, Any]:
    """{path: leaf} of any pytree but a model; arrays stay in their boxes."""
    leaves: dict[Path, Any] = {}
    names: set[str] = set()  # a key may hold a slash, and leaves go by joined paths
    try:
        found = jax.tree.leaves_with_path(tree, is_leaf=is_end)
    except ValueError as error:  # of keys that cannot be sorted
        raise ValueError(
            f"{what} must be a tree of dicts with keys of one type each: {error}"
        ) from error
    for keys, leaf in found:
        path = path_of(keys)
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


def replace_leaves(
    tree: Any, new: Mapping[Path, Any], put: Callable[[Any, Any], Any] | None = None
) -> Any:
    """`tree` with values at their paths, each `put(box, value)` into its box there."""

    def replace(keys: Any, leaf: Any) -> Any:
        path = path_of(keys)
        return (put or reboxed)(leaf, new[path]) if path in new else leaf

    return jax.tree.map_with_path(replace, tree, is_leaf=is_end)


def is_end(node: Any) -> bool:
    """True where a tree is taken as a whole: at a box, and what counts as a leaf."""
    may_be_box = isinstance(node, nnx.Variable | AxisMetadata)  # as few are
    return is_boxed(node) if may_be_box else isinstance(node, WHOLE)


def path_of(keys: Any) -> Path:
    """The path of a pytree's keys."""
    return tuple([jax.tree_util.keystr((key,), simple=True) for key in keys])


def is_boxed(leaf: Any) -> bool:
    """True for an array in a box: Linen's metadata, or an NNX variable."""
    if not isinstance(leaf, nnx.Variable):
        return isinstance(leaf, AxisMetadata)
    # A variable that holds a structure, such as a quantized kernel, is not a box: the
    # parts of the structure are leaves themselves.
    return jax.tree_util.all_leaves([leaf.get_raw_value()])


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


def split_static(args: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """JAX's arrays and shapes among arguments, and a function that replaces them."""
    # NumPy's stay what they are: code may compute with their numbers.
    leaves, structure = jax.tree.flatten(args)
    traced = [isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) for leaf in leaves]

    def join(arrays: list[Any]) -> Any:
        new, pairs = iter(arrays), zip(leaves, traced, strict=True)
        values = [next(new) if is_array else leaf for leaf, is_array in pairs]
        return jax.tree.unflatten(structure, values)

    return list(itertools.compress(leaves, traced)), join
