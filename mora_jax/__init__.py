"""MoRA for JAX and Flax: high-rank parameter-efficient fine-tuning.

An adapted layer computes y = x W + b + alpha D(C(x) M) and trains M alone, a small
square matrix between two fixed maps C and D (https://arxiv.org/abs/2405.12130).

What to adapt, and how::

  MoRAConfig            the settings of an adaptation
  plan                  which kernels of a model get an adapter, and which one
  Plan                  the plan: a mapping of paths to AdapterSpecs
  AdapterSpec           how one kernel is adapted
  TrainedArray          an array of the base that trains itself
  summary               a plan, or adapters, as a table
  directions            adapters between the directions of a first gradient
  gradient_bases        the same of gradients that you have
  input_damping         adapters that see less of what ordinary inputs have most of
  own_text              what a language model says of itself, as its ordinary inputs
  gradient_start        adapters that start as one step of gradient descent
  Call                  the inputs of one of several calls that a plan is for
  register_layer        teach linen.wrap and nnx.wrap a layer class
  LeftOutWarning        a plan leaves out kernels that you may have meant
  MoRAWarning           any warning of this library

Adapters, a tree beside the params::

  Adapter               what is trained beside a kernel, and what it means
  init                  the adapters of a plan
  combine               one tree of params and adapters
  split                 the combined tree as params and adapters again

Layers and models::

  mora_apply            one adapted dense layer as a pure function
  FrozenDense           all of that layer except M
  MoRADense             the same as a Linen module
  linen                 adapters for unmodified Linen models
  nnx                   adapters for unmodified NNX models
  mora_jax.qwix         (import it) adapters in models that qwix quantizes
  sharding              adapters on a mesh of devices

Training::

  optimizer             an optax transformation that moves M's alone
  trainable_mask        which leaves of a combined tree train, as booleans
  trainable_labels      the same as labels
  remora                restarts: merge, and train on between other maps

After training::

  merge                 params with the adapters merged in, checked
  fold                  the same without checks of the numbers, for use under jit
  unmerge               the base again, approximately
  delta_weight          what the adapters add to the kernels
  diagnostics           spectra, norms, and what rounding loses
  from_lora             adapters of a LoRA of qwix, Tunix or nnx.LoRA
  save                  write adapters to a directory
  load                  read them
  io                    the same and more: PEFT's files, LoRA, whole checkpoints
  mixing                adapters of one base scaled and summed
  serving               a different adapter for each row of a batch
  mora_jax.maxtext      (import it) adapters in MaxText's own trainer
  mora_jax.vllm         (vLLM imports it) adapters that vLLM serves as they are

What is between M and the layer::

  operators             the fixed maps C and D
  Operator              the class of them all
  make_operator         one of them by its name
  square_rank           the width of M that a budget buys
  products              how layers multiply their input with their kernel
"""

from etils.epy import lazy_api_imports

# Names are imported when they are used: a server with `mora_jax.vllm` lacks JAX.
with lazy_api_imports(globals()):
    from mora_jax import diagnostics as diagnostics
    from mora_jax import io as io
    from mora_jax import linen as linen
    from mora_jax import mixing as mixing
    from mora_jax import nnx as nnx
    from mora_jax import operators as operators
    from mora_jax import products as products
    from mora_jax import remora as remora
    from mora_jax import serving as serving
    from mora_jax import sharding as sharding
    from mora_jax._common.messages import LeftOutWarning as LeftOutWarning
    from mora_jax._common.messages import MoRAWarning as MoRAWarning
    from mora_jax._flax.calls import Call as Call
    from mora_jax._flax.layer_rules import register_layer as register_layer
    from mora_jax._flax.planning import plan as plan
    from mora_jax._layer.adapter import Adapter as Adapter
    from mora_jax._layer.dense import FrozenDense as FrozenDense
    from mora_jax._layer.dense import mora_apply as mora_apply
    from mora_jax._plan.settings import MoRAConfig as MoRAConfig
    from mora_jax._plan.spec import AdapterSpec as AdapterSpec
    from mora_jax._plan.spec import TrainedArray as TrainedArray
    from mora_jax._tree.adapters import combine as combine
    from mora_jax._tree.adapters import init as init
    from mora_jax._tree.adapters import split as split
    from mora_jax._tree.damping import input_damping as input_damping
    from mora_jax._tree.gradient_start import gradient_start as gradient_start
    from mora_jax._tree.gradients import directions as directions
    from mora_jax._tree.gradients import gradient_bases as gradient_bases
    from mora_jax._tree.lora_trees import from_lora as from_lora
    from mora_jax._tree.merge import delta_weight as delta_weight
    from mora_jax._tree.merge import fold as fold
    from mora_jax._tree.merge import merge as merge
    from mora_jax._tree.merge import unmerge as unmerge
    from mora_jax._tree.optim import optimizer as optimizer
    from mora_jax._tree.optim import trainable_labels as trainable_labels
    from mora_jax._tree.optim import trainable_mask as trainable_mask
    from mora_jax._tree.own_text import own_text as own_text
    from mora_jax._tree.plan import Plan as Plan
    from mora_jax._tree.plan import summary as summary
    from mora_jax.io import load as load
    from mora_jax.io import save as save
    from mora_jax.linen import MoRADense as MoRADense
    from mora_jax.operators import Operator as Operator
    from mora_jax.operators import make_operator as make_operator
    from mora_jax.operators import square_rank as square_rank

__version__ = "0.2.0"
del lazy_api_imports
_LAZY = globals()["__dir__"]()
_NAMES = sorted(["__version__", *(name for name in _LAZY if name[0] != "_")])


def __dir__() -> list[str]:
    """The public names alone."""
    return _NAMES
