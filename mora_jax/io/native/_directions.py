"""Directions of adapters as files hold them, with a byte for each number."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from mora_jax.operators.orthogonal import EIGHT_BITS_FACTOR


def narrowed(array: np.ndarray) -> np.ndarray:
    """Directions with a byte for each number, or as given if that would round them."""
    if array.dtype != jnp.bfloat16:
        return array
    scaled = array.astype(np.float32) * EIGHT_BITS_FACTOR
    narrow = scaled.astype(jnp.float8_e4m3fn)
    is_exact = np.array_equal(narrow.astype(np.float32), scaled)
    return narrow if is_exact else array


def widened(array: Any) -> Any:
    """Directions as they were before `narrowed`; anything else as it is given."""
    if getattr(array, "dtype", None) != jnp.float8_e4m3fn:
        return array
    return (array.astype(np.float32) / EIGHT_BITS_FACTOR).astype(jnp.bfloat16)
