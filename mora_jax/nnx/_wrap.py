"""Adapters in unmodified models, and out of them again."""

from typing import Any, TypeVar

import jax
from flax import nnx
from jax.typing import DTypeLike

from mora_jax._adapters import adapter_items, init
from mora_jax._config import MoRAConfig
from mora_jax._merge import merge
from mora_jax._plan import Plan
from mora_jax._spec import AdapterSpec
from mora_jax.nnx._adapters import (
    adapters,
    layers,
    named_sharding,
    parameters,
    plan_of,
)
from mora_jax.nnx._classes import attach, detach
from mora_jax.nnx._param import MoRAParam
from mora_jax.nnx._plan import check_model, normalised
from mora_jax.nnx._plan import plan as plan_model
from mora_jax.sharding import adapter_sharding

Model = TypeVar("Model", bound=nnx.Module)


def wrap(
    model: Model,
    config_or_plan: MoRAConfig | Plan | None = None,
    *,
    rngs: nnx.Rngs | None = None,
    seed: int = 0,
) -> Model:
    """An unmodified model with adapters.

    Each planned layer gets a `MoRAParam` beside its kernel, and a class that adds the
    update to what its methods return. All else is as it was: names, types and the
    paths of the parameters, so that a checkpoint of the base loads into it.

    With `MoRAConfig(dropout=...)` the model drops in training until `model.eval()`,
    which sampling and evaluation need; `model.train()` turns it on again. No generator
    is in the model: what a layer drops depends on `seed`, on its M and on its kernel.
    So the masks change whenever an optimizer changes M, and differ between layers; but
    several calls at one state, such as the microbatches of one step, drop the same
    positions.

    Args:
      model: any NNX module. It stays as it is, and shares its arrays with the result:
        a step to which the whole state of the result is donated deletes the base, too.
        Donate the adapters alone, the first part of `nnx.split(model, MoRAParam, ...)`;
        see docs/training-nnx.md.
      config_or_plan: What to adapt, and how: a config, None for the defaults, or a
        plan, as `nnx.plan` makes it.
      rngs: The source of the key for `init="gaussian"`.
      seed: The seed of the dropout masks.

    Returns:
      A new model. Its trainable state is `nnx.state(model, MoRAParam)`. Where a kernel
      is on a mesh of devices, its M is too, as `sharding.adapter_shardings` says.

    Raises:
      TypeError, ValueError: as `nnx.plan`; a Gaussian start without `rngs`; a plan that
        does not fit the model; a `seed` that is no number from 0 to 2^32 - 1.

    Example::

      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mora_jax import MoRAConfig
      >>> from mora_jax.nnx import wrap
      >>> layers = [nnx.Linear(16, 16, rngs=nnx.Rngs(k)) for k in range(2)]
      >>> model, x = nnx.Sequential(*layers), jnp.ones((1, 16))
      >>> adapted = wrap(model, MoRAConfig(rank=2))
      >>> bool((adapted(x) == model(x)).all())
      True
    """
    check_model(model)
    chosen = config_or_plan
    if not isinstance(chosen, Plan):
        chosen = plan_model(model, chosen)
    for name, how in normalised(model, chosen).items():  # a plan of shapes may hold it
        raise ValueError(f"{name}: {how}; exclude it")
    key = None
    if rngs is not None and any(spec.init == "gaussian" for spec in chosen.specs):
        key = rngs.params()
    model = nnx.clone(model)
    modules = dict(layers(model))
    for spec, m in adapter_items(init(chosen, key), chosen):
        module = modules.get(spec.path[:-1])
        kernel = getattr(module, spec.path[-1], None)
        shape = tuple(kernel.shape) if isinstance(kernel, nnx.Variable) else None
        if module is None or shape != spec.kernel_shape:
            raise ValueError(
                f"the plan has a kernel of shape {spec.kernel_shape} at {spec.name!r}, "
                f"the model has {shape}"
            )
        m = _placed(m, spec, kernel)
        attach(module, spec, m, seed=seed, traced=chosen.traced)
    return model


def _placed(m: jax.Array, spec: AdapterSpec, kernel: Any) -> jax.Array:
    """M on the mesh that its kernel is on, so that no step has to move it there."""
    sharding = named_sharding(kernel)
    return jax.device_put(m, adapter_sharding(spec, sharding)) if sharding else m


def unwrap(model: Model) -> Model:
    """The model without its adapters, as it was before `wrap`.

    Raises:
      ValueError: `model` has no adapters.

    Example::

      >>> from flax import nnx
      >>> from mora_jax.nnx import unwrap, wrap
      >>> model = nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
      >>> type(unwrap(wrap(model)).layers[0]) is nnx.Linear
      True
    """
    plan_of(model)
    model = nnx.clone(model)
    for _, module in list(layers(model)):
        if any(isinstance(value, MoRAParam) for value in vars(module).values()):
            detach(module)
    return model


def merge_adapters(
    model: Model, dtype: DTypeLike | None = None, *, any_base: bool = False
) -> Model:
    r"""The model with its adapters folded in: :math:`W' = W + \alpha\, C M D`.

    Args:
      model: as `wrap` makes it. It stays as it is.
      dtype: of the merged kernels; by default that of each kernel.
      any_base: Merge into other weights than those that the adapters were trained on,
        too. Adapters know them if `save` was given `params`.

    Returns:
      A new model of the plain classes, which computes the same.

    Raises:
      ValueError: `model` has no adapters; M's that hold NaN or infinity; kernels of
        another base, without `any_base`.

    Example::

      >>> from flax import nnx
      >>> from mora_jax.nnx import merge_adapters, wrap
      >>> model = nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
      >>> merged = merge_adapters(wrap(model))
      >>> bool((merged.layers[0].kernel[...] == model.layers[0].kernel[...]).all())
      True
    """
    plain = unwrap(model)
    plan = plan_of(model)
    params = parameters(plain)
    merged = merge(params, adapters(model), plan, dtype, any_base=any_base)
    nnx.update(plain, merged)
    return plain
