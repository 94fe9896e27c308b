"""The changes that many restarts made to a base, as one tree of adapters."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from mora_jax._common import axes, checks
from mora_jax._layer.adapter import Adapter, wide
from mora_jax._tree import lora_trees, paths
from mora_jax.operators import low_rank


def learned(
    base: Any, merged: Any, adapters: Any, *, max_error: float | int = 0.01
) -> tuple[paths.Tree, dict[str, float]]:
    """The difference that many restarts made to the base, as one tree of adapters.

    It is a LoRA ("low_rank") for each kernel, of the least rank that keeps it within
    `max_error`, and the arrays that are trained themselves: adapters as any others.

    Args:
      base: The params before the first restart.
      merged: The params with the last adapters merged in.
      adapters: The adapters of any part of the run, which say what is trained.
      max_error: The largest share of a delta that is cut off, by the Frobenius norm.

    Returns:
      (adapters, {kernel: the share of its delta that is cut off}).

    Raises:
      TypeError, ValueError: Params do not fit, or `max_error` is not from 0 to 1.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> params = {"kernel": jnp.eye(8)}
      >>> adapters = mora_jax.init(mora_jax.plan(params))
      >>> merged = {"kernel": jnp.eye(8).at[0, 1].add(0.5)}
      >>> mora_jax.remora.learned(params, merged, adapters)
      ({'kernel_mora': Adapter(low_rank, float32[16, 1])}, {'kernel': 0.0})
    """
    max_error = checks.check_number(
        "max_error", max_error, lambda error: 0 <= error <= 1, "be from 0 to 1"
    )
    found, made, lost = paths.adapters_in(adapters), paths.Found(), {}
    old, new = found.kernels.in_base(base, "base"), found.in_base(merged, "merged")
    for path, adapter in found.items():
        name, spec = "/".join(path), adapter.spec
        if not adapter.of_kernel:
            made[path] = Adapter(jnp.array(new[path][1], spec.dtype), spec)
            continue
        before, after = (wide(arrays[path][1]) for arrays in (old, new))
        what = f"the delta of {name!r}"
        checks.check_concrete(delta := after - before, what, spec.kernel_shape)
        checks.check_finite(delta, what)
        delta = np.asarray(axes.rows_from_kernel(delta, spec.axes))
        a, b, lost[name], _ = low_rank.nearest_factors(delta, max_error)
        spec = dataclasses.replace(spec, base_digest=None)
        made[path] = lora_trees.lora_adapter(spec, jnp.asarray(a), jnp.asarray(b))
    return made.tree(), lost
