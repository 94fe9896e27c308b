"""Flax NNX: a linear layer with its adapter, and adapters for unmodified models."""

import mora_jax.nnx._rules as _rules  # registers Flax's own layers
from mora_jax._flax.layer_rules import register_layer as register_layer
from mora_jax.nnx._adapters import adapters as adapters
from mora_jax.nnx._adapters import plan_of as plan_of
from mora_jax.nnx._adapters import set_adapters as set_adapters
from mora_jax.nnx._linear import MoRALinear as MoRALinear
from mora_jax.nnx._param import MoRAParam as MoRAParam
from mora_jax.nnx._plan import plan as plan
from mora_jax.nnx._training import adapter_optimizer as adapter_optimizer
from mora_jax.nnx._training import value_and_grad as value_and_grad
from mora_jax.nnx._wrap import merge_adapters as merge_adapters
from mora_jax.nnx._wrap import unwrap as unwrap
from mora_jax.nnx._wrap import wrap as wrap
