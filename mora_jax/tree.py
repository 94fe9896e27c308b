"""Base tree and adapter tree: made, joined, taken apart, merged."""

from collections.abc import Mapping
from typing import Any, overload
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from flax.core.meta import AxisMetadata
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Float, PRNGKeyArray

from mora_jax._types import ArrayLike
from mora_jax.layer import (
    SUFFIX,
    AdapterSpec,
    FrozenDense,
    check_adapter,
    concrete,
    init_adapter,
    kernel_update,
    params_adapter,
)
from mora_jax.planning import Path, Plan, adapter_path, key_name, named_leaves, nearest

Tree = dict[str, Any]


def init(plan_or_frozen: Plan | FrozenDense, key: PRNGKeyArray | None = None) -> Tree:
    """New adapters: a tree that holds the M's and nothing else.

    Args:
      plan_or_frozen: the plan of a model, or one layer.
      key: for `init="gaussian"`. Each kernel's M depends on the key and its own path.

    Returns:
      Nested dicts as the base's params, M at `<kernel>_mora`; for one layer
      `{"kernel_mora": M}`.

    Raises:
      ValueError: a Gaussian start without a key.

    Example::

      >>> from mora_jax import init, plan
      >>> params = {"fc": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}
      >>> jax.tree.map(jnp.shape, init(plan(params)))
      {'fc': {'kernel_mora': (8, 8)}}
    """
    if isinstance(plan_or_frozen, FrozenDense):
        return {f"kernel{SUFFIX}": init_adapter(plan_or_frozen.spec, key)}
    if not isinstance(plan_or_frozen, Plan):
        raise TypeError(
            f"init takes a Plan or a FrozenDense, got {type(plan_or_frozen).__name__}"
        )

    def one(spec: AdapterSpec) -> jax.Array:
        own = (
            None if key is None else jax.random.fold_in(key, crc32(spec.name.encode()))
        )
        return init_adapter(spec, own)

    return nest({adapter_path(spec): one(spec) for spec in plan_or_frozen})


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
    """Each spec of `plan` with its M out of `adapters`, of which none may be left."""
    flat, _ = jax.tree_util.tree_flatten_with_path(adapters)
    found = {tuple(key_name(key) for key in keys): leaf for keys, leaf in flat}
    items = []
    for spec in plan:
        path = adapter_path(spec)
        if path not in found:
            raise ValueError(f"adapters lack {'/'.join(path)!r}, which the plan has")
        m = found.pop(path)
        check_adapter(m, spec)
        items.append((spec, m))
    if found:
        path = "/".join(next(iter(found)))
        raise ValueError(f"adapters hold {path!r}, which the plan has not")
    return items


def combine(params: Any, adapters: Any) -> Any:
    """One params tree, with each M beside its kernel as `<kernel>_mora`.

    Args:
      params: the base's params: nested mappings, lists and tuples.
      adapters: as `init` makes them.

    Raises:
      ValueError: an adapter without its kernel, or a tree that is combined already.

    Example::

      >>> from mora_jax import combine, init, plan
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> sorted(combine(params, init(plan(params)))["fc"])
      ['kernel', 'kernel_mora']
    """

    def insert(base: Any, extra: Any, path: Path) -> Any:
        if not isinstance(extra, Mapping):
            raise ValueError(f"adapters hold {'/'.join(path)!r}, which is no M")
        node = _children(base)
        if node is None:
            raise ValueError(f"params have no module at {'/'.join(path)!r}")
        for key, value in extra.items():
            here = (*path, key)
            if key.endswith(SUFFIX) and not isinstance(value, Mapping):
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
                node[key] = value
            elif key not in node:
                raise ValueError(
                    f"params have nothing at {'/'.join(here)!r}"
                    + nearest(key, list(node))
                )
            else:
                node[key] = insert(node[key], value, here)
        return _rebuild(base, node)

    return insert(params, adapters, ())


