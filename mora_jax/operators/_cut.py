"""Blocks of neighbouring features, the first ones longer by one if need be."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from mora_jax._jax.tiles import pad_to


def cut(x: Array, n: int) -> Array:
    """(..., features) -> (..., n, width): neighbours, and zeros in shorter blocks."""
    *batch, features = x.shape
    width = -(-features // n)
    longer = features - n * (width - 1)
    if longer == n:
        return x.reshape(*batch, n, width)
    first = x[..., : longer * width].reshape(*batch, longer, width)
    rest = x[..., longer * width :].reshape(*batch, n - longer, width - 1)
    return jnp.concatenate([first, pad_to(rest, width)], axis=-2)


def join(h: Any, features: int) -> Any:
    """(..., n, width) -> (..., features): the transpose of `cut`, also for NumPy."""
    *batch, n, width = h.shape
    longer = features - n * (width - 1)
    if longer == n:
        return h.reshape(*batch, features)
    numpy = np if isinstance(h, np.ndarray) else jnp
    first = h[..., :longer, :].reshape(*batch, longer * width)
    rest = h[..., longer:, :-1].reshape(*batch, features - longer * width)
    return numpy.concatenate([first, rest], axis=-1)


def places(features: int, n: int) -> np.ndarray:
    """The places of features in their blocks, block * width + offset: (features,)."""
    width = -(-features // n)
    return join(np.arange(n * width).reshape(n, width), features)
