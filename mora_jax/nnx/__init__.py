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
from mora_jax._flax.layer_rules import register_layer as register_layer
from mora_jax.nnx._classes import MoRALinear as MoRALinear
from mora_jax.nnx._held import MoRAParam as MoRAParam
from mora_jax.nnx._held import adapters as adapters
from mora_jax.nnx._held import plan_of as plan_of
from mora_jax.nnx._held import set_adapters as set_adapters
from mora_jax.nnx._model import merge_adapters as merge_adapters
from mora_jax.nnx._model import plan as plan
from mora_jax.nnx._model import unwrap as unwrap
from mora_jax.nnx._model import wrap as wrap
from mora_jax.nnx._training import adapter_optimizer as adapter_optimizer
from mora_jax.nnx._training import value_and_grad as value_and_grad
