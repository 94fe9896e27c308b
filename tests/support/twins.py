"""The models under test: each in Flax Linen and in Flax NNX, with the same parameters.

Every law of `models/test_model_laws.py` holds each of `TWINS`, in both APIs. Many are a
`Block`: some layers, and one function that computes with them in either API.
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
from mora_jax.products import Blocks, Folded

BATCH, TIME, WIDTH, HIDDEN = 2, 5, 12, 20
EXPERTS = 3
BF16 = jnp.bfloat16
X = random(3, BATCH, TIME, WIDTH)
ZEROS = nnx.initializers.zeros_init()

CONFIG = MoRAConfig(rank=2, operator="rotation", alpha=0.25)
ALL = dataclasses.replace(
    CONFIG, rank=1, operator="sharing", targets=".*(kernel|embedding)"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Twin:
    """A model, or a layer of a block, in both APIs or in one."""

    linen: Any  # makes the Linen model, from nothing; None where there is none
    nnx: Any  # makes the NNX model from `nnx.Rngs`; None where there is none
    axes: Mapping[str, str]  # of every kernel that `config` adapts, by its path
    x: Any = dataclasses.field(default_factory=lambda: X)
    config: MoRAConfig = CONFIG


class Block:
    """Layers by name, and what is computed with them."""

    def __init__(self, forward: Callable[[Any, Any], Any], **layers: Twin):
        self.forward, self.layers = forward, layers
        self.axes = {
            f"{name}/{path}": axes
            for name, layer in layers.items()
            for path, axes in layer.axes.items()
        }


class LinenBlock(nn.Module):
    """A block in Linen; perhaps as the body of a scan."""

    block: Block
    scanned: bool = False

    def setup(self):
        for name, layer in self.block.layers.items():
            setattr(self, name, layer.linen())

    def __call__(self, x, _=None):
        y = self.block.forward(self, x)
        return (y, None) if self.scanned else y


class NNXBlock(nnx.Module):
    """A block in NNX."""

    def __init__(self, block, rngs):
        self.block = block
        for name, layer in block.layers.items():
            setattr(self, name, layer.nnx(rngs))

    def __call__(self, x):
        return self.block.forward(self, x)


def in_linen(model):
    return isinstance(model, nn.Module)


def built(forward, x=X, **layers):
    """The twin that a block is."""
    block = Block(forward, **layers)
    linen, in_nnx = (
        functools.partial(cls, block)
        if all(getattr(layer, api) for layer in layers.values())
        else None
        for cls, api in ((LinenBlock, "linen"), (NNXBlock, "nnx"))
    )
    return Twin(linen, in_nnx, block.axes, x)


# --- Layers ---


def dense(ins, outs, **settings):
    return Twin(
        lambda: nn.Dense(outs, **settings),
        lambda rngs: nnx.Linear(ins, outs, rngs=rngs, **settings),
        {"kernel": "io"},
    )


def general(axes, ins, outs, axis: Any = -1, batch: Any = ()):
    return Twin(
        lambda: nn.DenseGeneral(outs, axis=axis, batch_dims=tuple(batch)),
        lambda rngs: nnx.LinearGeneral(
            ins, outs, axis=axis, batch_axis=dict(batch), rngs=rngs
        ),
        {"kernel": axes},
    )


def einsum(axes, equation, *shape, bias=None, in_call=False):
    """`in_call` where the call of a Linen layer gives the equation."""
    return Twin(
        lambda: nn.Einsum(shape, None if in_call else equation, bias is not None),
        lambda rngs: nnx.Einsum(equation, shape, bias, rngs=rngs),
        {"kernel": axes},
    )


# --- Models ---

MLP = Block(
    lambda model, x: model.down(nn.gelu(model.up(x))),
    up=dense(WIDTH, HIDDEN),
    down=dense(HIDDEN, WIDTH),
)
ATTENTION = Block(
    lambda model, x: x + model.attention(x),
    attention=Twin(
        lambda: nn.MultiHeadDotProductAttention(2),
        lambda rngs: nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs),
        {"query/kernel": "ioo", "key/kernel": "ioo"}
        | {"value/kernel": "ioo", "out/kernel": "iio"},
    ),
)


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


def normalised(rngs):
    """Statistics, and dropout of its own."""
    norm = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
    drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
    return nnx.Sequential(nnx.Linear(WIDTH, 16, rngs=rngs), norm, drop)


# --- Lifted transformations ---

STACK: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
SHARED: Any = {"variable_axes": {"params": None}, "split_rngs": {"params": False}}


def stack_axes(letters, block, axis=0):
    """The axes of a block's kernels, with the stack's at one place of all of them."""
    return {
        path: axes + letters if axis == -1 else axes[:axis] + letters + axes[axis:]
        for path, axes in block.axes.items()
    }


def stacked(lift, block, axis=0):
    """A layer that is a stack of blocks, which `lift()` makes in Linen."""
    make = functools.partial(NNXBlock, block)
    return Twin(lift, vmapped(make, EXPERTS, axis), stack_axes("s", block, axis))


def vmapped(make, count, axis=0):
    made = nnx.vmap(make, out_axes=nnx.StateAxes({...: axis}))
    return nnx.split_rngs(splits=count)(made)


def scan(body, length=EXPERTS, axis=0):
    return nn.scan(body, **STACK | {"variable_axes": {"params": axis}}, length=length)


def two_scans(axis=0):
    return scan(scan(LinenBlock, axis=axis), 2, axis)(MLP, True)


def one_after_another(model, x, axis=0):
    if in_linen(model):
        return model.layers(x, None)[0]
    call = nnx.remat(lambda layer, x: layer(x))
    axes = nnx.Carry, nnx.StateAxes({...: axis})
    scan = nnx.scan(in_axes=axes, out_axes=nnx.Carry)
    return scan(lambda x, layer: call(layer, x))(x, model.layers)


def layers_on(axis):
    """A stack of attention, on any axis."""

    def lift():
        return scan(nn.remat(LinenBlock), axis=axis)(ATTENTION, True)

    forward = functools.partial(one_after_another, axis=axis)
    return built(forward, layers=stacked(lift, ATTENTION, axis))


def mixture(model, x):
    """What each token's router mixes of its two best experts, and what all give."""
    logits = model.router(x)
    best = logits >= jax.lax.top_k(logits, 2)[0][..., -1:]
    if in_linen(model):
        outputs = model.experts(x)
    else:
        each = nnx.vmap(lambda one, x: one(x), in_axes=(0, None))
        outputs = each(model.experts, x)
    gates = nn.softmax(logits, where=best)
    return jnp.einsum("bte,ebto->bto", gates, outputs), outputs


