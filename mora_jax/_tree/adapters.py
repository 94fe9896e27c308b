"""The tree of adapters: how it is made, and what a plan finds in it."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any
from zlib import crc32

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from mora_jax._common.checks import check_key
from mora_jax._common.types import Path
from mora_jax._layer.dense import FrozenDense
from mora_jax._plan.plan import Plan, check_plan
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._plan.trained_arrays import Items, copies, replacements
from mora_jax._tree.paths import (
    adapter_of,
    adapter_path,
    located_leaves,
    named_leaves,
    refuse_variables,
    replace_leaves,
    unboxed,
)
from mora_jax._tree.start import init_adapter

Tree = dict[str, Any]

_fold_in = jax.jit(jax.random.fold_in)


def init(
    plan_or_frozen: Plan | FrozenDense,
    key: PRNGKeyArray | None = None,
    *,
    params: Any = None,
) -> Tree:
    """New adapters: a tree that holds the M's, and the arrays that train themselves.

    Args:
      plan_or_frozen: The plan of a model, or one layer.
      key: The key for `init="gaussian"`. Each M depends on the key and its kernel's
        path.
      params: The base's params, of which the adapters get copies of the arrays that
        `MoRAConfig(train=...)` names. Other plans need none.

    Returns:
      Nested dicts as in the base's params, with each M at `<kernel>_mora`, and each
      copy at its own path; for one layer `{"kernel_mora": M}`.

    Raises:
      TypeError: The first argument is neither a plan nor a layer, or `key` is not a
        key, or `params` hold something other than arrays.
      ValueError: `init="gaussian"` without a key; or the plan trains arrays, and
        `params` are not given or lack one.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}
      >>> jax.tree.map(jnp.shape, mora_jax.init(mora_jax.plan(params)))
      {'fc': {'kernel_mora': (8, 8)}}
      >>> plan = mora_jax.plan(params, mora_jax.MoRAConfig(train="fc/bias"))
      >>> jax.tree.map(jnp.shape, mora_jax.init(plan, params=params))
      {'fc': {'bias': (8,), 'kernel_mora': (8, 8)}}
    """
    if isinstance(key, Mapping):
        raise TypeError(
            f"key must be a JAX PRNG key, got {type(key).__name__}: if these are the "
            "base's params, write init(plan, params=params)"
        )
    check_key(key)
    if isinstance(plan_or_frozen, FrozenDense):
        return {f"kernel{SUFFIX}": init_adapter(plan_or_frozen.spec, key)}
    check_plan(plan_or_frozen, "plan_or_frozen")

    def start(spec: AdapterSpec) -> jax.Array:
        number = np.uint32(crc32(spec.name.encode()))
        return init_adapter(spec, None if key is None else _fold_in(key, number))

    ms = {adapter_path(spec): start(spec) for spec in plan_or_frozen.specs}
    return nest(ms | _copies(plan_or_frozen, params))


def _copies(plan: Plan, params: Any) -> dict[Path, jax.Array]:
    """{path: copy} of the arrays that train themselves."""
    if not plan.trained:
        return {}
    if params is None:
        raise ValueError(
            f"params must be given, since the plan trains {plan.trained[0].name!r} "
            "itself, from what the base has there; write init(plan, params=params)"
        )
    refuse_variables(params)
    leaves = named_leaves(params)
    refuse_combined(leaves, plan.specs)
    return copies(leaves, plan.trained)


def refuse_combined(leaves: Collection[str], specs: Iterable[AdapterSpec]) -> None:
    """Raise if params hold the adapters too: they are no base any more.

    Args:
      leaves: The paths of the params.
      specs: The adapters.
    """
    for spec in specs:
        if f"{spec.name}{SUFFIX}" in leaves:
            raise ValueError(
                f"params hold the adapter {spec.name}{SUFFIX}: give the base alone, "
                "as split(params)[0]"
            )


def nest(items: Mapping[Path, Any]) -> Tree:
    """{path: leaf} as nested dicts."""
    tree: Tree = {}
    for path, leaf in items.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def adapter_items(
    adapters: Any, plan: Plan, *, by_row: bool = False
) -> list[tuple[AdapterSpec, Any]]:
    """Each spec of `plan` with its M; `adapters` may hold nothing that it lacks.

    Args:
      adapters: The adapters.
      plan: The plan.
      by_row: Whether each row of a batch may have M's of its own (`serving.select`).
    """
    return _items(adapters, plan, by_row)[0]


def trained_items(adapters: Any, plan: Plan) -> Items:
    """Each array that trains itself with its copy, checked as in `adapter_items`."""
    return _items(adapters, plan)[1]


def _items(
    adapters: Any, plan: Plan, by_row: bool = True
) -> tuple[list[tuple[AdapterSpec, Any]], Items]:
    check_plan(plan)
    found = located_leaves(adapters, "adapters")
    items, trained = [], []
    for spec in plan.specs:
        path = adapter_path(spec)
        if path not in found:
            raise ValueError(f"adapters lack {'/'.join(path)!r}, which the plan has")
        items.append((spec, adapter_of(found.pop(path), spec, by_row)))
    for one in plan.trained:
        if one.path not in found:
            raise ValueError(
                f"adapters lack {one.name!r}, which the plan trains: init(plan, "
                "params=params) and split(tree, plan) give it"
            )
        copy = unboxed(found.pop(one.path))
        one.check(copy, " in the adapters")
        trained.append((one, copy))
    if found:
        path = "/".join(next(iter(found)))
        raise ValueError(f"adapters hold {path!r}, which the plan lacks")
    return items, trained


def with_trained(params: Any, trained: Items, dtype: DTypeLike | None = None) -> Any:
    """The params with the trained copies in place of the base's arrays.

    Args:
      params: The base's params: any pytree.
      trained: The trained arrays with their copies.
      dtype: The dtype of the copies; None for the dtypes of the base's arrays.
    """
    if not trained:
        return params
    return replace_leaves(params, replacements(named_leaves(params), trained, dtype))
