"""Block diagonal: an M of its own for each block of features."""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from mora_jax._common.types import ArrayLike, Shape
from mora_jax._jax.linear_map import LinearMap
from mora_jax._jax.tiles import cut, join, places
from mora_jax.operators._base import Operator, Precision
from mora_jax.operators._pytree import operator, permutation, seeded

LEAST_USE = 2 / 3  # of the parameters, by blocks that divide both widths


@operator
class BlockDiagonal(Operator):
    r"""An M for each of n blocks of features: a delta of blocks on its diagonal.

    .. math:: y_k = x_k M_k, \qquad M: (n, p, s), \quad n\,p\,s \le r\,(in + out)

    Block k takes p neighbouring inputs to s neighbouring outputs, p = ceil(in / n) and
    s = ceil(out / n). Where n does not divide a width, the last blocks are shorter by
    one, and the last row or column of their M is not used. The source is DiaBlo
    (https://arxiv.org/abs/2506.03230); choosing n by a budget is ours.

    Other operators repeat each number of M in the delta. Here none is, so that steps of
    M are steps of the kernel, of rank up to min(in, out). `square_rank` is n.

    Attributes:
      seed: The seed of the order of features. With 0 a block is a part of the kernel.

    Example::

      >>> op = BlockDiagonal(in_features=4, out_features=2, square_rank=2)
      >>> op.delta_weight(jnp.array([[[1.0], [2.0]], [[3.0], [4.0]]]))
      Array([[1., 0.],
             [2., 0.],
             [0., 3.],
             [0., 4.]], dtype=float32)
    """

    seed: int = 0
    in_orders: tuple[ArrayLike, ...] = seeded(lambda op: _orders(op, op.in_features))
    out_orders: tuple[ArrayLike, ...] = seeded(lambda op: _orders(op, op.out_features))

    name = "block_diagonal"
    work = "blocks"
    block = True
    square = False

    @classmethod
    @functools.lru_cache(maxsize=1024)  # a model's layers ask the same again and again
    def widest(  # type: ignore[override]
        cls, rank: int, ins: int, outs: int, multiple: int | None = None
    ) -> int:
        """The least number of blocks with no more parameters than a LoRA of `rank`."""

        def parameters(n: int) -> int:
            return n * -(-ins // n) * -(-outs // n)

        budget, common = rank * (ins + outs), math.gcd(ins, outs)
        # min(in, out) blocks are narrower than in + out, so that one of these fits.
        numbers = range(max(1, ins * outs // budget), min(ins, outs) + 1)
        fitting = [n for n in numbers if parameters(n) <= budget]
        least = fitting[0]
        if multiple:
            return next((n for n in fitting if n % multiple == 0), least)
        whole = next((n for n in fitting if common % n == 0), least)
        return whole if parameters(whole) >= LEAST_USE * parameters(least) else least

    @property
    def m_shape(self) -> Shape:
        """Shape of M: (n, p, s)."""
        n = self.square_rank
        return n, -(-self.in_features // n), -(-self.out_features // n)

    @property
    def aligned(self) -> bool:
        """True if blocks are slices of features, all of one width."""
        widths = self.in_features, self.out_features
        return not self.in_orders and not any(w % self.square_rank for w in widths)

    @property
    def gains(self) -> tuple[float, float]:
        """1 each, since C and D move numbers."""
        return 1.0, 1.0

    def _compress(self, x: Array) -> Array:
        if self.in_orders:
            x = _Reorder()(self.in_orders, x)
        return cut(x, self.square_rank)

    def _decompress(self, h: Array) -> Array:
        y, orders = join(h, self.out_features), self.out_orders
        return _Reorder()(orders, y, transposed=True) if orders else y

    def scaled_by_input(self, m: Any, by_input: Any) -> Array:
        # Each input meets a row of M of its own.
        if self.in_orders:
            by_input = by_input[..., self.in_orders[0]]
        return m * cut(by_input, self.square_rank)[..., None]

    def product(self, h: Array, m: Array, precision: Precision = None) -> Array:
        return jnp.einsum("...np,nps->...ns", h, m, precision=precision)

    def product_by_m(self, h: Array, g: Array, precision: Precision = None) -> Array:
        return jnp.einsum("...np,...ns->nps", h, g, precision=precision)

    def unit_rows(self, indices: Array, m: Array, precision: Precision = None) -> Array:
        # A row of M, among zeros for the outputs of other blocks.
        n, p, s = self.m_shape
        if self.in_orders:
            indices = jnp.asarray(self.in_orders[1])[indices]
        at = jnp.asarray(places(self.in_features, n))[indices]
        here = (at // p)[..., None] == jnp.arange(n)
        rows = m.reshape(n * p, s)[at]
        return self._decompress(jnp.where(here[..., None], rows[..., None, :], 0))

    def matrix(self, m: Array) -> Array:
        return self.unit_rows(jnp.arange(self.in_features), m)


def _orders(op: BlockDiagonal, features: int) -> tuple[np.ndarray, ...]:
    """The order of features and its inverse; () if they stay as they are."""
    if op.seed == 0:
        return ()
    order = permutation(features, op.seed)
    return order, np.argsort(order).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class _Reorder(LinearMap):
    """x[..., order]; JAX would transpose it to a scatter, and the inverse is known."""

    def forward(self, residuals: Any, operand: Array) -> Array:
        # Each index of a permutation is in bounds, and unique.
        known: Any = {"mode": "promise_in_bounds", "unique_indices": True}
        return operand.at[..., residuals[0]].get(**known)

    def backward(self, residuals: Any, cotangent: Array) -> Array:
        return self.forward(residuals[::-1], cotangent)
