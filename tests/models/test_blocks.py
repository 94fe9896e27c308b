"""The blocks of real models, in Linen and NNX: attention, experts, a Transformer."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mora_jax.nnx as mora_nnx
from mora_jax import MoRAConfig, init, linen, merge, register_layer

CONFIG = MoRAConfig(rank=2, operator="rotation", alpha=0.5)
KEY = jax.random.key(0)
BATCH, TIME, WIDTH, HIDDEN = 2, 5, 12, 20
HEADS, KV_HEADS, HEAD = 4, 2, 6
EXPERTS = 3
X = jax.random.normal(jax.random.key(3), (BATCH, TIME, WIDTH))
CAUSAL = nn.make_causal_mask(jnp.ones((BATCH, TIME)))

fold_in = jax.jit(merge, static_argnums=2)


def random_like(tree):
    """Numbers far from zero, with no program to compile for them."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(0, 0.3, leaf.shape), jnp.float32), tree
    )


def trained(plan):
    return random_like(init(plan))


def assert_close(actual, expected):
    """Equal within the rounding of the greatest number."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(np.abs(b).max()))


# --- Blocks: layers, and what is computed with them in either API ---


class LinenBlock(nn.Module):
    block: str

    def setup(self):
        for name, (make, _, _) in BLOCKS[self.block][1].items():
            setattr(self, name, make())

    def __call__(self, x):
        return BLOCKS[self.block][0](self, x)


class NNXBlock(nnx.Module):
    def __init__(self, block, rngs):
        self.block = block
        for name, (_, make, _) in BLOCKS[block][1].items():
            setattr(self, name, make(rngs))

    def __call__(self, x):
        return BLOCKS[self.block][0](self, x)


def axes_of(name):
    layers = BLOCKS[name][1].items()
    return {
        f"{k}/{path}": axes for k, layer in layers for path, axes in layer[2].items()
    }


# A layer: how to make it in Linen and in NNX, and the axes of its adapted kernels.


def dense(ins, outs):
    return (
        lambda: nn.Dense(outs),
        lambda rngs: nnx.Linear(ins, outs, rngs=rngs),
        {"kernel": "io"},
    )


def general(axes, ins, outs, axis: Any = -1):
    return (
        lambda: nn.DenseGeneral(outs, axis=axis),
        lambda rngs: nnx.LinearGeneral(ins, outs, axis=axis, rngs=rngs),
        {"kernel": axes},
    )


def einsum(axes, equation, *shape):
    return (
        lambda: nn.Einsum(shape, equation, use_bias=False),
        lambda rngs: nnx.Einsum(equation, shape, rngs=rngs),
        {"kernel": axes},
    )


class LinenGemma(nn.Module):
    """Gemma's layer: the equation comes in the call, and before the input."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, eqn, x):
        w = self.param("w", nn.initializers.normal(0.3), self.shape)
        return jnp.einsum(eqn, x, w)


class NNXGemma(nnx.Module):
    def __init__(self, shape, rngs):
        self.w = nnx.Param(0.3 * jax.random.normal(rngs.params(), shape))

    def __call__(self, eqn, x):
        return jnp.einsum(eqn, x, self.w[...])


for cls in (LinenGemma, NNXGemma):
    register_layer(cls, equation=lambda layer, eqn, x: eqn, kernel="w", argument="x")


def gemma(axes, *shape):
    return lambda: LinenGemma(shape), lambda rngs: NNXGemma(shape, rngs), {"w": axes}


def stack(block, axes):
    """Some of the same block."""
    lift = nn.vmap(
        LinenBlock,
        in_axes=None,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        axis_size=EXPERTS,
    )
    make = nnx.split_rngs(splits=EXPERTS)(nnx.vmap(functools.partial(NNXBlock, block)))
    return lambda: lift(block), make, axes


def router():
    return *dense(WIDTH, EXPERTS)[:2], {}


