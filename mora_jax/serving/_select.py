"""The adapters for the rows of a batch."""

from typing import Any

import jax.numpy as jnp

from mora_jax._layer.slots import Selected
from mora_jax._tree.adapters import Tree, nest
from mora_jax.serving._stack import check_indices, slots_of


def select(stacked: Tree, index: Any) -> Tree:
    """The adapters for the rows of a batch, one for each row.

    They go wherever adapters of a single kind go: to the function that `linen.wrap`
    returns, and to `nnx.set_adapters`. Call this inside of the compiled function: then
    one program serves all indices.

    The first axis of each adapted layer's input must be the batch (for an einsum the
    first axis that the kernel lacks). A layer multiplies all rows by its kernel in one
    product, and adds to each row the delta of its own adapter. Nothing is folded into
    kernels.

    Args:
      stacked: Adapters in slots, as `stack` makes them. Gradients by them are those by
        the M's that rows have used.
      index: The number of the slot for each row, (B,), integers; -1 for no adapter. In
        a compiled function, where nobody can check it, a number beyond the slots means
        no adapter as well.

    Returns:
      A tree that holds the slots and the index in place of each M.

    Raises:
      TypeError: `stacked` was not made by `stack`, or `index` are no integers.
      ValueError: `index` has more or fewer axes than one, or a number of no slot.

    Example::

      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp, mora_jax
      >>> from mora_jax import serving
      >>> model, x = nn.Dense(16), jnp.ones((4, 16))
      >>> variables = model.init(jax.random.key(0), x)
      >>> adapted = mora_jax.linen.wrap(model, None, variables, x)
      >>> @jax.jit
      ... def apply(stacked, variables, x, index):
      ...     return adapted(serving.select(stacked, index), variables, x)
      >>> one = jax.tree.map(jnp.ones_like, mora_jax.init(adapted.plan))
      >>> stacked = serving.stack([one], adapted.plan, slots=2)
      >>> y = apply(stacked, variables, x, jnp.array([0, -1, 1, 0]))
      >>> (y != model.apply(variables, x)).any(axis=1)
      Array([ True, False, False,  True], dtype=bool)
    """
    slots = slots_of(stacked)
    number = next(iter(slots.values())).number
    index = check_indices(index, "index", -1, number, (None,))
    return nest(
        {
            path: Selected(
                each, jnp.broadcast_to(index, (*each.shape[: each.axis], *index.shape))
            )
            for path, each in slots.items()
        }
    )
