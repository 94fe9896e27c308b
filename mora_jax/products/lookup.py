"""Embeddings: rows of the kernel by index."""

import dataclasses

import jax
import jax.numpy as jnp

from mora_jax._common.types import ArrayLike
from mora_jax.products._product import Factors, KernelDelta, Product


@dataclasses.dataclass(frozen=True)
class Lookup(Product):
    """An embedding: the kernel's rows at integer inputs.

    The kernel is (in, out), and the input features are the vocabulary. The delta's rows
    are computed for the given indices alone.

    Example: an embedding class of your own, and its tied head::

      >>> from flax import nnx
      >>> from mora_jax import register_layer
      >>> from mora_jax.products import ATTEND, Lookup
      >>> class Table(nnx.Module):
      ...     def encode(self, ids): return self.table[...][ids]
      ...     def decode(self, x): return x @ self.table[...].T
      >>> register_layer(Table, equation=Lookup(), kernel="table", method="encode")
      >>> register_layer(Table, equation=ATTEND, kernel="table", method="decode")
    """

    axes = "io"
    label = "an embedding"
    primitive = "gather"
    # Flax does not look up in an embedding of a single row, but copies it.
    stand_ins = frozenset({"broadcast_in_dim"})
    takes_indices = True

    @property
    def passes(self) -> frozenset[str]:
        return frozenset({"select_n"})  # it selects NaN for an index out of bounds

    def delta(self, delta: KernelDelta, x: jax.Array) -> jax.Array:
        return delta.lookup(x)

    def factors(self, scale: ArrayLike | float) -> Factors:
        if jnp.ndim(scale) > 1:  # it varies along the vocabulary
            return super().factors(scale)
        return None, jnp.asarray(scale)
