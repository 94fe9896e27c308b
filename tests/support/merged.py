"""The adapted and the merged model compared by numbers, beside the trace check."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import random_like, wide

import mora_jax
from mora_jax import Plan
from mora_jax import nnx as mora_nnx
from mora_jax._flax.proofs import unchecked
from mora_jax._tree.paths import Found, adapters_in


@unchecked()  # by a trace: numbers are to show what layers do
def merge_errors(model: Any, variables: Any, plan: Plan, *inputs: Any) -> dict:
    """{kernel: |adapted - merged| / |adapted - base|}, each with its adapter alone.

    The delta is as large as the kernel. `variables` are None for NNX.
    """
    is_linen, errors = isinstance(model, nn.Module), {}
    state = variables["params"] if is_linen else nnx.state(model, nnx.Param)
    params = state if is_linen else nnx.to_pure_dict(state)
    start = adapters_in(mora_jax.init(plan, params=params))
    zeros = Found({p: jax.tree.map(jnp.zeros_like, a) for p, a in start.items()})
    zeros |= start.trained
    both = _in_linen if is_linen else _in_nnx
    base, _ = both(model, variables, plan, zeros.tree(), inputs)
    for path, (_, kernel) in start.kernels.in_base(params).items():
        own = random_like(start[path])
        factor = np.linalg.norm(wide(kernel)) / np.linalg.norm(wide(own.delta()))
        own = own.replace(m=own.operator.scaled(own.m, float(factor)))
        adapters = Found({**zeros, path: own}).tree()
        adapted, merged = both(model, variables, plan, adapters, inputs)
        difference, effect = (np.linalg.norm(adapted - y) for y in (merged, base))
        # If the merged model alone has an effect, all of it is a difference: 1.
        errors["/".join(path)] = difference / (effect or np.linalg.norm(merged - base))
    return errors


def _in_linen(model: Any, variables: Any, plan: Plan, adapters: Any, inputs: Any):
    merged = mora_jax.merge(variables["params"], adapters)
    apply = mora_jax.linen.wrap(model, plan)
    adapted = apply(adapters, variables, *inputs)
    return _flat(adapted), _flat(model.apply({**variables, "params": merged}, *inputs))


def _in_nnx(model: Any, _: Any, plan: Plan, adapters: Any, inputs: Any):
    adapted = mora_nnx.wrap(model, plan)
    mora_nnx.set_adapters(adapted, adapters)
    merged = mora_nnx.merge_adapters(adapted)
    return _flat(adapted(*inputs)), _flat(merged(*inputs))


def _flat(outputs: Any) -> np.ndarray:
    return np.concatenate([wide(y).ravel() for y in jax.tree.leaves(outputs)])
