"""Signed decoupling: random signs that tell the blocks apart."""

import math

import jax
import jax.numpy as jnp

from mora_jax._common.types import ArrayLike
from mora_jax.operators._pytree import operator, seeded
from mora_jax.operators._random import signs
from mora_jax.operators.decoupling import Decoupling


@operator
class SignedDecoupling(Decoupling):
    """Decoupling with a fixed random sign on each number of each block before M.

    Signs tell blocks apart as the angles of `Rotation` do, and cost one multiplication.
    What all blocks have in common cancels in the gradient of M instead of adding up.

    Attributes:
      seed: The seed of the signs; equal widths with the same q share them.

    Example::

      >>> from mora_jax.operators import SignedDecoupling
      >>> op = SignedDecoupling(in_features=4, out_features=4, square_rank=2)
      >>> op.decompress(op.compress(op.decompress(op.compress(jnp.arange(4.0)))))
      Array([0., 1., 2., 3.], dtype=float32)
    """

    seed: int = 0
    in_signs: ArrayLike = seeded(
        lambda op: signs(math.prod(op.compressed_shape), op.seed).reshape(
            op.compressed_shape
        )
    )

    name = "signed_decoupling"

    def rotate_rows(self, h: jax.Array, block: jax.Array | None = None) -> jax.Array:
        signs = jnp.asarray(self.in_signs, h.dtype)
        return h * (signs if block is None else signs[block])

    def rotate_m(self, m: jax.Array) -> jax.Array:
        return m * jnp.asarray(self.in_signs, m.dtype)[..., None]
