"""A Transformer as in Flax's examples, scanned and with dropout, learns."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import numpy as np
import optax
from twins import BATCH, CONFIG, HIDDEN, TIME, WIDTH

from mora_jax import init, linen

KEY = jax.random.key(0)
VOCABULARY, LAYERS = 17, 3
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, TIME))


class Layer(nn.Module):
    deterministic: bool

    @nn.compact
    def __call__(self, x, mask):
        settings = {"dropout_rate": 0.1, "deterministic": self.deterministic}
        attention = nn.MultiHeadDotProductAttention(2, **settings, name="attention")
        x = x + attention(nn.LayerNorm()(x), mask=mask)
        h = nn.gelu(nn.Dense(HIDDEN, name="up")(nn.LayerNorm()(x)))
        h = nn.Dense(WIDTH, name="down")(h)
        return x + nn.Dropout(0.1, deterministic=self.deterministic)(h), None


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens, deterministic=True):
        embed = nn.Embed(VOCABULARY, WIDTH, name="embed")
        positions = self.param("positions", nn.initializers.normal(), (TIME, WIDTH))
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=LAYERS,
        )(deterministic, name="layers")
        x, _ = layers(embed(tokens) + positions, nn.make_causal_mask(tokens))
        return embed.attend(nn.LayerNorm()(x))


def test_transformer_learns():
    model, config = Transformer(), dataclasses.replace(CONFIG, dropout=0.1)
    variables = jax.jit(model.init)(KEY, TOKENS)
    plan = linen.plan(model, variables, config, TOKENS)
    before = jax.tree.map(np.array, variables)
    tx, traces = optax.adam(1e-2), []
    apply = functools.partial(
        linen.wrap(model, plan), deterministic=False, adapter_deterministic=False
    )

    @jax.jit
    def step(adapters, state, variables, key):
        traces.append(None)

        def loss(adapters):
            logits = apply(adapters, variables, TOKENS, rngs={"dropout": key})
            following = nn.one_hot(TOKENS[:, 1:], VOCABULARY)
            return optax.softmax_cross_entropy(logits[:, :-1], following).mean()

        value, gradients = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(gradients, state)
        return optax.apply_updates(adapters, updates), state, value

    adapters, losses = init(plan), []
    state = tx.init(adapters)
    for key in jax.random.split(KEY, 30):
        adapters, state, value = step(adapters, state, variables, key)
        losses.append(float(value))
    assert len(traces) == 1
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    for m in jax.tree.leaves(adapters):
        assert (np.abs(m).max(axis=(1, 2)) > 0).all()  # of every layer
    chex.assert_trees_all_equal(variables, before)
