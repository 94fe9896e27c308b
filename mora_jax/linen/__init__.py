"""Flax Linen: adapters for unmodified models, and a dense layer that has its own.

Public names::

  plan                  which kernels of a model get an adapter, by what layers compute
  wrap                  a model's `apply` with adapters
  MoRADense             `nn.Dense` with an adapter
  register_layer        teach `plan` and `wrap` a layer class
"""

import mora_jax._flax.layers as _layers  # registers them
from mora_jax._flax.layer_rules import register_layer as register_layer
from mora_jax.linen._bound import MoRADense as MoRADense
from mora_jax.linen._model import plan as plan
from mora_jax.linen._model import wrap as wrap
