"""Adapters of one plan in slots of one tree."""

import functools
from collections.abc import Iterable, Sequence
from operator import index
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mora_jax._common.checks import as_jax_array, check_finite, positive_integer
from mora_jax._layer.slots import Selected, Slots, beyond_if_none
from mora_jax._plan.plan import Plan, check_plan
from mora_jax._plan.trained_arrays import refuse_trained
from mora_jax._tree.adapters import Tree, nest
from mora_jax._tree.merge import finite_items
from mora_jax._tree.paths import adapter_path, located_leaves, unboxed


def stack(adapters: Sequence[Any], plan: Plan, *, slots: int | None = None) -> Tree:
    """The adapters of one plan in one tree, a slot for each of them.

    A tree of N slots takes the memory of N adapters, whether or not they are used.

    Args:
      adapters: Adapters of `plan`, as `init` makes them. With `slots` there may be
        none.
      plan: Their plan, of which `linen.wrap` or `nnx.wrap` has made the model.
      slots: The number of slots, N; by default one for each adapter. Those that are
        left over hold zeros, which add nothing, until `put` fills them.

    Returns:
      A tree like that of one adapter. In place of an M of the shape (q, q) it has an
      array of the shape (N, q, q), in the widest dtype of the M's. Leading axes of a
      stack of layers or experts stay in front: (layers, N, q, q). Several squares stay
      behind: (N, K, q, q).

    Raises:
      TypeError: `adapters` is no sequence of trees of arrays, `plan` is not a Plan, or
        `slots` is not an integer.
      ValueError: Adapters do not fit the plan or hold NaN or infinity; there are none,
        or more than slots; or the plan trains arrays of the base, which all rows share.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> from mora_jax import serving
      >>> plan = mora_jax.plan({"fc": {"kernel": jnp.ones((16, 16))}})
      >>> adapters = [mora_jax.init(plan) for _ in range(3)]
      >>> serving.stack(adapters, plan, slots=8)["fc"]["kernel_mora"].shape
      (8, 16, 16)
    """
    check_plan(plan)
    refuse_trained(
        plan.trained, "and all rows of a batch share it; serve it by another base"
    )
    if isinstance(adapters, dict) or not isinstance(adapters, Iterable):
        raise TypeError(
            "adapters must be a sequence of adapters of one plan, got "
            f"{type(adapters).__name__}"
        )
    found = [finite_items(one, plan) for one in adapters]
    number = _number_of_slots(slots, len(found))
    result = {}
    for position, spec in enumerate(plan.specs):
        ms = [items[position][1] for items in found]
        dtype = jnp.result_type(*ms) if ms else spec.param_dtype
        ms += [jnp.zeros(spec.shape, dtype)] * (number - len(ms))
        ndim_m = len(spec.operator.m_shape)
        joined = jnp.stack([m.astype(dtype) for m in ms], len(spec.stack_shape))
        result[adapter_path(spec)] = Slots(joined, ndim_m)
    return nest(result)


def _number_of_slots(slots: Any, adapters: int) -> int:
    if slots is None:
        if not adapters:
            raise ValueError("slots must be given where adapters are none")
        return adapters
    positive_integer("slots", slots)
    if slots < adapters:
        raise ValueError(
            f"slots must be at least the number of adapters, {adapters}, got {slots}"
        )
    return index(slots)


