"""Params and adapters as one tree, and split again."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from mora_jax._common.suggestions import nearest_paths
from mora_jax._common.types import Path
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree import paths
from mora_jax._tree.paths import Tree, adapters_in, nest


def combine(params: Any, adapters: Any) -> Any:
    """One tree of params, with each adapter next to its kernel as `<kernel>_mora`.

    Arrays that train themselves take the place of the base's, as adapters too.

    Args:
      params: The base's params: nested mappings, lists and tuples.
      adapters: The adapters, as `init` makes them.

    Raises:
      TypeError, ValueError: An argument is not such a tree, `params` hold adapters, or
        an adapter lacks its kernel.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> adapters = mora_jax.init(mora_jax.plan(params))
      >>> sorted(mora_jax.combine(params, adapters)["fc"])
      ['kernel', 'kernel_mora']
    """
    found = adapters_in(adapters, by_row=True)
    if trained := found.trained:
        leaves = paths.named_leaves(params)
        new = {paths.find_array(leaves, p, a.spec)[0]: a for p, a in trained.items()}
        params = paths.replace_leaves(params, new)
    added: dict[Path, Any] = found.kernels.placed
    if isinstance(params, nnx.State):  # an NNX variable keeps its box among others
        boxes = paths.located_leaves(adapters, "adapters")
        added = {place: boxes[place] for place in added}
    return with_ms(params, added)


def with_ms(params: Any, ms: Mapping[Path, Any]) -> Any:
    """The params with each adapter, or what stands for it, at its path."""
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


def split(tree: Any) -> tuple[Any, Tree]:
    """Undo `combine`; also of the params of a model of `MoRADense` layers.

    Returns:
      The base's params, and the adapters. An array that trains itself is in both, since
      the tree holds it once. To have the base as it was, keep what `combine` was given.

    Raises:
      TypeError, ValueError: As `combine`.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> layer = mora_jax.MoRADense(8, config=mora_jax.MoRAConfig(rank=1))
      >>> params = layer.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
      >>> base, adapters = mora_jax.split(params)
      >>> sorted(base), adapters
      (['bias', 'kernel'], {'kernel_mora': Adapter(rotation, float32[4, 4])})
    """
    _check_nested(tree, "tree")
    adapters, rounded = {}, {}
    for path, leaf in paths.located_leaves(tree, "tree").items():
        if path[-1].endswith(SUFFIX):
            adapters[path] = leaf
        elif (copy := paths.adapter_of(leaf)) is not None:
            adapters[path] = copy
            rounded[path] = copy.m.astype(copy.spec.base_dtype)
    return paths.replace_leaves(_without_ms(tree), rounded), nest(adapters)


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
