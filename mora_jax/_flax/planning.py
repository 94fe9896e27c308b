"""A plan: the choice of kernels to adapt, and of the adapter for each of them."""

import math
from typing import Any

from mora_jax._flax.candidates import Candidates
from mora_jax._flax.left_out import left_out_of, warn_of
from mora_jax._flax.survey import Survey
from mora_jax._plan.config import MoRAConfig, check_config
from mora_jax._plan.plan import Plan
from mora_jax._tree.paths import named_leaves, refuse_variables


def plan(params_or_shapes: Any, config: MoRAConfig | None = None) -> Plan:
    """Choose the kernels to adapt, and an operator and square rank for each.

    The plan goes by names and shapes alone: a kernel of two axes is (in, out), and
    Flax's attention kernels of three axes are known by name. `linen.plan` and
    `nnx.plan` ask the model itself.

    Args:
      params_or_shapes: The model's params, any pytree of arrays, or its
        `jax.eval_shape`. Paths are the slash-joined keys.
      config: The settings; None for the defaults.

    Raises:
      TypeError: A leaf is not an array, or a target or an array to train is not
        floating-point.
      ValueError: A pattern matches nothing, the meaning of a kernel's axes is not
        known, an array is found twice or shared by two paths, or is to be adapted and
        trained, or a rank does not fit.

    Example::

      >>> import jax.numpy as jnp
      >>> import mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}}
      >>> print(mora_jax.plan(params, mora_jax.MoRAConfig(rank=2)))
      path       in -> out  operator    r   q  scale  parameters  of base
      fc/kernel   64 -> 64  rotation  2.0  16      4         256    6.15%
      1 adapter: 256 trainable parameters, 6.15% of 4,160
    """
    config = check_config(config, "plan(params, config)")
    refuse_variables(params_or_shapes)
    return plan_surveyed(params_or_shapes, config, None)


def plan_surveyed(params: Any, config: MoRAConfig, survey: Survey | None) -> Plan:
    """`plan` for a model that is known by a survey, if there is one."""
    model = Candidates(named_leaves(params), config, survey)
    targets = model.targets()
    trained = model.trained(targets)
    model.refuse_idle_overrides(targets, trained)
    specs = tuple(map(model.adapter, targets))
    left_out = left_out_of(model, {*targets, *(array.name for array in trained)})
    if model.by_default:
        warn_of(left_out)
    return Plan(
        specs,
        base_parameters=sum(math.prod(a.shape) for _, a in model.leaves.values()),
        traced=survey is not None and survey.uses is not None,
        left_out=left_out,
        unproven=survey.unproven(targets) if survey is not None else (),
        trained=trained,
    )
