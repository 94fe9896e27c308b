"""MoRA for JAX and Flax: high-rank parameter-efficient fine-tuning."""

from mora_jax import diagnostics as diagnostics
from mora_jax import io as io
from mora_jax import linen as linen
from mora_jax.config import MoRAConfig as MoRAConfig
from mora_jax.layer import FrozenDense as FrozenDense
from mora_jax.layer import mora_apply as mora_apply
from mora_jax.linen import MoRADense as MoRADense
from mora_jax.linen import register_layer as register_layer
from mora_jax.masks import optimizer as optimizer
from mora_jax.masks import trainable_labels as trainable_labels
from mora_jax.masks import trainable_mask as trainable_mask
from mora_jax.merging import delta_weight as delta_weight
from mora_jax.merging import merge as merge
from mora_jax.merging import unmerge as unmerge
from mora_jax.operators import make_operator as make_operator
from mora_jax.operators import square_rank as square_rank
from mora_jax.planning import Plan as Plan
from mora_jax.planning import plan as plan
from mora_jax.planning import summary as summary
from mora_jax.tree import combine as combine
from mora_jax.tree import init as init
from mora_jax.tree import ravel_adapters as ravel_adapters
from mora_jax.tree import split as split
from mora_jax.tree import unravel_adapters as unravel_adapters
