"""Adapters for models that qwix quantizes (QMoRA); `pip install 'mora-jax[qwix]'`.

Public names, beside `mora_jax.nnx.adapters` and `set_adapters`, or `mora_jax.split` and
`combine`, for the M's::

  MoRAProvider          what `qwix.apply_lora_to_model` takes
  MoRARule              the settings of the modules that match a pattern
  plan_of               the plan that a model follows
  dequantize            the base as floating-point arrays, for `mora_jax.merge`
  merge_quantized       kernels of 4 or 8 bits with their deltas, for `remora.renewing`
  merge_adapters        an NNX model with its adapters merged into it
"""

# First: its error says what to install.
from mora_jax.qwix._private import dequantize as dequantize
from mora_jax.qwix._private import merge_adapters as merge_adapters
from mora_jax.qwix._private import merge_quantized as merge_quantized
from mora_jax.qwix._provider import MoRAProvider as MoRAProvider
from mora_jax.qwix._provider import MoRARule as MoRARule
from mora_jax.qwix._provider import plan_of as plan_of
