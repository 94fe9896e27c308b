"""M beside a kernel in a running module, and its dropout."""

from typing import Any

import flax.linen as nn
from flax import nnx
from jaxtyping import PRNGKeyArray

from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._tree.paths import adapter_of
from mora_jax._tree.start import init_adapter
from mora_jax.nnx import _held
from mora_jax.qwix import _private


def m_of(module: Any, spec: AdapterSpec) -> Any:
    """M, or one for each row of a batch; None in an NNX model that has none.

    A Linen module makes its M when it is initialised.
    """
    if not isinstance(module, nn.Module):
        adapter = _held.held(module, spec.path)
        return adapter and adapter[1]
    assert module.scope is not None
    kernel, name = spec.path[-1], spec.path[-1] + SUFFIX
    given = module.scope.get_variable("params", name)
    if given is not None:
        return adapter_of(given, spec, by_row=True)

    def start(key: PRNGKeyArray) -> Any:
        box = _private.parameters_of(module)[kernel]
        return _private.boxed_as(box, init_adapter(spec, key))

    return module.scope.param(name, start)  # raises if a call lacks M


def attach(model: nnx.Module, spec: AdapterSpec) -> None:
    """Give an NNX model an M, in the first call.

    Raises:
      ValueError: The model has an M there, or another kernel than it multiplies.
    """
    module = dict(_held.named_modules(model))[spec.path[:-1]]
    kernel = getattr(module, spec.path[-1])
    if _held.held(module, spec.path):
        raise ValueError(
            f"{spec.name}: model has an M there already: give qwix a model without "
            "adapters, such as the base or what mora_jax.qwix.merge_adapters makes"
        )
    if tuple(kernel.shape) != spec.kernel_shape:
        raise ValueError(
            f"{spec.name} of shape {kernel.shape} is multiplied as {spec.kernel_shape}:"
            " qwix has no kernels inside nnx.scan and nnx.vmap; leave it out of "
            "module_path"
        )
    key = _private.rngs_of(model).params() if spec.init == "gaussian" else None
    _held.hold(module, spec, init_adapter(spec, key), _private.values_of(kernel))


def dropout_key(module: Any, spec: AdapterSpec, m: Any) -> PRNGKeyArray | None:
    """The key of a call's dropout; None where nothing is dropped."""
    if spec.dropout == 0:
        return None
    if isinstance(module, nn.Module):
        return module.make_rng("dropout") if module.has_rng("dropout") else None
    kernel = _private.values_of(getattr(module, spec.path[-1]))
    return _held.dropout_key(module, m, kernel)
