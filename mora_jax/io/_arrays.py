"""M between JAX and files."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mora_jax._common.checks import as_jax_array
from mora_jax.io._errors import AdapterFileError


def to_numpy(name: str, m: Any) -> np.ndarray:
    """M as a NumPy array of finite numbers; `name` is what messages call it.

    Raises:
      TypeError: M is a tracer, or not an array.
      ValueError: M holds NaN or infinity.
    """
    if isinstance(m, Tracer):
        raise TypeError(f"{name} must be a concrete array, got a tracer of jit")
    as_jax_array(name, m)
    array = np.asarray(m)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return array


def to_jax(name: str, m: np.ndarray) -> jax.Array:
    """An M from a file as a JAX array of the same dtype.

    Raises:
      AdapterFileError: M is float64, which is not enabled in JAX.
    """
    array = jnp.asarray(m)
    if array.dtype != m.dtype:
        raise AdapterFileError(
            f"{name} is {m.dtype}: set jax_enable_x64 to load it as it is"
        )
    return array
