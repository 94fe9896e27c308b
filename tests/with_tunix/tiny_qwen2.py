"""A Qwen2 of Tunix that is small enough for eight devices on one CPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mora_jax import register_layer

IDS = np.arange(32, dtype=np.int32).reshape(4, 8) % 64


def mesh(*shape: int, devices: Any = None) -> Mesh:
    """Tunix's two axes of a mesh."""
    axis_types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh(shape, ("fsdp", "tp"), axis_types, devices=devices)


def load(on: Mesh | None = None, **settings: Any) -> Any:
    """A model with random weights, on a mesh as its own annotations say."""
    from tunix.models.qwen2 import model as qwen2  # pyright: ignore

    register_layer(qwen2.Einsum, equation=lambda layer, x: layer.einsum_str, kernel="w")
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "vocab_size": 64,
        "embed_dim": 32,
        "hidden_dim": 64,
        "num_heads": 4,
        "head_dim": 8,
        "num_kv_heads": 4,
        "rope_theta": 10_000,
        "norm_eps": 1e-6,
        "use_tied_embedding": True,
    }
    model = qwen2.Qwen2(qwen2.ModelConfig(**sizes, **settings), rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    random = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(state):
        if path[-1] == "kernel":  # Tunix leaves these zeros
            value = jnp.asarray(0.2 * random.normal(size=variable.shape))
            variable.set_value(value.astype(variable.dtype))
    if on is None:
        return nnx.merge(graph, state)
    places = jax.tree.map(
        lambda spec: NamedSharding(on, spec),
        nnx.get_partition_spec(state),
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )
    return nnx.merge(graph, jax.device_put(state, places))


def positions_and_mask(ids: Any) -> tuple[jax.Array, jax.Array]:
    """What Tunix's models take beside the ids."""
    rows, length = ids.shape
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    return positions, jnp.tril(jnp.ones((rows, length, length), bool))


def logits(model: Any, ids: Any) -> jax.Array:
    positions, mask = positions_and_mask(ids)
    return model(jnp.asarray(ids), positions, None, mask)[0]


def model_input(batch: Any) -> dict[str, Any]:
    """What Tunix's own loss takes."""
    positions, mask = positions_and_mask(batch.input_tokens)
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": positions,
        "attention_mask": mask,
    }
