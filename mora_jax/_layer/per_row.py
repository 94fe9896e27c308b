r"""The equation where each row of a batch has an M of its own.

.. math:: y_b = x_b W + \alpha\, D(C(x_b) M_{s(b)})

s(b) is the slot of row b. The layer's own product, C and D take the whole
batch; only the product with M is by row. `TimesSlots` is that product for dense layers.
Other products, and layers whose features devices share, do all of what is behind W for
each row by itself, with copies of the M's (`jax.vmap`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._common.axes import sizes
from mora_jax._common.types import Shape
from mora_jax._jax.linear_map import LinearMap
from mora_jax._jax.qwix_guard import matmul
from mora_jax._jax.tuning import current_tuning
from mora_jax._jax.vma import transposed, zeros_for
from mora_jax._layer.slots import Selected, beyond_if_none
from mora_jax._mesh.placement import gather_m, mesh_of
from mora_jax._plan.spec import AdapterSpec
from mora_jax.operators._base import rows_product, whole
from mora_jax.products import Contraction, Product

Added = Callable[[jax.Array, jax.Array], jax.Array]
"""(M, x) to the delta of the layer's output."""


def by_row(
    spec: AdapterSpec,
    product: Product,
    added: Added,
    precision: jax.lax.PrecisionLike,
    m: Selected,
    x: jax.Array,
) -> jax.Array:
    """The delta of a layer's output, where each row of a batch has an M of its own."""
    batch_axes = product.batch_axes(x)
    ins, outs = batch_axes or (0, 0)
    if batch_axes is None or x.shape[ins] != m.rows:
        raise ValueError(
            f"axis {ins} of the layer's input must be the batch, with a "
            f"row for each of the {m.rows} numbers of index, got an input of shape "
            f"{x.shape}; a model must not join the batch with another axis"
        )
    shape, axes = spec.seen_by(len(product.axes))
    layout = spec.layout
    splits = layout is not None and layout.for_activations(axes, shape).splits
    if splits or not isinstance(product, Contraction):
        # A batch of one row stays in its place, so that the product is the same.
        rows = jnp.moveaxis(jnp.expand_dims(x, ins + 1), ins, 0)
        return jax.vmap(added, out_axes=outs)(m.gathered(), rows).squeeze(outs + 1)
    # C and D see all rows at once: they do not depend on M, and are fast in bulk.
    one_device = layout is None and mesh_of(x) is None
    axis, ms = m.slots.axis, gather_m(m.slots.m, layout, x, m.slots.ndim_m + 1)
    index = m.index[(0,) * axis]

    def times(h: jax.Array, m: jax.Array, part: Any = whole) -> jax.Array:
        by_m = TimesSlots(m.shape, m.dtype, precision, one_device, part)
        return by_m((h, index), m)

    def for_rows(x: jax.Array) -> jax.Array:
        def with_slots(m: jax.Array, x: jax.Array) -> jax.Array:
            # Alpha multiplies what is there once, instead of each M.
            return spec.factor * spec.operator.rows_with(times, x, m)

        function = with_slots
        for _ in range(axis):
            function = jax.vmap(function)
        return function(ms, x)

    x = product.to_rows(x)
    if axes == product.axes:
        y = for_rows(x)
    else:
        y = transposed(for_rows, (*x.shape[:-1], spec.operator.in_features), x)
    return product.from_rows(y, sizes(shape, product.axes, "o"))


@dataclasses.dataclass(frozen=True)
class TimesSlots(LinearMap):
    """The product of each row with the M in its slot, as a map of the M's, (N, q, k).

    The residuals are h, (B, ..., q) or blocks, and the slots of the rows, (B,), where
    those out of range stand for an M of zeros. With `one_device` one has all rows. If
    there is a `part`, rows are multiplied by that part of an M.
    """

    shape: Shape
    dtype: Any
    precision: jax.lax.PrecisionLike
    one_device: bool
    part: Any = whole

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        def product(row: tuple[jax.Array, jax.Array]) -> jax.Array:
            h, slot = row
            m = jax.lax.dynamic_index_in_dim(operand, slot, keepdims=False)
            y = matmul(h, self.part(m).astype(h.dtype), self.precision)
            return jnp.where((slot >= 0) & (slot < self.shape[0]), y, 0)

        # One row after another takes no copies of M's; all at once, each row has one.
        if self._loops:
            return jax.lax.map(product, residuals)
        return jax.vmap(product)(residuals)

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        h, index = residuals
        at = beyond_if_none(index, self.shape[0])
        wide = jnp.promote_types(h.dtype, jnp.float32)  # several rows are added up

        def gradient(h: jax.Array, g: jax.Array) -> jax.Array:
            by_part = rows_product(h, g, self.precision).astype(wide)
            return transposed(self.part, self.shape[1:], by_part)

        def add_row(row: jax.Array, total: jax.Array) -> jax.Array:
            return total.at[at[row]].add(gradient(h[row], cotangent[row]), mode="drop")

        zeros = zeros_for(self.shape, wide, h, cotangent)
        if self._loops:
            total = jax.lax.fori_loop(0, index.size, add_row, zeros)
        else:
            total = zeros.at[at].add(jax.vmap(gradient)(h, cotangent), mode="drop")
        return total.astype(self.dtype)

    @property
    def _loops(self) -> bool:
        # XLA splits a batch between devices, and no loop.
        return self.one_device and current_tuning().loops_over_rows
