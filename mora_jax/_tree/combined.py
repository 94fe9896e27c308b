"""Params and adapters as one tree, and split again."""

from collections.abc import Collection, Mapping
from typing import Any

from flax import nnx

from mora_jax._common.suggestions import nearest_paths
from mora_jax._common.types import Path
from mora_jax._plan.plan import Plan, check_plan
from mora_jax._plan.spec import SUFFIX
from mora_jax._plan.trained_arrays import find_trained
from mora_jax._tree.adapters import Tree, adapter_items, nest, trained_items
from mora_jax._tree.paths import (
    located_leaves,
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
      TypeError: An argument is not such a tree but, for example, a model or an array.
      ValueError: An adapter has no kernel, or the tree is combined already; or the
        adapters do not fit the plan.

    Example::

      >>> import jax.numpy as jnp
      >>> import mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> adapters = mora_jax.init(mora_jax.plan(params))
      >>> sorted(mora_jax.combine(params, adapters)["fc"])
      ['kernel', 'kernel_mora']
    """
    in_state = isinstance(params, nnx.State)

    def insert(base: Any, extra: Any, path: Path) -> Any:
        added, node = _children(extra), _children(base)
        if added is None:
            raise ValueError(
                f"adapters hold {'/'.join(path)!r}, which is not an M; if their plan "
                "trains it, write combine(params, adapters, plan)"
            )
        if node is None:
            raise ValueError(f"params have no module at {'/'.join(path)!r}")
        for key, value in added.items():
            here = (*path, key)
            if key.endswith(SUFFIX) and _children(value) is None:
                if key.removesuffix(SUFFIX) not in node:
                    raise ValueError(
                        f"params have no kernel for the adapter {'/'.join(here)!r}"
                    )
                if key in node:
                    raise ValueError(f"params already hold {'/'.join(here)!r}")
                if not isinstance(base, Mapping):
                    raise TypeError(
                        f"the parent of {'/'.join(here)!r} must be a mapping, "
                        f"got {type(base).__name__}"
                    )
                # An NNX variable keeps its box only in a state, among other variables.
                alone = isinstance(value, nnx.Variable) and not in_state
                node[key] = unboxed(value) if alone else value
            elif key not in node:
                raise ValueError(
                    f"params have nothing at {'/'.join(here)!r}"
                    + nearest_paths(key, list(node))
                )
            else:
                node[key] = insert(node[key], value, here)
        return _rebuild(base, node)

    for what, tree in (("params", params), ("adapters", adapters)):
        _check_nested(tree, what)
    if plan is not None:
        adapter_items(adapters, plan)
    if plan is not None and plan.trained:
        trained, leaves = trained_items(adapters, plan), named_leaves(params)
        new = {find_trained(leaves, one)[0]: copy for one, copy in trained}
        params = replace_leaves(params, new)
        adapters = _without(adapters, {one.path for one, _ in trained})
    return insert(params, adapters, ())


def _without(adapters: Any, paths: Collection[Path]) -> Tree:
    """The adapters as nested dicts, without the leaves at `paths`."""
    leaves = located_leaves(adapters, "adapters")
    return nest({path: leaf for path, leaf in leaves.items() if path not in paths})


def split(tree: Any, plan: Plan | None = None) -> tuple[Any, Tree]:
    """Undo `combine`.

    Args:
      tree: A tree as `combine` makes it.
      plan: The plan of the adapters, which is needed if it trains arrays of the base.

    Returns:
      The base's params, and the adapters. An array that trains itself is in both: the
      tree has no other one. To have the base as it was, keep what `combine` was given.

    Raises:
      TypeError: `tree` is not made of nested mappings, lists and tuples.
      ValueError: The tree lacks an array that the plan trains.

    Example::

      >>> import jax.numpy as jnp
      >>> import mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> adapters = mora_jax.init(mora_jax.plan(params))
      >>> base, adapters = mora_jax.split(mora_jax.combine(params, adapters))
      >>> sorted(base["fc"]), sorted(adapters["fc"])
      (['kernel'], ['kernel_mora'])
    """
    _check_nested(tree, "tree")
    base, adapters = _split(tree)
    if plan is None or not check_plan(plan).trained:
        return base, adapters
    leaves, found = named_leaves(base), located_leaves(adapters, "adapters")
    found |= {one.path: find_trained(leaves, one)[1] for one in plan.trained}
    rounded = {
        leaves[one.name][0]: found[one.path].astype(one.base_dtype)
        for one in plan.trained
    }
    return replace_leaves(base, rounded), nest(found)


def _split(tree: Any) -> tuple[Any, Tree]:
    base, adapters = {}, {}
    node = _children(tree)
    if node is None:
        return tree, {}
    for key, value in node.items():
        if key.endswith(SUFFIX) and _children(value) is None:
            adapters[key] = value
            continue
        base[key], inner = _split(value)
        if inner:
            adapters[key] = inner
    return _rebuild(tree, base), adapters


def _check_nested(tree: Any, what: str) -> None:
    """Raise unless `tree` is a container whose children `_children` finds."""
    refuse_model(tree, what)
    if _children(tree) is None:
        raise TypeError(
            f"{what} must be nested mappings, lists and tuples, "
            f"got {type(tree).__name__}"
        )


def _children(node: Any) -> Tree | None:
    """The children of a container by name; None for a leaf."""
    if isinstance(node, nnx.State):
        node = node.raw_mapping  # a state wraps its items, and they differ in structure
    if isinstance(node, Mapping):
        return {str(key): value for key, value in node.items()}
    if isinstance(node, list | tuple):
        return {str(k): value for k, value in enumerate(node)}
    return None


def _rebuild(like: Any, children: Tree) -> Any:
    if isinstance(like, Mapping):
        original = {str(key): key for key in like}
        items = {original.get(key, key): value for key, value in children.items()}
        kind: Any = type(like)
        return items if isinstance(like, dict) else kind(items)
    values = children.values()
    return type(like)(*values) if hasattr(like, "_fields") else type(like)(values)
