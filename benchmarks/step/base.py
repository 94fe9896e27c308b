"""Models of SmolLM2-135M's shape: ours, and one that others wrote.

Weights are random, because time does not depend on them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import mora_jax
from benchmarks.common import flax_llama
from benchmarks.common.harness import random_like
from models import smollm2
from mora_jax import MoRAConfig, linen

Params = dict[str, Any]
Inputs = Callable[[Any], tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Base:
    """A model, its parameters and a batch of tokens.

    Attributes:
        model: A Linen module.
        inputs: The function from tokens to the model's inputs.
        config: Its sizes.
        params: Its parameters.
        ids: Tokens, (batch, tokens).
    """

    model: nn.Module
    inputs: Inputs
    config: smollm2.Config
    params: Params
    ids: np.ndarray

    @classmethod
    def random(
        cls, name: str, layers: int, batch: int, tokens: int, dtype: str
    ) -> "Base":
        """One of `MODELS` with random parameters of `dtype`, and random tokens."""
        config, shape = smollm2.Config(layers=layers), (batch, tokens)
        model, inputs = MODELS[name](config, tokens, dtype)
        ids = np.random.default_rng(0).integers(0, config.vocab, shape)
        ids = ids.astype(np.int32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs(ids[:1]))
        params = random_like(shapes["params"], 0.03, dtype)
        return cls(model, inputs, config, params, ids)

    def logits(self, apply: Callable[..., Any], ids: Any) -> jax.Array:
        """Logits by `apply`, a function of the model's own inputs."""
        output = apply(*self.inputs(ids))
        return getattr(output, "logits", output)

    def plain(self, params: Params, ids: Any) -> jax.Array:
        """Logits of the model as it is."""
        apply = functools.partial(self.model.apply, {"params": params})
        return self.logits(apply, ids)

    def plan(self, rank: int, operator: Any = "rotation") -> mora_jax.Plan:
        """Plan for the projections of all layers."""
        config = MoRAConfig(rank=rank, operator=operator)
        variables = {"params": self.params}
        return linen.plan(self.model, variables, config, *self.inputs(self.ids))


def ours(config: smollm2.Config, *_: Any) -> tuple[nn.Module, Inputs]:
    """The Llama in models/smollm2.py."""
    return smollm2.Llama(config), lambda ids: (ids,)


def theirs(config: smollm2.Config, tokens: int, dtype: str) -> tuple[nn.Module, Inputs]:
    """Transformers' Llama of the same sizes; its rotary positions have another base."""
    model = flax_llama.flax_llama(
        tokens,
        jnp.dtype(dtype),
        vocab_size=config.vocab,
        hidden_size=config.width,
        intermediate_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        tie_word_embeddings=True,
    )
    return model, flax_llama.inputs


MODELS = {"SmolLM2": ours, "FlaxLlama": theirs}
