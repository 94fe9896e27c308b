"""Parts of operators whose C and D are matrices."""

from typing import Any

import jax

from mora_jax._interception import matmul
from mora_jax.operators._shard import Shard


class BasisShard(Shard):
    """Rows of C and D for the features that are here.

    `whole._basis(side, start, size, dtype)` must give those of a run, (size, q).
    """

    def _rows(self, side: str, dtype: Any) -> jax.Array:
        start, size = (
            getattr(self, f"{side}_{what}") for what in ("start", "features")
        )
        whole: Any = self.whole
        return whole._basis(side, start, size, dtype)

    def _meet(self, x: jax.Array) -> jax.Array:
        return matmul(x, self._rows("in", x.dtype))

    def _spread(self, h: jax.Array) -> jax.Array:
        return matmul(h, self._rows("out", h.dtype).T)

    def _delta(self, m: jax.Array) -> jax.Array:
        c, d = self._rows("in", m.dtype), self._rows("out", m.dtype)
        return matmul(c, matmul(m, d.T))
