"""SmolLM2-135M-Instruct in plain Flax NNX: the twin of the Linen model in smollm2.py.

This file does not know about adapters: every projection is an unmodified `nnx.Linear`.
The parameters have the same paths as in the Linen model, so adapters that were
trained on one of the two fit the other.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from models import smollm2
from models.smollm2 import Config, Tokenizer, rotary


class Attention(nnx.Module):
    """Causal attention, in which each key/value head serves a group of query heads."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        c = self.config = config
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.q_proj = linear(c.width, c.heads * c.head_width)
        self.k_proj = linear(c.width, c.kv_heads * c.head_width)
        self.v_proj = linear(c.width, c.kv_heads * c.head_width)
        self.o_proj = linear(c.heads * c.head_width, c.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x`: (batch, length, width) -> the same shape."""
        c = self.config

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*x.shape[:2], -1, c.head_width)

        q = rotary(heads(self.q_proj(x)), c.rope_base)
        k = rotary(heads(self.k_proj(x)), c.rope_base)
        v = heads(self.v_proj(x))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.reshape(x.shape))


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.gate_proj = linear(config.width, config.hidden)
        self.up_proj = linear(config.width, config.hidden)
        self.down_proj = linear(config.hidden, config.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x`: (..., width) -> the same shape."""
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """Attention, then the MLP, each on a normalised input and added to the stream."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        norm = functools.partial(nnx.RMSNorm, epsilon=config.epsilon, rngs=rngs)
        self.input_layernorm = norm(config.width)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = norm(config.width)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x`: (batch, length, width) -> the same shape."""
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nnx.Module):
    """A Llama whose output head is its embedding, transposed."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        c = self.config = config
        self.embed_tokens = nnx.Embed(c.vocab, c.width, rngs=rngs)
        for i in range(c.layers):  # Linen's paths, which an nnx.List would not have
            setattr(self, f"layers_{i}", Layer(c, rngs=rngs))
        self.norm = nnx.RMSNorm(c.width, epsilon=c.epsilon, rngs=rngs)

    def __call__(self, ids: jax.Array, at: jax.Array | None = None) -> jax.Array:
        """The logits of the next token, with the arguments of the Linen model."""
        x = self.embed_tokens(ids)
        for i in range(self.config.layers):
            x = getattr(self, f"layers_{i}")(x)
        if at is not None:
            x = jnp.take_along_axis(x, at[..., None], axis=1)
        return self.embed_tokens.attend(self.norm(x))


def load(path: Path | None = None) -> tuple[Llama, Tokenizer]:
    """The model that `smollm2.load` loads; raises as that does."""
    twin, params, tokenizer = smollm2.load(path)
    config = twin.config
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))  # shapes only
    nnx.update(model, params)
    return model, tokenizer
