"""Sharing: groups of features that M treats alike, with or without random signs."""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from mora_jax._common.checks import check_choice
from mora_jax._common.types import ArrayLike
from mora_jax._jax.tiles import cut, join, places, sum_tiles, tile_to
from mora_jax.operators._base import Operator, Side
from mora_jax.operators._pytree import operator, seeded, signs
from mora_jax.operators.decoupling import block_positions

Grouping = Literal["strided", "contiguous"]

REFERENCE_GROUPS: dict[int, tuple[Grouping, Grouping]] = {
    1: ("strided", "strided"),
    2: ("contiguous", "contiguous"),
    3: ("contiguous", "strided"),
    4: ("strided", "contiguous"),
}
"""How the sharing types of the reference group inputs and outputs."""


@operator
class Sharing(Operator):
    """Sums of q groups of inputs; outputs repeat the q results (paper equations 6-7).

    A group is strided (equal index mod q) or contiguous (neighbouring features). The
    delta is dense, and costs no more than the product with M.

    Attributes:
      compress_groups: Grouping of the inputs. Where q does not divide `in_features`,
        "strided" uses the first features once more, as the reference does, and
        "contiguous" balances the groups: the first ones are longer by one.
      decompress_groups: Grouping of the outputs.
      normalised: True to divide by sqrt(in / q * out / q): the delta is as large as M
        (an isometry when q divides both widths), and one learning rate serves every
        width. The paper and the reference do not; their sharing wants a smaller rate.

    Example::

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
    work = "sums"
    bounded = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for side, field in (("in", "compress_groups"), ("out", "decompress_groups")):
            groups, features = getattr(self, field), getattr(self, f"{side}_features")
            check_choice(field, groups, get_args(Grouping))
            if groups == "contiguous" and self.square_rank > features:
                rule = f"square_rank of contiguous {self.name} must be at most"
                limit = f"{side}_features = {features}"
                raise ValueError(f"{rule} {limit}, got {self.square_rank}")

    @property
    def gains(self) -> tuple[float, float]:
        """An output has one weight, and C(x) sums groups of numbers of either sign."""
        # What a group has in common adds up instead, and wants a smaller rate.
        group = max(1.0, self.in_features / self.square_rank)
        c_scale, d_scale = (float(self._scale(s, np.float64)) for s in ("in", "out"))
        return math.sqrt(group) * c_scale, d_scale

    def _compress(self, x: Array) -> Array:
        q, strided = self.square_rank, self.compress_groups == "strided"
        sums = _sum_strided(x, q) if strided else cut(x, q).sum(-1)
        return sums * self._scale("in", x.dtype)

    def _decompress(self, h: Array) -> Array:
        h = h * self._scale("out", h.dtype)  # q numbers, and not all outputs
        if self.decompress_groups == "strided":
            return tile_to(h, self.out_features)
        repeats = -(-self.out_features // self.square_rank)
        repeated = jnp.broadcast_to(h[..., None], (*h.shape, repeats))
        return join(repeated, self.out_features)

    def _compress_units(self, indices: Array, dtype: DTypeLike) -> Array:
        if self.compress_groups == "contiguous":
            at = jnp.asarray(places(self.in_features, self.square_rank))[indices]
            group = at[..., None] // -(-self.in_features // self.square_rank)
        else:  # the first features may be in two groups
            _, group = block_positions(indices, self.in_features, self.square_rank)
        member = jax.nn.one_hot(group, self.square_rank, dtype=dtype).sum(-2)
        return member * self._scale("in", dtype)

    def _scale(self, side: Side, dtype: DTypeLike) -> np.ndarray:
        features = self.in_features if side == "in" else self.out_features
        scale = math.sqrt(self.square_rank / features) if self.normalised else 1.0
        return np.asarray(scale, dtype)


@operator
class SignedSharing(Sharing):
    """Sharing with a fixed random sign on each input and on each output.

    Plain sums cancel features that differ in sign and add up what all have in common;
    random signs treat all directions alike. This is an isometry where sharing is.

    Attributes:
      seed: The seed of the signs; equal widths share them.

    Example::

      >>> op = SignedSharing(in_features=4, out_features=4, square_rank=2)
      >>> op.compress(op.decompress(jnp.array([1.0, 2.0]))).round(3)
      Array([1., 2.], dtype=float32)
    """

    seed: int = 0
    in_signs: ArrayLike = seeded(lambda op: signs(op.in_features, op.seed))
    out_signs: ArrayLike = seeded(lambda op: signs(op.out_features, op.seed))

    name = "signed_sharing"

    def _compress(self, x: Array) -> Array:
        return super()._compress(x * jnp.asarray(self.in_signs, x.dtype))

    def _decompress(self, h: Array) -> Array:
        y = super()._decompress(h)
        return y * jnp.asarray(self.out_signs, y.dtype)

    def _compress_units(self, indices: Array, dtype: DTypeLike) -> Array:
        signs = jnp.asarray(self.in_signs, dtype)[indices]
        return super()._compress_units(indices, dtype) * signs[..., None]


def _sum_strided(x: Array, groups: int) -> Array:
    """(..., features) -> (..., groups): the last ones have the first features, too."""
    features = x.shape[-1]
    if groups >= features:
        return tile_to(x, groups)
    if not (missing := -features % groups):
        return sum_tiles(x, groups)
    before = [(0, 0)] * (x.ndim - 1) + [(groups - missing, 0)]
    return sum_tiles(x, groups) + jnp.pad(x[..., :missing], before)
