"""A Transformer as in Flax's examples, scanned and with dropout, learns."""

import dataclasses

import chex
import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from helpers import close, trained
from twins import BATCH, CONFIG, HIDDEN, TIME, WIDTH

from mora_jax import fold, init, linen

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


@pytest.mark.slow
def test_transformer_learns():
    """In Flax's TrainState; the merged model draws the same of the base's dropout."""
    model, config = Transformer(), dataclasses.replace(CONFIG, dropout=0.1)
    variables = jax.jit(model.init)(KEY, TOKENS)
    plan = linen.plan(model, variables, config, TOKENS)
    before = jax.tree.map(np.array, variables)
    apply, traces = linen.wrap(model, plan), []
    drops = {"deterministic": False, "rngs": {"dropout": KEY}}
    y = apply(
        m := trained(plan), variables, TOKENS, adapter_deterministic=True, **drops
    )
    merged = {"params": fold(variables["params"], m)}
    close(y, model.apply(merged, TOKENS, **drops))

    @jax.jit
    def step(state, variables, key):
        traces.append(None)
        drops = {"deterministic": False, "rngs": {"dropout": key}}

        def loss(adapters):
            settings = {**drops, "adapter_deterministic": False}
            logits = state.apply_fn(adapters, variables, TOKENS, **settings)
            following = nn.one_hot(TOKENS[:, 1:], VOCABULARY)
            return optax.softmax_cross_entropy(logits[:, :-1], following).mean()

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    settings, losses = {"params": init(plan), "tx": optax.adam(1e-2)}, []
    state = TrainState.create(apply_fn=apply, **settings)
    for key in jax.random.split(KEY, 30):
        state, value = step(state, variables, key)
        losses.append(float(value))
    assert len(traces) == 1
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    for m in jax.tree.leaves(state.params):
        assert (np.abs(m).max(axis=(1, 2)) > 0).all()  # of every layer
    chex.assert_trees_all_equal(variables, before)
