r"""The equation where each row of a batch has an M of its own.

.. math:: y_b = x_b W + \alpha\, D(C(x_b) M_{s(b)})

s(b) is the slot of row b. The layer's own product, C and D take the whole
batch; only the product with M is by row. `BySlot` is that product for dense layers.
Other products, and layers whose features devices share, do all of what is behind W for
each row by itself, with copies of the M's (`jax.vmap`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._common.axes import sizes
from mora_jax._common.types import Shape
from mora_jax._jax.linear_algebra import transposed
from mora_jax._jax.linear_map import LinearMap
from mora_jax._jax.vma import zeros_for
from mora_jax._layer.slots import Selected, beyond_if_none
from mora_jax._layer.tuning import current_tuning
from mora_jax._mesh.placement import gather_m, mesh_of
from mora_jax._plan.spec import AdapterSpec
from mora_jax.operators._map import Precision
from mora_jax.products._product import Product
from mora_jax.products.contraction import Contraction

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
    op, one_device = spec.operator, layout is None and mesh_of(x) is None
    axis, ms = m.slots.axis, gather_m(m.slots.m, layout, x, m.slots.ndim_m + 1)
    index = m.index[(0,) * axis]

    def for_rows(x: jax.Array) -> jax.Array:
        def with_slots(m: jax.Array, x: jax.Array) -> jax.Array:
            h = op.enter(x)
            product = BySlot(precision, one_device, h.shape[1:])
            # Alpha multiplies what is there once, instead of each M.
            return spec.factor * op.leave(product(((op, index), m), h))

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
class _BySlot(LinearMap):
    """A map of an array by rows, which may go through them one after another.

    With `one_device` one has all rows.
    """

    precision: Precision
    one_device: bool

    def each(self, function: Callable[..., jax.Array], rows: Any) -> jax.Array:
        """The function of each row, zero for slots that are none."""
        # One row after another takes no copies of M's; all at once, each row has one.
        if self.loops:
            return jax.lax.map(function, rows)
        return jax.vmap(function)(rows)

    @property
    def loops(self) -> bool:
        """True if rows come one after another."""
        # XLA splits a batch between devices, and no loop.
        return self.one_device and current_tuning().loops_over_rows


@dataclasses.dataclass(frozen=True)
class BySlot(_BySlot):
    """The product of each row with the M in its slot.

    The operand is C(x), (B, ..., q) or blocks, without B of the shape `row`. The
    residuals are the operator and the slots of the rows, (B,), where those out of range
    stand for an M of zeros; and the M's, (N, *m_shape).
    """

    row: Shape

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        (op, index), ms = residuals

        def product(row: tuple[jax.Array, jax.Array]) -> jax.Array:
            h, slot = row
            y = op.product(h, _in_slot(ms, slot).astype(h.dtype), self.precision)
            return _if_any(ms, slot, y)

        return self.each(product, (operand, index))

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        of_h = functools.partial(self.forward, residuals)
        return transposed(of_h, (cotangent.shape[0], *self.row), cotangent)

    @property
    def derives(self) -> bool:
        return True

    def derivative(self, residuals: Any, operand: Any) -> tuple[LinearMap, Any]:
        """The derivative by the M's."""
        (op, index), ms = residuals
        by_ms = ByMs(self.precision, self.one_device, ms.shape, ms.dtype)
        return by_ms, (op, index, ms, operand)


@dataclasses.dataclass(frozen=True)
class ByMs(_BySlot):
    """The same as a map of the M's, or its derivative if it is not linear in them."""

    shape: Shape
    dtype: Any

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        op, index, ms, h = residuals

        def product(row: tuple[jax.Array, jax.Array]) -> jax.Array:
            h, slot = row
            m, tangent = (_in_slot(a, slot).astype(h.dtype) for a in (ms, operand))
            times = functools.partial(op.product, h, precision=self.precision)
            return _if_any(ms, slot, jax.jvp(times, (m,), (tangent,))[1])

        return self.each(product, (h, index))

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        op, index, ms, h = residuals
        at = beyond_if_none(index, self.shape[0])
        wide = jnp.promote_types(h.dtype, jnp.float32)  # several rows are added up

        def gradient(h: jax.Array, g: jax.Array, slot: jax.Array) -> jax.Array:
            m = _in_slot(ms, slot).astype(h.dtype)
            _, back = jax.vjp(lambda m: op.product(h, m, self.precision), m)
            return back(g)[0].astype(wide)

        def add_row(row: jax.Array, total: jax.Array) -> jax.Array:
            by_row = gradient(h[row], cotangent[row], index[row])
            return total.at[at[row]].add(by_row, mode="drop")

        zeros = zeros_for(self.shape, wide, h, cotangent)
        if self.loops:
            total = jax.lax.fori_loop(0, index.size, add_row, zeros)
        else:
            by_rows = jax.vmap(gradient)(h, cotangent, index)
            total = zeros.at[at].add(by_rows, mode="drop")
        return total.astype(self.dtype)


def _in_slot(ms: jax.Array, slot: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(ms, slot, keepdims=False)


def _if_any(ms: jax.Array, slot: jax.Array, y: jax.Array) -> jax.Array:
    """`y`, or zeros if no M is in such a slot."""
    return jnp.where((slot >= 0) & (slot < ms.shape[0]), y, 0)
