"""Sharing: groups of features that M treats alike."""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._interception import matmul
from mora_jax.operators._base import Operator
from mora_jax.operators._blocks import add_cycles, cycle, places
from mora_jax.operators._pytree import operator

Grouping = Literal["strided", "contiguous"]


@operator
class Sharing(Operator):
    """Sums of q groups of inputs; each output repeats one of q results.

    Paper equations 6-7. A group is strided (all features with the same index mod q) or
    contiguous (a run of neighbours). The update is dense, and costs only M's product.

    Attributes:
      compress_groups: how inputs are grouped. "strided" uses the first features once
        more where q does not divide `in_features`, as the reference does;
        "contiguous" balances the groups, the first ones being longer by one.
      decompress_groups: how outputs are grouped.
      normalised: divide by sqrt(in / q * out / q), so that the update is as large as M
        (an isometry when q divides both widths) and one learning rate serves every
        width. The paper and the reference do not; their sharing wants a smaller rate.

    Example::

      >>> from mora_jax.operators import Sharing
      >>> op = Sharing(in_features=4, out_features=4, square_rank=2, normalised=False)
      >>> op.compress(jnp.array([1.0, 2.0, 3.0, 4.0]))
      Array([4., 6.], dtype=float32)
      >>> op.decompress(jnp.array([1.0, 2.0]))
      Array([1., 2., 1., 2.], dtype=float32)
    """

    compress_groups: Grouping = "strided"
    decompress_groups: Grouping = "strided"
    normalised: bool = True

    name = "sharing"
    bounded = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for side, field in (("in", "compress_groups"), ("out", "decompress_groups")):
            groups, width = getattr(self, field), getattr(self, f"{side}_features")
            if groups not in get_args(Grouping):
                raise ValueError(
                    f"{field} must be one of {get_args(Grouping)}, got {groups!r}"
                )
            if groups == "contiguous" and self.square_rank > width:
                raise ValueError(
                    f"square_rank of contiguous sharing must be at most "
                    f"{side}_features = {width}, got {self.square_rank}"
                )

    @property
    def partition(self) -> bool:
        contiguous = self.compress_groups == "contiguous"
        return contiguous or self.in_features % self.square_rank == 0

    @property
    def isometry(self) -> bool:
        q, ins, outs = self.square_rank, self.in_features, self.out_features
        return (self.normalised or ins == outs == q) and ins % q == outs % q == 0

    def _compress(self, x: jax.Array) -> jax.Array:
        if self.compress_groups == "strided":
            h = self._add_groups(x)
        else:
            h = _sum_runs(x, self.square_rank)
        return h * self._scale(self.in_features, h)

    def _add_groups(self, x: jax.Array) -> jax.Array:
        """Sums of strided groups, the last ones completed by the first features."""
        q = self.square_rank
        if q >= self.in_features:
            return cycle(x, q)
        missing = -self.in_features % q
        if not missing:
            return add_cycles(x, q)
        before = [(0, 0)] * (x.ndim - 1) + [(q - missing, 0)]
        return add_cycles(x, q) + jnp.pad(x[..., :missing], before)

    def _decompress(self, h: jax.Array) -> jax.Array:
        if self.decompress_groups == "strided":
            y = cycle(h, self.out_features)
        else:
            y = _repeat_runs(h, self.out_features)
        return y * self._scale(self.out_features, y)

    def _lookup(
        self, m: jax.Array, indices: jax.Array, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        q = self.square_rank
        if self.compress_groups == "strided":
            _, group = places(indices, self.in_features, q)
            h = jax.nn.one_hot(group, q, dtype=m.dtype).sum(-2)
        else:
            group = _run_of(indices, self.in_features, q)
            h = jax.nn.one_hot(group, q, dtype=m.dtype)
        h = h * self._scale(self.in_features, h)
        return self._decompress(matmul(h, m, precision))

    def _scale(self, features: int, like: jax.Array) -> np.ndarray:
        scale = math.sqrt(self.square_rank / features) if self.normalised else 1.0
        return np.asarray(scale, like.dtype)


def _runs(features: int, square_rank: int) -> tuple[int, int]:
    """Length of the shorter runs, and how many runs are longer by one."""
    return divmod(features, square_rank)


def _sum_runs(x: jax.Array, square_rank: int) -> jax.Array:
    """(..., features) -> (..., q): the sum of each run."""
    *batch, features = x.shape
    length, longer = _runs(features, square_rank)
    head, tail = jnp.split(x, [longer * (length + 1)], axis=-1)
    head = head.reshape(*batch, longer, length + 1).sum(-1)
    tail = tail.reshape(*batch, square_rank - longer, length).sum(-1)
    return jnp.concatenate([head, tail], axis=-1)


def _run_of(indices: jax.Array, features: int, square_rank: int) -> jax.Array:
    """Which run each feature is in: (...) -> (...)."""
    length, longer = _runs(features, square_rank)
    tail = indices - longer * (length + 1)
    return jnp.where(tail < 0, indices // (length + 1), longer + tail // length)


def _repeat_runs(h: jax.Array, features: int) -> jax.Array:
    """(..., q) -> (..., features): each value along its run."""
    length, longer = _runs(features, h.shape[-1])
    head, tail = jnp.split(h, [longer], axis=-1)
    head, tail = jnp.repeat(head, length + 1, -1), jnp.repeat(tail, length, -1)
    return jnp.concatenate([head, tail], axis=-1)
