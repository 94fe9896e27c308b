"""New adapters of a plan, and their state as Flax serializes it."""

from collections.abc import Mapping
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jaxtyping import PRNGKeyArray

from mora_jax._common.checks import check_key
from mora_jax._layer.adapter import Adapter
from mora_jax._layer.dense import FrozenDense
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree.paths import Found, Tree
from mora_jax._tree.plan import Plan, check_plan

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
    plan, made = check_plan(plan_or_frozen, "plan_or_frozen"), Found()
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
    trained = plan.shapes.trained
    for path, (_, array) in trained.in_base(params).items():
        spec = trained[path].spec
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
