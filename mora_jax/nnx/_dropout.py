"""Dropout of an adapter's input, which needs no generator in the model's state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from mora_jax._common.checks import check_seed
from mora_jax._mesh.placement import explicit_sharding, with_auto_axes


class AdapterDropout(nnx.Dropout):
    """Flax's switch of dropout, with keys that follow from what the layer holds.

    The key of a call depends on the seed, on M, which each step of an optimizer
    changes, and on the kernel, which differs between layers. All of these are inputs of
    the layer. So lifted transformations, rematerialization and resumed runs draw the
    same masks, and the model's state holds nothing except its parameters.

    Attributes:
      seed: The seed that all masks share.
    """

    def __init__(self, rate: float, seed: int):
        super().__init__(rate)
        check_seed(seed)
        self.seed = seed

    def key(self, m: Any, kernel: Any) -> PRNGKeyArray:
        """The key for one call of a layer; M and the kernel may be trees of arrays."""
        m, leaf = jax.tree.leaves(m)[0], jax.tree.leaves(kernel)[0]

        def make_key(m: jax.Array, leaf: jax.Array) -> PRNGKeyArray:
            first = leaf[(0,) * (leaf.ndim - 1)][:16]  # to read all would take long
            key = jax.random.fold_in(jax.random.key(np.uint32(self.seed)), _hash(m))
            return jax.random.fold_in(key, _hash(first))

        for sharding in filter(None, map(explicit_sharding, (m, leaf))):
            replicated = NamedSharding(sharding.mesh, PartitionSpec())
            return with_auto_axes(make_key, replicated, m, leaf)
        return make_key(m, leaf)


def _hash(x: jax.Array) -> jax.Array:
    """32 bits that change with any number in `x`, and with its position.

    They are the sum of the numbers' bits, each multiplied by another odd number, modulo
    2^32. There an odd number has an inverse, so no factor loses any bits.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32).ravel()
    position = jax.lax.iota(jnp.uint32, bits.size)
    odd = (position * jnp.uint32(2) + jnp.uint32(1)) * jnp.uint32(0x9E3779B1)
    return jnp.sum(bits * odd, dtype=jnp.uint32)
