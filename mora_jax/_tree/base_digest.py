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
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from mora_jax._common.axes import sizes
from mora_jax._common.types import Path
from mora_jax._plan.spec import AdapterSpec


def kernel_digests(spec: AdapterSpec, kernel: Any) -> tuple[str, ...]:
    """The SHA-256 of up to eight rows of a kernel, for each index of its stack axes."""
    # Only these rows are copied to the host, from the first to the last one.
    axes, stack = spec.axes, spec.stack_shape
    ins = sizes(spec.kernel_shape, axes, "i")
    count = min(8, math.prod(ins))
    numbers = np.arange(count) * (math.prod(ins) - 1) // max(count - 1, 1)
    places = np.stack(np.unravel_index(numbers, ins)).astype(np.int32)
    if isinstance(kernel, jax.Array) and kernel.is_fully_replicated:
        kernel = kernel.addressable_data(0)
    sharding = getattr(kernel, "sharding", None)
    if isinstance(sharding, NamedSharding):
        # Where types name a mesh, JAX has to be told where the rows are to be.
        there = NamedSharding(sharding.mesh, PartitionSpec())
        rows = gathered(_row_bits(kernel, places, axes, there))
        taken = np.asarray(rows).view(kernel.dtype)
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
    each = iter(places)
    return tuple(next(each) if letter == "i" else slice(None) for letter in axes)


# Compiled, since integers of the whole kernel would be a copy of it. Devices send rows
# as a sum with zeros, which would make 0.0 of a float's -0.0.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _row_bits(kernel: jax.Array, places: Any, axes: str, there: Any) -> jax.Array:
    bits = kernel.view(f"uint{jnp.finfo(kernel.dtype).bits}")
    return bits.at[_index(places, axes)].get(out_sharding=there)


def shared_place(array: Any) -> str:
    """The place of an array, or of a shape, if several processes share it, or ""."""
    sharding = getattr(array, "sharding", None)
    abstract = isinstance(getattr(sharding, "mesh", None), AbstractMesh)
    local = sharding is None or abstract or sharding.is_fully_addressable
    return "" if local else f"{array.dtype}{array.shape} {sharding}"


def gathered(array: Any) -> Any:
    """An array that this process can read; all that share it call this together."""
    shared = shared_place(array)
    return multihost_utils.process_allgather(array, tiled=True) if shared else array


def check_base(
    specs: Mapping[Path, Any], leaves: Mapping[str, tuple[Path, Any]]
) -> None:
    """Raise if an array of `named_leaves` is known not to be its adapter's base."""
    found = []
    for path, spec in specs.items():
        _, kernel = leaves.get(name := "/".join(path), (path, None))
        known = isinstance(kernel, np.ndarray | jax.Array)
        known = known and not isinstance(kernel, Tracer) and hasattr(spec, "axes")
        if known and spec.base_digest and kernel.shape == spec.kernel_shape:
            found.append((name, spec, kernel_digests(spec, kernel)))
    for each in found:  # which all processes have computed before one may raise
        check_digests(*each)


def check_digests(
    name: str, spec: AdapterSpec, digests: tuple[str, ...], at: int = 0
) -> None:
    """Raise unless `spec` has `digests` from the stack index `at` on."""
    known = spec.base_digest
    if known is not None and known[at : at + len(digests)] != digests:
        base = "the base that the adapter was trained on"
        told = f"the kernel {name!r} holds other weights than {base}"
        raise ValueError(f"{told}: give that base, or set any_base=True")
