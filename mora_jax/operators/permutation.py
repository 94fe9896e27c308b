"""Permutation: decoupling over shuffled features."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._common.types import ArrayLike
from mora_jax._jax.linear_map import LinearMap
from mora_jax._jax.tiles import stored
from mora_jax.operators._base import Precision
from mora_jax.operators._pytree import operator, seeded
from mora_jax.operators._random import permutation
from mora_jax.operators.decoupling import Decoupling, block_positions, divide


@operator
class Permutation(Decoupling):
    """A fixed random order of the features, then decoupling, then the order undone.

    Attributes:
      seed: The seed of the two orders; equal widths share one.

    Example::

      >>> from mora_jax.operators import Permutation
      >>> op = Permutation(in_features=6, out_features=6, square_rank=3, seed=1)
      >>> op.decompress(op.compress(jnp.arange(6.0)))
      Array([0., 1., 2., 3., 4., 5.], dtype=float32)
    """

    seed: int = 0
    in_order: ArrayLike = seeded(lambda op: permutation(op.in_features, op.seed))
    in_inverse: ArrayLike = seeded(lambda op: np.argsort(op.in_order).astype(np.int32))
    out_order: ArrayLike = seeded(lambda op: permutation(op.out_features, op.seed))
    out_inverse: ArrayLike = seeded(
        lambda op: np.argsort(op.out_order).astype(np.int32)
    )

    name = "permutation"

    @property
    def aligned(self) -> bool:
        """False, since blocks gather features from everywhere."""
        return False

    def _compress(self, x: jax.Array) -> jax.Array:
        return super()._compress(_Reorder()((self.in_order, self.in_inverse), x))

    def leave(self, h: jax.Array) -> jax.Array:
        orders = self.out_order, self.out_inverse
        return _Reorder()(orders, super().leave(h), transposed=True)

    def matrix(self, m: jax.Array) -> jax.Array:
        # From the places of features in the two orders: it gathers the numbers of M,
        # and reorders nothing of the delta's size.
        q = self.square_rank
        out_block, out_offset = divide(self.out_inverse, q)
        block, offset = block_positions(self.in_inverse, self.in_features, q)
        group, out_group = self.in_group(block), out_block % np.uint32(self.num_groups)
        columns = stored(lambda m: _take(m, out_offset, unique=False), m)
        # A feature that starts over is in up to t blocks. An offset of q or more is in
        # no group, whatever row of M it is clipped to.
        parts = (
            jnp.where(
                group[:, t, None] == out_group,
                columns.at[offset[:, t]].get(mode="clip"),
                0,
            )
            for t in range(group.shape[1])
        )
        return functools.reduce(jnp.add, parts)

    def unit_rows(
        self, indices: jax.Array, m: jax.Array, precision: Precision = None
    ) -> jax.Array:
        return super().unit_rows(jnp.asarray(self.in_inverse)[indices], m, precision)


@dataclasses.dataclass(frozen=True)
class _Reorder(LinearMap):
    """x[..., order]; JAX would transpose it to a scatter, and the inverse is known."""

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        order, _ = residuals
        return _take(operand, order)

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        _, inverse = residuals
        return _take(cotangent, inverse)


def _take(x: jax.Array, order: ArrayLike, unique: bool = True) -> jax.Array:
    # Each index of a permutation is in bounds, and unique.
    return x.at[..., order].get(mode="promise_in_bounds", unique_indices=unique)
