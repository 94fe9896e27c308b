"""Permutation: decoupling over shuffled features."""

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax.operators._base import array_field, operator
from mora_jax.operators._random import check_seed, permutation
from mora_jax.operators.decoupling import Decoupling


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
    out_order: jax.Array | np.ndarray = array_field()

    name = "permutation"
    arrays = ("in_order", "out_order")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        order = permutation(self.in_features, self.seed)
        object.__setattr__(self, "in_order", order)
        order = permutation(self.out_features, self.seed)
        object.__setattr__(self, "out_order", order)

    def _split(self, x: jax.Array) -> jax.Array:
        return super()._split(jnp.take(x, self.in_order, axis=-1))

    def _join(self, h: jax.Array) -> jax.Array:
        return jnp.take(super()._join(h), jnp.argsort(self.out_order), axis=-1)

    def _lookup(
        self, m: jax.Array, indices: jax.Array, precision: jax.lax.PrecisionLike
    ) -> jax.Array:
        shuffled = jnp.argsort(self.in_order)[indices]
        return super()._lookup(m, shuffled, precision)
