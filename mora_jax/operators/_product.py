"""The product that all operators share, D(C(x) M), and its derivatives."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._linear import LinearMap, with_derivatives


def product(
    block: bool, precision: jax.lax.PrecisionLike
) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """(operator, M, x) -> D(C(x) M); `block` is the operator's."""
    if not block:  # for the gradient JAX keeps C(x), which is small
        return _Product(precision)
    return with_derivatives(_Product(precision), {1: _ByM(precision)})


@dataclasses.dataclass(frozen=True)
class _Product:
    """D(C(x) M)."""

    precision: jax.lax.PrecisionLike

    def __call__(self, op: Any, m: jax.Array, x: jax.Array) -> jax.Array:
        return op._spread(jnp.matmul(op._meet(x), m, precision=self.precision))


@dataclasses.dataclass(frozen=True)
class _ByM(LinearMap):
    """The product as a map of M. It keeps x for the gradient, and no blocks of it.

    Layers that read the same x (queries, keys and values) then keep it once.
    """

    precision: jax.lax.PrecisionLike

    def forward(self, residuals: Any, x: jax.Array) -> jax.Array:
        op, rows = residuals
        return _Product(self.precision)(op, x, rows)

    def backward(self, residuals: Any, y: jax.Array) -> jax.Array:
        op, rows = residuals
        h = op._meet(rows)
        (by_h,) = jax.linear_transpose(op._spread, h)(y)
        # One product of all blocks of all rows, not one for each block.
        h, by_h = (a.reshape(-1, op.square_rank) for a in (h, by_h))
        return jnp.matmul(h.T, by_h, precision=self.precision)
