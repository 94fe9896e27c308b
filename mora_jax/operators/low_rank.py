"""LoRA: two trained factors instead of a square between fixed maps."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from mora_jax._common.types import Shape
from mora_jax._jax.linear_algebra import last_with_first, matmul, rows_product
from mora_jax.operators._base import Operator, Precision
from mora_jax.operators._pytree import operator


@operator
class LowRank(Operator):
    r"""LoRA (https://arxiv.org/abs/2106.09685), in the plans and files of this library.

    .. math:: y = x W + \alpha\, (x A) B, \qquad A: in \to r, \quad B: r \to out

    Both factors are trained, and one array (in + out, r) holds them: A, and below it
    the transpose of B. A starts as PEFT's does, uniform between -1/sqrt(in) and
    1/sqrt(in), and B at zero, so that the delta is zero. The delta is not linear in
    what is trained, so that the ranks of a sum of deltas add up.

    Attributes:
      seed: The seed of A's start, where `init` is given no key.

    Example::

      >>> op = LowRank(in_features=3, out_features=2, square_rank=1)
      >>> a, b = jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[5.0, 7.0]])
      >>> op.delta_weight(op.joined(a, b))
      Array([[ 5.,  7.],
             [10., 14.],
             [15., 21.]], dtype=float32)
    """

    seed: int = 0

    name = "low_rank"
    linear = False
    square = False
    bounded = False
    work = "factors"

    @classmethod
    def widest(cls, rank: int, ins: int, outs: int, multiple: int | None = None) -> int:
        """The rank itself, or the multiple below it."""
        return rank - rank % (multiple or 1) or rank

    @property
    def rank(self) -> int:
        """The rank r, which stands in `square_rank`."""
        return self.square_rank

    @property
    def m_shape(self) -> Shape:
        """Shape of A above the transpose of B: (in + out, r)."""
        return self.in_features + self.out_features, self.rank

    @property
    def fine_tuning_scale(self) -> float:
        """1: LoRA has learning rates of its own, see docs/learning-rates.md."""
        return 1.0

    def factors(self, m: Array) -> tuple[Array, Array]:
        """A, (..., in, r), and B, (..., r, out), of a trained array."""
        a, b = m[..., : self.in_features, :], m[..., self.in_features :, :]
        return a, jnp.swapaxes(b, -2, -1)

    def joined(self, a: Array, b: Array) -> Array:
        """The trained array of A, (..., in, r), and B, (..., r, out)."""
        return jnp.concatenate([a, jnp.swapaxes(b, -2, -1)], axis=-2)

    def start(
        self, stack: Shape, init: str, key: PRNGKeyArray | None, dtype: DTypeLike
    ) -> Array:
        """A as PEFT draws it, and B: zeros, or as `super().start` draws an M."""
        # With init="embedding" A is zero, so that untrained tokens stay, and B normal.
        assert key is not None
        keys = jax.random.split(key)
        bound = 1 / math.sqrt(self.in_features)
        shape = (*stack, self.in_features, self.rank)
        a = jax.random.uniform(keys[0], shape, dtype, -bound, bound)
        b = super().start(stack, init, keys[1], dtype)[..., self.in_features :, :]
        if init == "embedding":
            a, b = jnp.zeros_like(a), jax.random.normal(keys[1], b.shape, dtype)
        return jnp.concatenate([a, b], axis=-2)

    def scaled(self, m: Any, factor: Any) -> Array:
        # B alone, or the delta would be multiplied by the square.
        is_b = jnp.arange(m.shape[-2])[:, None] >= self.in_features
        return m * jnp.where(is_b, factor, 1).astype(m.dtype)

    def scaled_by_input(self, m: Any, by_input: Any) -> Array:
        outputs = jnp.ones((*by_input.shape[:-1], self.out_features), by_input.dtype)
        return m * jnp.concatenate([by_input, outputs], axis=-1)[..., None]

    # C and D are identities, and between them x is multiplied by both factors. With
    # h = x A kept, dy = (x dA) B + h dB, so that dA = x^T (g B^T) and dB = h^T g.

    def enter(self, x: Array) -> Array:
        return x

    def leave(self, h: Array) -> Array:
        return h

    def product(self, h: Array, m: Array, precision: Precision = None) -> Array:
        a, b = self.factors(m)
        h = jax.lax.dot_general(h, a, last_with_first(h), precision=precision)
        return jax.lax.dot_general(h, b, last_with_first(h), precision=precision)

    def kept(self, x: Array, m: Array, precision: Precision = None) -> Any:
        a, b = self.factors(m)
        return x, matmul(x, a, precision), b

    def tangent(self, kept: Any, tangent: Array, precision: Precision = None) -> Array:
        (x, h, b), (by_a, by_b) = kept, self.factors(tangent)
        through_a = matmul(matmul(x, by_a, precision), b, precision)
        return through_a + matmul(h, by_b, precision)

    def gradient(
        self, kept: Any, g: Array, precision: Precision = None, shards: int = 1
    ) -> Array:
        x, h, b = kept
        by_a = rows_product(x, matmul(g, b.T, precision), precision)
        return self.joined(by_a, rows_product(h, g, precision))

    def unit_rows(self, indices: Array, m: Array, precision: Precision = None) -> Array:
        a, b = self.factors(m)
        return matmul(a[indices], b, precision)

    def matrix(self, m: Array) -> Array:
        return matmul(*self.factors(m))


def nearest_factors(
    delta: np.ndarray, max_error: float | int, rank: int | None = None
) -> tuple[np.ndarray, np.ndarray, float, int]:
    """A and B that are nearest to a delta, (*stack, in, out), and what they lack.

    Then come the share of the delta's norm that is cut off, the largest of a stack, and
    the least rank from 1 on that cuts off at most `max_error`: A's and B's by default.
    """
    left, values, right = np.linalg.svd(delta, full_matrices=False)
    squares = np.cumsum(values[..., ::-1] ** 2, -1)[..., ::-1]
    shares = np.sqrt(squares / np.where(squares[..., :1] > 0, squares[..., :1], 1))
    # What the ranks from 0 to min(in, out) cut off, since singular values fall.
    cut = np.append(shares.reshape(-1, values.shape[-1]).max(0), 0)
    least = max(1, int(np.sum(cut > max_error)))
    rank = min(rank or least, values.shape[-1])
    b = values[..., :rank, None] * right[..., :rank, :]
    return left[..., :rank], b, float(cut[rank]), least
