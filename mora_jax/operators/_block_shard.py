"""Parts of operators that multiply blocks of features with M."""

from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._interception import matmul
from mora_jax.operators._blocks import blocks, cycle
from mora_jax.operators._shard import Shard


class BlockShard(Shard):
    """The blocks that have features here, and the groups of them that are wanted here.

    Blocks that meet are a group. A run of features touches whole blocks where q divides
    its length; else M multiplies up to two more.
    """

    def _product(
        self, m: jax.Array, x: jax.Array, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        whole: Any = self.whole
        groups, parts = int(whole._meeting), self._parts(x)
        start, wanted = self._wanted(groups)
        # M multiplies whichever are fewer: those from here, or those for here.
        early = sum(h.shape[-2] for h, _ in parts) <= wanted
        if early:
            parts = [(matmul(h, m, precision), k) for h, k in parts]
        placed = (_place(h, k - start, groups)[..., :wanted, :] for h, k in parts)
        h = sum(placed, jnp.zeros((), m.dtype))
        if not early:
            h = matmul(h, m, precision)
        if wanted == groups and not self._runs("out"):
            return whole._spread(h)
        q, size = self.square_rank, self.out_features
        y = cycle(h.reshape(*h.shape[:-2], wanted * q), _reach(size, q) * q)
        return jax.lax.dynamic_slice_in_dim(y, self.out_start % q, size, axis=-1)

    def _parts(self, x: jax.Array) -> list[tuple[jax.Array, Any]]:
        """Blocks, (..., k, q), each with the group of the first of them.

        The next ones are of the next groups; after the last comes the first again.
        """
        whole: Any = self.whole
        q, size = self.square_rank, self.in_features
        again_and_again = q > whole.in_features
        if whole.truncate or again_and_again or not self._runs("in"):
            return [(self._meet(x), 0)]
        first, reach = self.in_start // q, _reach(size, q)
        h = _among_zeros(x, reach * q, self.in_start % q)
        h = h.reshape(*x.shape[:-1], reach, q)
        h = whole._turn(h, first + jnp.arange(reach))
        parts: list[tuple[jax.Array, Any]] = [(whole._add_up(h), first)]
        n = blocks(whole.in_features, q)
        if over := n * q - whole.in_features:  # the first features complete the last
            start = jnp.minimum(self.in_start, over)
            h = _among_zeros(x, over + size, start)[..., None, :over]
            h = jnp.pad(h, [*[(0, 0)] * x.ndim, (q - over, 0)])
            parts.append((whole._turn(h, jnp.array([n - 1])), n - 1))
        return parts

    def _wanted(self, groups: int) -> tuple[Any, int]:
        """The first group that outputs here take, and how many follow each other."""
        if not self._runs("out"):
            return 0, groups
        reach = _reach(self.out_features, self.square_rank)
        return self.out_start // self.square_rank, min(groups, reach)

    def _runs(self, side: str) -> bool:
        """Whether there are features of this side elsewhere."""
        name = f"{side}_features"
        return getattr(self, name) < getattr(self.whole, name)


def _reach(size: int, q: int) -> int:
    """How many blocks a run of `size` features touches at most; runs are as long."""
    return size // q if size % q == 0 else blocks(size - 1, q) + 1


def _among_zeros(x: jax.Array, size: int, start: Any) -> jax.Array:
    zeros = jnp.zeros((*x.shape[:-1], size), x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(zeros, x, start, axis=-1)


def _place(h: jax.Array, first: Any, groups: int) -> jax.Array:
    """(..., k, q) among zeros as (..., groups, q), from group `first` on, around."""
    before = [(0, 0)] * (h.ndim - 2)
    h = jnp.pad(h, [*before, (0, groups - h.shape[-2]), (0, 0)])
    return h if isinstance(first, int) and first == 0 else jnp.roll(h, first, axis=-2)
