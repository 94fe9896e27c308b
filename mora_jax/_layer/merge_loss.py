"""Loss of a delta when a kernel is stored."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from mora_jax._common.types import ArrayLike


def shares_lost(change: ArrayLike, delta: ArrayLike) -> tuple[Any, Any]:
    """The shares of a delta that a kernel's change, merged - base, lacks.

    The first is measured along the delta, see `diagnostics.merge_loss`. The second is
    norm(change - delta) / norm(delta). Both are 0 for a delta of zeros, and arrays in a
    trace.
    """
    along, whole = _shares(change, delta)
    return (along, whole) if isinstance(along, Tracer) else (float(along), float(whole))


# Compiled, so that no array of the kernel's size is made on the way.
@jax.jit
def _shares(change: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Divided first, since the squares of small numbers are zero in float32.
    size = jnp.linalg.norm(jnp.ravel(delta))
    above_zero = jnp.where(size > 0, size, 1)
    # Exact products: accelerators would round what they multiply to 16 bits.
    scaled, exact = delta / above_zero, jax.lax.Precision.HIGHEST
    along = jnp.abs(size - jnp.vdot(change, scaled, precision=exact)) / above_zero
    whole = jnp.linalg.norm(jnp.ravel(change - delta)) / above_zero
    return along, jnp.where(size > 0, whole, 0)
