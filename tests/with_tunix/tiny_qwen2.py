"""A Qwen2 of Tunix that is small enough for eight devices on one CPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from meshes import shardings

from mora_jax import register_layer

IDS = np.arange(32, dtype=np.int32).reshape(4, 8) % 64


def register(einsum: Any, **settings: Any) -> None:
    """What a layer of Tunix computes."""
    register_layer(einsum, equation=lambda m, x: m.einsum_str, kernel="w", **settings)


def load(mesh: Mesh, **settings: Any) -> Any:
    """A model with random weights, on a mesh as its own annotations say."""
    from tunix.models.qwen2 import model as qwen2  # pyright: ignore

    register(qwen2.Einsum)
    sizes: dict[str, Any] = {"num_layers": 2, "vocab_size": 64, "embed_dim": 32}
    sizes |= {"hidden_dim": 64, "num_heads": 4, "head_dim": 8, "num_kv_heads": 4}
    settings |= {"rope_theta": 10_000, "norm_eps": 1e-6, "use_tied_embedding": True}
    config = qwen2.ModelConfig(**sizes, **settings)
    graph, state = nnx.split(qwen2.Qwen2(config, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(state):
        if path[-1] == "kernel":  # Tunix leaves these zeros
            value = jnp.asarray(0.2 * random.normal(size=variable.shape))
            variable.set_value(value.astype(variable.dtype))
    places = shardings(nnx.get_partition_spec(state), mesh)
    return nnx.merge(graph, jax.device_put(state, places))


def positions_and_mask(ids: Any) -> tuple[jax.Array, jax.Array]:
    """What Tunix's models take beside the ids."""
    rows, length = ids.shape
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    return positions, jnp.tril(jnp.ones((rows, length, length), bool))


def logits(model: Any, ids: Any = IDS) -> jax.Array:
    """Logits of the next token, each position seeing itself and what is before it."""
    positions, mask = positions_and_mask(ids)
    return model(jnp.asarray(ids), positions, None, mask)[0]
