"""Permutation: decoupling over shuffled features."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._linear import LinearMap
from mora_jax._types import ArrayLike
from mora_jax.operators._blocks import divide, places
from mora_jax.operators._pytree import array_field, operator
from mora_jax.operators._random import check_seed, inverse, permutation
from mora_jax.operators._shard import Shard
from mora_jax.operators.decoupling import Decoupling


class _PermutationShard(Shard):
    """Rows and columns that are here; each block has features from everywhere."""

    def _delta(self, m: jax.Array) -> jax.Array:
        whole: Any = self.whole
        here = (
            jax.lax.dynamic_slice_in_dim(
                jnp.asarray(getattr(whole, f"{side}_places")),
                getattr(self, f"{side}_start"),
                getattr(self, f"{side}_features"),
            )
            for side in ("in", "out")
        )
        return whole._delta_at(m, *here)


@operator
class Permutation(Decoupling):
    """A fixed random order of the features, then decoupling, then the order undone.

    Attributes:
      seed: of the two orders; equal widths share one.

    Example::

      >>> import jax.numpy as jnp
      >>> from mora_jax.operators import Permutation
      >>> op = Permutation(in_features=6, out_features=6, square_rank=3, seed=1)
      >>> op.decompress(op.compress(jnp.arange(6.0)))
      Array([0., 1., 2., 3., 4., 5.], dtype=float32)
    """

    seed: int = 0
    in_order: jax.Array | np.ndarray = array_field()
    in_places: jax.Array | np.ndarray = array_field()
    out_order: jax.Array | np.ndarray = array_field()
    out_places: jax.Array | np.ndarray = array_field()

    name = "permutation"
    shard_type = _PermutationShard
    arrays = ("in_order", "in_places", "out_order", "out_places")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        for side in ("in", "out"):
            order = permutation(getattr(self, f"{side}_features"), self.seed)
            object.__setattr__(self, f"{side}_order", order)
            object.__setattr__(self, f"{side}_places", inverse(order))

    def _compress(self, x: jax.Array) -> jax.Array:
        return super()._compress(_Reorder()((self.in_order, self.in_places), x))

    def _spread(self, h: jax.Array) -> jax.Array:
        return _Reorder().transpose(
            (self.out_order, self.out_places), super()._spread(h)
        )

    def _delta(self, m: jax.Array) -> jax.Array:
        return self._delta_at(m, self.in_places, self.out_places)

    def _delta_at(
        self, m: jax.Array, in_places: ArrayLike, out_places: ArrayLike
    ) -> jax.Array:
        """Rows and columns of the update that have these places in the two orders."""
        q = self.square_rank
        out_block, out_offset = divide(out_places, q)
        columns = m.at[:, out_offset].get(mode="promise_in_bounds")
        # With a row more, since XLA does not redo a concatenation for each row.
        columns = jnp.concatenate([columns, jnp.zeros_like(columns[:1])])
        block, offset = places(in_places, self.in_features, q)
        group, out_group = self._in_group(block), self._out_group(out_block)
        parts = (
            jnp.where(
                group[:, t, None] == out_group,
                columns.at[offset[:, t]].get(mode="clip"),
                0,
            )
            for t in range(group.shape[1])
        )
        return functools.reduce(jnp.add, parts)

    def _lookup(
        self, m: jax.Array, indices: jax.Array, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        place = jnp.asarray(self.in_places)[indices]
        y = super()._lookup(m, place, precision)
        return jnp.take(y, jnp.asarray(self.out_places), axis=-1)


@dataclasses.dataclass(frozen=True)
class _Reorder(LinearMap):
    """x[..., order]; JAX would transpose it to a scatter, and the inverse is known."""

    def forward(self, residuals: Any, x: jax.Array) -> jax.Array:
        order, _ = residuals
        return _take(x, order)

    def backward(self, residuals: Any, y: jax.Array) -> jax.Array:
        _, places = residuals
        return _take(y, places)


def _take(x: jax.Array, order: jax.Array) -> jax.Array:
    # A permutation has no index out of bounds, and none twice.
    return x.at[..., order].get(mode="promise_in_bounds", unique_indices=True)
