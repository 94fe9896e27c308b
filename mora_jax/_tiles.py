"""Vectors that repeat: tiles, and their sums."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._linear_map import LinearMap
from mora_jax._tuning import MAX_UNROLLED_SLICES


def tile_to(x: jax.Array, features: int) -> jax.Array:
    """(..., width) -> (..., features): entry j is entry j mod width of `x`."""
    return _Tile(x.shape[-1], features)((), x)


def sum_tiles(x: jax.Array, width: int) -> jax.Array:
    """(..., features) -> (..., width): the transpose of `tile_to`."""
    return _Tile(width, x.shape[-1]).transpose((), x)


def pad_to(x: jax.Array, size: int, axis: int = -1) -> jax.Array:
    """`x` with zeros behind it, so that `axis` has `size` entries."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths) if widths[axis][1] else x


@dataclasses.dataclass(frozen=True)
class _Tile(LinearMap):
    """`tile_to`, whose transpose JAX would compute by padding to whole tiles."""

    width: int
    features: int

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        whole, rest = divmod(self.features, self.width)
        if not whole:
            return operand[..., :rest]
        if whole == 1:
            parts = [operand, operand[..., :rest]] if rest else [operand]
            return jnp.concatenate(parts, axis=-1)
        repeats = [1] * (operand.ndim - 1) + [whole + bool(rest)]
        return jnp.tile(operand, repeats)[..., : self.features]

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        width, features, y = self.width, self.features, cotangent
        if features > MAX_UNROLLED_SLICES * width:
            y = pad_to(y, -(-features // width) * width)
            return y.reshape(*y.shape[:-1], -1, width).sum(-2)
        wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        first, *others = (wide[..., k : k + width] for k in range(0, features, width))
        total = sum((pad_to(tile, width) for tile in others), pad_to(first, width))
        return total.astype(y.dtype)
