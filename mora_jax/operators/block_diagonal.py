"""Block diagonal: an M of its own for each block of features."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._common.types import Shape
from mora_jax._jax.tiles import pad_to
from mora_jax.operators._base import Precision
from mora_jax.operators._order import Ordered
from mora_jax.operators._pytree import operator

LEAST_USE = 2 / 3
"""The part of the parameters that blocks which divide both widths must have."""


@operator
class BlockDiagonal(Ordered):
    r"""An M for each of n blocks of features: a delta of blocks on its diagonal.

    .. math:: y_k = x_k M_k, \qquad M: (n, p, s), \quad n\,p\,s \le r\,(in + out)

    Block k takes p neighbouring inputs to s neighbouring outputs, p = ceil(in / n) and
    s = ceil(out / n). Where n does not divide a width, the last blocks are shorter by
    one, and the last row or column of their M is not used. The source is DiaBlo
    (https://arxiv.org/abs/2506.03230); choosing n by a budget is ours.

    Other operators repeat each number of M in many places of the delta. Here none is,
    so that steps of M are steps of the kernel itself, of rank up to min(in, out).
    `square_rank` is n.

    Attributes:
      seed: The seed of the order in which features are taken. With 0 they stay as they
        are, so that a block is a part of the kernel.

    Example::

      >>> from mora_jax.operators import BlockDiagonal
      >>> op = BlockDiagonal(in_features=4, out_features=2, square_rank=2)
      >>> op.delta_weight(jnp.array([[[1.0], [2.0]], [[3.0], [4.0]]]))
      Array([[1., 0.],
             [2., 0.],
             [0., 3.],
             [0., 4.]], dtype=float32)
    """

    name = "block_diagonal"
    seed_0_shuffles = False
    work = "blocks"
    block = True
    square = False

    @classmethod
    @functools.lru_cache(maxsize=1024)  # a model's layers ask the same again and again
    def widest(  # type: ignore[override]
        cls, rank: int, in_features: int, out_features: int
    ) -> int:
        """The least number of blocks with no more parameters than a LoRA of `rank`.

        It divides both widths if blocks then have two thirds of the parameters or more.
        """

        def parameters(n: int) -> int:
            return n * -(-in_features // n) * -(-out_features // n)

        budget = rank * (in_features + out_features)
        most, common = (
            min(in_features, out_features),
            math.gcd(in_features, out_features),
        )
        # min(in, out) blocks are narrower than in + out, so that one of these fits.
        numbers = range(max(1, in_features * out_features // budget), most + 1)
        least = next(n for n in numbers if parameters(n) <= budget)
        whole = next((n for n in numbers if n >= least and common % n == 0), least)
        enough = parameters(whole) >= LEAST_USE * parameters(least)
        return whole if enough else least

    @property
    def m_shape(self) -> Shape:
        """Shape of M: (n, p, s)."""
        n = self.square_rank
        return n, -(-self.in_features // n), -(-self.out_features // n)

    @property
    def compressed_shape(self) -> Shape:
        """Shape of the blocks of one vector: (n, p)."""
        return self.m_shape[:2]

    @property
    def aligned(self) -> bool:
        """True if blocks are slices of features, all of one width."""
        widths = self.in_features, self.out_features
        return self.in_order is None and not any(w % self.square_rank for w in widths)

    @property
    def gains(self) -> tuple[float, float]:
        """1 each, since C and D move numbers."""
        return 1.0, 1.0

    def _compress(self, x: jax.Array) -> jax.Array:
        return cut(self.ordered(x), self.square_rank)

    def _decompress(self, h: jax.Array) -> jax.Array:
        return self.restored(join(h, self.out_features))

    def product(
        self, h: jax.Array, m: jax.Array, precision: Precision = None
    ) -> jax.Array:
        return jnp.einsum("...np,nps->...ns", h, m, precision=precision)

    def product_by_m(
        self, h: jax.Array, g: jax.Array, precision: Precision = None
    ) -> jax.Array:
        return jnp.einsum("...np,...ns->nps", h, g, precision=precision)

    def unit_rows(
        self, indices: jax.Array, m: jax.Array, precision: Precision = None
    ) -> jax.Array:
        # A row of M, among zeros for the outputs of other blocks.
        n, p, s = self.m_shape
        places = jnp.asarray(join(np.arange(n * p).reshape(n, p), self.in_features))
        at = places[self.places(indices)]
        here = (at // p)[..., None] == jnp.arange(n)
        rows = m.reshape(n * p, s)[at]
        return self._decompress(jnp.where(here[..., None], rows[..., None, :], 0))

    def matrix(self, m: jax.Array) -> jax.Array:
        return self.unit_rows(jnp.arange(self.in_features), m)


def cut(x: jax.Array, n: int) -> jax.Array:
    """(..., features) -> (..., n, width): neighbours, and zeros in shorter blocks."""
    *batch, features = x.shape
    width = -(-features // n)
    longer = features - n * (width - 1)
    if longer == n:
        return x.reshape(*batch, n, width)
    first = x[..., : longer * width].reshape(*batch, longer, width)
    rest = x[..., longer * width :].reshape(*batch, n - longer, width - 1)
    return jnp.concatenate([first, pad_to(rest, width)], axis=-2)


def join(h: Any, features: int) -> Any:
    """(..., n, width) -> (..., features): the transpose of `cut`, also for NumPy."""
    *batch, n, width = h.shape
    longer = features - n * (width - 1)
    if longer == n:
        return h.reshape(*batch, features)
    numpy = np if isinstance(h, np.ndarray) else jnp
    first = h[..., :longer, :].reshape(*batch, longer * width)
    rest = h[..., longer:, :-1].reshape(*batch, features - longer * width)
    return numpy.concatenate([first, rest], axis=-1)
