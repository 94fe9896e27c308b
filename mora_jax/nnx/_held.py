"""The door to NNX for `qwix`: adapters in modules whose classes stay as they are."""

from mora_jax.nnx._classes import detached as detached
from mora_jax.nnx._param import MoRAParam as MoRAParam
from mora_jax.nnx._param import dropout_key as dropout_key
from mora_jax.nnx._param import held as held
from mora_jax.nnx._param import hold_adapter as hold_adapter
from mora_jax.nnx._state import adapters as adapters
from mora_jax.nnx._state import named_modules as named_modules
from mora_jax.nnx._state import plan_of as plan_of
from mora_jax.nnx._state import traceable as traceable
