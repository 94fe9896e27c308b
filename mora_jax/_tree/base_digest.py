"""Digests of adapted kernels, which tell the base of an adapter from others."""

import functools
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
    """The SHA-256 of up to eight rows of a kernel, for each index of its stack axes.

    If processes share the kernel, all of them must call this together.
    """
    axes, stack = spec.axes, spec.stack_shape
    ins = sizes(spec.kernel_shape, axes, "i")
    count = min(8, math.prod(ins))
    numbers = np.arange(count) * (math.prod(ins) - 1) // max(count - 1, 1)
    places = np.stack(np.unravel_index(numbers, ins)).astype(np.int32)
    if isinstance(kernel, jax.Array) and kernel.is_fully_replicated:
        kernel = kernel.addressable_data(0)
    sharding = getattr(kernel, "sharding", None)
    # Only these rows are copied to the host, from the first to the last one.
    if isinstance(sharding, NamedSharding):
        there = NamedSharding(sharding.mesh, PartitionSpec())
        bits = _row_bits(kernel, places, axes, there).addressable_data(0)
        taken = np.asarray(bits).view(kernel.dtype)
    else:
        taken = kernel[_index(places, axes)]
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


def _index(places: Any, axes: str) -> tuple[Any, ...]:
    """The index of rows in a kernel, by their places along each of its input axes."""
    each = iter(places)
    return tuple(next(each) if letter == "i" else slice(None) for letter in axes)


@functools.partial(jax.jit, static_argnames=("axes", "there"))
def _row_bits(
    kernel: jax.Array, places: jax.Array, axes: str, there: NamedSharding
) -> jax.Array:
    """Rows of a kernel on every device, as integers."""
    # Devices send rows alone, as a sum in which others have zeros. It would make 0.0 of
    # a -0.0, so it is a sum of integers.
    unsigned = f"uint{8 * kernel.dtype.itemsize}"
    bits = jax.lax.bitcast_convert_type(kernel, unsigned)
    rows = bits.at[_index(places, axes)].get(out_sharding=there)
    return jax.lax.with_sharding_constraint(rows, there)


def is_shared(array: Any) -> bool:
    """True if processes share an array, or one that a shape with a sharding is of."""
    sharding = None if isinstance(array, Tracer) else getattr(array, "sharding", None)
    return not (sharding is None or sharding.is_fully_addressable)


def check_base(
    specs: Mapping[Path, Any], leaves: Mapping[str, tuple[Path, Any]]
) -> None:
    """Raise if one of `named_leaves` is not what its adapter was trained on.

    Nothing is known without a digest, or of shapes and tracers.
    """
    found = {}
    for path, spec in specs.items():
        name = "/".join(path)
        if getattr(spec, "base_digest", None) is None or name not in leaves:
            continue
        kernel = leaves[name][1]
        known = isinstance(kernel, np.ndarray | jax.Array)
        known = known and not isinstance(kernel, Tracer)
        if known and kernel.shape == spec.kernel_shape:  # others are refused
            found[name] = spec, kernel_digests(spec, kernel)
    # What processes compute together is behind them when one of them raises.
    for name, (spec, digests) in found.items():
        check_digests(name, spec, digests)


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
