"""Digests of adapted kernels, which tell the base of an adapter from others."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mora_jax._common.axes import sizes
from mora_jax._common.types import Path, Shape
from mora_jax._layer.adapter import Adapter
from mora_jax._plan.spec import AdapterSpec


def kernel_digests(spec: AdapterSpec, kernel: Any) -> tuple[str, ...]:
    """The SHA-256 of up to eight rows of a kernel, for each index of its stack axes."""
    # Only these rows are copied to the host. They are rounded to bfloat16, so that a
    # float32 base and its bfloat16 copy have the same digest.
    rows = _rows(kernel, spec.kernel_shape, spec.axes).astype(jnp.bfloat16)
    return tuple(hashlib.sha256(each.tobytes()).hexdigest() for each in rows)


def readable(kernel: Any) -> bool:
    """True if this process has all values of `kernel`, which need not be an array."""
    if isinstance(kernel, jax.Array) and not isinstance(kernel, Tracer):
        return kernel.is_fully_addressable or kernel.is_fully_replicated
    return isinstance(kernel, np.ndarray)


def check_base(
    adapters: Mapping[Path, Adapter], leaves: Mapping[str, tuple[Path, Any]]
) -> None:
    """Raise if one of `named_leaves` is not what its adapter was trained on.

    Nothing is known without a digest, or where this process lacks some of the values.
    """
    for path, adapter in adapters.items():
        name, spec = "/".join(path), adapter.spec
        if getattr(spec, "base_digest", None) is None or name not in leaves:
            continue
        kernel = leaves[name][1]
        if readable(kernel) and kernel.shape == spec.kernel_shape:  # others are refused
            check_digests(name, spec, kernel_digests(spec, kernel))


def check_digests(
    name: str, spec: AdapterSpec, digests: tuple[str, ...], at: int = 0
) -> None:
    """Raise unless `spec` has `digests` from the stack index `at` on."""
    known = spec.base_digest
    if known is not None and known[at : at + len(digests)] != digests:
        raise ValueError(
            f"the kernel {name!r} holds other weights than the base that the "
            "adapter was trained on: give that base, or set any_base=True"
        )


def _rows(kernel: Any, shape: Shape, axes: str) -> np.ndarray:
    """(stack, rows, out_features) of a kernel, rows from the first to the last one."""
    # With the axes of the stack first and inputs before outputs, an index of rows is
    # adjacent arrays, and NumPy leaves rows where the input axes are.
    order = sorted(range(len(axes)), key=lambda k: "sio".index(axes[k]))
    stack, ins, outs = (sizes(shape, axes, letter) for letter in "sio")
    before, behind = len(stack), len(stack) + len(ins)
    count = min(8, math.prod(ins))
    numbers = np.arange(count) * (math.prod(ins) - 1) // max(count - 1, 1)
    places = np.stack(np.unravel_index(numbers, ins)).astype(np.int32)
    rows = np.empty((*stack, count, *outs), np.float32)
    for index, data in _pieces(kernel):
        index, data = [index[k] for k in order], data.transpose(order)
        first = [[part.start or 0] for part in index[before:behind]]
        extent = np.array(data.shape[before:behind])[:, None]
        local = places - np.array(first, np.int32)
        inside = ((local >= 0) & (local < extent)).all(0)
        if inside.any():
            taken = data[(*[slice(None)] * before, *local[:, inside])]
            with np.errstate(over="ignore"):  # float64 beyond float32 is infinite
                rows[(*index[:before], inside, *index[behind:])] = np.asarray(taken)
    return rows.reshape(math.prod(stack), count, -1)


def _pieces(kernel: Any) -> list[tuple[tuple[slice, ...], Any]]:
    """The parts of an array that are on single devices, with their indices in it."""
    if not isinstance(kernel, jax.Array):
        return [((slice(None),) * kernel.ndim, kernel)]
    if not readable(kernel):
        raise ValueError(
            "params must hold arrays that this process can read in full, got one of "
            f"shape {kernel.shape} with parts on other processes"
        )
    copies = {str(shard.index): shard for shard in kernel.addressable_shards}
    return [(shard.index, shard.data) for shard in copies.values()]
