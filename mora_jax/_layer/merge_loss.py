"""Loss of a delta where the sum of a kernel and its delta is stored."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer


class MergeLoss(NamedTuple):
    """Loss of a delta when a kernel is stored.

    Attributes:
      share: The share that is lost in the mean, as `diagnostics.merge_loss` has it.
      error: The norm of what the stored kernel lacks of the sum of base and delta,
        divided by the norm of the delta; 0 for a delta of zeros.
    """

    share: float | jax.Array
    error: float | jax.Array

    @classmethod
    def of(cls, base: jax.Array, delta: jax.Array, stored: jax.Array) -> "MergeLoss":
        """The loss in the array `stored` for `base + delta`; arrays in a trace."""
        base, stored = base.astype(delta.dtype), stored.astype(delta.dtype)
        size = jnp.linalg.norm(delta.ravel())
        # Divided first, since the squares of small numbers are zero in float32.
        scaled = delta / jnp.where(size > 0, size, 1)
        # Exact products: accelerators would round what they multiply to 16 bits.
        along = jnp.vdot(stored - base, scaled, precision=jax.lax.Precision.HIGHEST)
        share = jnp.abs(1 - along / jnp.where(size > 0, size, 1))
        error = jnp.linalg.norm((stored - (base + delta)).ravel())
        loss = jnp.where(size > 0, share, 0), error / jnp.where(size > 0, size, jnp.inf)
        return cls(*(loss if isinstance(size, Tracer) else map(float, loss)))
