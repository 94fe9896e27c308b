"""The models under test: each in Flax Linen and in Flax NNX, with the same parameters.

A model is one line of `TWINS`; every law of `models/test_model_laws.py` then holds it,
in both APIs. Most are a `Block`: some layers, and one function that computes with them
in either API.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import random, random_like

from mora_jax import MoRAConfig, register_layer

BATCH, TIME, WIDTH, HIDDEN = 2, 5, 12, 20
HEADS, KV_HEADS, HEAD = 4, 2, 6
EXPERTS = 3
BF16 = jnp.bfloat16
X = random(3, BATCH, TIME, WIDTH)
CAUSAL = np.tril(np.ones((TIME, TIME), bool))
ZEROS = nnx.initializers.zeros_init()

CONFIG = MoRAConfig(rank=2, operator="rotation", alpha=0.5)
ALL = dataclasses.replace(
    CONFIG, rank=1, operator="sharing", targets=".*(kernel|embedding)"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Twin:
    """A model in both APIs, or in one.

    Attributes:
      linen: Makes the Linen model, from nothing; None where there is none.
      nnx: Makes the NNX model from `nnx.Rngs`; None where there is none.
      axes: The axes of every kernel that `config` adapts, by its path.
      x: The input.
      config: What to adapt, and how.
    """

    linen: Any
    nnx: Any
    axes: Mapping[str, str]
    x: Any = dataclasses.field(default_factory=lambda: X)
    config: MoRAConfig = CONFIG


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A layer of a block: how to make it, and the axes of its adapted kernels."""

    linen: Callable[[], nn.Module]
    nnx: Callable[[nnx.Rngs], nnx.Module] | None
    axes: Mapping[str, str]


class Block:
    """Layers by name, and what is computed with them."""

    def __init__(self, forward: Callable[[Any, Any], Any], **layers: Layer):
        self.forward, self.layers = forward, layers
        self.axes = {
            f"{name}/{path}": axes
            for name, layer in layers.items()
            for path, axes in layer.axes.items()
        }


class LinenBlock(nn.Module):
    """A block in Linen."""

    block: Block

    def setup(self):
        for name, layer in self.block.layers.items():
            setattr(self, name, layer.linen())

    def __call__(self, x):
        return self.block.forward(self, x)


class LinenStep(LinenBlock):
    """The same as the body of a scan."""

    def __call__(self, x, _=None):
        return self.block.forward(self, x), None


class NNXBlock(nnx.Module):
    """A block in NNX."""

    def __init__(self, block, rngs):
        self.block = block
        for name, layer in block.layers.items():
            setattr(self, name, layer.nnx(rngs))

    def __call__(self, x):
        return self.block.forward(self, x)


def built(forward, x=X, **layers):
    """The twin that a block is."""
    block = Block(forward, **layers)
    in_nnx = all(layer.nnx for layer in layers.values())
    return Twin(
        lambda: LinenBlock(block),
        functools.partial(NNXBlock, block) if in_nnx else None,
        block.axes,
        x,
    )


# --- Layers ---


def dense(ins, outs, **settings):
    return Layer(
        lambda: nn.Dense(outs, **settings),
        lambda rngs: nnx.Linear(ins, outs, rngs=rngs, **settings),
        {"kernel": "io"},
    )


def router():
    """A layer that no default target names, if it is called so."""
    return dataclasses.replace(dense(WIDTH, EXPERTS), axes={})


def general(axes, ins, outs, axis: Any = -1, batch: Any = ()):
    return Layer(
        lambda: nn.DenseGeneral(outs, axis=axis, batch_dims=tuple(batch)),
        lambda rngs: nnx.LinearGeneral(
            ins, outs, axis=axis, batch_axis=dict(batch), rngs=rngs
        ),
        {"kernel": axes},
    )


def einsum(axes, equation, *shape, bias=None, in_call=False):
    """`in_call` where the call of a Linen layer gives the equation."""
    return Layer(
        lambda: nn.Einsum(shape, None if in_call else equation, bias is not None),
        lambda rngs: nnx.Einsum(equation, shape, bias, rngs=rngs),
        {"kernel": axes},
    )


def attention(heads=2):
    return Layer(
        lambda: nn.MultiHeadDotProductAttention(heads),
        lambda rngs: nnx.MultiHeadAttention(heads, WIDTH, decode=False, rngs=rngs),
        {f"{k}/kernel": "ioo" for k in ("query", "key", "value")}
        | {"out/kernel": "iio"},
    )


