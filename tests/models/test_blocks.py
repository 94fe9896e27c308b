"""What the blocks of real models do: experts, a cache, a Transformer that learns."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import close, random_like, trained
from programs import case_of, results
from twins import BATCH, CAUSAL, CONFIG, EXPERTS, HIDDEN, TIME, WIDTH, X

from mora_jax import fold, init, linen
from mora_jax import nnx as mora

KEY = jax.random.key(0)


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize("name", ["experts-stacked", "experts-einsum"])
def test_experts_do_not_share(name, api):
    """Each has an M of its own, and one that no token goes to gets no gradient."""
    case, run = case_of(name, api), results(name, api).run
    _, before = run(case.adapters)[1][0][1]
    for k, spec in enumerate(case.plan.specs):
        q = spec.operator.square_rank
        assert spec.shape == (EXPERTS, q, q)
        for expert in range(EXPERTS):
            leaves, structure = jax.tree.flatten(case.adapters)
            leaves[k] = leaves[k].at[expert].add(1.0)
            _, after = run(jax.tree.unflatten(structure, leaves))[1][0][1]
            changed = np.any(np.asarray(after != before), axis=(1, 2, 3))
            np.testing.assert_array_equal(changed, np.arange(EXPERTS) == expert)

    router = {"kernel": jnp.zeros((WIDTH, EXPERTS)), "bias": jnp.array([3.0, -9, 2])}
    params = {**case.params, "router": router}

    @jax.jit
    @jax.grad
    def gradients(adapters):
        return jnp.sum(case.adapted(params, adapters, X)[0] ** 2)

    for gradient in jax.tree.leaves(gradients(case.adapters)):
        first, unused, last = np.abs(gradient).max(axis=(1, 2))
        assert unused == 0 < min(first, last) and np.isfinite(gradient).all()


# --- Attention with a cache ---


def test_decoding_with_a_cache():
    """Token by token as all at once, adapted as merged, Linen as NNX."""
    whole, cached = (
        nn.MultiHeadDotProductAttention(num_heads=2, decode=decode)
        for decode in (False, True)
    )
    shapes = jax.eval_shape(cached.init, KEY, X)
    params = random_like(shapes["params"])
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes["cache"])
    cache = {"cache": zeros}
    variables = {"params": params, **cache}
    plan = linen.plan(cached, variables, CONFIG, X[:, :1], mutable=["cache"])
    adapters, apply = trained(plan), linen.wrap(cached, plan)

    def decode(apply, params):
        step = jax.jit(functools.partial(apply, mutable=["cache"]))
        ys, state = [], cache
        for x in jnp.split(X, TIME, axis=1):
            y, state = step({"params": params, **state}, x)
            ys.append(y)
        return jnp.concatenate(ys, axis=1), state

    y, state = decode(functools.partial(apply, adapters), params)
    merged = decode(cached.apply, fold(params, adapters, plan))
    chex.assert_trees_all_equal_structs((y, state), merged, (y, cache))
    close((y, state), merged)
    at_once = linen.wrap(whole, plan)(adapters, {"params": params}, X, mask=CAUSAL)
    close(y, at_once)

    model = nnx.MultiHeadAttention(2, WIDTH, decode=True, rngs=nnx.Rngs(0))
    nnx.update(model, params)
    assert mora.plan(model, CONFIG) == plan
    wrapped = mora.wrap(model, plan)
    mora.set_adapters(wrapped, adapters)
    step = nnx.jit(lambda model, x: model(x))
    for twin in (wrapped, mora.merge_adapters(wrapped)):
        twin.init_cache(X.shape)
        ys = [step(twin, x) for x in jnp.split(X, TIME, axis=1)]
        close(jnp.concatenate(ys, axis=1), y)
        close(nnx.to_pure_dict(nnx.state(twin, nnx.Cache)), state["cache"])
        close(twin(X, mask=CAUSAL, decode=False), y)


# --- A Transformer as in Flax's examples: scanned, with a shared embedding ---

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


STACK = {
    **{f"layers/attention/{k}/kernel": "sioo" for k in ("query", "key", "value")},
    "layers/attention/out/kernel": "siio",
    **{f"layers/{k}/kernel": "sio" for k in ("up", "down")},
}


@functools.cache
def initialised():
    """Variables with which a Transformer can learn."""
    return jax.jit(Transformer().init)(KEY, TOKENS)


def transformer(**config):
    model = Transformer()
    variables = initialised()
    config = dataclasses.replace(CONFIG, **config)
    return model, variables, linen.plan(model, variables, config, TOKENS)


@pytest.mark.parametrize(
    ("targets", "more", "settings"),
    [
        (CONFIG.targets, {}, {"deterministic": False, "rngs": {"dropout": KEY}}),
        (".*/(kernel|embedding)", {"embed/embedding": "io"}, {}),
    ],
    ids=["base-dropout", "shared-embedding"],
)
def test_transformer_adapted_is_merged(targets, more, settings):
    model, variables, plan = transformer(targets=targets)
    assert {spec.name: spec.axes for spec in plan.specs} == STACK | more
    assert all(spec.shape[0] == LAYERS for spec in plan.specs if spec.axes[0] == "s")
    base, apply = (
        jax.jit(f, static_argnames="deterministic")
        for f in (model.apply, linen.wrap(model, plan))
    )
    y = apply(trained(plan), variables, TOKENS, **settings)
    merged = {"params": fold(variables["params"], trained(plan), plan)}
    close(y, base(merged, TOKENS, **settings))
    assert jnp.abs(y - base(variables, TOKENS, **settings)).max() > 1e-2


def test_transformer_learns():
    model, variables, plan = transformer(dropout=0.1)
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
