"""Vectors in blocks of neighbours, and in tiles, which repeat; sums of tiles."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._jax.linear_map import LinearMap
from mora_jax._jax.tracing import MAX_UNROLLED_SLICES, current_chip

_SUBLANES, _LANES = 8, 128


def tile_to(x: jax.Array, features: int) -> jax.Array:
    """(..., width) -> (..., features): entry j is entry j mod width of `x`."""
    return x if x.shape[-1] == features else _Tile(x.shape[-1], features)((), x)


def sum_tiles(x: jax.Array, width: int) -> jax.Array:
    """(..., features) -> (..., width): the transpose of `tile_to`."""
    features = x.shape[-1]
    return x if features == width else _Tile(width, features)((), x, transposed=True)


def pad_to(x: jax.Array, size: int, axis: int = -1) -> jax.Array:
    """`x` with zeros behind it, so that `axis` has `size` entries."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths) if widths[axis][1] else x


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


def places(features: int, n: int) -> np.ndarray:
    """The places of features in their blocks, block * width + offset: (features,)."""
    width = -(-features // n)
    return join(np.arange(n * width).reshape(n, width), features)


@dataclasses.dataclass(frozen=True)
class _Tile(LinearMap):
    """`tile_to`, whose transpose JAX would compute by padding to whole tiles."""

    width: int
    features: int

    def forward(self, residuals: Any, operand: jax.Array) -> jax.Array:
        whole, rest = divmod(self.features, self.width)
        if whole < 2:
            first = operand[..., :rest]
            return jnp.concatenate([operand, first], axis=-1) if whole else first
        rows = operand.shape[-2] if operand.ndim > 1 else 1
        if rows % _SUBLANES == self.width % _LANES == 0 and current_chip() == "tpu":
            return self._broadcast(operand)
        # Not by `jnp.tile`: older JAX cannot type its steps where sharding is explicit.
        *batch, width = operand.shape
        n = -(-self.features // width)
        y = jnp.broadcast_to(operand[..., None, :], (*batch, n, width))
        return y.reshape(*batch, n * width)[..., : self.features]

    def _broadcast(self, operand: jax.Array) -> jax.Array:
        """One broadcast, in the order in which a TPU stores an array."""
        # It stores tiles of 8 rows and 128 features, tile by tile. To repeat features
        # is to repeat whole tiles, which a broadcast of (..., rows / 8, n, q / 128, 8,
        # 128) along n does. Its result is the wanted array in the order of memory, so
        # that the reshapes and transposes around it cost nothing. A broadcast of
        # features as such, a tile or a concatenation XLA computes elsewhere and copies.
        *batch, rows, width = operand.shape
        n, tiles = -(-self.features // width), width // _LANES
        stored = (*batch, rows // _SUBLANES, _SUBLANES, tiles, _LANES)
        y = jnp.swapaxes(operand.reshape(stored), -3, -2)[..., None, :, :, :]
        repeated = (*batch, rows // _SUBLANES, n, tiles, _SUBLANES, _LANES)
        y = jnp.broadcast_to(y, repeated)
        y = y.reshape(*batch, rows // _SUBLANES, n * tiles, _SUBLANES, _LANES)
        y = jnp.swapaxes(y, -3, -2).reshape(*batch, rows, n * width)
        return y[..., : self.features]

    def backward(self, residuals: Any, cotangent: jax.Array) -> jax.Array:
        width, features, y = self.width, self.features, cotangent
        wide = jnp.promote_types(y.dtype, jnp.float32)
        if features > MAX_UNROLLED_SLICES * width:
            y = pad_to(y, -(-features // width) * width)
            return y.reshape(*y.shape[:-1], -1, width).sum(-2)
        # Converted after they are cut: XLA would write all of y in the wider dtype.
        starts = range(0, features, width)
        first, *others = [y[..., k : k + width].astype(wide) for k in starts]
        total = sum([pad_to(tile, width) for tile in others], pad_to(first, width))
        return total.astype(y.dtype)
