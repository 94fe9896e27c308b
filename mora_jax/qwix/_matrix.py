"""The M beside a kernel in a running module, and its dropout."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from jaxtyping import PRNGKeyArray

from mora_jax._common.types import Path
from mora_jax._layer.slots import Selected
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._tree.start import init_adapter
from mora_jax.nnx._adapters import named_sharding
from mora_jax.nnx._classes import DROPOUT
from mora_jax.nnx._dropout import AdapterDropout
from mora_jax.nnx._param import MoRAParam, is_m, value_of
from mora_jax.qwix import _private
from mora_jax.sharding import adapter_sharding


def m_of(module: Any, name: str, spec: AdapterSpec, again: bool) -> Any:
    """M, made when the module is initialised; None in an NNX model that was merged.

    Each row of a batch may have an M of its own (`serving.select`).

    Args:
      module: The module that runs.
      name: The name of its kernel.
      spec: The adapter.
      again: Whether this call of the model has asked for the M before.

    Raises:
      ValueError: An NNX module has an M from before.
    """
    kernel = _private.parameters_of(module)[name]
    if isinstance(module, nn.Module):
        assert module.scope is not None
        given = module.scope.get_variable("params", name + SUFFIX)
        if isinstance(given, Selected):  # its arrays have not M's shape
            return given
        # A scope gives a parameter once, unless its module is called again.
        if again and module.scope.name_reserved(name + SUFFIX, "params"):
            return nn.unbox(given)

        def start(key: PRNGKeyArray) -> Any:
            return _private.boxed_as(kernel, init_adapter(spec, key))

        return module.scope.param(name + SUFFIX, start)
    if _private.is_first_call(module) and not again:
        if hasattr(module, name + SUFFIX):
            raise ValueError(
                f"{spec.name}: model has an M there already: give qwix a model without "
                "adapters, such as the base or what mora_jax.qwix.merge_adapters makes"
            )
        _attach(module, name, spec, _private.values_of(kernel))
    m = getattr(module, name + SUFFIX, None)
    return None if m is None else value_of(m)


def spec_of(module: Any, path: Path) -> AdapterSpec | None:
    """What an M of an NNX module was made for, which may be another model's."""
    m: Any = getattr(module, path[-1] + SUFFIX, None)
    return dataclasses.replace(m.spec, path=path) if is_m(m) else None


def _attach(module: nnx.Module, name: str, spec: AdapterSpec, kernel: Any) -> None:
    """Give an NNX module its M, on the mesh of its kernel."""
    gaussian = spec.init == "gaussian"
    m = init_adapter(spec, _private.rngs_of(module).params() if gaussian else None)
    if sharding := named_sharding(kernel):
        m = jax.device_put(m, adapter_sharding(spec, sharding))
    setattr(module, name + SUFFIX, MoRAParam.of(spec, m))
    if spec.dropout > 0:
        setattr(module, DROPOUT, AdapterDropout(spec.dropout, 0))


def dropout_key(
    module: Any, name: str, spec: AdapterSpec, m: Any
) -> PRNGKeyArray | None:
    """The key of a call's dropout; None for no dropout."""
    if spec.dropout == 0:
        return None
    if isinstance(module, nn.Module):
        return module.make_rng("dropout") if module.has_rng("dropout") else None
    dropout = getattr(module, DROPOUT, None)
    if dropout is None or dropout.deterministic:
        return None
    return dropout.key(m, _private.values_of(getattr(module, name)))
