"""The tree of adapters: made for a plan, checked, and as one vector."""

from collections.abc import Iterable, Mapping
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jax.flatten_util import ravel_pytree
from jax.typing import DTypeLike
from jaxtyping import Float, PRNGKeyArray

from mora_jax._common.checks import as_jax_array, check_finite, check_key
from mora_jax._common.types import ArrayLike, Path
from mora_jax._layer.adapter import Adapter
from mora_jax._layer.dense import FrozenDense
from mora_jax._plan.spec import SUFFIX, AdapterSpec, TrainedArray, check_same
from mora_jax._tree import paths
from mora_jax._tree.base_digest import check_base
from mora_jax._tree.paths import Found, Tree, adapters_in, nest
from mora_jax._tree.plan import Plan, check_plan
from mora_jax.operators import Operator

# Compiled, since a plan has hundreds of kernels, and each key is several operations.
_fold_in = jax.jit(jax.random.fold_in)


def init(
    plan_or_frozen: Plan | FrozenDense,
    key: PRNGKeyArray | None = None,
    *,
    params: Any = None,
) -> Tree:
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
      {'kernel_mora': Adapter(rotation, float32[8, 8]),
       'bias': Adapter(trained, float32[8])}
    """
    if isinstance(key, Mapping):
        raise TypeError(
            f"key must be a JAX PRNG key, got {type(key).__name__}: if these are the "
            "base's params, write init(plan, params=params)"
        )
    check_key(key)
    if isinstance(plan_or_frozen, FrozenDense):
        spec = plan_or_frozen.spec
        return {f"kernel{SUFFIX}": Adapter(init_m(spec, ("kernel",), key), spec)}
    plan, made = check_plan(plan_or_frozen, "plan_or_frozen"), Found()
    for path, spec in plan.specs.items():
        # By the path, so that an M does not depend on which other kernels are adapted.
        number = np.uint32(crc32("/".join(path).encode()))
        own = None if key is None else _fold_in(key, number)
        made[path] = Adapter(init_m(spec, path, own), spec)
    if plan.trained and params is None:
        raise ValueError(
            f"params must be given, since the plan trains {[*plan.trained][0]!r} "
            "itself, from what the base has there; write init(plan, params=params)"
        )
    leaves = base_leaves(params) if plan.trained else {}
    for path, spec in plan.parts.items():
        if not isinstance(spec, AdapterSpec):
            made[path] = trained_copy(leaves, path, spec)
    return made.tree()


def trained_copy(
    leaves: Mapping[str, tuple[Path, Any]], path: Path, spec: TrainedArray
) -> Adapter:
    """An array of the base as an adapter, which trains itself."""
    # A copy in any case: a step may be given the adapters to overwrite.
    _, base = base_array(leaves, path, spec)
    return Adapter(jnp.array(base, dtype=spec.dtype, copy=True), spec)


def init_m(spec: AdapterSpec, path: Path, key: PRNGKeyArray | None = None) -> jax.Array:
    """The M of the kernel at `path` at its start, of the shape `spec.shape`."""
    if key is None and not spec.operator.linear:
        key = start_key(path, spec.operator)
    return spec.operator.start(spec.stack_shape, spec.init, key, spec.param_dtype)


def start_key(path: Path, operator: Operator) -> PRNGKeyArray:
    """The key that a plan determines for what is random at the start."""
    # The same on every platform, whatever JAX's default kind of key is.
    seed = crc32(repr((path, operator)).encode())
    return jax.random.key(seed, impl="threefry2x32")


def base_leaves(
    params: Any, adapters: Mapping[Path, Adapter] | None = None
) -> dict[str, tuple[Path, Any]]:
    """Leaves of params, which must be the base alone that adapters were trained on."""
    leaves = paths.named_leaves(params)
    for name in leaves:
        if name.endswith(SUFFIX):
            rule = "give the base alone, as split(params)[0]"
            raise ValueError(f"params hold the adapter {name}: {rule}")
    check_base(adapters or {}, leaves)
    return leaves


def base_array(
    leaves: Mapping[str, tuple[Path, Any]], path: Path, spec: Any
) -> tuple[Path, jax.Array]:
    """`find_array`, which must be an array, and not just its shape."""
    place, leaf = paths.find_array(leaves, path, spec)
    return place, as_jax_array(f"{'/'.join(path)} in params", leaf)


def checked_adapters(adapters: Any, *, finite: bool = True) -> Found:
    """`adapters_in`, all of them JAX arrays; with `finite` of finite numbers."""
    found = adapters_in(adapters)
    for path, adapter in found.items():
        name = "/".join(paths.place_of(path, adapter.spec))
        if not adapter.of_kernel:
            name += " in the adapters"
        m = as_jax_array(name, adapter.m)
        if finite:
            check_finite(m, name)
        found[path] = adapter.replace(m=m)
    return found


def checked_sequence(adapters: Any) -> list[Found]:
    """`checked_adapters` of a sequence, which must have at least one of them."""
    rule = "adapters must be a sequence of adapters, as init makes them"
    if isinstance(adapters, Mapping) or not isinstance(adapters, Iterable):
        raise TypeError(f"{rule}, got {type(adapters).__name__}")
    if not (found := [checked_adapters(tree) for tree in adapters]):
        raise ValueError("adapters must be one at least, such as init(plan), got none")
    return found


def check_same_meaning(found: Found, first: Found, otherwise: str = "") -> None:
    """Raise unless adapters have the kernels and the meaning of the `first` ones."""
    for path in {**found, **first}:
        name = "/".join(path)
        if path not in found or path not in first:
            rule = "adapters must be of the same kernels"
            raise ValueError(f"{rule}, and {name!r} is not")
        one, other = found[path].spec, first[path].spec
        if type(one) is not type(other):
            raise ValueError(f"adapters must mean the same, and {name!r} does not")
        if isinstance(one, AdapterSpec):
            check_same(name, one, other, otherwise)


def refuse_nonlinear(specs: Mapping[Path, Any], why: str) -> None:
    """Raise if a delta is not linear in what is trained; `why` it has to be."""
    for path, spec in specs.items():
        if isinstance(spec, AdapterSpec) and not spec.operator.linear:
            raise ValueError(
                f"{'/'.join(path)}: the delta of {spec.operator.name!r} is not linear "
                f"in what is trained, {why}"
            )


def with_trained(params: Any, found: Found, dtype: DTypeLike | None = None) -> Any:
    """The params with the trained copies, in `dtype` or in the base's dtypes."""
    if not (trained := found.trained):
        return params
    leaves, new = paths.named_leaves(params), {}
    for path, adapter in trained.items():
        place, leaf = paths.find_array(leaves, path, adapter.spec)
        copy = as_jax_array("/".join(path), adapter.m)
        new[place] = copy.astype(dtype or leaf.dtype)
    return paths.replace_leaves(params, new)


