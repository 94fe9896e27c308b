"""The tree of adapters: made for a plan, and read by one."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.flatten_util import ravel_pytree
from jax.typing import DTypeLike
from jaxtyping import Float, PRNGKeyArray

from mora_jax._common.checks import as_jax_array, check_key, check_leaf
from mora_jax._common.types import ArrayLike, Path
from mora_jax._layer.dense import FrozenDense
from mora_jax._plan.plan import Plan, check_plan
from mora_jax._plan.spec import SUFFIX, AdapterSpec, Items
from mora_jax._tree import paths
from mora_jax._tree.base_digest import check_base

Tree = dict[str, Any]

# Compiled, since a plan has hundreds of kernels, and each key is several operations.
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
      key: The key for `init="gaussian"`, from which each M's is made by its path.
      params: The base's params, needed where `MoRAConfig(train=...)` copies arrays.

    Returns:
      Nested dicts as in the base's params, with each M at `<kernel>_mora`, and each
      copy at its own path; for one layer `{"kernel_mora": M}`.

    Raises:
      TypeError: An argument, or a leaf of `params`, is of another kind.
      ValueError: `init="gaussian"` lacks a key, or `params` lack an array to train.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}
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
    plan, arrays = check_plan(plan_or_frozen, "plan_or_frozen"), {}
    for spec in plan.specs:
        # By the path, so that an M does not depend on which other kernels are adapted.
        number = np.uint32(crc32(spec.name.encode()))
        own = None if key is None else _fold_in(key, number)
        arrays[paths.adapter_path(spec)] = init_adapter(spec, own)
    why = "from what the base has there; write init(plan, params=params)"
    for array, base in trained_in_base(plan, params, why):
        # A copy in any case: a step may be given the adapters to overwrite.
        arrays[array.path] = jnp.array(base, dtype=array.dtype, copy=True)
    return nest(arrays)


def init_adapter(spec: AdapterSpec, key: PRNGKeyArray | None = None) -> jax.Array:
    """M at its start, of the shape `spec.shape`."""
    if key is None and spec.operator.drawn:
        key = start_key(spec)
    return spec.operator.start(spec.stack_shape, spec.init, key, spec.param_dtype)


def start_key(spec: AdapterSpec) -> PRNGKeyArray:
    """The key that the plan determines for what is random at the start."""
    # The same on every platform, whatever JAX's default kind of key is.
    seed = crc32(repr((spec.path, spec.operator)).encode())
    return jax.random.key(seed, impl="threefry2x32")


def trained_in_base(plan: Plan, params: Any, why: str, any_base: bool = True) -> Items:
    """Each array that trains itself with the base's; `why` says what that is for."""
    if not plan.trained:
        return []
    if params is None:
        trained = plan.trained[0].name
        raise ValueError(
            f"params must be given, since the plan trains {trained!r} itself, {why}"
        )
    leaves = base_leaves(params, plan.specs, any_base)
    pairs = [(array, paths.find_part(leaves, array)[1]) for array in plan.trained]
    return [(array, as_jax_array(f"{array.name} in params", a)) for array, a in pairs]


def base_leaves(
    params: Any, specs: Sequence[AdapterSpec], any_base: bool
) -> dict[str, tuple[Path, Any]]:
    """Leaves of params, which must be the base alone, and the one that specs know."""
    leaves = paths.named_leaves(params)
    refuse_combined(leaves, specs)
    if not any_base:
        check_base(specs, {name: leaf for name, (_, leaf) in leaves.items()})
    return leaves


def refuse_combined(leaves: Collection[str], specs: Iterable[AdapterSpec]) -> None:
    """Raise if the paths of params include adapters: they are not the base alone."""
    for name in (f"{spec.name}{SUFFIX}" for spec in specs):
        if name in leaves:
            rule = "give the base alone, as split(params)[0]"
            raise ValueError(f"params hold the adapter {name}: {rule}")


def nest(items: Mapping[Path, Any]) -> Tree:
    """{path: leaf} as nested dicts."""
    return unflatten_dict(items)


def adapter_items(
    adapters: Any, plan: Plan, *, by_row: bool = False
) -> list[tuple[AdapterSpec, Any]]:
    """Each spec with its M; with `by_row` each row of a batch may have one."""
    leaves = _leaves_of(plan, adapters)
    pairs = ((spec, leaves[paths.adapter_path(spec)]) for spec in plan.specs)
    return [(spec, paths.adapter_of(m, spec, by_row)) for spec, m in pairs]


