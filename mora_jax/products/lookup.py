"""Embeddings: rows of the kernel by index."""

import dataclasses

import jax

from mora_jax.products._base import Delta, Product


@dataclasses.dataclass(frozen=True)
class Lookup(Product):
    """An embedding: the kernel's rows at integer inputs.

    The kernel is (in, out), and the input features are the vocabulary. The delta's rows
    are computed for the given indices alone.

    Example: an embedding class of your own, and its tied head::

      >>> from flax import nnx
      >>> import mora_jax
      >>> class Table(nnx.Module):
      ...     def encode(self, ids): return self.table[...][ids]
      ...     def decode(self, x): return x @ self.table[...].T
      >>> lookup, tied = mora_jax.products.Lookup(), mora_jax.products.ATTEND
      >>> mora_jax.register_layer(
      ...     Table, equation=lookup, kernel="table", method="encode")
      >>> mora_jax.register_layer(
      ...     Table, equation=tied, kernel="table", method="decode")
    """

    primitive = "gather"

    @property
    def axes(self) -> str:
        return "io"

    @property
    def adapted_by_default(self) -> bool:
        return False

    @property
    def passes(self) -> frozenset[str]:
        return frozenset({"select_n"})  # it selects NaN for an index out of bounds

    def fits(self, axes: str) -> bool:
        return axes == self.axes

    def delta(self, delta: Delta, x: jax.Array) -> jax.Array:
        return delta.lookup(x)
