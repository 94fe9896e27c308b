"""M, the matrix of an adapter: what it must be, and how it starts."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from mora_jax._common.checks import check_key
from mora_jax._plan.spec import SUFFIX, AdapterSpec


def check_adapter(m: Any, spec: AdapterSpec) -> None:
    """Raise unless `m` can be the M of `spec`."""
    name = f"{spec.name}{SUFFIX}"
    if not hasattr(m, "shape") or not hasattr(m, "dtype"):
        raise TypeError(f"{name} must be an array, got {type(m).__name__}")
    if tuple(m.shape) != spec.shape:
        raise ValueError(f"{name} must have shape {spec.shape}, got {tuple(m.shape)}")
    if not jnp.issubdtype(m.dtype, jnp.floating):
        raise TypeError(f"{name} must have a floating-point dtype, got {m.dtype}")


def init_adapter(spec: AdapterSpec, key: PRNGKeyArray | None = None) -> jax.Array:
    """M as `spec.init` wants it, of the shape `spec.shape`."""
    check_key(key)
    return spec.operator.start(spec.stack_shape, spec.init, key, spec.param_dtype)