def trained_items(adapters: Any, plan: Plan) -> Items:
    """Each array that trains itself with its copy, checked as in `adapter_items`."""
    leaves = _leaves_of(plan, adapters)
    items = [(array, paths.unboxed(leaves[array.path])) for array in plan.trained]
    for array, copy in items:
        check_leaf(copy, f"{array.name} in the adapters", array.shape)
    return items


def _leaves_of(plan: Plan, adapters: Any) -> dict[Path, Any]:
    """{path: leaf} of the adapters: a leaf for each part of the plan, and no other."""
    leaves = paths.located_leaves(adapters, "adapters")
    known = {paths.adapter_path(spec): "has" for spec in check_plan(plan).specs}
    remedy = "trains: init(plan, params=params) and split(tree, plan) give it"
    known |= {array.path: remedy for array in plan.trained}
    for path, verb in known.items():
        if path not in leaves:
            kernels = {spec.path for spec in plan.specs}
            swapped = any({path, path[1:]} & kernels for path in leaves)
            verb += "; they hold kernels: were params and adapters swapped?" * swapped
            raise ValueError(f"adapters lack {'/'.join(path)!r}, which the plan {verb}")
    for path in leaves:
        if path not in known:
            raise ValueError(f"adapters hold {'/'.join(path)!r}, which the plan lacks")
    return leaves


def with_trained(params: Any, trained: Items, dtype: DTypeLike | None = None) -> Any:
    """The params with the trained copies, in `dtype` or in the base's dtypes."""
    if not trained:
        return params
    leaves, new = paths.named_leaves(params), {}
    for array, copy in trained:
        path, leaf = paths.find_part(leaves, array)
        new[path] = as_jax_array(array.name, copy).astype(dtype or leaf.dtype)
    return paths.replace_leaves(params, new)


def ravel_adapters(adapters: Any) -> Float[jax.Array, " parameters"]:
    """All M's and trained arrays as one vector, in the order of their paths, by rows.

    Raises:
      TypeError, ValueError: `adapters` is not a tree of arrays, or holds none.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> adapters = {"fc": {"kernel_mora": jnp.array([[1.0, 2.0], [3.0, 4.0]])}}
      >>> mora_jax.ravel_adapters(adapters)
      Array([1., 2., 3., 4.], dtype=float32)
    """
    if not (leaves := paths.located_leaves(adapters, "adapters")):
        raise ValueError("adapters hold no M")
    # A state of NNX may sort its layers as numbers. Nested dicts have them by name.
    return ravel_pytree(nest({path: paths.unboxed(m) for path, m in leaves.items()}))[0]


def unravel_adapters(
    vector: Float[ArrayLike, " parameters"], plan_or_adapters: Any
) -> Any:
    """Undo `ravel_adapters`.

    Args:
      vector: All M's as one vector, (parameters,).
      plan_or_adapters: The plan, or adapters of the wanted shapes and dtypes.

    Returns:
      Nested dicts for a plan, otherwise a tree like the given adapters.

    Raises:
      TypeError: The second argument is neither a plan nor a tree of arrays or shapes.
      ValueError: The vector has another length.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> plan = mora_jax.plan({"fc": {"kernel": jnp.ones((8, 8))}})
      >>> vector = mora_jax.ravel_adapters(mora_jax.init(plan))
      >>> mora_jax.unravel_adapters(vector, plan)["fc"]["kernel_mora"].shape
      (8, 8)
    """
    like = plan_or_adapters
    if isinstance(like, Plan):
        shape = jax.ShapeDtypeStruct
        ms = {paths.adapter_path(s): shape(s.shape, s.param_dtype) for s in like.specs}
        like = nest(ms | {a.path: shape(a.shape, a.dtype) for a in like.trained})
    leaves = paths.named_leaves(like, "plan_or_adapters").values()
    zeros = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in leaves}
    whole, unravel = ravel_pytree(nest(zeros))
    if getattr(vector, "shape", None) != whole.shape:
        got = getattr(vector, "shape", type(vector).__name__)
        raise ValueError(f"vector must have shape {whole.shape}, got {got}")
    restored = unravel(jnp.asarray(vector, whole.dtype))
    return paths.replace_leaves(like, paths.located_leaves(restored))