class LinenGemma(nn.Module):
    """Gemma's layer: the equation comes in the call, and before the input."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, eqn, x):
        w = self.param("w", nn.initializers.normal(0.3), self.shape)
        return jnp.einsum(eqn, x, w)


class NNXGemma(nnx.Module):
    """The same in NNX."""

    def __init__(self, shape, rngs):
        self.w = nnx.Param(0.3 * jax.random.normal(rngs.params(), shape))

    def __call__(self, eqn, x):
        return jnp.einsum(eqn, x, self.w[...])


for cls in (LinenGemma, NNXGemma):
    register_layer(cls, equation=lambda layer, eqn, x: eqn, kernel="w", argument="x")


def gemma(axes, *shape):
    return Layer(
        lambda: LinenGemma(shape), lambda rngs: NNXGemma(shape, rngs), {"w": axes}
    )


# --- Blocks ---


def mlp(model, x):
    return model.down(nn.gelu(model.up(x)))


MLP = Block(mlp, up=dense(WIDTH, HIDDEN), down=dense(HIDDEN, WIDTH))
ATTENTION = Block(lambda m, x: x + m.attention(x), attention=attention())


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


def mixture(experts):
    """What each token's router mixes of its two best experts, and what all give."""

    def forward(model, x):
        logits = model.router(x)
        best = logits >= jax.lax.top_k(logits, 2)[0][..., -1:]
        outputs = experts(model, x)
        gates = nn.softmax(logits, where=best)
        return jnp.einsum("bte,ebto->bto", gates, outputs), outputs

    return forward


def einsums(model, x):
    """Equations in the layer and in the call, experts, and a kernel turned round."""
    x = model.out(model.heads(x), "bthd,hdi->bti")
    x = model.down(nn.gelu(model.up(x))).sum(0)
    return model.turned(x)


class LinenMethods(nn.Module):
    """Called by other methods than `__call__`, too; one layer is used twice."""

    def setup(self):
        self.encoder = nn.Dense(WIDTH)
        self.decoder = nn.Dense(HIDDEN)

    def __call__(self, x):
        return self.decode(self.encode(self.encode(x)))

    def encode(self, x):
        return jnp.tanh(self.encoder(x))

    def decode(self, x):
        return self.decoder(x)


class NNXMethods(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.encoder = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.decoder = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)

    def __call__(self, x):
        return self.decode(self.encode(self.encode(x)))

    def encode(self, x):
        return jnp.tanh(self.encoder(x))

    def decode(self, x):
        return self.decoder(x)


class Normalised(nnx.Module):
    """Statistics, and dropout of its own."""

    def __init__(self, rngs):
        self.fc = nnx.Linear(WIDTH, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.fc(x)))


