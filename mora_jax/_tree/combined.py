"""Params and adapters as one tree, and split again."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import nnx

from mora_jax._common.suggestions import nearest_paths
from mora_jax._common.types import Path
from mora_jax._plan.plan import Plan, check_plan
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree.adapters import Tree, adapter_items, nest, trained_items
from mora_jax._tree.paths import (
    find_part,
    named_leaves,
    refuse_model,
    replace_leaves,
    unboxed,
)


def combine(params: Any, adapters: Any, plan: Plan | None = None) -> Any:
    """One tree of params, with each M next to its kernel as `<kernel>_mora`.

    Arrays that train themselves take the place of the base's, in their own dtype.

    Args:
      params: The base's params: nested mappings, lists and tuples.
      adapters: The adapters, as `init` makes them.
      plan: Their plan, which is needed if it trains arrays of the base.

    Raises:
      TypeError: An argument is not such a tree but, for example, a model.
      ValueError: An adapter lacks its kernel, or the tree is combined already; or the
        adapters do not fit the plan.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> adapters = mora_jax.init(mora_jax.plan(params))
      >>> sorted(mora_jax.combine(params, adapters)["fc"])
      ['kernel', 'kernel_mora']
    """
    for what, tree in (("params", params), ("adapters", adapters)):
        _check_nested(tree, what)
    added = _leaves(adapters)
    if plan is not None:
        adapter_items(adapters, plan)
        trained = trained_items(adapters, plan)
        leaves = named_leaves(params) if trained else {}
        new = {find_part(leaves, array)[0]: copy for array, copy in trained}
        params = replace_leaves(params, new)
        added = {path: leaf for path, leaf in added.items() if path not in new}
    nodes, in_state = dict(_nodes(params)), isinstance(params, nnx.State)
    ms: dict[Path, Tree] = defaultdict(dict)
    for path, m in added.items():
        _check_place(path, nodes)
        # An NNX variable keeps its box only in a state, among other variables.
        alone = isinstance(m, nnx.Variable) and not in_state
        ms[path[:-1]][path[-1]] = unboxed(m) if alone else m
    return _edited(params, lambda path, children: children | ms.get(path, {}))


def _check_place(path: Path, nodes: Mapping[Path, tuple[Any, Tree | None]]) -> None:
    """Raise unless the kernel of the adapter at `path` is there, and no such M."""
    name = "/".join(path)
    if not path[-1].endswith(SUFFIX):
        raise ValueError(
            f"adapters hold {name!r}, which is not an M; if their plan trains it, "
            "write combine(params, adapters, plan)"
        )
    for end in range(1, len(path)):
        here, above = "/".join(path[:end]), nodes[path[: end - 1]][1]
        if path[:end] not in nodes:
            near = nearest_paths(path[end - 1], list(above or ()))
            raise ValueError(f"params have nothing at {here!r}{near}")
        if nodes[path[:end]][1] is None:
            raise ValueError(f"params have no module at {here!r}")
    if (*path[:-1], path[-1].removesuffix(SUFFIX)) not in nodes:
        raise ValueError(f"params have no kernel for the adapter {name!r}")
    if path in nodes:
        raise ValueError(f"params already hold {name!r}")
    if not isinstance(parent := nodes[path[:-1]][0], Mapping):
        kind = type(parent).__name__
        raise TypeError(f"the parent of {name!r} must be a mapping, got {kind}")


def split(tree: Any, plan: Plan | None = None) -> tuple[Any, Tree]:
    """Undo `combine`, with the plan if it trains arrays of the base.

    Returns:
      The base's params, and the adapters. An array that trains itself is in both, since
      the tree holds it once. To have the base as it was, keep what `combine` was given.

    Raises:
      TypeError: `tree` is not made of nested mappings, lists and tuples.
      ValueError: The tree lacks an array that the plan trains.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> adapters = mora_jax.init(mora_jax.plan(params))
      >>> base, adapters = mora_jax.split(mora_jax.combine(params, adapters))
      >>> sorted(base["fc"]), sorted(adapters["fc"])
      (['kernel'], ['kernel_mora'])
    """
    _check_nested(tree, "tree")
    leaves = _leaves(tree).items()
    adapters = {path: leaf for path, leaf in leaves if path[-1].endswith(SUFFIX)}

    def without(path: Path, children: Tree) -> Tree:
        return {k: v for k, v in children.items() if (*path, k) not in adapters}

    base = _edited(tree, without)
    if plan is not None and check_plan(plan).trained:
        named, rounded = named_leaves(base), {}
        for array in plan.trained:
            path, copy = find_part(named, array)
            adapters[array.path] = copy
            rounded[path] = copy.astype(array.base_dtype)
        base = replace_leaves(base, rounded)
    return base, nest(adapters)


def _check_nested(tree: Any, what: str) -> None:
    """Raise unless `tree` is a container whose children `_children` finds."""
    refuse_model(tree, what)
    if _children(tree) is None:
        kind = type(tree).__name__
        raise TypeError(f"{what} must be nested mappings, lists and tuples, got {kind}")


def _children(node: Any) -> Tree | None:
    """The children of a container by name; None for a leaf."""
    if isinstance(node, nnx.State):
        node = node.raw_mapping  # a state wraps its items, and they differ in structure
    if isinstance(node, list | tuple):
        node = dict(enumerate(node))
    is_mapping = isinstance(node, Mapping)
    return {str(key): node[key] for key in node} if is_mapping else None


def _nodes(node: Any, path: Path = ()) -> Iterator[tuple[Path, tuple[Any, Any]]]:
    """Each node of a tree by its path, with its children or None."""
    children = _children(node)
    yield path, (node, children)
    for key, child in (children or {}).items():
        yield from _nodes(child, (*path, key))


def _leaves(tree: Any) -> dict[Path, Any]:
    """The leaves by their paths, in their boxes."""
    return {path: leaf for path, (leaf, children) in _nodes(tree) if children is None}


def _edited(node: Any, edit: Callable[[Path, Tree], Tree], path: Path = ()) -> Any:
    """The tree with `edit(path, children)` for the children of each container."""
    children = _children(node)
    if children is None:
        return node
    edited = {key: _edited(v, edit, (*path, key)) for key, v in children.items()}
    return _rebuild(node, edit(path, edited))


def _rebuild(like: Any, children: Tree) -> Any:
    if isinstance(like, Mapping):
        original = {str(key): key for key in like}
        items = {original.get(key, key): value for key, value in children.items()}
        kind: Any = type(like)
        return items if isinstance(like, dict) else kind(items)
    values = children.values()
    return type(like)(*values) if hasattr(like, "_fields") else type(like)(values)
