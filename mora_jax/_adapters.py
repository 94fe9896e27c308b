"""The tree of adapters: how it is made, joined to the params, and split from them."""

from collections.abc import Mapping
from typing import Any
from zlib import crc32

import jax
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from mora_jax._checks import check_key
from mora_jax._dense import FrozenDense
from mora_jax._matrix import init_adapter
from mora_jax._paths import (
    Path,
    adapter_of,
    adapter_path,
    located_leaves,
    nearest_paths,
    refuse_model,
    unboxed,
)
from mora_jax._plan import Plan, check_plan
from mora_jax._spec import SUFFIX, AdapterSpec

Tree = dict[str, Any]

_fold_in = jax.jit(jax.random.fold_in)


def init(plan_or_frozen: Plan | FrozenDense, key: PRNGKeyArray | None = None) -> Tree:
    """New adapters: a tree that holds the M's and nothing else.

    Args:
      plan_or_frozen: The plan of a model, or one layer.
      key: The key for `init="gaussian"`. Each M depends on the key and its kernel's
        path.

    Returns:
      Nested dicts as in the base's params, with each M at `<kernel>_mora`; for one
      layer `{"kernel_mora": M}`.

    Raises:
      TypeError: The first argument is neither a plan nor a layer, or `key` is not a
        key.
      ValueError: `init="gaussian"` without a key.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}
      >>> jax.tree.map(jnp.shape, mora_jax.init(mora_jax.plan(params)))
      {'fc': {'kernel_mora': (8, 8)}}
    """
    check_key(key)
    if isinstance(plan_or_frozen, FrozenDense):
        return {f"kernel{SUFFIX}": init_adapter(plan_or_frozen.spec, key)}
    check_plan(plan_or_frozen, "plan_or_frozen")

    def start(spec: AdapterSpec) -> jax.Array:
        number = np.uint32(crc32(spec.name.encode()))
        return init_adapter(spec, None if key is None else _fold_in(key, number))

    return nest({adapter_path(spec): start(spec) for spec in plan_or_frozen.specs})


def nest(items: Mapping[Path, Any]) -> Tree:
    """{path: leaf} as nested dicts."""
    tree: Tree = {}
    for path, leaf in items.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def adapter_items(adapters: Any, plan: Plan) -> list[tuple[AdapterSpec, Any]]:
    """Each spec of `plan` with its M; `adapters` may hold no further M."""
    check_plan(plan)
    found = located_leaves(adapters, "adapters")
    items = []
    for spec in plan.specs:
        path = adapter_path(spec)
        if path not in found:
            raise ValueError(f"adapters lack {'/'.join(path)!r}, which the plan has")
        items.append((spec, adapter_of(found.pop(path), spec)))
    if found:
        path = "/".join(next(iter(found)))
        raise ValueError(f"adapters hold {path!r}, which the plan lacks")
    return items


def combine(params: Any, adapters: Any) -> Any:
    """One tree of params, with each M next to its kernel as `<kernel>_mora`.

    Args:
      params: The base's params: nested mappings, lists and tuples.
      adapters: The adapters, as `init` makes them.

    Raises:
      TypeError: An argument is not such a tree but, for example, a model or an array.
      ValueError: An adapter has no kernel, or the tree is combined already.

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
            raise ValueError(f"adapters hold {'/'.join(path)!r}, which is not an M")
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
    return insert(params, adapters, ())


def split(tree: Any) -> tuple[Any, Tree]:
    """Undo `combine`.

    Args:
      tree: A tree as `combine` makes it.

    Returns:
      The base's params, and the adapters.

    Raises:
      TypeError: `tree` is not made of nested mappings, lists and tuples.

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
    return _split(tree)


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
