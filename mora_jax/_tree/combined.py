"""Params and adapters as one tree, and split again: nested mappings, as Flax has."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.traversals import flatten_mapping, unflatten_mapping

from mora_jax._common import trees
from mora_jax._common.axes import interleaved, stack_places
from mora_jax._common.suggestions import nearest_paths
from mora_jax._common.types import Path
from mora_jax._layer.adapter import Adapter
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree import paths
from mora_jax._tree.paths import Tree, adapters_in, nest


def combine(params: Any, adapters: Any) -> Any:
    """One tree of params, with each adapter next to its kernel as `<kernel>_mora`.

    Arrays that train themselves take the place of the base's, as adapters too.

    Args:
      params: The base's params: nested mappings, or `nnx.state(model, nnx.Param)`.
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
    placed = found.kernels.placed.items()
    added: dict[Path, Any] = {place: a.replace(m=a.in_model()) for place, a in placed}
    if isinstance(params, nnx.State):  # an NNX variable keeps its box among others
        boxes = trees.located_leaves(adapters, "adapters")
        added = {place: boxes[place] for place in added}
    return with_ms(params, added)


def with_ms(params: Any, ms: Mapping[Path, Any]) -> Any:
    """The params with each adapter, or what stands for it, at its path."""
    flat = _flat(params, "params")
    # The keys of a state are numbers where it has lists. Paths are made of strings. A
    # kernel may be a mapping itself, of the parts of a quantized one.
    starts = {keys[:end]: None for keys in flat for end in range(len(keys) + 1)}
    known = {tuple(map(str, keys)): keys for keys in starts}
    for path, m in ms.items():
        *parent, own = path
        name, kernel = "/".join(path), (*parent, own.removesuffix(SUFFIX))
        if path in known:
            raise ValueError(f"params already hold {name!r}")
        if kernel not in known:
            near = nearest_paths("/".join(kernel), map("/".join, known))
            raise ValueError(f"params have no kernel for the adapter {name!r}{near}")
        flat[(*known[kernel][:-1], own)] = m
    return _nested(flat, params)


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
      (['bias', 'kernel'],
       {'kernel_mora': Adapter(block_diagonal, float32[4, 2, 2])})
    """
    base, adapters, flat = {}, {}, _flat(tree, "tree")
    for keys, leaf in flat.items():
        path, copy = tuple(map(str, keys)), paths.adapter_of(leaf)
        if path[-1].endswith(SUFFIX):
            kernel = flat.get((*keys[:-1], path[-1].removesuffix(SUFFIX)))
            own = kernel is not None and isinstance(leaf, Adapter) and leaf.of_kernel
            adapters[path] = _of_params(leaf, kernel) if own else leaf
            continue
        if copy is not None:
            adapters[path] = copy
            leaf = paths.reboxed(leaf, copy.m.astype(copy.spec.base_dtype))
        base[keys] = leaf
    return _nested(base, tree), nest(adapters)


def _of_params(adapter: Adapter, kernel: Any) -> Adapter:
    """An adapter of a model's params, whose layers a transformation may have stacked.

    Flax knows nothing of specs, and so makes a stack of M's with the spec of one layer.
    """
    m, spec = adapter.m, adapter.spec
    count, shape = jnp.ndim(m) - len(spec.shape), jnp.shape(m)
    if count <= 0 or shape[count:] == spec.shape:
        return Adapter.of_model(m, spec)
    whole = tuple(trees.unboxed(kernel).shape)
    for places in stack_places(whole, spec.kernel_shape):
        axes = "".join(interleaved("s" * count, spec.axes, places))
        one = dataclasses.replace(spec, axes=axes, kernel_shape=whole)
        if one.shape_in_model == shape:
            return Adapter.of_model(m, one)
    return adapter


def _flat(tree: Any, what: str) -> dict[tuple[Any, ...], Any]:
    """{keys: leaf} of nested mappings; all else is a leaf."""
    trees.refuse_model(tree, what)
    rule = f"{what} must be nested mappings, or a state of NNX"
    if not isinstance(tree, Mapping):
        raise TypeError(f"{rule}, got {type(tree).__name__}")
    flat = flatten_mapping(tree, keep_empty_nodes=True)
    for keys, leaf in flat.items():
        if isinstance(leaf, list | tuple):  # of layers, or a parameter of two arrays
            parts = jax.tree.leaves(leaf, is_leaf=lambda x: isinstance(x, Mapping))
            if any(isinstance(part, Mapping) for part in parts):
                got = f"a {type(leaf).__name__} at {'/'.join(map(str, keys))!r}"
                raise TypeError(
                    f"{rule}, got {got}: keep the adapters in their own tree, as init "
                    "makes it, and use fold"
                )
    return flat


def _nested(flat: Mapping[tuple[Any, ...], Any], like: Any) -> Any:
    """Undo `_flat`."""
    nested, kind = unflatten_mapping(flat), type(like)
    return nested if isinstance(like, dict) else kind(nested)
