"""Dropout of what the adapter of a layer sees, and the layer does not."""

import jax
from jaxtyping import PRNGKeyArray

from mora_jax._common.types import Shape


def dropped(
    x: jax.Array, key: PRNGKeyArray | None, rate: float, shape: Shape | None = None
) -> jax.Array:
    """`x` with a part of it zero, by a mask of `shape`; without a key all of it."""
    if key is None or rate == 0:
        return x
    # What stays is scaled up, which keeps the mean.
    mask = jax.random.bernoulli(key, 1 - rate, x.shape if shape is None else shape)
    return jax.numpy.where(mask, x / (1 - rate), 0)