def attend(q, k, v):
    """Causal attention; queries share what keys and values there are."""
    k, v = (jnp.repeat(a, q.shape[-2] // a.shape[-2], axis=-2) for a in (k, v))
    return nn.dot_product_attention(q, k, v, mask=CAUSAL)


def fused_dense(model, x):
    heads = [a.reshape(*x.shape[:2], 2, 6) for a in jnp.split(model.qkv(x), 3, -1)]
    return model.out(attend(*heads).reshape(x.shape))


def gemma_layer(model, x):
    q = model.q_einsum("BTD,NDH->BTNH", x)
    k, v = model.kv_einsum("BSD,CKDH->CBSKH", x)
    x = x + model.attn_vec_einsum("BTNH,NHD->BTD", attend(q, k, v))
    gate = model.gating("...F,NHF->...NH", x=x)
    h = nn.gelu(gate[..., 0, :]) * gate[..., 1, :]
    return x + model.linear(x=h, eqn="...H,HF->...F")


def mlp(model, x):
    return model.down(nn.gelu(model.up(x)))


def run_stack(experts, x):
    if isinstance(experts, nn.Module):
        return experts(x)
    return nnx.vmap(lambda expert, x: expert(x), in_axes=(0, None))(experts, x)


def mixture(experts):
    """What each token's router mixes of its two best experts, and what all give."""

    def forward(model, x):
        logits = model.router(x)
        best = logits >= jax.lax.top_k(logits, 2)[0][..., -1:]
        outputs = experts(model, x)
        gates = nn.softmax(logits, where=best)
        return jnp.einsum("bte,ebto->bto", gates, outputs), outputs

    return forward


BLOCKS: dict[str, tuple[Callable[[Any, jax.Array], Any], dict[str, Any]]] = {
    "mlp": (mlp, {"up": dense(WIDTH, HIDDEN), "down": dense(HIDDEN, WIDTH)}),
    "fused-general": (
        lambda m, x: m.out(attend(*jnp.moveaxis(m.qkv(x), -3, 0))),
        {
            "qkv": general("iooo", WIDTH, (3, HEADS, HEAD)),
            "out": general("iio", (HEADS, HEAD), WIDTH, axis=(-2, -1)),
        },
    ),
    "fused-dense": (
        fused_dense,
        {"qkv": dense(WIDTH, 3 * WIDTH), "out": dense(WIDTH, WIDTH)},
    ),
    "grouped-query": (
        lambda m, x: m.out(attend(m.q(x), m.k(x), m.v(x))),
        {
            "q": einsum("ioo", "BTD,DNH->BTNH", WIDTH, HEADS, HEAD),
            "k": einsum("ioo", "BTD,DNH->BTNH", WIDTH, KV_HEADS, HEAD),
            "v": einsum("ioo", "BTD,DNH->BTNH", WIDTH, KV_HEADS, HEAD),
            "out": einsum("iio", "BTNH,NHD->BTD", HEADS, HEAD, WIDTH),
        },
    ),
    "gemma": (
        gemma_layer,
        {
            "q_einsum": gemma("oio", HEADS, WIDTH, HEAD),
            "kv_einsum": gemma("ooio", 2, KV_HEADS, WIDTH, HEAD),
            "attn_vec_einsum": gemma("iio", HEADS, HEAD, WIDTH),
            "gating": gemma("ooi", 2, HIDDEN, WIDTH),
            "linear": gemma("io", HIDDEN, WIDTH),
        },
    ),
    "experts-stacked": (
        mixture(lambda m, x: run_stack(m.experts, x)),
        {
            "experts": stack("mlp", {"up/kernel": "sio", "down/kernel": "sio"}),
            "router": router(),
        },
    ),
    "experts-einsum": (
        mixture(lambda m, x: mlp(m, jnp.broadcast_to(x, (EXPERTS, *x.shape)))),
        {
            "up": einsum("sio", "ebti,eio->ebto", EXPERTS, WIDTH, HIDDEN),
            "down": einsum("sio", "ebti,eio->ebto", EXPERTS, HIDDEN, WIDTH),
            "router": router(),
        },
    ),
}
"""{name: (what the model computes, its layers)}"""


def linen_functions(name):
    """(params, plan, base(params), adapted(params, adapters), merged(the same));
    the last one gives params."""
    model = LinenBlock(name)
    params = random_like(jax.eval_shape(model.init, KEY, X)["params"])
    plan = linen.plan(model, {"params": params}, CONFIG, X)
    apply = linen.wrap(model, plan)
    return (
        params,
        plan,
        jax.jit(lambda params: model.apply({"params": params}, X)),
        jax.jit(lambda params, adapters: apply(adapters, {"params": params}, X)),
        lambda params, adapters: fold_in(params, adapters, plan),
    )


def nnx_functions(name):
    """The same for the NNX twin."""
    model = nnx.eval_shape(lambda: NNXBlock(name, nnx.Rngs(0)))
    plan = mora_nnx.plan(model, CONFIG, X)
    wrapped = mora_nnx.wrap(model, plan)

    def load(model, params, adapters=None):
        model = nnx.merge(*nnx.split(model), copy=True)
        nnx.update(model, params)
        if adapters is not None:
            mora_nnx.set_adapters(model, adapters)
        return model

    def params(model):
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    return (
        random_like(params(model)),
        plan,
        jax.jit(lambda params: load(model, params)(X)),
        jax.jit(lambda params, adapters: load(wrapped, params, adapters)(X)),
        jax.jit(lambda *args: params(mora_nnx.merge_adapters(load(wrapped, *args)))),
    )


@pytest.mark.parametrize("name", BLOCKS)
def test_adapted_is_merged(name):
    """In Linen, and in its twin in NNX, of the same parameters and adapters."""
    params, plan, *of_linen = linen_functions(name)
    same, same_plan, *of_nnx = nnx_functions(name)
    assert {spec.name: spec.axes for spec in plan.specs} == axes_of(name)
    assert plan == same_plan
    chex.assert_trees_all_equal(params, same)
    expected = of_linen[1](params, trained(plan))
    for base, adapted, merged in (of_linen, of_nnx):
        y = adapted(params, trained(plan))
        assert_close(y, expected)
        assert_close(y, base(merged(params, trained(plan))))
        changes = jax.tree.map(lambda a, b: abs(a - b).max(), base(params), y)
        assert min(jax.tree.leaves(changes)) > 1e-2


@pytest.mark.parametrize("functions", [linen_functions, nnx_functions])
@pytest.mark.parametrize("name", [name for name in BLOCKS if "experts" in name])
def test_experts_do_not_share(functions, name):
    """Each has an M of its own, and one that no token goes to gets no gradient."""
    params, plan, _, adapted, _ = functions(name)
    _, before = adapted(params, trained(plan))
    for k, spec in enumerate(plan.specs):
        q = spec.operator.square_rank
        assert spec.shape == (EXPERTS, q, q)
        for expert in range(EXPERTS):
            leaves, structure = jax.tree.flatten(trained(plan))
            leaves[k] = leaves[k].at[expert].add(1.0)
            _, after = adapted(params, jax.tree.unflatten(structure, leaves))
            changed = np.any(np.asarray(after != before), axis=(1, 2, 3))
            np.testing.assert_array_equal(changed, np.arange(EXPERTS) == expert)

    router = {"kernel": jnp.zeros((WIDTH, EXPERTS)), "bias": jnp.array([3.0, -9, 2])}
    params = {**params, "router": router}
    gradients = jax.grad(lambda a: jnp.sum(adapted(params, a)[0] ** 2))(trained(plan))
    for gradient in jax.tree.leaves(gradients):
        first, unused, last = np.abs(gradient).max(axis=(1, 2))
        assert unused == 0 < min(first, last) and np.isfinite(gradient).all()


# --- Attention with a cache ---


def test_decoding_with_a_cache():
    """Token by token as all at once, adapted as merged, Linen as NNX."""
    whole, cached = (
        nn.MultiHeadDotProductAttention(num_heads=2, decode=decode)
        for decode in (False, True)
    )
    variables = jax.jit(cached.init)(KEY, X)
    params, cache = variables["params"], {"cache": variables["cache"]}
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
    merged = decode(cached.apply, fold_in(params, adapters, plan))
    chex.assert_trees_all_equal_structs((y, state), merged, (y, cache))
    assert_close((y, state), merged)
    at_once = linen.wrap(whole, plan)(adapters, {"params": params}, X, mask=CAUSAL)
    assert_close(y, at_once)

    model = nnx.MultiHeadAttention(2, WIDTH, decode=True, rngs=nnx.Rngs(0))
    nnx.update(model, params)
    assert mora_nnx.plan(model, CONFIG) == plan
    wrapped = mora_nnx.wrap(model, plan)
    mora_nnx.set_adapters(wrapped, adapters)
    step = nnx.jit(lambda model, x: model(x))
    for twin in (wrapped, mora_nnx.merge_adapters(wrapped)):
        twin.init_cache(X.shape)
        ys = [step(twin, x) for x in jnp.split(X, TIME, axis=1)]
        assert_close(jnp.concatenate(ys, axis=1), y)
        assert_close(nnx.to_pure_dict(nnx.state(twin, nnx.Cache)), state["cache"])
        assert_close(twin(X, mask=CAUSAL, decode=False), y)


# --- A Transformer as in Flax's examples: scanned, with a shared embedding ---

VOCABULARY, LAYERS = 17, 3
TOKENS = jax.random.randint(KEY, (BATCH, TIME), 0, VOCABULARY)


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


def transformer(**config):
    model = Transformer()
    variables = jax.jit(model.init)(KEY, TOKENS)
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
    merged = {"params": fold_in(variables["params"], trained(plan), plan)}
    assert_close(y, base(merged, TOKENS, **settings))
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
