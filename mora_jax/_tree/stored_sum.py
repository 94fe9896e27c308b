"""Sum of a kernel and its delta that is stored in a form of its own, and the loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mora_jax._layer.equation import delta_kernel
from mora_jax._layer.rounding import ratio, share_lost
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree.merge import merged_kernel, wide, with_kernels
from mora_jax._tree.paths import reboxed, unboxed


class MergeLoss(NamedTuple):
    """Loss of a delta when a kernel is stored.

    Attributes:
      share: The share that is lost in the mean, as `diagnostics.merge_loss` has it.
      error: The norm of what the stored kernel lacks of the sum of base and delta,
        divided by the norm of the delta; 0 for a delta of zeros.
    """

    share: float | jax.Array
    error: float | jax.Array


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
      any_base: True to merge into any weights.
    """
    ((_, _, _, base),) = with_kernels(
        {spec.name: kernel}, [(spec, m)], any_base=any_base
    )
    total = merged_kernel(spec, m, base, rounding="dither")
    stored = store(reboxed(kernel, total))
    delta = delta_kernel(spec, wide(m, base.dtype))
    change = jnp.asarray(unboxed(load(stored)), delta.dtype) - base.astype(delta.dtype)
    missing, size = (jnp.linalg.norm(a.ravel()) for a in (change - delta, delta))
    return stored, MergeLoss(share_lost(change, delta), ratio(missing, size))
