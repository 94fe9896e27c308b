"""Many adapters at once: a different one for each row of a batch.

The M's of N adapters of one meaning are one tree of adapters, whose arrays have a
leading axis of N slots. By an array of integers `select` takes one for each row of a
batch, and `jax.vmap` calls the model with one row and its adapter. So a row cannot get
the adapter of another one, whatever the model does with a batch. The base's products
stay products of the whole batch. Slots and index are data: one compiled program serves
any mixture of adapters, also after one of them was replaced by another.

Example::

  >>> import flax.linen as nn, jax, jax.numpy as jnp, mora_jax
  >>> model, x = nn.Dense(16), jnp.ones((4, 16))
  >>> variables = model.init(jax.random.key(0), x)
  >>> adapted = mora_jax.linen.wrap(model, None, variables, x)
  >>> @jax.jit
  ... def is_adapted(stacked, index):
  ...     def row(adapters, x):  # the model gets a batch of one row
  ...         return adapted(adapters, variables, x[None])[0]
  ...     y = jax.vmap(row)(mora_jax.serving.select(stacked, index), x)
  ...     return (y != model.apply(variables, x)).any(axis=1)
  >>> ones = jax.tree.map(jnp.ones_like, mora_jax.init(adapted.plan))
  >>> stacked = mora_jax.serving.stack([ones], slots=2)
  >>> is_adapted(stacked, jnp.array([0, -1, 1, 0]))
  Array([ True, False, False,  True], dtype=bool)

Another adapter in one slot is a line of JAX, which refuses adapters of other meanings::

  >>> stacked = jax.tree.map(lambda slots, m: slots.at[1].set(m), stacked, ones)
  >>> is_adapted(stacked, jnp.array([0, -1, 1, 0]))
  Array([ True, False,  True,  True], dtype=bool)
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mora_jax._common import checks, trees
from mora_jax._layer.adapter import Adapter
from mora_jax._mesh.places import explicit_sharding
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree.paths import Found, Tree, alike_adapters

__all__ = ["select", "stack"]


def stack(adapters: Sequence[Any], *, slots: int | None = None) -> Tree:
    """Adapters of one meaning in one tree, a slot for each of them.

    Args:
      adapters: Adapters of the same kernels, operators and factors. New ones add
        nothing, so that `[mora_jax.init(plan)]` makes a tree of empty slots.
      slots: The number of slots, N, which all take memory; None for one for each
        adapter. Others hold zeros, which add nothing.

    Returns:
      A tree as of one adapter, in which each M is (N, *stack, *m_shape), in the widest
      dtype of the M's, and means what one of them means.

    Raises:
      TypeError, ValueError: Adapters have different meanings or bases, or hold NaN;
        there are none, or more than slots; they train arrays, which all rows share.
    """
    found = alike_adapters(adapters)
    why = "and all rows of a batch share it; serve it by another base"
    found[0].refuse_trained(why)
    number = checks.positive_integer("slots", len(found) if slots is None else slots)
    if number < len(found):
        rule = f"slots must be at least the number of adapters, {len(found)}"
        raise ValueError(f"{rule}, got {slots}")
    stacked = Found()
    for path, adapter in found[0].items():
        ms = [one[path].m for one in found]
        ms += [jnp.zeros_like(ms[0])] * (number - len(ms))
        stacked[path] = adapter.replace(m=jnp.stack(ms))
    return stacked.tree()


def select(stacked: Tree, index: Any) -> Tree:
    """The adapters for the rows of a batch, one for each row.

    They are for `jax.vmap` of a function of one adapter and one row, see above; in NNX
    that function calls `nnx.set_adapters` on a clone of the model, see
    docs/many-adapters.md. Call this where it is compiled: one program for all indices.

    Args:
      stacked: Adapters in slots, as `stack` makes them. Gradients by them are gradients
        by the M's that rows have used.
      index: The number of the slot for each row, (B,), integers; -1 for no adapter. In
        a compiled function a number beyond the slots means no adapter as well.

    Returns:
      A tree as of one adapter, each M (B, *stack, *m_shape), or zeros for no adapter.

    Raises:
      TypeError: `stacked` is not of `stack`, or `index` not integers in one axis.
      ValueError: `index` has a number without a slot.
    """
    rule = "stacked must be adapters in slots, as serving.stack makes them"
    numbers = set[int]()
    for path, leaf in trees.located_leaves(stacked, "stacked").items():
        if not isinstance(leaf, Adapter) or not isinstance(leaf.spec, AdapterSpec):
            raise TypeError(f"{rule}, got {type(leaf).__name__} at {'/'.join(path)!r}")
        number, *shape = jnp.shape(leaf.m) or (0,)
        if (*shape,) != leaf.spec.shape:
            raise ValueError(f"{rule}, got {leaf} at {'/'.join(path)!r}")
        numbers.add(number)
    if len(numbers) != 1:
        raise ValueError(f"{rule} of one number, got {sorted(numbers) or 'none'}")
    index = _indices(index, number := numbers.pop())
    # JAX would count negative numbers from the end, and fills beyond it.
    at, sharding = jnp.where(index < 0, number, index), explicit_sharding(index)
    chosen: Any = {"mode": "fill", "fill_value": 0, "out_sharding": sharding}
    return jax.tree.map(lambda m: m.at[at].get(**chosen), stacked)


def _indices(index: Any, number: int) -> jax.Array:
    """`index` as slots from -1 to `number` - 1, checked as far as it is known."""
    known = not isinstance(index, Tracer)
    try:
        indices = np.asarray(index) if known else index
    except ValueError:  # lists of several lengths
        got = f"{index!r:.80}"
        raise TypeError(
            f"index must be integers, one for each row, got {got}"
        ) from None
    if not indices.size:  # NumPy takes [] for floats
        indices = indices.astype(jnp.int32)
    if not jnp.issubdtype(indices.dtype, jnp.integer) or indices.ndim != 1:
        kind = f"{indices.dtype}{list(indices.shape)}"
        raise TypeError(f"index must be integers, one for each row, got {kind}")
    for slot in indices[(indices < -1) | (indices >= number)] if known else ():
        raise ValueError(f"index must be from -1 to {number - 1}, got {slot}")
    return jnp.asarray(indices, jnp.int32)
