"""Teach transformers' Flax GPT-2 a sentence: it continues it before and after.

It needs `pip install transformers==4.57.6`, the last version with Flax models.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax
from transformers import FlaxGPT2LMHeadModel, GPT2Config

import mora_jax

SENTENCE = b"The matrix between two fixed maps is square, and it is all that learns."

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--rate", type=float, default=1e-2)
options = parser.parse_args()

# A small random model of bytes, for which nothing is downloaded. For a pretrained one
# take FlaxGPT2LMHeadModel.from_pretrained(path), its tokenizer, and a rate of 1e-4.
sizes: Any = {"vocab_size": 256, "n_positions": 128, "n_embd": 128, "n_layer": 2}
ends: Any = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
model = FlaxGPT2LMHeadModel(GPT2Config(**sizes, n_head=4, **ends))
ids = jnp.array([[*SENTENCE]])
batch = ids, jnp.ones_like(ids), jnp.arange(ids.size)[None]

training = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}}
variables, config = {"params": model.params}, mora_jax.MoRAConfig(rank=8)
plan = mora_jax.linen.plan(model.module, variables, config, *batch, **training)
print(plan)
apply, adapters = mora_jax.linen.wrap(model.module, plan), mora_jax.init(plan)
tx = optax.adam(options.rate)
state = tx.init(adapters)


@jax.jit
def step(adapters, state, variables, key):
    """Train the adapters by one step; return them, their state and the loss."""

    def loss(adapters):
        settings = {"deterministic": False, "rngs": {"dropout": key}}
        logits = apply(adapters, variables, *batch, **settings).logits[:, :-1]
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        return cross_entropy(logits, ids[:, 1:]).mean()

    value, grads = jax.value_and_grad(loss)(adapters)
    updates, state = tx.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state, value


def continued(params):
    """The sentence as these params continue it."""
    settings: Any = {"max_new_tokens": ids.size - 8, "do_sample": False}
    output: Any = model.generate(ids[:, :8], params=params, **settings)
    return bytes(output.sequences[0].tolist()).decode(errors="replace")


print(f"before: {continued(model.params)!r}")
for k, key in enumerate(jax.random.split(jax.random.key(1), options.steps)):
    adapters, state, value = step(adapters, state, variables, key)
    if k % 50 == 0 or k == options.steps - 1:
        print(f"step {k:3}: loss {value:.4f}")
print(f"after: {continued(mora_jax.merge(model.params, adapters))!r}")
