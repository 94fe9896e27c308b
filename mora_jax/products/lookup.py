"""Embeddings: rows of the kernel by index."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._common.checks import check_choice
from mora_jax._common.types import ArrayLike
from mora_jax._trace_check import Claim
from mora_jax.products._product import Factors, KernelDelta, Product

MODES: tuple[Any, ...] = None, "clip", "wrap", "fill"


@dataclasses.dataclass(frozen=True)
class Lookup(Product):
    """An embedding: the kernel's rows at integer inputs.

    The kernel is (in, out), and the input features are the vocabulary. The delta's rows
    are computed for the given indices alone.

    Attributes:
      mode: Rows at indices beyond the table, as in `jnp.take`: "clip", "wrap" or "fill"
        (no delta there). None is for `table[ids]`, where negative indices count from
        the end, and the rest is clipped; and for layers that return NaN.

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

    mode: str | None = None

    axes = "io"
    label = "an embedding"
    takes_indices = True

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)

    @property
    def claim(self) -> Claim:
        lookups = [self, *(Lookup(mode) for mode in MODES if mode != self.mode)]
        return Claim(
            primitive="gather",
            # Flax does not look up in an embedding of a single row, but copies it.
            stand_ins=frozenset({"broadcast_in_dim"}),
            rows=tuple((f"products.{lookup}", lookup.places) for lookup in lookups),
        )

    def places(self, indices: Any, size: int) -> Any:
        """The rows of a table of `size` rows; beyond it for none of them."""
        if self.mode == "wrap":
            return indices % size
        if self.mode != "clip":
            indices = indices + size * (indices < 0)
        return indices if self.mode == "fill" else indices.clip(0, size - 1)

    def delta(self, delta: KernelDelta, x: jax.Array) -> jax.Array:
        size, wide = delta.operator.in_features, jnp.result_type(x.dtype, jnp.int32)
        places = self.places(x.astype(wide), size)
        inside = (places >= 0) & (places < size)
        rows = delta.lookup(places)
        return jnp.where(inside[..., None], rows, 0) if self.mode == "fill" else rows

    def factors(self, scale: ArrayLike | float) -> Factors:
        if jnp.ndim(scale) > 1:  # it varies along the vocabulary
            return super().factors(scale)
        return None, jnp.asarray(scale)
