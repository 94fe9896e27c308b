"""Signed sharing: sharing between random signs."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mora_jax._common.types import ArrayLike
from mora_jax.operators._pytree import operator, seeded
from mora_jax.operators._random import signs
from mora_jax.operators.sharing import Sharing


@operator
class SignedSharing(Sharing):
    """Sharing with a fixed random sign on each input and on each output.

    Plain sums cancel features that differ in sign and add up what all have in common;
    random signs treat all directions alike. This is an isometry where sharing is.

    Attributes:
      seed: The seed of the signs; equal widths share them.

    Example::

      >>> from mora_jax.operators import SignedSharing
      >>> op = SignedSharing(in_features=4, out_features=4, square_rank=2)
      >>> op.compress(op.decompress(jnp.array([1.0, 2.0]))).round(3)
      Array([1., 2.], dtype=float32)
    """

    seed: int = 0
    in_signs: ArrayLike = seeded(lambda op: signs(op.in_features, op.seed))
    out_signs: ArrayLike = seeded(lambda op: signs(op.out_features, op.seed))

    name = "signed_sharing"

    def _compress(self, x: jax.Array) -> jax.Array:
        return super()._compress(x * jnp.asarray(self.in_signs, x.dtype))

    def _decompress(self, h: jax.Array) -> jax.Array:
        y = super()._decompress(h)
        return y * jnp.asarray(self.out_signs, y.dtype)

    def _compress_units(self, indices: jax.Array, dtype: DTypeLike) -> jax.Array:
        signs = jnp.asarray(self.in_signs, dtype)[indices]
        return super()._compress_units(indices, dtype) * signs[..., None]
