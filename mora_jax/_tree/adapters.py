"""Adapters of a plan, their state as Flax has it, and one tree of them and the params.

Trees of params are nested mappings here, as Flax has them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, serialization
from flax.nnx.traversals import flatten_mapping, unflatten_mapping
from jaxtyping import PRNGKeyArray

from mora_jax._common import trees
from mora_jax._common.axes import interleaved, stack_places
from mora_jax._common.checks import check_key, check_leaf
from mora_jax._common.messages import nearest_paths
from mora_jax._common.types import Path
from mora_jax._layer.adapter import Adapter
from mora_jax._layer.dense import FrozenDense
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree import paths
from mora_jax._tree.plan import Plan, check_plan

# Compiled, since a plan has hundreds of kernels, and each key is several operations.
_fold_in = jax.jit(jax.random.fold_in)


def init(
    plan_or_frozen: Plan | FrozenDense,
    key: PRNGKeyArray | None = None,
    *,
    params: Any = None,
) -> paths.Tree:
    """New adapters: a tree of an `Adapter` for each kernel, and for each trained array.

    Args:
      plan_or_frozen: The plan of a model, or one layer.
      key: The key for `init="gaussian"`, from which each M's is made by its path.
      params: The base's params, needed where `MoRAConfig(train=...)` copies arrays.

    Returns:
      Nested dicts as in the base's params, with the adapter of each kernel at
      `<kernel>_mora`, and each copy at its own path; for one layer at "kernel_mora".

    Raises:
      TypeError: An argument, or a leaf of `params`, is of another kind.
      ValueError: `init="gaussian"` lacks a key, or `params` lack an array to train.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}
      >>> plan = mora_jax.plan(params, mora_jax.MoRAConfig(train="fc/bias"))
      >>> mora_jax.init(plan, params=params)["fc"]
      {'kernel_mora': Adapter(block_diagonal, float32[1, 8, 8]),
       'bias': Adapter(trained, float32[8])}
    """
    if isinstance(key, Mapping):
        hint = "if these are the base's params, write init(plan, params=params)"
        raise TypeError(f"key must be a JAX PRNG key, got {type(key).__name__}: {hint}")
    check_key(key)
    if isinstance(plan_or_frozen, FrozenDense):
        spec = plan_or_frozen.spec
        return {f"kernel{SUFFIX}": Adapter(spec.start(("kernel",), key), spec)}
    plan, made = check_plan(plan_or_frozen, "plan_or_frozen"), paths.Found()
    for path, spec in plan.specs.items():
        # By the path, so that an M does not depend on which other kernels are adapted.
        number = np.uint32(crc32("/".join(path).encode()))
        own = None if key is None else _fold_in(key, number)
        made[path] = Adapter(spec.start(path, own), spec)
    if not plan.trained:
        return made.tree()
    if params is None:
        raise ValueError(
            f"params must be given, since the plan trains {[*plan.trained][0]!r} "
            "itself, from what the base has there; write init(plan, params=params)"
        )
    for path, (_, array) in plan.shapes.trained.in_base(params).items():
        spec: Any = plan.parts[path]
        # A copy in any case: a step may be given the adapters to overwrite.
        made[path] = Adapter(jnp.array(array, spec.dtype, copy=True), spec)
    return made.tree()


def _restored(adapter: Adapter, state: Any) -> Adapter:
    m: Any = serialization.from_state_dict(adapter.m, state)
    if (got := getattr(m, "shape", None)) != getattr(adapter.m, "shape", None):
        raise ValueError(f"the state of {adapter} must have its shape, got {got}")
    return adapter.replace(m=m)


# A state is the array alone, and what it means comes from the target.
serialization.register_serialization_state(
    Adapter, lambda adapter: serialization.to_state_dict(adapter.m), _restored
)


def combine(params: Any, adapters: Any) -> Any:
    """One tree of params, with each adapter next to its kernel as `<kernel>_mora`.

    Arrays that train themselves take the place of the base's, as adapters too.

    Args:
      params: The base's params: nested mappings, or `nnx.state(model, nnx.Param)`.
      adapters: The adapters, as `init` makes them.

    Raises:
      TypeError, ValueError: Not such trees; `params` hold adapters, or lack a kernel.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> adapters = mora_jax.init(mora_jax.plan(params))
      >>> sorted(mora_jax.combine(params, adapters)["fc"])
      ['kernel', 'kernel_mora']
    """
    found = paths.adapters_in(adapters)
    _check_kernels(params, found.kernels)
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


def _check_kernels(params: Any, kernels: paths.Found) -> None:
    """Raise if a kernel in the params has another shape than its adapter is for."""
    leaves = {
        tuple(map(str, keys)): leaf for keys, leaf in _flat(params, "params").items()
    }
    for path, adapter in kernels.items():
        leaf = trees.unboxed(leaves.get(path))
        # What is quantized may be stored in another shape.
        if jnp.issubdtype(getattr(leaf, "dtype", int), jnp.floating):
            name = f"{'/'.join(path)} in params"
            check_leaf(leaf, name, adapter.spec.kernel_shape)


def with_ms(params: Any, ms: Mapping[Path, Any]) -> Any:
    """The params with each adapter, or what stands for it, at its path."""
    flat = _flat(params, "params")
    # A state's keys are numbers where it has lists; a quantized kernel is a mapping.
    starts = {keys[:end]: None for keys in flat for end in range(len(keys) + 1)}
    known = {tuple(map(str, keys)): keys for keys in starts}
    for path, m in ms.items():
        *parent, own = path
        name, kernel = "/".join(path), (*parent, own.removesuffix(SUFFIX))
        if path in known:
            raise ValueError(f"params already hold {name!r}")
        if kernel not in known:
            near = nearest_paths("/".join(kernel), map("/".join, filter(None, known)))
            raise ValueError(f"params have no kernel for the adapter {name!r}{near}")
        flat[(*known[kernel][:-1], own)] = m
    return _nested(flat, params)


def split(tree: Any) -> tuple[Any, paths.Tree]:
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
    return _nested(base, tree), paths.nest(adapters)


def _of_params(adapter: Adapter, kernel: Any) -> Adapter:
    """Adapter of params, whose M Flax may have stacked with the spec of one layer."""
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
