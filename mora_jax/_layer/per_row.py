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
from mora_jax._layer.tuning import current_tuning
from mora_jax._mesh.placement import gather_m, mesh_of
from mora_jax._plan.spec import AdapterSpec
from mora_jax.operators._map import Precision
from mora_jax.products._product import Product
from mora_jax.products.contraction import Contraction

OfTwo = Callable[[jax.Array, jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The M's of several adapters for one kernel, (*stack, N, q, q)."""

    # `ndim_m` counts the axes of one M without a stack's: with stacks of layers before
    # the axis of the slots, shapes alone do not say where it is.

    m: Any
    ndim_m: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> Shape:
        return tuple(self.m.shape)

    @property
    def dtype(self) -> Any:
        return self.m.dtype

    @property
    def axis(self) -> int:
        return len(self.shape) - self.ndim_m - 1

    @property
    def number(self) -> int:
        """N, how many slots there are."""
        return self.shape[self.axis]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selected:
    """The M's in slots, and the slot of each row, `index`, (*stack, B); -1 for none."""

    # No M is copied before a layer does so: which way is fast depends on its input. The
    # index is the same for all of the stack.

    slots: Slots
    index: Any

    @property
    def shape(self) -> Shape:
        """The shape of the M that a row has, (*stack, q, q)."""
        shape, axis = self.slots.shape, self.slots.axis
        return shape[:axis] + shape[axis + 1 :]

    @property
    def dtype(self) -> Any:
        return self.slots.dtype

    @property
    def rows(self) -> int:
        """B, the number of rows."""
        return self.index.shape[-1]

    def gathered(self) -> jax.Array:
        """The M of each row, (B, *stack, q, q); zeros for none."""
        axis = self.slots.axis
        index = beyond_if_none(self.index[(0,) * axis], self.slots.number)
        slots = jnp.moveaxis(self.slots.m, axis, 0)
        return slots.at[index].get(mode="fill", fill_value=0)


def by_row(
    spec: AdapterSpec,
    product: Product,
    added: OfTwo,
    precision: jax.lax.PrecisionLike,
    m: Selected,
    x: jax.Array,
) -> jax.Array:
    """The delta of a layer's output, where each row of a batch has an M of its own.

    `added` gives it for one M, as a function of M and x.
    """
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
    features = layout and layout.for_activations(axes, shape)
    if features or not isinstance(product, Contraction):
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
class BySlot(LinearMap):
    """The product of each row with the M in its slot.

    The operand is C(x), (B, ..., q) or blocks, without B of the shape `row`; one device
    has all rows, if `one_device`. The residuals are the operator and the slots of the
    rows, (B,), where those out of range stand for an M of zeros; and the M's, (N,
    *m_shape).
    """

    precision: Precision
    one_device: bool
    row: Shape

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        (op, index), ms = residuals

        def product(h: jax.Array, slot: jax.Array) -> jax.Array:
            return op.product(h, _in_slot(ms, slot).astype(h.dtype), self.precision)

        return _each(product, self.one_device, len(ms), operand, index)

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        (op, index), ms = residuals

        def back(g: jax.Array, slot: jax.Array) -> jax.Array:
            m = _in_slot(ms, slot).astype(g.dtype)
            return transposed(lambda h: op.product(h, m, self.precision), self.row, g)

        return _each(back, self.one_device, len(ms), cotangent, index)

    def derivative(self, residuals: Any, operand: Any) -> tuple[LinearMap, Any]:
        (op, index), ms = residuals
        by_ms = ByMs(self.precision, self.one_device)
        return by_ms, (op, index, ms, operand)


@dataclasses.dataclass(frozen=True)
class ByMs(LinearMap):
    """The derivative by the M's, as a map of their tangent."""

    precision: Precision
    one_device: bool

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        op, index, ms, h = residuals

        def product(h: jax.Array, slot: jax.Array) -> jax.Array:
            m, tangent = (_in_slot(a, slot).astype(h.dtype) for a in (ms, operand))
            times = functools.partial(op.product, h, precision=self.precision)
            return jax.jvp(times, (m,), (tangent,))[1]

        return _each(product, self.one_device, len(ms), h, index)

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        op, index, ms, h = residuals
        at = beyond_if_none(index, len(ms))
        wide = jnp.promote_types(h.dtype, jnp.float32)  # several rows are added up

        def gradient(h: jax.Array, g: jax.Array, slot: jax.Array) -> jax.Array:
            m = _in_slot(ms, slot).astype(h.dtype)
            _, back = jax.vjp(lambda m: op.product(h, m, self.precision), m)
            return back(g)[0].astype(wide)

        def add_row(row: jax.Array, total: jax.Array) -> jax.Array:
            by_row = gradient(h[row], cotangent[row], index[row])
            return total.at[at[row]].add(by_row, mode="drop")

        zeros = zeros_for(ms.shape, wide, h, cotangent)
        if _loops(self.one_device):
            total = jax.lax.fori_loop(0, index.size, add_row, zeros)
        else:
            by_rows = jax.vmap(gradient)(h, cotangent, index)
            total = zeros.at[at].add(by_rows, mode="drop")
        return total.astype(ms.dtype)


def beyond_if_none(index: jax.Array, number: int) -> jax.Array:
    """Slot of each row; rows without an adapter have a number past the last slot."""
    # JAX would count negative numbers from the end.
    return jnp.where(index < 0, number, index)


def _loops(one_device: bool) -> bool:
    # XLA splits a batch between devices, and no loop.
    return one_device and current_tuning().loops_over_rows


def _each(
    function: OfTwo, one_device: bool, number: int, h: jax.Array, index: jax.Array
) -> jax.Array:
    """The function of each row and its slot; zero where none has such a number."""

    def of_row(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        h, slot = row
        return jnp.where((slot >= 0) & (slot < number), function(h, slot), 0)

    # One row after another takes no copies of M's; all at once, each row has one.
    rows = h, index
    return jax.lax.map(of_row, rows) if _loops(one_device) else jax.vmap(of_row)(rows)


def _in_slot(ms: jax.Array, slot: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(ms, slot, keepdims=False)
