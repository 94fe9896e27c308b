"""Loss of a delta when a kernel is stored."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from mora_jax._common.types import ArrayLike


class MergeLoss(NamedTuple):
    """Loss of a delta when a kernel is stored.

    Attributes:
      share: The share that is lost in the mean, as `diagnostics.merge_loss` has it.
      error: norm(stored - base - delta) / norm(delta); 0 for a delta of zeros.
    """

    share: float | jax.Array
    error: float | jax.Array

    @classmethod
    def of(cls, change: ArrayLike, delta: ArrayLike) -> "MergeLoss":
        """The loss where a stored kernel differs from the base's by `change`."""
        losses = _losses(change, delta)
        return cls(*(x if isinstance(x, Tracer) else float(x) for x in losses))


# Compiled, so that no array of the kernel's size is made on the way.
@jax.jit
def _losses(change: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Divided first, since the squares of small numbers are zero in float32.
    size = jnp.linalg.norm(jnp.ravel(delta))
    above_zero = jnp.where(size > 0, size, 1)
    # Exact products: accelerators would round what they multiply to 16 bits.
    scaled, exact = delta / above_zero, jax.lax.Precision.HIGHEST
    share = jnp.abs(size - jnp.vdot(change, scaled, precision=exact)) / above_zero
    error = jnp.linalg.norm(jnp.ravel(change - delta)) / above_zero
    return share, jnp.where(size > 0, error, 0)
