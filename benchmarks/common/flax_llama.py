"""The Llama that Hugging Face transformers has in Flax, of any size."""

import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def flax_llama(tokens: int, dtype: Any, **sizes: Any) -> nn.Module:
    """Linen module for sequences of `tokens`.

    Args:
        tokens: The length of the longest sequence.
        dtype: The dtype of activations.
        **sizes: Fields of transformers' `LlamaConfig`.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_flax_llama

    # transformers cuts sines and cosines off at as many features as tokens.
    head_width = sizes["hidden_size"] // sizes["num_attention_heads"]
    longest = max(tokens, 2 * head_width)
    config = LlamaConfig(max_position_embeddings=longest, **sizes)
    model: Any = modeling_flax_llama.FlaxLlamaForCausalLM
    return model(config, _do_init=False, dtype=dtype).module


def inputs(ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inputs of the model: tokens, a mask of all of them, and their positions."""
    places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return ids, jnp.ones_like(ids), places
