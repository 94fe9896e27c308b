"""Sum of a kernel and its delta that is stored in a form of its own, and the loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from mora_jax._layer.equation import delta_kernel
from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree.adapters import nest
from mora_jax._tree.merge import merge, wide
from mora_jax._tree.paths import adapter_path, unboxed


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


def stored_sum(
    kernel: Any,
    spec: AdapterSpec,
    m: jax.Array,
    *,
    store: Callable[[Any], Any],
    load: Callable[[Any], Any],
    any_base: bool,
) -> tuple[Any, MergeLoss]:
    """A kernel with its delta as it is stored, and what is lost.

    Args:
      kernel: The array of a kernel, perhaps in a box.
      spec: Its adapter.
      m: M.
      store: A function of the sum, in the box of the kernel, to what is stored.
      load: The inverse of `store`, except for rounding.
      any_base: True to merge into any weights, as in `merge`.
    """
    params, adapters = {spec.name: kernel}, nest({adapter_path(spec): m})
    plan = Plan((spec,), 0, traced=True)
    stored = store(merge(params, adapters, plan, any_base=any_base)[spec.name])
    base, after = (jnp.asarray(unboxed(leaf)) for leaf in (kernel, load(stored)))
    delta = delta_kernel(spec, wide(m, base.dtype))
    return stored, MergeLoss.of(base, delta, after)
