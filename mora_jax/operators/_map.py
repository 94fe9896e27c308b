r"""The linear map of an adapter, with its derivative by M.

.. math::

    y = D(C(x) M), \qquad dy = D(C(x)\, dM), \qquad dM = \sum_{rows} C(x)^T D^T(g)

Here g is the gradient of y, and the sum runs over rows. Blocks of C(x) are rows like
any other, so that it goes over both. An operator is such a map. What computes the same
otherwise replaces it as a whole: a form for a chip, one device's part, many devices.
"""

from typing import Any, ClassVar

import jax

from mora_jax._common.types import Shape
from mora_jax._jax.linear_algebra import last_with_first, rows_product, transposed

Precision = jax.lax.PrecisionLike


class DeltaMap:
    """D(C(x) M) as a map of x, with its derivative by M.

    It follows from `enter`, `leave` and, where rows of C(x) are not multiplied by an M
    as they are, `product`. A map that knows a faster way gives it as well.
    """

    block: ClassVar[bool] = False
    """True if M acts on several blocks of the input, so that C(x) is as large as x."""

    @property
    def m_shape(self) -> Shape:
        """Shape of M."""
        raise NotImplementedError

    def enter(self, x: jax.Array) -> jax.Array:
        """C(x), or a sum of its blocks where M may multiply the sum."""
        raise NotImplementedError

    def leave(self, h: jax.Array) -> jax.Array:
        """D, of what M has made of `enter(x)`."""
        raise NotImplementedError

    def product(
        self, h: jax.Array, m: jax.Array, precision: Precision = None
    ) -> jax.Array:
        """The rows of h times M."""
        return jax.lax.dot_general(h, m, last_with_first(h), precision=precision)

    def product_by_m(
        self, h: jax.Array, g: jax.Array, precision: Precision = None
    ) -> jax.Array:
        """The transpose of `product` by M: the sum of h^T g over rows."""
        return rows_product(h, g, precision)

    def rows(
        self, x: jax.Array, m: jax.Array, precision: Precision = None
    ) -> jax.Array:
        """D(C(x) M), row by row: (..., in_features) -> (..., out_features)."""
        return self.leave(self.product(self.enter(x), m, precision))

    def kept(self, x: jax.Array, m: jax.Array, precision: Precision = None) -> Any:
        """The part of x that the derivative needs: C(x), unless it is as large as x."""
        # Of blocks x itself is kept: layers that read the same x (queries, keys,
        # values) keep it once.
        return x if self.block else self.enter(x)

    def tangent(
        self, kept: Any, tangent: jax.Array, precision: Precision = None
    ) -> jax.Array:
        """The derivative dy = D(C(x) dM) of `rows` by M."""
        h = self.enter(kept) if self.block else kept
        return self.leave(self.product(h, tangent, precision))

    def gradient(
        self, kept: Any, g: jax.Array, precision: Precision = None, shards: int = 1
    ) -> jax.Array:
        """dM, the transpose of `tangent`. So many `shards` may split the first axis."""
        h = self.enter(kept) if self.block else kept
        back = transposed(self.leave, (*h.shape[:-1], self.m_shape[-1]), g)
        return self.product_by_m(h, back, precision)
