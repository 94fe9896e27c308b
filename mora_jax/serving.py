"""Many adapters at once: a different one for each row of a batch.

The M's of N adapters of one meaning are one tree of adapters, whose arrays have a
leading axis of N slots. By an array of integers `select` takes one for each row of a
batch, and `jax.vmap` calls the model with one row and its adapter. So a row cannot get
the adapter of another one, whatever the model does with a batch. The base's products
stay products of the whole batch. Slots and index are data: one compiled program serves
any mixture of adapters, also after one of them was replaced by another.

  stack                 adapters of one meaning in one tree, in slots
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
  ...     def row(adapters, x):  # the model gets a batch of one row
  ...         return adapted(adapters, variables, x[None])[0]
  ...     y = jax.vmap(row)(serving.select(stacked, index), x)
  ...     return (y != model.apply(variables, x)).any(axis=1)
  >>> ones = jax.tree.map(jnp.ones_like, mora_jax.init(adapted.plan))
  >>> stacked = serving.stack([ones], slots=2)
  >>> is_adapted(stacked, jnp.array([0, -1, 1, 0]))
  Array([ True, False, False,  True], dtype=bool)
  >>> is_adapted(serving.put(stacked, 1, ones), jnp.array([0, -1, 1, 0]))
  Array([ True, False,  True,  True], dtype=bool)
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mora_jax._common import checks
from mora_jax._common.trees import located_leaves
from mora_jax._layer.adapter import Adapter, is_adapter
from mora_jax._mesh.placement import explicit_sharding
from mora_jax._plan.spec import SUFFIX, AdapterSpec, check_alike
from mora_jax._tree.paths import (
    Found,
    Tree,
    alike_adapters,
    checked_adapters,
    nest,
    place_of,
)

__all__ = ["put", "select", "stack"]


def stack(adapters: Sequence[Any], *, slots: int | None = None) -> Tree:
    """Adapters of one meaning in one tree, a slot for each of them.

    Args:
      adapters: Adapters of the same kernels, operators and factors. New ones add
        nothing, so that `[mora_jax.init(plan)]` makes a tree of empty slots.
      slots: The number of slots, N, which all take memory; None for one for each
        adapter. Others hold zeros, which add nothing, until `put` fills them.

    Returns:
      A tree as of one adapter, in which each M is (N, *stack, *m_shape), in the widest
      dtype of the M's, and means what one of them means.

    Raises:
      TypeError, ValueError: Adapters have different meanings or bases, or hold NaN;
        there are none, or more than slots; arrays of the base are trained, which all
        rows share.
    """
    found = alike_adapters(adapters)
    why = "and all rows of a batch share it; serve it by another base"
    found[0].refuse_trained(why)
    number = checks.positive_integer("slots", len(found) if slots is None else slots)
    if number < len(found):
        raise ValueError(
            f"slots must be at least the number of adapters, {len(found)}, got {slots}"
        )
    stacked = Found()
    for path, adapter in found[0].items():
        ms = [one[path].m for one in found]
        dtype = jnp.result_type(*ms)
        ms += [jnp.zeros(adapter.spec.shape, dtype)] * (number - len(ms))
        stacked[path] = adapter.replace(m=jnp.stack([m.astype(dtype) for m in ms]))
    return stacked.tree()


def put(stacked: Tree, slot: int | jax.Array, adapters: Any) -> Tree:
    """The stacked adapters with another adapter in one slot.

    The arrays of `stacked` are donated: they are changed in place where the platform
    can, and cannot be used afterwards. All slots share one compiled program.

    Args:
      stacked: Adapters in slots, as `stack` makes them.
      slot: The number of the slot, from 0 to N - 1. In a compiled function, where it is
        not known, another number changes nothing.
      adapters: Adapters of the same meaning, rounded to the slots' dtypes.

    Raises:
      TypeError, ValueError: The slot does not exist; or the adapters have other M's
        than the slots, or hold numbers that are not finite in the slots' dtype.
    """
    slots, number = _slots_of(stacked)
    new = checked_adapters(adapters)
    check_alike(new.specs, slots.specs, "the slots")
    # All of them are checked before the slots, which are donated, are lost.
    for path, adapter in slots.items():
        dtype, place = adapter.m.dtype, place_of(path, adapter.spec)
        where = f" in {dtype}, the dtype of the slots"
        checks.check_finite(new[path].m.astype(dtype), "/".join(place), where)
    at = _check_indices(slot, "slot", 0, number, ndim=0)
    ms = {place: adapter.m for place, adapter in new.placed.items()}
    return _put(stacked, at, nest(ms))


@functools.partial(jax.jit, donate_argnums=0)
def _put(stacked: Tree, slot: jax.Array, ms: Tree) -> Tree:
    def changed(slots: Adapter, m: jax.Array) -> Adapter:
        # A traced `slot` may be one that does not exist. Then it changes nothing.
        at = slots.m.at[_beyond_if_none(slot, len(slots.m))]
        return slots.replace(m=at.set(m.astype(slots.m.dtype), mode="drop"))

    return jax.tree.map(changed, stacked, ms, is_leaf=is_adapter)


def select(stacked: Tree, index: Any) -> Tree:
    """The adapters for the rows of a batch, one for each row.

    They are for `jax.vmap` of a function of one adapter and one row, see above; in NNX
    that function calls `nnx.set_adapters` on a clone of the model, see
    docs/many-adapters.md. Call this inside of the compiled function: then one program
    serves all indices.

    Args:
      stacked: Adapters in slots, as `stack` makes them. Gradients by them are gradients
        by the M's that rows have used.
      index: The number of the slot for each row, (B,), integers; -1 for no adapter. In
        a compiled function a number beyond the slots means no adapter as well.

    Returns:
      A tree as of one adapter, in which each M is (B, *stack, *m_shape); an M of zeros
      stands for no adapter.

    Raises:
      TypeError: `stacked` was not made by `stack`, or `index` are not integers.
      ValueError: `index` has more or fewer axes than one, or a number without a slot.
    """
    slots, number = _slots_of(stacked)
    index = _check_indices(index, "index", -1, number, ndim=1)
    at, sharding = _beyond_if_none(index, number), explicit_sharding(index)
    for path, adapter in slots.items():
        take = adapter.m.at[at].get
        chosen = take(mode="fill", fill_value=0, out_sharding=sharding)
        slots[path] = adapter.replace(m=chosen)
    return slots.tree()


def _slots_of(stacked: Any) -> tuple[Found, int]:
    """The adapters in slots, and the one number of slots that all have."""
    rule = "stacked must be adapters in slots, as serving.stack makes them"
    slots, numbers = Found(), set[int]()
    for path, leaf in located_leaves(stacked, "stacked").items():
        if not isinstance(leaf, Adapter) or not isinstance(leaf.spec, AdapterSpec):
            kind = type(leaf).__name__
            raise TypeError(f"{rule}, got {kind} at {'/'.join(path)!r}")
        number, *shape = jnp.shape(leaf.m) or (0,)
        if (*shape,) != leaf.spec.shape:
            expected = "(N, {})".format(", ".join(map(str, leaf.spec.shape)))
            raise ValueError(
                f"{rule}, {'/'.join(path)!r} of shape {expected}, got "
                f"{jnp.shape(leaf.m)}"
            )
        numbers.add(number)
        slots[(*path[:-1], path[-1].removesuffix(SUFFIX))] = leaf
    if len(numbers) != 1:
        raise ValueError(f"{rule} of one number, got {sorted(numbers) or 'none'}")
    return slots, numbers.pop()


def _beyond_if_none(index: jax.Array, number: int) -> jax.Array:
    """Slot of each row; rows without an adapter have a number past the last slot."""
    # JAX would count negative numbers from the end.
    return jnp.where(index < 0, number, index)


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
