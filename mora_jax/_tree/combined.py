"""Params and adapters as one tree, and split again."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from mora_jax._common.suggestions import nearest_paths
from mora_jax._common.types import Path
from mora_jax._plan.plan import Plan, check_plan
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree import paths
from mora_jax._tree.adapters import Tree, adapter_items, nest, trained_items


def combine(params: Any, adapters: Any, plan: Plan | None = None) -> Any:
    """One tree of params, with each M next to its kernel as `<kernel>_mora`.

    Arrays that train themselves take the place of the base's, in their own dtype.

    Args:
      params: The base's params: nested mappings, lists and tuples.
      adapters: The adapters, as `init` makes them.
      plan: Their plan, which is needed if it trains arrays of the base.

    Raises:
      TypeError, ValueError: An argument is not such a tree, `params` hold adapters, an
        adapter lacks its kernel, or the adapters do not fit the plan.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> adapters = mora_jax.init(mora_jax.plan(params))
      >>> sorted(mora_jax.combine(params, adapters)["fc"])
      ['kernel', 'kernel_mora']
    """
    added = paths.located_leaves(adapters, "adapters")
    if plan is not None:
        adapter_items(adapters, plan)  # checks the M's
        trained = trained_items(adapters, plan)
        leaves = paths.named_leaves(params) if trained else {}
        new = {paths.find_part(leaves, array)[0]: copy for array, copy in trained}
        params = paths.replace_leaves(params, new)
        added = {path: leaf for path, leaf in added.items() if path not in new}
    for path in added:
        if not path[-1].endswith(SUFFIX):
            raise ValueError(
                f"adapters hold {'/'.join(path)!r}, which is not an M: give params "
                "first, and the plan if it trains that: combine(params, adapters, plan)"
            )
    if not isinstance(params, nnx.State):
        # An NNX variable keeps its box only in a state, among other variables.
        for path, m in added.items():
            added[path] = paths.unboxed(m) if isinstance(m, nnx.Variable) else m
    return with_ms(params, added)


def with_ms(params: Any, ms: Mapping[Path, Any]) -> Any:
    """The params with each M, or what stands for it, at its path beside its kernel."""
    _check_nested(params, "params")
    return _joined(params, nest(ms), ())


def _joined(node: Any, added: Tree, path: Path) -> Any:
    """The part of the params at `path`, with the M's of `added` inside it."""
    children = _children(node) or {}
    if not children and not added:
        return node
    for key, new in added.items():
        name = "/".join((*path, key))
        if isinstance(new, dict):
            if key not in children:
                near = nearest_paths(key, list(children))
                raise ValueError(f"params have nothing at {name!r}{near}")
        elif key.removesuffix(SUFFIX) not in children:
            raise ValueError(f"params have no kernel for the adapter {name!r}")
        elif key in children:
            raise ValueError(f"params already hold {name!r}")
        elif not isinstance(node, Mapping):
            kind = type(node).__name__
            raise TypeError(f"the parent of {name!r} must be a mapping, got {kind}")
    pairs = children.items()
    joined = {k: _joined(child, added.get(k, {}), (*path, k)) for k, child in pairs}
    return _rebuild(node, joined | {k: m for k, m in added.items() if k not in joined})


def split(tree: Any, plan: Plan | None = None) -> tuple[Any, Tree]:
    """Undo `combine`, with the plan if it trains arrays of the base.

    Returns:
      The base's params, and the adapters. An array that trains itself is in both, since
      the tree holds it once. To have the base as it was, keep what `combine` was given.

    Raises:
      TypeError, ValueError: As `combine`, or `tree` lacks an array to train.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> tree = {"kernel": jnp.ones((8, 8)), "kernel_mora": jnp.ones((4, 4))}
      >>> jax.tree.map(jnp.shape, mora_jax.split(tree))
      ({'kernel': (8, 8)}, {'kernel_mora': (4, 4)})
    """
    _check_nested(tree, "tree")
    leaves = paths.located_leaves(tree, "tree").items()
    adapters = {path: leaf for path, leaf in leaves if path[-1].endswith(SUFFIX)}
    base = _without_ms(tree)
    if plan is not None and check_plan(plan).trained:
        named, rounded = paths.named_leaves(base), {}
        for array in plan.trained:
            path, copy = paths.find_part(named, array)
            adapters[array.path] = copy
            rounded[path] = copy.astype(array.base_dtype)
        base = paths.replace_leaves(base, rounded)
    return base, nest(adapters)


def _check_nested(tree: Any, what: str) -> None:
    """Raise unless `tree` is a container whose children `_children` finds."""
    paths.refuse_model(tree, what)
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


def _without_ms(node: Any) -> Any:
    """The tree without the M's, or what stands for them."""
    if (children := _children(node)) is None:
        return node
    # While a Linen model runs, an M and its spec stand where the array was.
    ms = [k for k in children if k.endswith(SUFFIX) and _children(children[k]) is None]
    kept = {k: _without_ms(child) for k, child in children.items() if k not in ms}
    return _rebuild(node, kept)


def _rebuild(like: Any, children: Tree) -> Any:
    if isinstance(like, Mapping):
        # The keys of a state are numbers where it has lists. Paths are made of strings.
        original = {str(key): key for key in like}
        items = {original.get(key, key): value for key, value in children.items()}
        kind: Any = type(like)
        return items if isinstance(like, dict) else kind(items)
    values = children.values()
    return type(like)(*values) if hasattr(like, "_fields") else type(like)(values)
