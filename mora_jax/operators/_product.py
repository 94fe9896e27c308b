"""The product that all operators share, D(C(x) M), as a map of M."""

import dataclasses
from typing import Any

import jax

from mora_jax._interception import matmul
from mora_jax._linear import LinearMap


def product(
    op: Any, m: jax.Array, x: jax.Array, precision: jax.lax.PrecisionLike
) -> jax.Array:
    """D(C(x) M)."""
    if op.block:
        return _Blocks(precision)((op, x), m)
    return op._spread(rows_product(op._meet(x), m, precision))


def rows_product(
    h: jax.Array, m: jax.Array, precision: jax.lax.PrecisionLike
) -> jax.Array:
    """H M, (..., q), as a map of M; linear in h, too."""
    return _Rows(precision)(h, m)


@dataclasses.dataclass(frozen=True)
class _Rows(LinearMap):
    """h M. For the gradient it keeps h = C(x), which is small."""

    precision: jax.lax.PrecisionLike

    def forward(self, residuals: Any, x: jax.Array) -> jax.Array:
        return matmul(residuals, x, self.precision)

    def backward(self, residuals: Any, y: jax.Array) -> jax.Array:
        # One product of all blocks of all rows, not one for each block.
        h, by_h = (a.reshape(-1, a.shape[-1]) for a in (residuals, y))
        return matmul(h.T, by_h, self.precision)


@dataclasses.dataclass(frozen=True)
class _Blocks(LinearMap):
    """D(C(x) M). It keeps x for the gradient, and no blocks of it.

    Layers that read the same x (queries, keys and values) then keep it once.
    """

    precision: jax.lax.PrecisionLike

    def forward(self, residuals: Any, x: jax.Array) -> jax.Array:
        op, rows = residuals
        return op._spread(_Rows(self.precision).forward(op._meet(rows), x))

    def backward(self, residuals: Any, y: jax.Array) -> jax.Array:
        op, rows = residuals
        h = op._meet(rows)
        (by_h,) = jax.linear_transpose(op._spread, h)(y)
        return _Rows(self.precision).backward(h, by_h)