class BareExperts(nnx.Module):
    """Experts that are arrays of the module, which a part of its method multiplies."""

    def __init__(self, rngs):
        self.router = nnx.Linear(WIDTH, EXPERTS, rngs=rngs)
        self.up = nnx.Param(ZEROS(rngs.params(), (EXPERTS, WIDTH, HIDDEN)))
        self.down = nnx.Param(ZEROS(rngs.params(), (EXPERTS, HIDDEN, WIDTH)))

    def __call__(self, x):
        return nnx.remat(BareExperts.mixed)(self, x, nnx.softmax(self.router(x)))

    def mixed(self, x, gates):
        outputs = [nnx.gelu(x @ self.up[k]) @ self.down[k] for k in range(EXPERTS)]
        return x + jnp.einsum("bte,btoe->bto", gates, jnp.stack(outputs, -1))


class LinenGate(nn.Module):
    """A kernel for each block of features, as RecurrentGemma's gates have it."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal(1, 2, 0)
        return in_blocks(x, self.param("w", init, (3, WIDTH // 3, 5)))


# Its library need not be here: rules go by a class's full name.
LinenGate.__module__ = "recurrentgemma.jax.layers"
LinenGate.__qualname__ = "BlockDiagonalLinear"


class Gate(nnx.Module):
    """The same in NNX, of one's own."""

    def __init__(self, rngs):
        self.w = nnx.Param(ZEROS(rngs.params(), (3, WIDTH // 3, 5)))

    def __call__(self, x):
        return in_blocks(x, self.w[...])


def in_blocks(x, w):
    y = jnp.einsum("...hi,hij->...hj", x.reshape(*x.shape[:-1], *w.shape[:2]), w)
    return y.reshape(*x.shape[:-1], -1)


register_layer(Gate, equation=Blocks(), kernel="w")

for bare in ("up", "down"):
    register_layer(BareExperts, equation=Folded("sio"), kernel=bare)
BARE = Twin(None, BareExperts, {"up": "sio", "down": "sio"})
STACKED_BARE = {"up": "ssio", "down": "ssio"}


def jitted_twice(model, x):
    if in_linen(model):
        return model.second(model.first(x))
    call = nnx.jit(NNXBlock.__call__)
    return call(model.second, call(model.first, x))


def on_each(model, x):
    if in_linen(model):
        return model.inner(x)
    return nnx.vmap(lambda block, x: block(x), in_axes=(None, 0))(model.inner, x)


def mlp(lift):
    """The MLP, lifted in Linen; in NNX the forward function does it."""
    cls = lift(LinenBlock)
    return Twin(lambda: cls(MLP), functools.partial(NNXBlock, MLP), MLP.axes)


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
IDS = np.array([0, 3, 10, 3], np.int32)

# --- All of them ---

DENSE = {
    "blocks": Twin(LinenGate, Gate, {"w": "sio"}),
    "dense-bfloat16": dense(WIDTH, 10, dtype=BF16),
    "methods": Twin(
        LinenMethods, NNXMethods, {"encoder/kernel": "io", "decoder/kernel": "io"}
    ),
    "normalised": Twin(None, normalised, {"layers/0/kernel": "io"}),
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
        mixed=general("iioo", (5, 4), (2, 5), axis=(-1, 1)),
        batched=general("sio", 5, 6, batch={0: 2}),
        first=general("io", 3, 4, axis=1),
    ),
}
LIFTED = {
    "experts": built(
        mixture,
        experts=stacked(
            lambda: nn.vmap(LinenBlock, in_axes=None, axis_size=EXPERTS, **STACK)(MLP),
            MLP,
        ),
        # No default target names a layer that is called so.
        router=dataclasses.replace(dense(WIDTH, EXPERTS), axes={}),
    ),
    "scan-remat": layers_on(0),
    "scan-second": layers_on(1),
    "scan-last": layers_on(-1),
    "scan-scan": built(
        lambda model, x: model.layers(x, None)[0],
        layers=Twin(two_scans, None, stack_axes("ss", MLP)),
    ),
    "scan-scan-second": built(
        lambda model, x: model.layers(x, None)[0],
        layers=Twin(functools.partial(two_scans, 1), None, stack_axes("ss", MLP, 1)),
    ),
    "bare-experts": BARE,
    "bare-experts-scan": built(
        one_after_another, layers=Twin(None, vmapped(BareExperts, 2), STACKED_BARE)
    ),
    "bare-experts-second": built(
        functools.partial(one_after_another, axis=1),
        layers=Twin(None, vmapped(BareExperts, 2, 1), STACKED_BARE),
    ),
    "jit": built(jitted_twice, **dict.fromkeys(("first", "second"), mlp(nn.jit))),
    "vmap-shared": built(
        on_each,
        jnp.stack([X] * EXPERTS),
        inner=mlp(lambda block: nn.vmap(block, **SHARED)),
    ),
}
CONVOLUTIONS = {
    "1d-causal": conv((2, 7, 3), 3, padding="CAUSAL", kernel_dilation=2),
    "3d-valid": conv((1, 4, 3, 4, 2), (2, 2, 3), padding="VALID", strides=(1, 2, 1)),
    "pad-int": conv(padding=2, input_dilation=(2, 3)),
    "pad-pairs": conv(padding=[(0, 2), (3, 1)], strides=(2, 1)),
    "circular": conv(padding="CIRCULAR", strides=2),
    "reflect-no-batch": conv((6, 5, 3), padding="REFLECT", kernel_dilation=(1, 2)),
    "two-batches": conv(
        (2, 2, 6, 5, 3), strides=None, input_dilation=None, kernel_dilation=None
    ),
    "groups": conv((2, 6, 5, 4), feature_group_count=2, use_bias=False),
    "mask": conv(mask=mask(3, 2, 3, 6), padding="CIRCULAR"),
    "depthwise-mask": conv(
        mask=mask(3, 2, 1, 6), feature_group_count=3, padding=(2, 0), strides=2
    ),
    "conv-bfloat16": conv(dtype=BF16),
    "conv-bfloat16-mask": conv(dtype=BF16, mask=mask(3, 2, 3, 6)),
    "t-3d-no-batch": transposed(
        (2, 3, 2, 3), (2, 1, 3), strides=(1, 2, 2), padding="VALID", use_bias=False
    ),
    "t-pad-int-mask": transposed(padding=1, strides=(2, 2), mask=mask(3, 2, 3, 6)),
    "t-pad-pairs": transposed(padding=((1, 0), (2, 2)), kernel_dilation=(2, 1)),
    "t-kernel": transposed(strides=(2, 3), transpose_kernel=True),
    "t-circular": transposed(padding="CIRCULAR", strides=(2, 1)),
    "t-kernel-mask": transposed(mask=mask(3, 2, 6, 3), transpose_kernel=True),
}
TABLES = {
    "scalar": embed(np.array(3, np.int32)),
    "one-word": embed(np.array([0, 3, -2], np.int32), vocabulary=1),
    "attend": embed(random(2, 3, 6), "attend"),
    "tied": embed(np.array([[-1, 4], [-11, 0]], np.int32), "tied"),
    "tied-bfloat16": embed(IDS, "tied", dtype=BF16),
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