def refuse_trained(parts: Mapping[Path, Any], why: str) -> None:
    """Raise if there are trained arrays; `why` says what cannot be done with them."""
    for path, part in parts.items():
        if not isinstance(getattr(part, "spec", part), AdapterSpec):
            raise ValueError(f"{'/'.join(path)}: this array is trained itself, {why}")


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
      Adapters: nested dicts for a plan, otherwise a tree like the given one.

    Raises:
      TypeError: The second argument is neither a plan nor a tree of arrays or shapes.
      ValueError: The vector has another length.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> plan = mora_jax.plan({"fc": {"kernel": jnp.ones((8, 8))}})
      >>> vector = mora_jax.ravel_adapters(mora_jax.init(plan))
      >>> mora_jax.unravel_adapters(vector, plan)["fc"]["kernel_mora"]
      Adapter(rotation, float32[8, 8])
    """
    like = plan_or_adapters
    if isinstance(like, Plan):
        like = shapes_of(like)
    leaves = paths.located_leaves(like, "plan_or_adapters")
    if not leaves:
        raise ValueError("plan_or_adapters holds no array")
    for path, leaf in leaves.items():
        if not all(hasattr(array, "shape") for array in jax.tree.leaves(leaf)):
            kind = f"{type(leaf).__name__} at {'/'.join(path)!r}"
            raise TypeError(f"plan_or_adapters must hold arrays only, got {kind}")
    arrays = nest({path: paths.unboxed(leaf) for path, leaf in leaves.items()})
    zeros = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), arrays)
    whole, unravel = ravel_pytree(zeros)
    if getattr(vector, "shape", None) != whole.shape:
        got = getattr(vector, "shape", type(vector).__name__)
        raise ValueError(f"vector must have shape {whole.shape}, got {got}")
    restored = unravel(jnp.asarray(vector, whole.dtype))
    return paths.replace_leaves(like, paths.located_leaves(restored))


def shapes_of(plan: Plan) -> Tree:
    """The adapters of a plan with shapes instead of arrays."""
    made = Found()
    for path, spec in plan.parts.items():
        dtype = spec.param_dtype if isinstance(spec, AdapterSpec) else spec.dtype
        made[path] = Adapter(jax.ShapeDtypeStruct(spec.shape, dtype), spec)
    return made.tree()


def _restored(adapter: Adapter, state: Any) -> Adapter:
    m: Any = serialization.from_state_dict(adapter.m, state)
    shapes = [getattr(array, "shape", None) for array in (m, adapter.m)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the state of {adapter} must have its shape, got {shapes[0]}")
    return adapter.replace(m=m)


# A state is the array alone, and what it means comes from the target.
serialization.register_serialization_state(
    Adapter, lambda adapter: serialization.to_state_dict(adapter.m), _restored
)
