"""SmolLM2-135M-Instruct in plain Flax NNX: the twin of the Linen model in smollm2.py.

Nothing here knows of adapters: every projection is an unmodified `nnx.Linear`. The
paths of the parameters are those of the Linen model, so adapters trained on the one
fit the other.

Run this file (see smollm2.py for what it needs) and you see the largest difference
from reference logits, then the model's answer to a question.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import smollm2
from flax import nnx
from smollm2 import Config, Tokenizer, rotary


class Attention(nnx.Module):
    """Causal attention; each key/value head serves a group of query heads."""

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
    """Attention, then MLP; each on a normalised input, each added to the stream."""

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
        for i in range(c.layers):  # an nnx.List would give other paths than Linen
            setattr(self, f"layers_{i}", Layer(c, rngs=rngs))
        self.norm = nnx.RMSNorm(c.width, epsilon=c.epsilon, rngs=rngs)

    def __call__(self, ids: jax.Array, at: jax.Array | None = None) -> jax.Array:
        """Logits of the next token.

        Args:
            ids: token ids, (batch, length) int32; pad on the right.
            at: the positions whose logits are wanted, (batch, k); all by default. The
                head costs as much as 8 layers, so ask only for what you need.

        Returns:
            (batch, k or length, vocab).
        """
        x = self.embed_tokens(ids)
        for i in range(self.config.layers):
            x = getattr(self, f"layers_{i}")(x)
        if at is not None:
            x = jnp.take_along_axis(x, at[..., None], axis=1)
        return self.embed_tokens.attend(self.norm(x))


def load() -> tuple[Llama, Tokenizer]:
    """SmolLM2-135M-Instruct, dequantised to float32; raises as `smollm2.load` does."""
    _, params, tokenizer = smollm2.load()
    model = nnx.eval_shape(lambda: Llama(Config(), rngs=nnx.Rngs(0)))  # shapes only
    nnx.update(model, params)
    return model, tokenizer


def main() -> None:
    """Load, check, and ask a question."""
    model, tokenizer = load()
    forward: Any = nnx.jit(Llama.__call__)  # takes numpy arrays, too
    apply = functools.partial(forward, model)
    worst = smollm2.check_reference(apply)
    print(f"largest difference from the reference: {worst:.1e}")
    question = "What is the capital of Japan? Answer in one sentence."
    [answer] = smollm2.generate(apply, [tokenizer.chat(question)], 12)
    print(f"{question}\n{tokenizer.decode(answer)}")


if __name__ == "__main__":
    main()
