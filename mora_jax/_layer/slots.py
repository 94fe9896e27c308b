"""M's of many adapters in one array, and the choice of one for each row of a batch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._common.types import Shape


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
        """The shape of the array."""
        return tuple(self.m.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the array."""
        return self.m.dtype

    @property
    def axis(self) -> int:
        """The axis of the slots."""
        return len(self.shape) - self.ndim_m - 1

    @property
    def number(self) -> int:
        """N, how many slots there are."""
        return self.shape[self.axis]

    @property
    def shape_of_one(self) -> Shape:
        """The shape of the M of one adapter, (*stack, q, q)."""
        return self.shape[: self.axis] + self.shape[self.axis + 1 :]


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
        """The shape of the M that a row has."""
        return self.slots.shape_of_one

    @property
    def dtype(self) -> Any:
        """The dtype of the M's."""
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


def beyond_if_none(index: jax.Array, number: int) -> jax.Array:
    """Slot of each row; rows without an adapter have a number past the last slot."""
    # JAX would count negative numbers from the end.
    return jnp.where(index < 0, number, index)
