"""Adapters in NNX modules whose classes stay as they are: all that `qwix` needs of NNX.

`wrap` gives a layer a class that adds the delta. A model that qwix intercepts keeps its
classes: M is beside its kernel all the same, and the provider adds the delta.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jaxtyping import PRNGKeyArray

from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._tree.paths import Path
from mora_jax.nnx._adapters import adapters as adapters
from mora_jax.nnx._adapters import named_modules as named_modules
from mora_jax.nnx._adapters import named_sharding
from mora_jax.nnx._adapters import plan_of as plan_of
from mora_jax.nnx._classes import DROPOUT
from mora_jax.nnx._dropout import AdapterDropout
from mora_jax.nnx._param import MoRAParam as MoRAParam
from mora_jax.nnx._param import is_m, value_of
from mora_jax.sharding import adapter_sharding


def hold(module: nnx.Module, spec: AdapterSpec, m: jax.Array, kernel: Any) -> None:
    """Put M beside its kernel, on the mesh of the variable `kernel`."""
    if sharding := named_sharding(kernel):
        m = jax.device_put(m, adapter_sharding(spec, sharding))
    setattr(module, spec.path[-1] + SUFFIX, MoRAParam.of(spec, m))
    if spec.dropout > 0:
        setattr(module, DROPOUT, AdapterDropout(spec.dropout, 0))


def release(module: nnx.Module, name: str) -> None:
    """Remove the M of the kernel `name`, and the dropout of its module."""
    for own in (name + SUFFIX, DROPOUT):
        if hasattr(module, own):
            delattr(module, own)


def held(module: nnx.Module, path: Path) -> tuple[AdapterSpec, Any] | None:
    """The adapter of the kernel at `path`, and M; None if `module` has no M for it.

    M may come from another model, whose adapter it was made for.
    """
    m: Any = getattr(module, path[-1] + SUFFIX, None)
    return (dataclasses.replace(m.spec, path=path), value_of(m)) if is_m(m) else None


def dropout_key(module: nnx.Module, m: Any, kernel: Any) -> PRNGKeyArray | None:
    """The key of a call's dropout; None where nothing is dropped."""
    dropout = getattr(module, DROPOUT, None)
    if dropout is None or dropout.deterministic:
        return None
    return dropout.key(m, kernel)
