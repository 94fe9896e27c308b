"""Where things are in a tree: slash-joined paths."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.core.meta import AxisMetadata

from mora_jax._spec import (
    DEQUANTISE,
    SUFFIX,
    AdapterSpec,
    check_adapter,
    check_kernel,
    check_same,
)

Path = tuple[str, ...]


def located_leaves(tree: Any, what: str = "params") -> dict[Path, Any]:
    """{path: leaf} of a tree, boxes as they are.

    Args:
      tree: any pytree, an `nnx.State` too.
      what: what messages call it.

    Raises:
      TypeError: a model, or something that holds nothing under a name.
      ValueError: two leaves of one path.
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
    """Path and array of the kernel that `spec` adapts, checked.

    Args:
      leaves: as `named_leaves` gives them.
      spec: the adapter.

    Raises:
      TypeError: a kernel that is no floating-point array.
      ValueError: no such kernel, as where it is quantized and has parts, or one of
        another shape.
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


def lacking(name: str, names: Iterable[str]) -> str:
    """Why `name` may not be among the names of a model, as the end of a message."""
    parts = [other for other in names if other.startswith(f"{name}/")]
    if parts:
        return f"; they have parts of it, such as {parts[0]!r}: {DEQUANTISE}"
    if f"params/{name}" in names:
        return "; pass variables['params'], not all variables"
    return nearest(name, names)


def refuse_variables(params: Any) -> None:
    """Raise if `params` are all variables of a Linen model."""
    if isinstance(params, Mapping) and isinstance(params.get("params"), Mapping):
        if not isinstance(params, nnx.State):  # whose attribute may be called so
            raise ValueError(
                f"params must not hold 'params' at its top, got {sorted(params)}: "
                "pass variables['params'], not all variables"
            )


def replace_leaves(tree: Any, new: Mapping[Path, Any]) -> Any:
    """`tree` with other values at the paths of `new`, in the boxes that are there."""

    def replace(keys: Any, leaf: Any) -> Any:
        path = tuple(key_name(key) for key in keys)
        return reboxed(leaf, new[path]) if path in new else leaf

    return jax.tree_util.tree_map_with_path(replace, tree, is_leaf=is_boxed)


def key_name(key: Any) -> str:
    """What a pytree key is called in a path."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def is_boxed(leaf: Any) -> bool:
    """Whether `leaf` is one array in a box: Linen's for metadata, or an NNX variable.

    A variable that holds a structure, as a quantized kernel, is no box: its parts are
    leaves of their own.
    """
    if isinstance(leaf, nnx.Variable):
        inside = jax.tree.structure(leaf).children()
        return len(inside) == 1 and jax.tree_util.treedef_is_leaf(inside[0])
    return isinstance(leaf, AxisMetadata)


def unboxed(leaf: Any) -> Any:
    """The array in a box; anything else as it is."""
    if not is_boxed(leaf):
        return leaf
    # Not by an attribute, which Flax has called by several names.
    return jax.tree.leaves(leaf)[0] if isinstance(leaf, nnx.Variable) else leaf.unbox()


def reboxed(box: Any, value: Any) -> Any:
    """`value` in the box that `box` is, or as it is where that is none."""
    if not is_boxed(box):
        return value
    is_variable = isinstance(box, nnx.Variable)
    return box.replace(value) if is_variable else box.replace_boxed(value)


def adapter_of(box: Any, spec: AdapterSpec) -> Any:
    """The M that `box` holds or is, checked against `spec`.

    A variable of an NNX model says what its M was made for, which must be the same
    update as that of `spec`.
    """
    m = unboxed(box)
    check_adapter(m, spec)
    made_for = getattr(box, "spec", None)
    if isinstance(made_for, AdapterSpec):
        stack = tuple(m.shape[: m.ndim - len(made_for.shape)])
        check_same(made_for.stacked(stack, spec.path), spec)
    return m


def _is_end(node: Any) -> bool:
    return is_boxed(node) or isinstance(node, nnx.Module)


def refuse_model(leaf: Any, what: str) -> None:
    """Raise if `leaf` is a whole model: NNX's are pytrees, too."""
    if isinstance(leaf, nnx.Module):
        api, own = (
            "nnx",
            {
                "params": "its params are nnx.state(model, nnx.Param)",
                "adapters": "its adapters are nnx.state(model, MoRAParam)",
            },
        )
        takers = "plan, wrap and merge_adapters"
    elif isinstance(leaf, nn.Module):
        api, own = "linen", {"params": "its params are model.init(...)['params']"}
        takers = "plan and wrap"
    else:
        return
    raise TypeError(
        f"{what} must be a tree of arrays, got the model {type(leaf).__name__}: "
        f"{own.get(what, own['params'])}; mora_jax.{api}'s {takers} take models"
    )


def _kind(leaf: Any) -> str:
    if hasattr(leaf, "shape"):
        return f"an array of shape {tuple(leaf.shape)} without a name"
    return type(leaf).__name__


def suggestion(pattern: str, names: Iterable[str]) -> str:
    """What a pattern that matches nothing may have meant, as the end of a message."""
    names = list(names)
    group = f"(?:{pattern})" if "|" in pattern else pattern
    wider = rf"(.*/)?{group}/kernel", rf"(.*/)?{group}(/.*)?", rf".*{group}.*"
    for candidate in wider:
        try:
            matched = [name for name in names if re.fullmatch(candidate, name)]
        except re.error:  # the pattern has flags, which must come first
            break
        if matched:
            more = f" and {len(matched) - 1} more" if len(matched) > 1 else ""
            return (
                f"; patterns match whole paths: {candidate!r} would match "
                f"{matched[0]!r}{more}"
            )
    return nearest(pattern, names)


def nearest(name: str, names: Iterable[str]) -> str:
    """The names most like `name`, as the end of a message."""
    words = re.sub(r"\\?[.*+?()|\[\]^$\\]+", " ", name).strip(" /")
    depth = words.count("/") + 1
    # Runs of as many words as the name has: layers of the same kind are one candidate,
    # and a wrong word counts for more than a long way to it.
    runs: dict[str, str] = {}
    for known in names:
        parts = known.split("/")
        for end in range(len(parts), min(depth, len(parts)) - 1, -1):
            runs.setdefault("/".join(parts[max(0, end - depth) : end]), known)
    close = difflib.get_close_matches(words, runs, n=3, cutoff=0.0)
    shown = ", ".join(map(repr, dict.fromkeys(runs[run] for run in close)))
    return f"; the nearest are {shown}" if close else ""


def adapter_path(spec: AdapterSpec) -> Path:
    """Where M lives, in the adapters and in a combined tree."""
    return (*spec.path[:-1], spec.path[-1] + SUFFIX)
