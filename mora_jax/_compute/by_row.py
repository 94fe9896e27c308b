"""A delta for each row of a batch, by an M of its own."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mora_jax._slots import Selected
from mora_jax.products import Contraction, Convolution, Product

Added = Callable[[jax.Array, jax.Array], jax.Array]
"""(M, x) to the delta of the layer's output."""


def by_row(
    name: str, product: Product, added: Added, m: Selected, x: jax.Array
) -> jax.Array:
    """The delta of a layer's output, where each row of a batch has an M of its own.

    Args:
      name: The path of the kernel, for messages.
      product: What the layer computes.
      added: The delta of the layer's output by one M for all rows.
      m: The M's.
      x: The layer's input.

    Raises:
      ValueError: The input has no such batch.
    """
    ins, outs = _batch_axes(name, product, x)
    if x.shape[ins] != m.rows:
        raise ValueError(
            f"{name}: axis {ins} of the layer's input must be the batch, of one row "
            f"for each of the {m.rows} numbers in index, got an input of shape "
            f"{x.shape}; a model must not join the batch with another axis"
        )
    # A batch of one stays in its place, so that the product is the same.
    rows = jnp.moveaxis(jnp.expand_dims(x, ins + 1), ins, 0)
    return jax.vmap(added, out_axes=outs)(m.gathered(), rows).squeeze(outs + 1)


def _batch_axes(name: str, product: Product, x: jax.Array) -> tuple[int, int]:
    """The axes of the batch in a layer's input and output."""
    if isinstance(product, Contraction):
        free = [c for c in product.inputs if c not in product.kernel]
        if free:
            return product.inputs.index(free[0]), product.outputs.index(free[0])
    elif x.ndim >= (len(product.axes) if isinstance(product, Convolution) else 1):
        return 0, 0
    raise ValueError(
        f"{name}: the layer's input must have an axis of the batch, since each row has "
        f"an adapter of its own; got an input of shape {x.shape}"
    )