def split(tree: Any) -> tuple[Any, Tree]:
    """Undo `combine`: the base's params, and the adapters.

    Example::

      >>> from mora_jax import combine, init, plan, split
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> base, adapters = split(combine(params, init(plan(params))))
      >>> sorted(base["fc"]), sorted(adapters["fc"])
      (['kernel'], ['kernel_mora'])
    """
    base, adapters = {}, {}
    node = _children(tree)
    if node is None:
        return tree, {}
    for key, value in node.items():
        if key.endswith(SUFFIX) and _children(value) is None:
            adapters[key] = value
            continue
        base[key], inner = split(value)
        if inner:
            adapters[key] = inner
    return _rebuild(tree, base), adapters


def _children(node: Any) -> Tree | None:
    """The children of a container by name; None for a leaf."""
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


@overload
def delta_weight(params: Any, frozen: FrozenDense) -> Float[jax.Array, "..."]: ...
@overload
def delta_weight(params: Any, frozen: Plan) -> Tree: ...
def delta_weight(
    params: Any, frozen: FrozenDense | Plan
) -> Float[jax.Array, "..."] | Tree:
    r"""The update as a kernel, :math:`\alpha\, C M D` (paper equation 3).

    Args:
      params: `{"kernel_mora": M}` of one layer, or the adapters of a model.
      frozen: the layer, or the plan.

    Returns:
      An array of the kernel's shape; for a model a tree of them, under their kernels'
      names. In float32, or float64 where M or the layer's kernel is.

    Example::

      >>> from mora_jax import FrozenDense, MoRAConfig, delta_weight
      >>> config = MoRAConfig(square_rank=1, operator="truncation", alpha=2.0)
      >>> frozen = FrozenDense.from_config(jnp.ones((2, 2)), config=config)
      >>> delta_weight({"kernel_mora": jnp.ones((1, 1))}, frozen)
      Array([[2., 0.],
             [0., 0.]], dtype=float32)
    """
    if isinstance(frozen, FrozenDense):
        m = _wide(params_adapter(params, frozen), frozen.kernel.dtype)
        return kernel_update(frozen.spec, m)
    items = adapter_items(params, frozen)
    return nest({spec.path: kernel_update(spec, _wide(m)) for spec, m in items})


def _wide(array: ArrayLike, *dtypes: DTypeLike) -> jax.Array:
    """`array` in float32, or in float64 where it or any of `dtypes` is."""
    array = jnp.asarray(array)
    return array.astype(jnp.result_type(jnp.float32, array.dtype, *dtypes))


def merge(
    params: Any, adapters: Any, plan: Plan, dtype: DTypeLike | None = None
) -> Any:
    r"""The base with its adapters folded in: :math:`W' = W + \alpha\, C M D`.

    The merged model computes the same function and costs what the base does. The sum
    is taken in float32 (float64 where the kernel is) and rounded once;
    `diagnostics.merge_loss` says what that loses in a 16-bit kernel.

    Args:
      params: the base's params; any pytree.
      adapters: as `init` makes them.
      plan: the plan that they follow.
      dtype: of the merged kernels; by default that of each kernel.

    Returns:
      A new tree of the same structure; unadapted leaves are the same arrays.

    Raises:
      TypeError: leaves that are no arrays.
      ValueError: adapters or params that do not fit the plan, or M's that hold NaN or
        infinity.

    Example::

      >>> from mora_jax import init, merge, plan
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> layers = plan(params)
      >>> merged = merge(params, init(layers), layers)
      >>> bool((merged["fc"]["kernel"] == params["fc"]["kernel"]).all())
      True
    """
    return _add(params, adapters, plan, 1, dtype)


def unmerge(params: Any, adapters: Any, plan: Plan) -> Any:
    r"""Subtract the update from merged kernels: :math:`W = W' - \alpha\, C M D`.

    Approximate: each kernel comes back to within the rounding of its dtype. To have the
    base exactly, keep it; `merge` leaves it as it was.

    Raises:
      ValueError: as `merge`, and kernels of fewer than 32 bits, which would drift.

    Example::

      >>> from mora_jax import init, merge, plan, unmerge
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> layers = plan(params)
      >>> adapters = jax.tree.map(lambda m: m + 1, init(layers))
      >>> back = unmerge(merge(params, adapters, layers), adapters, layers)
      >>> bool(jnp.allclose(back["fc"]["kernel"], params["fc"]["kernel"]))
      True
    """
    for spec in plan:
        _, kernel = _kernel(named_leaves(params), spec)
        if jnp.finfo(kernel.dtype).bits < 32:
            raise ValueError(
                f"unmerge needs float32 kernels, got {kernel.dtype} at {spec.name!r}; "
                "keep the base instead"
            )
    return _add(params, adapters, plan, -1, None)


