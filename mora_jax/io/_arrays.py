"""Between files and devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mora_jax._dense import as_jax_array
from mora_jax.io._errors import AdapterFileError


def host(name: str, m: Any) -> np.ndarray:
    """An M as numpy, finite.

    Raises:
      TypeError: a tracer, or no array.
      ValueError: NaN or infinity.
    """
    if isinstance(m, Tracer):
        raise TypeError(f"{name} must be a concrete array, got a tracer of jit")
    as_jax_array(name, m)
    array = np.asarray(m)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return array


def device(name: str, m: np.ndarray) -> jax.Array:
    """An M out of a file as JAX's, in its own dtype.

    Raises:
      AdapterFileError: float64 where JAX has it not enabled.
    """
    array = jnp.asarray(m)
    if array.dtype != m.dtype:
        raise AdapterFileError(
            f"{name} is {m.dtype}: set jax_enable_x64 to load it as it is"
        )
    return array
