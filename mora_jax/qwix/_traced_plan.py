"""Plan of a model with a `MoRAProvider`, by a trace that shows all its products."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from mora_jax._jax.traces import fresh_shapes
from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._tree.paths import named_leaves
from mora_jax.nnx._state import plan_of as nnx_plan_of

Specs = dict[str, AdapterSpec]

traced_specs: ContextVar[Specs | None] = ContextVar("traced_specs", default=None)
"""{path of a kernel: its adapter} in a trace of this file; None outside of one."""


def trace(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Specs]:
    """The shapes that a call returns, and the adapters of the kernels it multiplies."""
    # In the trace nothing is quantized, and each operand is known by what made it.
    specs: Specs = {}
    token = traced_specs.set(specs)
    try:
        return fresh_shapes(function, *args, **kwargs), specs
    finally:
        traced_specs.reset(token)


def plan_of(model: Any, *args: Any, **kwargs: Any) -> Plan:
    """The plan that a model with a `MoRAProvider` follows, for `merge` and `save`.

    A Linen model is initialised abstractly for it, which computes nothing.

    Args:
      model: A model of `qwix.apply_lora_to_model`, of either Flax API.
      *args: The inputs of a call for a Linen model: arrays or shapes, and static
        arguments such as `train`. An NNX model has its adapters and needs none.
      **kwargs: Further inputs, by name.

    Raises:
      TypeError: `model` is not a Flax module.
      ValueError: It lacks adapters; or it multiplies by what it makes of a kernel.

    Example: see `merge`.
    """
    if isinstance(model, nnx.Module):
        return nnx_plan_of(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Flax module, got {type(model).__name__}")
    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
    shapes, traced = trace(model.init, rngs, *args, **kwargs)
    if not traced:
        raise ValueError("model has no adapters: give qwix a MoRAProvider")
    leaves, specs = named_leaves(shapes["params"]), []
    for name, spec in traced.items():
        _, m = leaves.pop(name + SUFFIX)  # nn.scan stacks M's; the trace saw one layer
        specs.append(spec.stacked(m.shape, spec.path))
    size = sum(leaf.size for _, leaf in leaves.values())
    return Plan(tuple(sorted(specs, key=lambda s: s.path)), size, traced=True)
