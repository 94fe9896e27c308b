"""Trained arrays between JAX and files."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mora_jax._layer.dense import as_jax_array
from mora_jax.io._errors import AdapterFileError


def to_numpy(name: str, array: Any) -> np.ndarray:
    """Return a trained array as a NumPy array of finite numbers.

    Args:
      name: The name of the array in messages.
      array: The array.

    Raises:
      TypeError: It is a tracer, or not an array.
      ValueError: It holds NaN or infinity.
    """
    if isinstance(array, Tracer):
        raise TypeError(f"{name} must be a concrete array, got a tracer of jit")
    as_jax_array(name, array)
    array = np.asarray(array)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return array


def to_jax(name: str, array: np.ndarray) -> jax.Array:
    """Return an array from a file as a JAX array of the same dtype.

    Raises:
      AdapterFileError: The array is float64, which is not enabled in JAX.
    """
    converted = jnp.asarray(array)
    if converted.dtype != array.dtype:
        raise AdapterFileError(
            f"{name} is {array.dtype}: set jax_enable_x64 to load it as it is"
        )
    return converted
