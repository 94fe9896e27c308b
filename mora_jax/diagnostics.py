"""What an adapter does, and what a merge loses."""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from mora_jax.merging import delta_weight, merge
from mora_jax.paths import named_leaves
from mora_jax.planning import Plan


def merge_loss(
    params: Any, adapters: Any, plan: Plan, dtype: DTypeLike | None = None
) -> dict[str, float]:
    """The share of each update that rounding loses when it is merged.

    A 16-bit kernel has a coarse grid; small updates fall between its points.

    Args:
      params: the base's params.
      adapters: as `init` makes them.
      plan: the plan that they follow.
      dtype: of the merged kernels, as in `merge`.

    Returns:
      {path: norm(merged - base - update) / norm(update)}, 0 where the update is zero.

    Example::

      >>> from mora_jax import MoRAConfig, diagnostics, plan
      >>> params = {"kernel": jnp.ones((4, 4), jnp.bfloat16)}
      >>> layers = plan(params, MoRAConfig(operator="truncation", square_rank=4))
      >>> adapters = {"kernel_mora": jnp.full((4, 4), 1e-4)}
      >>> diagnostics.merge_loss(params, adapters, layers)
      {'kernel': 1.0}
    """
    merged = named_leaves(merge(params, adapters, plan, dtype))
    base, deltas = named_leaves(params), named_leaves(delta_weight(adapters, plan))
    loss = {}
    for spec in plan:
        before, after, delta = (
            jnp.asarray(leaves[spec.name][1], deltas[spec.name][1].dtype)
            for leaves in (base, merged, deltas)
        )
        norm = float(jnp.linalg.norm(delta))
        lost = float(jnp.linalg.norm(after - before - delta))
        loss[spec.name] = lost / norm if norm else 0.0
    return loss
