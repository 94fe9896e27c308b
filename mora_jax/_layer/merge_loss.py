"""Loss of a delta when a kernel is stored."""

import jax
import jax.numpy as jnp

from mora_jax._common.types import ArrayLike


# Compiled, so that no array of the kernel's size is made on the way.
@jax.jit
def share_lost(change: ArrayLike, delta: ArrayLike) -> jax.Array:
    """The share of a delta that a kernel's change, merged - base, lacks along it.

    It is 0 for a delta of zeros.
    """
    # Divided first, since the squares of small numbers are zero in float32.
    size = jnp.linalg.norm(jnp.ravel(delta))
    above_zero = jnp.where(size > 0, size, 1)
    # Exact products: accelerators would round what they multiply to 16 bits.
    scaled, exact = delta / above_zero, jax.lax.Precision.HIGHEST
    return jnp.abs(size - jnp.vdot(change, scaled, precision=exact)) / above_zero
