"""Deltas merged into a base, each time with another dither."""

import dataclasses
from typing import Any
from zlib import crc32

import jax
from jax import Array

from mora_jax._layer.adapter import Adapter
from mora_jax._plan.spec import AdapterSpec, operator_settings
from mora_jax._tree import merge, paths
from mora_jax.operators import Operator


def merged_deltas(
    params: Any, adapters: Any, shift: Any = None, *, any_base: bool = True
) -> Any:
    """The params with deltas, rounded with the dither that starts at `shift`."""
    found, sums = paths.adapters_in(adapters), {}
    for path, (place, kernel) in found.in_base(params, any_base=any_base).items():
        if not (adapter := found[path]).of_kernel:
            continue
        # Equal layers share a program, whatever arrays their operators have. The dither
        # is a hash of a number's place; shifted, it is another one.
        settings = repr(operator_settings(adapter.operator))
        own = crc32(settings.encode()) % 2**31 if shift is None else shift
        spec = dataclasses.replace(adapter.spec, base_digest=None)
        sums[place] = _dithered(spec, adapter.m, kernel, own)
    return paths.replace_leaves(params, sums)


def respecified(spec: AdapterSpec, op: Operator) -> AdapterSpec:
    # On the merged kernel it starts with a delta of zero.
    init = "zeros" if spec.init == "gradient" else spec.init
    return dataclasses.replace(spec, base_digest=None, operator=op, init=init)


@jax.jit
def _dithered(spec: AdapterSpec, m: Array, kernel: Array, shift: Any) -> Array:
    """The kernel plus the delta, rounded with the dither that starts at `shift`."""
    start = shift, shift
    return merge.merged_kernel(Adapter(m, spec), kernel, rounding="dither", start=start)
