"""Truncation: the first q features."""

from jax import Array

from mora_jax._jax.tiles import pad_to
from mora_jax.operators._base import Operator
from mora_jax.operators._pytree import operator


@operator
class Truncation(Operator):
    """The first q input features move the first q outputs (paper equations 4-5).

    Example::

      >>> import jax.numpy as jnp
      >>> op = Truncation(in_features=4, out_features=3, square_rank=2)
      >>> op.delta_weight(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
      Array([[1., 2., 0.],
             [3., 4., 0.],
             [0., 0., 0.],
             [0., 0., 0.]], dtype=float32)
    """

    name = "truncation"
    work = "sums"

    @property
    def gains(self) -> tuple[float, float]:
        """1 each, of the inputs and outputs that are kept."""
        return 1.0, 1.0

    def _compress(self, x: Array) -> Array:
        return x[..., : self.square_rank]

    def _decompress(self, h: Array) -> Array:
        return pad_to(h, self.out_features)
