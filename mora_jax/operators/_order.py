"""Features in a random order, which a seed fixes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._common.types import ArrayLike
from mora_jax._jax.linear_map import LinearMap
from mora_jax.operators._base import Operator, Side
from mora_jax.operators._pytree import operator, seeded
from mora_jax.operators._random import permutation


def _order(side: Side, *, inverse: bool = False) -> Any:
    def order(op: "Ordered") -> np.ndarray | None:
        if not (op.seed or op.seed_0_shuffles):
            return None
        order = permutation(getattr(op, f"{side}_features"), op.seed)
        return np.argsort(order).astype(np.int32) if inverse else order

    return seeded(order)


@operator
class Ordered(Operator):
    """An operator that takes features in an order of its own, and undoes it after D.

    Attributes:
      seed: The seed of the two orders; equal widths share one.
    """

    seed: int = 0
    in_order: ArrayLike | None = _order("in")
    in_inverse: ArrayLike | None = _order("in", inverse=True)
    out_order: ArrayLike | None = _order("out")
    out_inverse: ArrayLike | None = _order("out", inverse=True)

    seed_0_shuffles = True
    """False if features stay as they are with the seed 0."""

    def ordered(self, x: jax.Array) -> jax.Array:
        """Inputs in the order, (..., in_features)."""
        orders = self.in_order, self.in_inverse
        return x if self.in_order is None else _Reorder()(orders, x)

    def restored(self, y: jax.Array) -> jax.Array:
        """Outputs out of the order, (..., out_features)."""
        orders = self.out_order, self.out_inverse
        return y if self.out_order is None else _Reorder()(orders, y, transposed=True)

    def places(self, indices: Any) -> Any:
        """The places of inputs in the order, by their numbers."""
        order = self.in_inverse
        return indices if order is None else jnp.asarray(order)[indices]


@dataclasses.dataclass(frozen=True)
class _Reorder(LinearMap):
    """x[..., order]; JAX would transpose it to a scatter, and the inverse is known."""

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        order, _ = residuals
        return _take(operand, order)

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        _, inverse = residuals
        return _take(cotangent, inverse)


def _take(x: jax.Array, order: ArrayLike) -> jax.Array:
    # Each index of a permutation is in bounds, and unique.
    return x.at[..., order].get(mode="promise_in_bounds", unique_indices=True)