class Compact(nn.Module):
    """Layers that are made where they are called."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(x)
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(HIDDEN)(x)))


# --- Lifted transformations ---


def stacked(letters, axes):
    return {path: letters + each for path, each in axes.items()}


STACK: dict[str, Any] = dict(variable_axes={"params": 0}, split_rngs={"params": True})


def stack_of(block):
    """Makes a stack of NNX blocks."""
    return nnx.split_rngs(splits=EXPERTS)(nnx.vmap(functools.partial(NNXBlock, block)))


def linen_scan(body, length=EXPERTS):
    return nn.scan(body, **STACK, length=length)


def scanned(block, *transforms):
    """A stack of blocks, one after another, each perhaps under a transformation."""
    by_linen, by_nnx = transforms or (lambda body: body, lambda call: call)

    def forward(model, x):
        if isinstance(model, nn.Module):
            return model.layers(x, None)[0]
        call = by_nnx(lambda layer, x: layer(x))
        scan = nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(lambda x, layer: call(layer, x))(x, model.layers)

    lift = linen_scan(by_linen(LinenStep))
    layer = Layer(lambda: lift(block), stack_of(block), stacked("s", block.axes))
    return built(forward, layers=layer)


def each(model, x):
    """All experts on the same input."""
    if isinstance(model, nn.Module):
        return model.experts(x)
    return nnx.vmap(lambda one, x: one(x), in_axes=(0, None))(model.experts, x)


def experts():
    lift = nn.vmap(LinenBlock, in_axes=None, axis_size=EXPERTS, **STACK)
    return Layer(lambda: lift(MLP), stack_of(MLP), stacked("s", MLP.axes))


def called(by_linen, by_nnx, *names):
    """Blocks of one class, one after another, which a transformation runs."""
    cls = by_linen(LinenBlock)
    layer = Layer(lambda: cls(MLP), functools.partial(NNXBlock, MLP), MLP.axes)

    def forward(model, x):
        for name in names:
            block = getattr(model, name)
            in_linen = isinstance(model, nn.Module)
            x = block(x) if in_linen else by_nnx(NNXBlock.__call__)(block, x)
        return x

    return built(forward, **dict.fromkeys(names, layer))


def scan_of_scans():
    lift = linen_scan(linen_scan(LinenStep), length=2)
    layer = Layer(lambda: lift(ATTENTION), None, stacked("ss", ATTENTION.axes))
    return built(lambda model, x: model.layers(x, None)[0], layers=layer)


def vmapped(stack):
    """Blocks on an input each, or one block on all inputs at once."""
    shared: dict[str, Any] = dict(
        variable_axes={"params": None}, split_rngs={"params": False}
    )
    lift = nn.vmap(LinenBlock, **(STACK if stack else shared))
    inner = Layer(
        lambda: lift(MLP),
        stack_of(MLP) if stack else functools.partial(NNXBlock, MLP),
        stacked("s", MLP.axes) if stack else MLP.axes,
    )

    def forward(model, x):
        if isinstance(model, nn.Module):
            return model.inner(x)
        axes = (0 if stack else None, 0)
        return nnx.vmap(lambda block, x: block(x), in_axes=axes)(model.inner, x)

    return built(forward, jnp.stack([X] * EXPERTS), inner=inner)


# --- Convolutions and embeddings ---


def layer(kind, shape=(2, 6, 5, 3), size: Any = (3, 2), **settings):
    """A convolution by itself."""

    def make(rngs):
        rest = {"kernel_init": ZEROS, "rngs": rngs, **settings}
        return getattr(nnx, kind)(shape[-1], 6, size, **rest)

    rank = len(size) if isinstance(size, tuple) else 1
    # The features of what would be its output are its inputs, if it is turned round.
    last = "oi" if settings.get("transpose_kernel") else "io"
    axes = {"kernel": "i" * rank + last}
    make_linen = functools.partial(getattr(nn, kind), 6, size, **settings)
    return Twin(make_linen, make, axes, random(1, *shape), ALL)


class Table(nn.Module):
    """An embedding that is used by index, as a head, or as both."""

    use: str
    vocabulary: int = 11
    dtype: Any = None

    def setup(self):
        self.embed = nn.Embed(self.vocabulary, 6, dtype=self.dtype)

    def __call__(self, x):
        return use_table(self.embed, self.use, x)


class TableTwin(nnx.Module):
    """The same in NNX."""

    def __init__(self, use, vocabulary=11, *, init=ZEROS, rngs, **settings):
        rest = {"embedding_init": init, "rngs": rngs, **settings}
        self.embed, self.use = nnx.Embed(vocabulary, 6, **rest), use

    def __call__(self, x):
        return use_table(self.embed, self.use, x)


def use_table(embed, use, x):
    h = x if use == "attend" else embed(x)
    if use == "array":  # a head that no adapter would reach
        return h @ jnp.asarray(embed.embedding).T
    if use == "variables":
        return h @ embed.variables["params"]["embedding"].T
    return h if use == "call" else embed.attend(jnp.tanh(h))


def embed(x, use="call", **settings):
    return Twin(
        lambda: Table(use, **settings),
        lambda rngs: TableTwin(use, **settings, rngs=rngs),
        {"embed/embedding": "io"},
        x,
        ALL,
    )


def mask(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 2, shape), jnp.float32)


conv = functools.partial(layer, "Conv")
transposed = functools.partial(layer, "ConvTranspose")
IDS = np.array([0, 3, 10, 3])

CONVOLUTIONS = {
    "1d": conv((2, 7, 3), 3),
    "1d-causal": conv((2, 7, 3), 3, padding="CAUSAL", kernel_dilation=2),
    "2d": conv(),
    "3d-valid": conv((1, 4, 3, 4, 2), (2, 2, 3), padding="VALID", strides=(1, 2, 1)),
    "nones": conv(strides=None, kernel_dilation=None, input_dilation=None),
    "pad-int": conv(padding=2, input_dilation=(2, 3)),
    "pad-ints": conv(padding=(2, 0), kernel_dilation=(1, 2)),
    "pad-pairs": conv(padding=[(0, 2), (3, 1)], strides=(2, 1)),
    "circular": conv(padding="CIRCULAR", strides=2),
    "reflect-no-batch": conv((6, 5, 3), padding="REFLECT", kernel_dilation=(1, 2)),
    "two-batches": conv((2, 2, 6, 5, 3), strides=2, use_bias=False),
    "groups": conv((2, 6, 5, 4), feature_group_count=2),
    "depthwise": conv(feature_group_count=3, strides=2),
    "mask": conv(mask=mask(3, 2, 3, 6), padding="CIRCULAR"),
    "mask-groups": conv(mask=mask(3, 2, 1, 6), feature_group_count=3),
    "conv-bfloat16": conv(dtype=BF16),
    "conv-bfloat16-mask": conv(dtype=BF16, mask=mask(3, 2, 3, 6)),
    "t-1d": transposed((2, 7, 3), 3),
    "t-2d-no-batch": transposed((6, 5, 3), strides=(2, 1), use_bias=False),
    "t-3d": transposed((1, 2, 3, 2, 3), (2, 1, 3), strides=(1, 2, 2), padding="VALID"),
    "t-pad-int": transposed(padding=1, strides=(2, 2)),
    "t-pad-pairs": transposed(padding=((1, 0), (2, 2)), kernel_dilation=(2, 1)),
    "t-kernel": transposed(strides=(2, 3), transpose_kernel=True),
    "t-two-batches": transposed((2, 2, 6, 5, 3), transpose_kernel=True),
    "t-mask": transposed(mask=mask(3, 2, 3, 6)),
    "t-circular": transposed(padding="CIRCULAR", strides=(2, 1)),
    "t-kernel-mask": transposed(mask=mask(3, 2, 6, 3), transpose_kernel=True),
    "t-bfloat16-mask": transposed(mask=mask(3, 2, 3, 6), dtype=BF16),
}
TABLES = {
    "scalar": embed(np.array(3)),
    "negative": embed(np.array([-1, 4, -11])),
    "uint8": embed(IDS.astype(np.uint8)),
    "2d": embed(np.array([[3], [-2]])),
    "no-index": embed(IDS[:0]),
    "one-word": embed(np.array([0, 3, -2]), vocabulary=1),
    "attend": embed(random(2, 3, 6), "attend"),
    "tied": embed(IDS, "tied"),
    "tied-negative": embed(-IDS.reshape(2, 2), "tied"),
    "tied-bfloat16": embed(IDS, "tied", dtype=BF16),
}

# --- All of them ---

DENSE = {
    "dense": Twin(
        lambda: nn.Dense(10),
        lambda rngs: nnx.Linear(WIDTH, 10, rngs=rngs),
        {"kernel": "io"},
    ),
    "dense-bfloat16": Twin(
        lambda: nn.Dense(10, dtype=BF16),
        lambda rngs: nnx.Linear(WIDTH, 10, dtype=BF16, rngs=rngs),
        {"kernel": "io"},
    ),
    "methods": Twin(
        LinenMethods, NNXMethods, {"encoder/kernel": "io", "decoder/kernel": "io"}
    ),
    "compact": Twin(
        Compact,
        None,
        {"Dense_0/kernel": "io", "Dense_1/kernel": "io"}
        | {
            f"MultiHeadDotProductAttention_0/{k}": v
            for k, v in attention().axes.items()
        },
    ),
    "normalised": Twin(None, Normalised, {"fc/kernel": "io"}),
    "attention": Twin(lambda: attention(3).linen(), attention(3).nnx, attention().axes),
    "gru": Twin(
        lambda: nn.RNN(nn.GRUCell(WIDTH)),
        None,
        {f"cell/{a}{b}/kernel": "io" for a in "hi" for b in "nrz"},
    ),
    "fused-gru": Twin(
        None,
        lambda rngs: nnx.RNN(nnx.GRUCell(WIDTH, WIDTH, rngs=rngs), rngs=rngs),
        {"cell/dense_h/kernel": "io", "cell/dense_i/kernel": "io"},
    ),
    "einsums": built(
        einsums,
        heads=einsum("ioo", "bti,ihd->bthd", WIDTH, 2, 6, bias=(2, 6)),
        out=einsum("iio", "bthd,hdi->bti", 2, 6, WIDTH, in_call=True),
        up=einsum("oio", "...i,eio->e...o", EXPERTS, WIDTH, 8),
        down=einsum("sio", "ebti,eio->ebto", EXPERTS, 8, WIDTH),
        turned=einsum("oi", "...i,oi->...o", WIDTH, WIDTH),
    ),
    "generals": built(
        lambda m, x: m.first(m.batched(m.mixed(m.split(x)))),
        split=general("ioo", WIDTH, (3, 4)),
        mixed=general("iioo", (5, 4), (2, 5), axis=(1, -1)),
        batched=general("sio", 5, 6, batch={0: 2}),
        first=general("io", 3, 4, axis=1),
    ),
    "mlp": built(mlp, **MLP.layers),
    "fused-general": built(
        lambda m, x: m.out(attend(*jnp.moveaxis(m.qkv(x), -3, 0))),
        qkv=general("iooo", WIDTH, (3, HEADS, HEAD)),
        out=general("iio", (HEADS, HEAD), WIDTH, axis=(-2, -1)),
    ),
    "fused-dense": built(
        fused_dense, qkv=dense(WIDTH, 3 * WIDTH), out=dense(WIDTH, WIDTH)
    ),
    "grouped-query": built(
        lambda m, x: m.out(attend(m.q(x), m.k(x), m.v(x))),
        q=einsum("ioo", "BTD,DNH->BTNH", WIDTH, HEADS, HEAD),
        k=einsum("ioo", "BTD,DNH->BTNH", WIDTH, KV_HEADS, HEAD),
        v=einsum("ioo", "BTD,DNH->BTNH", WIDTH, KV_HEADS, HEAD),
        out=einsum("iio", "BTNH,NHD->BTD", HEADS, HEAD, WIDTH),
    ),
    "gemma": built(
        gemma_layer,
        q_einsum=gemma("oio", HEADS, WIDTH, HEAD),
        kv_einsum=gemma("ooio", 2, KV_HEADS, WIDTH, HEAD),
        attn_vec_einsum=gemma("iio", HEADS, HEAD, WIDTH),
        gating=gemma("ooi", 2, HIDDEN, WIDTH),
        linear=gemma("io", HIDDEN, WIDTH),
    ),
    "experts-stacked": built(mixture(each), experts=experts(), router=router()),
    "experts-einsum": built(
        mixture(lambda m, x: mlp(m, jnp.broadcast_to(x, (EXPERTS, *x.shape)))),
        up=einsum("sio", "ebti,eio->ebto", EXPERTS, WIDTH, HIDDEN),
        down=einsum("sio", "ebti,eio->ebto", EXPERTS, HIDDEN, WIDTH),
        router=router(),
    ),
}
LIFTED = {
    "scan": scanned(MLP),
    "scan-remat": scanned(ATTENTION, nn.remat, nnx.remat),
    "scan-scan": scan_of_scans(),
    "remat": called(nn.remat, nnx.remat, "only"),
    "remat-dense": built(
        lambda m, x: m.fc(x),
        fc=Layer(lambda: nn.remat(nn.Dense)(6), None, {"kernel": "io"}),
    ),
    "jit": called(nn.jit, nnx.jit, "first", "second"),
    "vmap": vmapped(stack=True),
    "vmap-shared": vmapped(stack=False),
}

TWINS = DENSE | LIFTED | CONVOLUTIONS | TABLES


def nnx_shapes(twin: Twin) -> Any:
    """The NNX model with shapes in place of its variables' arrays."""
    model: Any = nnx.eval_shape(lambda: twin.nnx(nnx.Rngs(0)))
    if getattr(model, "mask", None) is not None:  # an array, and no variable
        model.mask = twin.nnx(nnx.Rngs(0)).mask
    return model


def nnx_model(twin: Twin) -> Any:
    """The NNX model with normal numbers as parameters, and nothing to compile for it.

    Statistics, masks and generators are as they were made.
    """
    graph, params, rest = nnx.split(nnx_shapes(twin), nnx.Param, ...)
    if jax.tree.leaves(rest):

        def others():
            return nnx.state(twin.nnx(nnx.Rngs(0)), nnx.Not(nnx.Param))

        rest = jax.jit(others)()
    return nnx.merge(graph, random_like(params), rest)
