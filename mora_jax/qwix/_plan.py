"""The plan that a model with a `MoRAProvider` follows."""

from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree.combined import split
from mora_jax._tree.paths import located_leaves
from mora_jax.nnx._state import plan_of as plan_of_nnx
from mora_jax.qwix._first_call import shapes_of
from mora_jax.qwix._kernels import Run
from mora_jax.qwix._provider import running


def plan_of(model: Any, *args: Any, **kwargs: Any) -> Plan:
    """The plan that a model with a `MoRAProvider` follows.

    It is what `mora_jax.save` and `merge` want. A Linen model is initialised
    abstractly for it, which computes nothing.

    Args:
      model: What `qwix.apply_lora_to_model` returns, of either Flax API.
      *args: The inputs of a call for a Linen model: arrays or shapes, and static
        arguments such as `train`. An NNX model has its adapters and needs none.
      **kwargs: Further inputs, by name.

    Raises:
      TypeError: `model` is not a Flax module.
      ValueError: It has no adapters.

    Example::

      >>> import flax.linen as nn, jax.numpy as jnp, mora_jax, qwix
      >>> provider = mora_jax.qwix.MoRAProvider(module_path=".*", rank=2)
      >>> model = qwix.apply_lora_to_model(nn.Dense(16), provider)
      >>> plan = mora_jax.qwix.plan_of(model, jnp.ones((1, 16)))
      >>> {path: spec.shape for path, spec in plan.items()}
      {'kernel': (8, 8)}
    """
    if isinstance(model, nnx.Module):
        return plan_of_nnx(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Flax module, got {type(model).__name__}")
    runs: list[Run] = []
    token = running.set(runs)
    try:
        rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
        shapes = shapes_of(model.init, rngs, *args, **kwargs)
    finally:
        running.reset(token)
    base, adapters = split(nn.unbox(shapes.get("params", {})))
    specs = {path: spec for run in runs for (path, _), spec in run.specs.items()}
    found = []
    for path, leaf in located_leaves(adapters, "adapters").items():
        kernel = tuple(path[:-1]) + (path[-1].removesuffix(SUFFIX),)
        spec = specs["/".join(kernel)]
        stack = tuple(leaf.shape[: leaf.ndim - len(spec.shape)])
        found.append(spec.stacked(stack, kernel))
    if not found:
        raise ValueError("model has no adapters: give qwix a MoRAProvider")
    size = sum(leaf.size for leaf in jax.tree.leaves(base))
    return Plan(tuple(sorted(found, key=lambda s: s.path)), size, traced=True)
