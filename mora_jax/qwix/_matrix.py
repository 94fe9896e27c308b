"""The M beside a kernel in a running module, and its dropout."""

from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from jaxtyping import PRNGKeyArray

from mora_jax._matrix import init_adapter
from mora_jax._slots import Selected
from mora_jax._spec import SUFFIX, AdapterSpec
from mora_jax.nnx._adapters import named_sharding
from mora_jax.nnx._classes import DROPOUT
from mora_jax.nnx._dropout import AdapterDropout
from mora_jax.nnx._param import MoRAParam, value_of
from mora_jax.qwix import _private
from mora_jax.sharding import adapter_sharding


def m_of(module: Any, name: str, spec: AdapterSpec) -> Any:
    """M, made when the module is initialised; None in an NNX model that was merged.

    Each row of a batch may have an M of its own (`serving.select`).
    """
    kernel = _private.parameters_of(module)[name]
    if isinstance(module, nn.Module):
        assert module.scope is not None
        given = module.scope.get_variable("params", name + SUFFIX)
        if isinstance(given, Selected):  # its arrays have not M's shape
            return given

        def start(key: PRNGKeyArray) -> Any:
            return _private.boxed_as(kernel, init_adapter(spec, key))

        return module.scope.param(name + SUFFIX, start)
    if _private.is_first_call(module) and not hasattr(module, name + SUFFIX):
        _attach(module, name, spec, _private.values_of(kernel))
    m = getattr(module, name + SUFFIX, None)
    return None if m is None else value_of(m)


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
    dropout = getattr(module, DROPOUT)
    if dropout.deterministic:
        return None
    return dropout.key(m, _private.values_of(getattr(module, name)))
