"""Folded kernels: the methods of a module read the kernel with its delta."""

import dataclasses

import jax

from mora_jax._trace_check import Claim
from mora_jax.products._product import KernelDelta, Product


@dataclasses.dataclass(frozen=True)
class Folded(Product):
    r"""Any use of a kernel: all methods of its module read :math:`W + \alpha\, C M D`.

    It is for kernels whose use no einsum of one input describes, such as experts that
    are bare arrays of an NNX module, for all of a class or none. It is exact whatever
    the methods compute, but each call forms the sum and a gradient of its shape.

    Attributes:
      axes: The kernel's axes as letters i, o, and s for experts, which have an M each.
      adapted_by_default: True to have the kernel among the default targets.

    Example::

      >>> from flax import nnx
      >>> import jax, jax.numpy as jnp, mora_jax
      >>> class Experts(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.w = nnx.Param(jax.random.normal(rngs.params(), (4, 16, 16)))
      ...     def __call__(self, x, best):  # (n, 16), and an expert for each
      ...         return jnp.einsum("ni,nio->no", x, self.w[best])
      >>> folded = mora_jax.products.Folded("sio")
      >>> mora_jax.register_layer(Experts, equation=folded, kernel="w")
      >>> model, config = Experts(nnx.Rngs(0)), mora_jax.MoRAConfig(rank=2)
      >>> x, best = jnp.ones((3, 16)), jnp.array([0, 3, 0])
      >>> mora_jax.nnx.plan(model, config, x, best)["w"].shape
      (4, 4, 4, 4)
    """

    axes: str
    adapted_by_default: bool = True

    @property
    def claim(self) -> Claim:
        return Claim(reads=True)

    def delta(self, delta: KernelDelta, x: jax.Array) -> jax.Array:
        """The delta itself: what is read here is the kernel, and `x` is not used."""
        return delta.kernel()