def _kernel(leaves: Mapping[str, tuple[Path, Any]], spec: AdapterSpec) -> Any:
    if spec.name not in leaves:
        raise ValueError(
            f"params lack the kernel {spec.name!r}{nearest(spec.name, leaves)}"
        )
    path, kernel = leaves[spec.name]
    if tuple(kernel.shape) != spec.kernel_shape:
        raise ValueError(
            f"{spec.name} must have shape {spec.kernel_shape}, got {kernel.shape}"
        )
    concrete(spec.name, kernel)
    return path, kernel


def _add(
    params: Any, adapters: Any, plan: Plan, sign: int, dtype: DTypeLike | None
) -> Any:
    leaves = named_leaves(params)
    updated: dict[Path, jax.Array] = {}
    for spec, m in adapter_items(adapters, plan):
        path, kernel = _kernel(leaves, spec)
        if not isinstance(m, Tracer) and not np.isfinite(m).all():
            raise ValueError(f"{spec.name}{SUFFIX} holds NaN or infinity")
        delta = sign * kernel_update(spec, _wide(m, kernel.dtype))
        updated[path] = (_wide(kernel) + delta).astype(dtype or kernel.dtype)

    def replace(keys: Any, leaf: Any) -> Any:
        new = updated.get(tuple(key_name(key) for key in keys))
        if new is None:
            return leaf
        return leaf.replace_boxed(new) if isinstance(leaf, AxisMetadata) else new

    return jax.tree_util.tree_map_with_path(
        replace, params, is_leaf=lambda leaf: isinstance(leaf, AxisMetadata)
    )


def ravel_adapters(adapters: Any) -> Float[jax.Array, " parameters"]:
    """All M's as one vector: in the order of their paths, each one row by row.

    Raises:
      ValueError: no adapters.

    Example::

      >>> from mora_jax import ravel_adapters
      >>> ravel_adapters({"fc": {"kernel_mora": jnp.array([[1.0, 2.0], [3.0, 4.0]])}})
      Array([1., 2., 3., 4.], dtype=float32)
    """
    leaves = jax.tree.leaves(adapters)
    if not leaves:
        raise ValueError("adapters hold no M")
    return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])


def unravel_adapters(
    vector: Float[ArrayLike, " parameters"], plan_or_adapters: Any
) -> Tree:
    """Undo `ravel_adapters`.

    Args:
      vector: (parameters,).
      plan_or_adapters: the plan, or adapters of the wanted shapes and dtypes.

    Raises:
      ValueError: a vector of another length.

    Example::

      >>> from mora_jax import init, plan, ravel_adapters, unravel_adapters
      >>> layers = plan({"fc": {"kernel": jnp.ones((8, 8))}})
      >>> vector = ravel_adapters(init(layers))
      >>> unravel_adapters(vector, layers)["fc"]["kernel_mora"].shape
      (8, 8)
      >>> unravel_adapters(vector[:9], layers)
      Traceback (most recent call last):
      ValueError: vector must have shape (64,), got (9,)
    """
    like = plan_or_adapters
    if isinstance(like, Plan):
        like = nest(
            {
                adapter_path(spec): jax.ShapeDtypeStruct(spec.shape, spec.param_dtype)
                for spec in like
            }
        )
    leaves, structure = jax.tree.flatten(like)
    size = sum(leaf.size for leaf in leaves)
    if tuple(vector.shape) != (size,):
        raise ValueError(f"vector must have shape ({size},), got {vector.shape}")
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = jnp.split(vector, ends)
    restored = [
        part.reshape(leaf.shape).astype(leaf.dtype)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, restored)
