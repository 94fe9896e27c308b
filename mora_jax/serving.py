"""Many adapters at once: a different one for each row of a batch.

The M's of N adapters of one plan are one tree, and the rows of a batch say by an array
of integers which of them they want. All of it is data: one compiled program serves any
mixture of adapters, also after one of them was replaced by another.

  stack                 the adapters of one plan in one tree, in slots
  put                   the same tree with another adapter in one slot
  select                the adapters for the rows of a batch

Example::

  >>> import flax.linen as nn, jax, jax.numpy as jnp, mora_jax
  >>> from mora_jax import serving
  >>> model, x = nn.Dense(16), jnp.ones((4, 16))
  >>> variables = model.init(jax.random.key(0), x)
  >>> adapted = mora_jax.linen.wrap(model, None, variables, x)
  >>> @jax.jit
  ... def is_adapted(stacked, index):
  ...     y = adapted(serving.select(stacked, index), variables, x)
  ...     return (y != model.apply(variables, x)).any(axis=1)
  >>> ones = jax.tree.map(jnp.ones_like, mora_jax.init(adapted.plan))
  >>> stacked = serving.stack([ones], adapted.plan, slots=2)
  >>> is_adapted(stacked, jnp.array([0, -1, 1, 0]))
  Array([ True, False, False,  True], dtype=bool)
  >>> is_adapted(serving.put(stacked, 1, ones), jnp.array([0, -1, 1, 0]))
  Array([ True, False,  True,  True], dtype=bool)
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mora_jax._common import checks
from mora_jax._common.types import Path
from mora_jax._layer.slots import Selected, Slots, beyond_if_none
from mora_jax._plan.plan import Plan, check_plan
from mora_jax._plan.spec import refuse_trained
from mora_jax._tree.adapters import Tree, nest
from mora_jax._tree.merge import array_items
from mora_jax._tree.paths import adapter_path, located_leaves, unboxed

__all__ = ["put", "select", "stack"]


def stack(adapters: Sequence[Any], plan: Plan, *, slots: int | None = None) -> Tree:
    """The adapters of one plan in one tree, a slot for each of them.

    Args:
      adapters: Adapters of `plan`, as `init` makes them; with `slots` perhaps none.
      plan: Their plan, by which `linen.wrap` or `nnx.wrap` has made the model.
      slots: The number of slots, N, which all take memory; None for one for each
        adapter. Others hold zeros, which add nothing, until `put` fills them.

    Returns:
      A tree as of one adapter, with an array (N, q, q), in the widest dtype of the M's,
      instead of each M. Axes of a stack stay in front: (layers, N, q, q).

    Raises:
      TypeError, ValueError: Adapters do not fit the plan or hold NaN or infinity; there
        are none, or more than slots; the plan trains arrays of the base, which all rows
        share.
    """
    why = "and all rows of a batch share it; serve it by another base"
    refuse_trained(check_plan(plan).trained, why)
    if isinstance(adapters, dict) or not isinstance(adapters, Iterable):
        kind = type(adapters).__name__
        raise TypeError(f"adapters must be a sequence of adapters, got {kind}")
    trees = [array_items(tree, plan) for tree in adapters]
    if slots is None and not trees:
        raise ValueError("slots must be given where adapters are none")
    number = checks.positive_integer("slots", len(trees) if slots is None else slots)
    if number < len(trees):
        raise ValueError(
            f"slots must be at least the number of adapters, {len(trees)}, got {slots}"
        )
    stacked = {}
    for position, spec in enumerate(plan.specs):
        ms = [items[position][1] for items in trees]
        dtype = jnp.result_type(*ms) if ms else spec.param_dtype
        ms += [jnp.zeros(spec.shape, dtype)] * (number - len(ms))
        joined = jnp.stack([m.astype(dtype) for m in ms], len(spec.stack_shape))
        stacked[adapter_path(spec)] = Slots(joined, len(spec.operator.m_shape))
    return nest(stacked)


def put(stacked: Tree, slot: int | jax.Array, adapters: Any) -> Tree:
    """The stacked adapters with another adapter in one slot.

    The arrays of `stacked` are donated: they are changed in place where the platform
    can, and cannot be used afterwards. All slots share one compiled program.

    Args:
      stacked: Adapters in slots, as `stack` makes them.
      slot: The number of the slot, from 0 to N - 1. In a compiled function, where it is
        not known, another number changes nothing.
      adapters: Adapters of the same plan, which are rounded to the slots' dtypes.

    Raises:
      TypeError, ValueError: The slot does not exist; or the adapters have other M's
        than the slots, or hold numbers that are not finite in the slots' dtype.
    """
    slots, number = _slots_of(stacked)
    new = located_leaves(adapters, "adapters")
    for path in sorted(slots.keys() ^ new.keys()):
        has, lacks = ("stacked", "adapters")[:: 1 if path in slots else -1]
        raise ValueError(f"{has} hold {'/'.join(path)!r}, which {lacks} lack")
    # All of them are checked before the slots, which are donated, are lost.
    for path, held in slots.items():
        name = "/".join(path)
        new[path] = m = checks.as_jax_array(name, unboxed(new[path]))
        checks.check_leaf(m, name, held.shape_of_one)
        where = f" in {held.dtype}, the dtype of the slots"
        checks.check_finite(m.astype(held.dtype), name, where)
    return _put(stacked, _check_indices(slot, "slot", 0, number, ndim=0), nest(new))


@functools.partial(jax.jit, donate_argnums=0)
def _put(stacked: Tree, slot: jax.Array, adapters: Tree) -> Tree:
    def changed(slots: Slots, m: jax.Array) -> Slots:
        # A traced `slot` may be one that does not exist. Then it changes nothing.
        at = (*[slice(None)] * slots.axis, beyond_if_none(slot, slots.number))
        new = slots.m.at[at].set(m.astype(slots.dtype), mode="drop")
        return Slots(new, slots.ndim_m)

    return jax.tree.map(
        changed, stacked, adapters, is_leaf=lambda node: isinstance(node, Slots)
    )


def select(stacked: Tree, index: Any) -> Tree:
    """The adapters for the rows of a batch, one for each row.

    They go to the function that `linen.wrap` returns, and to `nnx.set_adapters`. Call
    this inside of the compiled function: then one program serves all indices. The first
    axis of each adapted layer's input must be the batch (for an einsum the first axis
    that the kernel lacks), with the rows as the model's inputs have them on their first
    axes. This is proven once for each program; a model that permutes, reverses or sorts
    the batch is refused when it is called (docs/trace-check.md).

    Args:
      stacked: Adapters in slots, as `stack` makes them. Gradients by them are gradients
        by the M's that rows have used.
      index: The number of the slot for each row, (B,), integers; -1 for no adapter. In
        a compiled function a number beyond the slots means no adapter as well.

    Raises:
      TypeError: `stacked` was not made by `stack`, or `index` are not integers.
      ValueError: `index` has more or fewer axes than one, or a number without a slot.
    """
    slots, number = _slots_of(stacked)
    index = _check_indices(index, "index", -1, number, ndim=1)
    rows = {}
    for path, held in slots.items():
        # Flax's lifted transformations take one index off the stack of all arrays.
        shape = *held.shape[: held.axis], *index.shape
        rows[path] = Selected(held, jnp.broadcast_to(index, shape))
    return nest(rows)


def _slots_of(stacked: Any) -> tuple[dict[Path, Slots], int]:
    """{path of an M: its slots}, and the one number that all of them have."""
    rule = "stacked must be adapters in slots, as serving.stack makes them"
    slots = located_leaves(stacked, "stacked")
    for path, leaf in slots.items():
        if not isinstance(leaf, Slots):
            kind = type(leaf).__name__
            raise TypeError(f"{rule}, got {kind} at {'/'.join(path)!r}")
    if len(numbers := {held.number for held in slots.values()}) != 1:
        raise ValueError(f"{rule} of one number, got {sorted(numbers) or 'none'}")
    return slots, numbers.pop()


def _check_indices(value: Any, name: str, least: int, number: int, ndim: int) -> Any:
    """`value` as slots from `least` to `number` - 1, checked as far as it is known."""
    known = not isinstance(value, Tracer)
    indices = np.asarray(value) if known else value
    if not indices.size:  # NumPy takes [] for floats
        indices = indices.astype(jnp.int32)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {indices.dtype}")
    if indices.ndim != ndim:
        kind = "an integer for each row, (B,)" if ndim else "one integer"
        raise ValueError(f"{name} must be {kind}, got shape {indices.shape}")
    outside = indices[(indices < least) | (indices >= number)] if known else ()
    for index in outside:
        raise ValueError(f"{name} must be from {least} to {number - 1}, got {index}")
    return jnp.asarray(indices, jnp.int32)
