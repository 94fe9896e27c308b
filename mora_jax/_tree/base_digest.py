"""Digests of adapted kernels, which tell the base of an adapter from others."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from mora_jax._common.axes import sizes
from mora_jax._common.types import Path
from mora_jax._plan.spec import AdapterSpec


def kernel_digests(spec: AdapterSpec, kernel: Any) -> tuple[str, ...]:
    """The SHA-256 of up to eight rows of a kernel, for each index of its stack axes."""
    if not readable(kernel):
        rule = "params must hold arrays that this process can read in full"
        got = f"one of shape {kernel.shape} with parts on other processes"
        raise ValueError(f"{rule}, got {got}")
    # Only these rows are copied to the host, from the first to the last one.
    axes, stack = spec.axes, spec.stack_shape
    ins = sizes(spec.kernel_shape, axes, "i")
    count = min(8, math.prod(ins))
    numbers = np.arange(count) * (math.prod(ins) - 1) // max(count - 1, 1)
    places = iter(np.stack(np.unravel_index(numbers, ins)).astype(np.int32))
    index = tuple(next(places) if letter == "i" else slice(None) for letter in axes)
    if isinstance(kernel, jax.Array) and kernel.is_fully_replicated:
        kernel = kernel.addressable_data(0)
    sharding = getattr(kernel, "sharding", None)
    if isinstance(sharding, NamedSharding):
        # Where types name a mesh, JAX has to be told where the rows are to be.
        there = NamedSharding(sharding.mesh, PartitionSpec())
        taken = kernel.at[index].get(out_sharding=there)
    else:
        taken = kernel[index]
    # NumPy puts the rows where the input axes are, or first if those are apart.
    together, others = set(axes.strip("so")) == {"i"}, axes.replace("i", "")
    rows = np.moveaxis(np.asarray(taken), axes.index("i") if together else 0, 0)
    order = sorted(range(1, rows.ndim), key=lambda k: others[k - 1] == "o")
    rows = rows.transpose(*order[: len(stack)], 0, *order[len(stack) :])
    with np.errstate(over="ignore"):  # float64 beyond float32 is infinite
        rows = rows.astype(np.float32).reshape(math.prod(stack), count, -1)
    # Rounded, so that a float32 base and its bfloat16 copy have the same digest.
    rounded = rows.astype(jnp.bfloat16)
    return tuple(hashlib.sha256(each.tobytes()).hexdigest() for each in rounded)


def readable(kernel: Any) -> bool:
    """True if this process has all values of `kernel`, which need not be an array."""
    if isinstance(kernel, jax.Array) and not isinstance(kernel, Tracer):
        return kernel.is_fully_addressable or kernel.is_fully_replicated
    return isinstance(kernel, np.ndarray)


def check_base(
    specs: Mapping[Path, Any], leaves: Mapping[str, tuple[Path, Any]]
) -> None:
    """Raise if one of `named_leaves` is not what its adapter was trained on.

    Nothing is known without a digest, or where this process lacks some of the values.
    """
    for path, spec in specs.items():
        name = "/".join(path)
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
