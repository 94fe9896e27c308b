"""Params and adapters as one tree, and split again."""

from collections.abc import Callable, Mapping
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
    found = adapters_in(adapters)
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
    added: dict[Path, Tree] = {}
    for (*parent, name), m in ms.items():
        added.setdefault(tuple(parent), {})[name] = m

    def add(path: Path, node: Any, children: Tree) -> Tree:
        for key in (new := added.pop(path, {})):
            name = "/".join((*path, key))
            if key.removesuffix(SUFFIX) not in children:
                raise ValueError(f"params have no kernel for the adapter {name!r}")
            if key in children:
                raise ValueError(f"params already hold {name!r}")
            if not isinstance(node, Mapping):
                kind = type(node).__name__
                raise TypeError(f"the parent of {name!r} must be a mapping, got {kind}")
        return children | new

    joined = _changed(params, add)
    for parent, new in added.items():
        name, leaves = "/".join(parent), paths.named_leaves(params)
        if name in leaves:
            name = "/".join((*parent, *new))
            raise ValueError(f"params have no kernel for the adapter {name!r}")
        near = nearest_paths(name, leaves)
        raise ValueError(f"params have nothing at {name!r}{near}")
    return joined


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

    def remove(_: Path, __: Any, children: Tree) -> Tree:
        # While a Linen model runs, an M and its spec stand where the array was.
        return {
            key: child
            for key, child in children.items()
            if not key.endswith(SUFFIX) or _children(child) is not None
        }

    return paths.replace_leaves(_changed(tree, remove), rounded), nest(adapters)


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


def _changed(
    node: Any, change: Callable[[Path, Any, Tree], Tree], path: Path = ()
) -> Any:
    """The tree with `change(path, container, children)` in each container."""
    if (children := _children(node)) is None:
        return node
    new = change(path, node, children).items()
    changed = {key: _changed(child, change, (*path, key)) for key, child in new}
    if not isinstance(node, Mapping):
        values, is_named = changed.values(), hasattr(node, "_fields")
        return type(node)(*values) if is_named else type(node)(values)
    # The keys of a state are numbers where it has lists. Paths are made of strings.
    original = {str(key): key for key in node}
    items = {original.get(key, key): value for key, value in changed.items()}
    kind: Any = type(node)
    return items if isinstance(node, dict) else kind(items)
