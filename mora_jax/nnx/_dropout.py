"""Dropout of an adapter's input, without a generator in the model's state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from mora_jax._checks import check_seed
from mora_jax._mesh.layout import explicit_sharding, with_auto_axes


class AdapterDropout(nnx.Dropout):
    """Flax's switch of dropout, with keys that follow from what the layer holds.

    The key of a call is made of the seed, of M, which each step of an optimizer
    changes, and of the kernel, which differs between layers. These are inputs of the
    layer. So lifted transformations, rematerialization and resumed runs all draw the
    same mask, and the model's state holds no more than its parameters.

    Attributes:
      seed: the seed that all masks share.
    """

    def __init__(self, rate: float, seed: int):
        super().__init__(rate)
        check_seed(seed)
        self.seed = seed

    def key(self, m: jax.Array, kernel: Any) -> PRNGKeyArray:
        """The key for one call of a layer.

        Args:
          m: M, (*stack, q, q).
          kernel: the kernel, or a tree of arrays that stands for a quantized one.
        """
        first = jax.tree.leaves(kernel)[0]

        def of(m: jax.Array, first: jax.Array) -> PRNGKeyArray:
            key = jax.random.fold_in(jax.random.key(np.uint32(self.seed)), _hash(m))
            return jax.random.fold_in(key, _hash(_some(first)))

        for array in (m, first):
            sharding = explicit_sharding(array)
            if sharding is not None:
                whole = NamedSharding(sharding.mesh, PartitionSpec())
                return with_auto_axes(of, whole, m, first)
        return of(m, first)


def _some(x: jax.Array) -> jax.Array:
    """A few numbers of a kernel, which is long to read."""
    return x[(0,) * (x.ndim - 1)][:16]


def _hash(x: jax.Array) -> jax.Array:
    """32 bits that change with any number in `x`, and with its place.

    A sum of the numbers' bits, each times an odd number of its own (modulo 2^32).
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32).ravel()
    place = jax.lax.iota(jnp.uint32, bits.size)
    odd = (place * jnp.uint32(2) + jnp.uint32(1)) * jnp.uint32(0x9E3779B1)
    return jnp.sum(bits * odd, dtype=jnp.uint32)
