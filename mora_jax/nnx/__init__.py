"""Flax NNX: adapters for unmodified models, and a linear layer that has its own.

Public names::

  plan                  which kernels of a model get an adapter, by what layers compute
  wrap                  a model with adapters
  unwrap                the model without adapters, as it was
  merge_adapters        a plain model with the adapters merged into its kernels
  MoRALinear            `nnx.Linear` with an adapter
  MoRAParam             the variable that holds an M
  register_layer        teach `plan` and `wrap` a layer class
  adapters              the M's as nested dicts
  set_adapters          put M's into a model
  plan_of               the plan that a model follows
  value_and_grad        `nnx.value_and_grad` with respect to the adapters alone
  adapter_optimizer     an `nnx.Optimizer` of the adapters alone
"""

import mora_jax._flax.layers as _layers  # registers them
from mora_jax._flax.layer_rules import register_layer
from mora_jax.nnx._classes import MoRALinear
from mora_jax.nnx._held import MoRAParam, adapters, plan_of, set_adapters
from mora_jax.nnx._model import merge_adapters, plan, unwrap, wrap
from mora_jax.nnx._training import adapter_optimizer, value_and_grad

__all__ = ["MoRALinear", "MoRAParam", "adapter_optimizer", "adapters", "merge_adapters"]
__all__ += ["plan", "plan_of", "register_layer", "set_adapters", "unwrap"]
__all__ += ["value_and_grad", "wrap"]