def put(stacked: Tree, slot: int | jax.Array, adapters: Any) -> Tree:
    """The stacked adapters with another adapter in one slot.

    The arrays of `stacked` are donated: they are changed in place where the platform
    can, and cannot be used afterwards. All slots share one compiled program.

    Args:
      stacked: Adapters in slots, as `stack` makes them.
      slot: The number of the slot, from 0 to N - 1. In a compiled function, where it is
        not known, another number changes nothing.
      adapters: What is put there: adapters of the same plan, as `init` makes them. They
        are rounded to the dtypes of the slots.

    Returns:
      The new tree, of the same structure and shapes.

    Raises:
      TypeError: An argument has another type.
      ValueError: There is no such slot; or the adapters have other M's than the slots,
        or hold NaN or infinity, or numbers that are infinite in the slots' dtype.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> from mora_jax import serving
      >>> plan = mora_jax.plan({"fc": {"kernel": jnp.ones((16, 16))}})
      >>> ones = jax.tree.map(jnp.ones_like, mora_jax.init(plan))
      >>> stacked = serving.put(serving.stack([], plan, slots=8), 3, ones)
      >>> stacked["fc"]["kernel_mora"].m[2:4, 0, 0]
      Array([0., 1.], dtype=float32)
    """
    slots = slots_of(stacked)
    number = next(iter(slots.values())).number
    new = {
        path: as_jax_array("/".join(path), unboxed(m))
        for path, m in located_leaves(adapters, "adapters").items()
    }
    for path in sorted(slots.keys() ^ new.keys()):
        has, lacks = ("stacked", "adapters")[:: 1 if path in slots else -1]
        raise ValueError(f"{has} hold {'/'.join(path)!r}, which {lacks} lack")
    for path, m in new.items():
        name, shape = "/".join(path), slots[path].shape_of_one
        if m.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {m.shape}")
        if not jnp.issubdtype(m.dtype, jnp.floating):
            raise TypeError(f"{name} must have a floating-point dtype, got {m.dtype}")
        dtype = slots[path].dtype
        check_finite(m.astype(dtype), name, f" in {dtype}, the dtype of the slots")
    return _put(stacked, check_indices(slot, "slot", 0, number, ()), nest(new))


@functools.partial(jax.jit, donate_argnums=0)
def _put(stacked: Tree, slot: jax.Array, adapters: Tree) -> Tree:
    def changed(slots: Slots, m: jax.Array) -> Slots:
        # A traced `slot` may be one that does not exist. Then it changes nothing.
        at = (*[slice(None)] * slots.axis, beyond_if_none(slot, slots.number))
        new = slots.m.at[at].set(m.astype(slots.dtype), mode="drop")
        return Slots(new, slots.ndim_m)

    return jax.tree.map(changed, stacked, adapters, is_leaf=_is_slots)


def _is_slots(node: Any) -> bool:
    return isinstance(node, Slots)


def slots_of(stacked: Any) -> dict[tuple[str, ...], Slots]:
    """{path of an M: its slots}, all of one number."""
    rule = "stacked must be adapters in slots, as serving.stack makes them"
    found = located_leaves(stacked, "stacked")
    if not found:
        raise ValueError(f"{rule}, got none")
    for path, leaf in found.items():
        if isinstance(leaf, Selected):
            raise TypeError(f"{rule}, got what serving.select returned")
        if not isinstance(leaf, Slots):
            kind = type(leaf).__name__
            raise TypeError(f"{rule}, got {kind} at {'/'.join(path)!r}")
    if len(numbers := {slots.number for slots in found.values()}) > 1:
        raise ValueError(f"{rule} of one number, got {sorted(numbers)}")
    return found


def check_indices(value: Any, name: str, least: int, number: int, shape: Any) -> Any:
    """`value` as an array of numbers of slots, checked as far as it is known.

    Args:
      value: The numbers.
      name: What messages call them.
      least: The smallest one that is allowed.
      number: N; the largest one that is allowed is N - 1.
      shape: The shape that the array must have, with None for any size.
    """
    indices = jnp.asarray(value) if isinstance(value, Tracer) else np.asarray(value)
    if not indices.size:  # NumPy takes [] for floats
        indices = indices.astype(jnp.int32)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {indices.dtype}")
    if indices.ndim != len(shape):
        kind = "one integer" if not shape else "an integer for each row, (B,)"
        raise ValueError(f"{name} must be {kind}, got shape {indices.shape}")
    if not isinstance(indices, Tracer) and indices.size:
        for found in (indices.min(), indices.max()):
            if not least <= found < number:
                raise ValueError(
                    f"{name} must be from {least} to {number - 1}, got {found}"
                )
    return jnp.asarray(indices, jnp.int32)
