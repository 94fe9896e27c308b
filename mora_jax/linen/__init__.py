"""Flax Linen: a dense layer with its adapter, and adapters for unmodified models."""

import mora_jax.linen._rules as _rules  # registers Flax's own layers
from mora_jax._flax.layer_rules import register_layer as register_layer
from mora_jax.linen._dense import MoRADense as MoRADense
from mora_jax.linen._plan import plan as plan
from mora_jax.linen._wrap import wrap as wrap
