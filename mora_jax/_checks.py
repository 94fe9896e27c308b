"""What arguments must be."""

from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._types import Shape


def check_array(name: str, array: Any, end: Shape) -> None:
    """Raise unless `array` is floating-point and its shape ends in `end`."""
    if not isinstance(array, jax.Array | np.ndarray):
        raise TypeError(f"{name} must be an array, got {type(array).__name__}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating-point, got {array.dtype}")
    if array.shape[-len(end) :] != end:
        expected = ", ".join(map(str, end))
        raise ValueError(f"{name} must have shape (..., {expected}), got {array.shape}")


def positive_integer(name: str, value: object) -> None:
    """Raise unless `value` is an integer (not a bool) of at least 1."""
    # int first: to ask for a protocol is slow, and plans ask for every kernel.
    if isinstance(value, bool) or not isinstance(value, int | SupportsIndex):
        raise TypeError(f"{name} must be a positive integer, got {value!r}")
    if value.__index__() < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_seed(seed: object) -> None:
    """Raise unless `seed` is an integer that `RandomState` takes."""
    if isinstance(seed, bool) or not isinstance(seed, SupportsIndex):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not 0 <= seed.__index__() < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
