"""SmolLM2-135M-Instruct in Tunix's own code: its Qwen2, which holds any Llama.

Qwen2 is a Llama with biases on queries, keys and values, which are zeros here. Besides
what smollm2.py needs this needs Tunix:

    pip install google-tunix
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from models import smollm2
from models.smollm2 import EOS

PAD = 0
"""A token that no text has: EOS is in every chat."""

NAMES = (
    ("layers/", "layers_"),
    ("embedder/input_embedding", "embed_tokens/embedding"),
    ("final_norm", "norm"),
    ("norm/w", "norm/scale"),
    ("attn/", "self_attn/"),
    ("proj/w", "proj/kernel"),
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """SmolLM2's tokenizer as Tunix's samplers call it."""

    plain: smollm2.Tokenizer

    def encode(self, text: str, **_: Any) -> list[int]:
        """The tokens of `text`."""
        return self.plain.encode(text)

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """The text of `ids`, up to the end of the answer."""
        text = self.plain.decode([int(token) for token in ids])
        return text.partition("<|im_end|>")[0].strip()

    def bos_id(self) -> int:
        """The token that every chat begins with."""
        return 1

    def eos_id(self) -> int:
        """The token that ends an answer."""
        return EOS

    def pad_id(self) -> int:
        """The token that pads."""
        return PAD


def chat(question: str) -> str:
    """The text of a chat in which the model should answer `question`."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def load() -> tuple[Any, Tokenizer]:
    """The model and its tokenizer; raises as `smollm2.load` does."""
    from tunix.models.qwen2 import model as qwen2  # pyright: ignore

    llama, params, tokenizer = smollm2.load()
    flat, c = traverse_util.flatten_dict(params, sep="/"), llama.config
    config = qwen2.ModelConfig(
        num_layers=c.layers,
        vocab_size=c.vocab,
        embed_dim=c.width,
        hidden_dim=c.hidden,
        num_heads=c.heads,
        head_dim=c.head_width,
        num_kv_heads=c.kv_heads,
        rope_theta=int(c.rope_base),
        norm_eps=c.epsilon,
        use_tied_embedding=True,
    )
    model = nnx.eval_shape(lambda: qwen2.Qwen2(config, rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    for path, variable in nnx.to_flat_state(state):
        name = "/".join(map(str, path))
        for ours, theirs in NAMES:
            name = name.replace(ours, theirs)
        if name.endswith("_bias"):
            value = jnp.zeros(variable.shape)
        else:  # smollm2's kernels have heads and their features on one axis
            value = jnp.asarray(flat[name]).reshape(variable.shape)
        variable.set_value(value.astype(variable.dtype))
    nnx.update(model, state)
    return model, Tokenizer(tokenizer)


def next_tokens(model: Any, ids: Any, at: Any) -> jax.Array:
    """The logits (rows, k, vocab) of the tokens after positions `at`: (rows, k)."""
    rows, length = ids.shape
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    mask = jnp.tril(jnp.ones((rows, length, length), bool))
    logits, _ = model(jnp.asarray(ids), positions, None, mask)
    return jnp.take_along_axis(logits, jnp.asarray(at)[..., None], axis=1)


def asker(
    model: Any, tokenizer: Tokenizer, new_tokens: int = 16
) -> Callable[[Sequence[str]], list[str]]:
    """A function from questions to greedy answers, by Tunix's sampler."""
    from tunix.generate import sampler  # pyright: ignore

    chunk, length, c = 8, 48, model.config
    cache = sampler.CacheConfig(
        cache_size=length + new_tokens,
        num_layers=c.num_layers,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
    )
    sample = sampler.Sampler(model, tokenizer, cache)

    def ask(questions: Sequence[str]) -> list[str]:
        texts, answers = [chat(question) for question in questions], []
        texts += texts[:1] * (-len(texts) % chunk)
        for start in range(0, len(texts), chunk):
            answers += sample(
                texts[start : start + chunk], new_tokens, max_prompt_length=length
            ).text
        return answers[: len(questions)]

    return ask
