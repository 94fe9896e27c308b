"""Random models of both Flax APIs: blocks of layers, drawn by a seed.

A model is a list of blocks, each with a way past it. A feature is a function that draws
a block. The block is then put into a transformation of Flax or JAX, and the model gets
calls. `draw_model(seed)` prints as the seed and a short description.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping
from functools import partial
from random import Random
from types import SimpleNamespace as Namespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from deciding import CHOICES, CONTROL, WAYS
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import random, random_like
from jax.lax import conv_general_dilated, dot_general, reduce_precision, stop_gradient

from mora_jax import MoRAConfig, register_layer
from mora_jax.products import Lookup

WIDTH, ROWS, POSITIONS, VOCABULARY = 8, 2, 3, 11
TARGETS = ".*/(kernel|embedding|w)"
normal = nn.initializers.normal(0.35)


class Mode(enum.Enum):
    """A mode of a call."""

    EVAL = 0
    TRAIN = 1


def switch(flag: bool) -> Callable[[], bool]:
    """A function that holds a flag."""
    return lambda: flag


NUMBERS, TWICE = np.zeros(1, np.float32), np.zeros(2, np.float32)
SWITCHES: dict[str, tuple[Any, Any, Callable[[Any], bool]]] = {
    "bool": (False, True, bool),
    "int": (0, 1, bool),
    "float": (0.0, 0.5, bool),
    "enum": (Mode.EVAL, Mode.TRAIN, lambda mode: mode is Mode.TRAIN),
    "tuple": ((0, 1), (0, 2), lambda pair: pair[1] == 2),
    "record": (Namespace(on=False), Namespace(on=True), lambda record: record.on),
    "closure": (switch(False), switch(True), lambda function: function()),
    "partial": (partial(int, "0"), partial(int, "1"), lambda function: function() > 0),
    "shape": (NUMBERS, TWICE, lambda array: array.size == 2),
    "dtype": (NUMBERS, NUMBERS.astype(np.int8), lambda array: array.dtype == np.int8),
    "NumPy": (jnp.zeros(1), NUMBERS, lambda array: isinstance(array, np.ndarray)),
}
"""{kind: (input of a call that evaluates, of one that trains, which of both it is)}."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of a block, made for an API with a dtype of its parameters."""

    linen: Callable[[Any], nn.Module]
    nnx: Callable[[Any, nnx.Rngs], nnx.Module]


@dataclasses.dataclass(frozen=True)
class Context:
    """The call of a block: its module, inputs and the mode of the model's call."""

    m: Any
    x: jax.Array
    ids: jax.Array
    mode: str

    @property
    def linen(self) -> bool:
        """True for a module of Linen."""
        return isinstance(self.m, nn.Module)

    @property
    def inside(self) -> jax.Array:
        """The ids, none of them beyond the vocabulary."""
        return self.ids % VOCABULARY

    def a(self, *args: Any) -> jax.Array:
        """The output of the first layer."""
        return self.m.a(*args)

    def b(self, *args: Any) -> jax.Array:
        """The output of the second layer."""
        return self.m.b(*args)

    def kernel(self, name: str = "kernel") -> jax.Array:
        """The kernel of the first layer, as code reads it that does not call it."""
        if self.linen:
            return self.m.a.variables["params"][name]
        return getattr(self.m.a, name)[...]


Run = Callable[[Context], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A part of a model.

    Attributes:
      text: A short description.
      run: The computation.
      layers: Its layers, which are attributes of the module that runs it.
      right: True if a plan must adapt all of its kernels, and prove them.
      fault: The fault that it would have without what mends it; "" for none.
      lifts: The transformations that it is in, from the outside.
      calls: The calls that it was made for.
      liftable: True if any transformation may be put around it.
      steps: True if its outputs change by steps, whose derivative is 0.
      reverse: True if it has a gradient and no forward derivative.
      prepare: A function of the module, once its layers are made.
      is_lookup: True if it looks up in a table.
      no_gradient: True if JAX itself computes a wrong gradient of its kernel.
    """

    text: str
    run: Run
    layers: Mapping[str, Layer]
    right: bool = True
    fault: str = ""
    lifts: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    liftable: bool = True
    steps: bool = False
    reverse: bool = False
    prepare: Callable[[Any], None] | None = None
    is_lookup: bool = False
    no_gradient: bool = False

    def __repr__(self) -> str:
        return "(".join([*self.lifts, self.text]) + ")" * len(self.lifts)


@dataclasses.dataclass
class RandomModel:
    """A model with variables, inputs, calls and the settings of a config."""

    seed: int
    api: str
    precision: str
    blocks: tuple[Block, ...]
    calls: tuple[str, ...]
    all_planned: bool
    settings: Mapping[str, Any]
    switch: str = "bool"

    def __repr__(self) -> str:
        parts = self.api, self.precision, *self.settings.values(), self.switch
        blocks, calls = " + ".join(map(repr, self.blocks)), ", ".join(self.calls)
        planned = " (all planned)" if self.all_planned else ""
        return f"seed {self.seed}: {' '.join(parts)}: {blocks}; {calls}{planned}"

    @property
    def forward(self) -> bool:
        """True if it has only forward derivatives, as a loop of unknown length."""
        return any("while" in block.lifts for block in self.blocks)

    @property
    def dtype(self) -> Any:
        """The dtype of parameters, inputs and M's."""
        return jnp.float64 if self.precision == "float64" else jnp.float32

    def config(self, exclude: tuple[str, ...]) -> MoRAConfig:
        """The config of a plan of all kernels but some."""
        settings: Any = {
            "operator": "signed_decoupling",
            "square_rank": 4,
            "targets": TARGETS,
            "param_dtype": self.dtype,
        }
        return MoRAConfig(exclude=exclude, **(settings | self.settings))

    @functools.cached_property
    def inputs(self) -> tuple[jax.Array, jax.Array]:
        """Activations, and ids that are partly beyond the vocabulary."""
        numbers = np.random.default_rng(self.seed)
        ids = numbers.integers(0, VOCABULARY, (ROWS, POSITIONS))
        ids[0, :2] = VOCABULARY + 2, -3
        ids[1, 0] = 0  # in the few rows that truncation adapts
        x = random(self.seed, ROWS, POSITIONS, WIDTH, dtype=self.dtype)
        return x, jnp.asarray(ids, jnp.int32)

    @functools.cached_property
    def model(self) -> Any:
        """The module."""
        if self.api == "linen":
            return LinenModel(self.blocks, self.dtype, self.switch)
        return NNXModel(self.blocks, self.dtype, self.switch, nnx.Rngs(self.seed))

    @functools.cached_property
    def variables(self) -> Any:
        """The variables of a Linen model."""
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), *self.inputs)
        kept = {name: shapes[name] for name in shapes if name != "losses"}
        variables = random_like(kept, 0.35)
        if "batch_stats" in kept:  # no variance is negative
            variables["batch_stats"] = jax.tree.map(abs, variables["batch_stats"])
        return variables


# --- Modules that run blocks ---


class LinenBlock(nn.Module):
    """A block in Linen, inside of its transformations."""

    block: Block
    lifts: tuple[str, ...]
    dtype: Any
    mode: str

    def setup(self):
        for name, layer in ({} if self.lifts else self.block.layers).items():
            setattr(self, name, layer.linen(self.dtype))
        if self.block.prepare:
            self.block.prepare(self)

    @nn.compact
    def __call__(self, x, ids):
        if not self.lifts:
            return self.block.run(Context(self, x, ids, self.mode))
        fields = {"block": self.block, "dtype": self.dtype, "mode": self.mode}
        fields |= {"lifts": self.lifts[1:], "name": "inner"}
        return LINEN_LIFTS[self.lifts[0]](self, x, ids, fields)


class LinenStep(LinenBlock):
    """The same as a step of a scan."""

    def __call__(self, x, ids):
        return super().__call__(x, ids), None


def mode_of(kind, train):
    """The mode of a call with this input, of one of `SWITCHES`."""
    is_on = SWITCHES[kind][2]
    return "train" if train is not None and is_on(train) else "eval"


class LinenModel(nn.Module):
    """A model in Linen."""

    blocks: tuple[Block, ...]
    dtype: Any
    switch: str

    @nn.compact
    def run(self, x, ids, mode):
        for k, block in enumerate(self.blocks):
            fields = block, block.lifts, self.dtype, mode
            x = x + jnp.sin(LinenBlock(*fields, name=f"b{k}")(x, ids))
        return x

    def __call__(self, x, ids, train=None):
        return self.run(x, ids, mode_of(self.switch, train))

    def other(self, x, ids):
        return self.run(x, ids, "other")


class NNXBlock(nnx.Module):
    """A block in NNX, inside of its transformations."""

    def __init__(self, block, lifts, dtype, rngs):
        self.block, self.lifts = block, lifts
        if lifts:
            make = functools.partial(NNXBlock, block, lifts[1:], dtype)
            if lifts[0] in ("scan", "experts"):
                make = nnx.split_rngs(splits=2)(nnx.vmap(make))
            self.inner = make(rngs)
            return
        for name, layer in block.layers.items():
            setattr(self, name, layer.nnx(dtype, rngs))
        if block.prepare:
            block.prepare(self)

    def __call__(self, x, ids, mode):
        if not self.lifts:
            return self.block.run(Context(self, x, ids, mode))

        def run(inner, x):
            return inner(x, ids, mode)

        return NNX_LIFTS[self.lifts[0]](run, self.inner, x)


class NNXModel(nnx.Module):
    """A model in NNX."""

    def __init__(self, blocks, dtype, switch, rngs):
        self.number, self.switch = len(blocks), switch
        for k, block in enumerate(blocks):
            setattr(self, f"b{k}", NNXBlock(block, block.lifts, dtype, rngs))

    def run(self, x, ids, mode):
        for k in range(self.number):
            x = x + jnp.sin(getattr(self, f"b{k}")(x, ids, mode))
        return x

    def __call__(self, x, ids, train=None):
        return self.run(x, ids, mode_of(self.switch, train))

    def other(self, x, ids):
        return self.run(x, ids, "other")


# --- Transformations ---

STACK = {"variable_axes": {"params": 0, "losses": 0}, "split_rngs": {"params": True}}
SHARED = {"variable_axes": {"params": None}, "split_rngs": {"params": False}}


def linen_scan(m, x, ids, fields):
    step = nn.scan(LinenStep, **STACK, in_axes=nn.broadcast, length=2)
    return step(**fields)(x, ids)[0]


def linen_experts(m, x, ids, fields):
    lifted = nn.vmap(LinenBlock, **STACK, in_axes=None, axis_size=2)
    return lifted(**fields)(x, ids).sum(0)


def linen_vmap(axis, axis_of_ids, variables):
    """A block that sees one index of an axis of its inputs."""

    def lift(m, x, ids, fields):
        axes = {"in_axes": (axis, axis_of_ids), "out_axes": axis}
        return nn.vmap(LinenBlock, **variables, **axes)(**fields)(x, ids)

    return lift


def linen_cond(m, x, ids, fields):
    inner = LinenBlock(**fields)
    if m.is_initializing():
        return inner(x, ids)
    branches = (lambda m, x: m(x, ids)), (lambda m, x: m(2 * x, ids))
    return nn.cond(jnp.sum(x) > 0, *branches, inner, x)


def linen_one_branch(m, x, ids, fields):
    inner = LinenBlock(**fields)
    if m.is_initializing():
        return inner(x, ids)
    branches = (lambda m, x: m(x, ids)), (lambda m, x: x)
    return nn.cond(jnp.sum(x) < 1e6, *branches, inner, x)


def linen_while(m, x, ids, fields):
    inner = LinenBlock(**fields)
    if m.is_initializing():
        return inner(x, ids)
    steps = (lambda m, c: c[0] < 2), (lambda m, c: (c[0] + 1, jnp.sin(m(c[1], ids))))
    return nn.while_loop(*steps, inner, (0, x), broadcast_variables="params")[1]


def linen_energy(m, x, ids, fields):
    inner = LinenBlock(**fields)
    inner(x, ids)  # its parameters, before they are closed over
    return jax.grad(lambda x: jnp.sum(jnp.sin(inner(x, ids))))(x)


def linen_tangent(m, x, ids, fields):
    inner = LinenBlock(**fields)
    inner(x, ids)
    return jax.jvp(lambda x: inner(x, ids), (x,), (jnp.cos(x),))[1]


def linen_custom_vjp(change):
    """The gradients of parameters and input, changed by the model on their way back."""

    def lift(m, x, ids, fields):
        def run(m, x):
            return m(x, ids)

        def backward(vjp, gradient):
            return change(*vjp(gradient))

        forward = functools.partial(nn.vjp, run)
        own = nn.custom_vjp(run, forward_fn=forward, backward_fn=backward)
        return own(LinenBlock(**fields), x)

    return lift


def linen_mapped(change):
    """`nn.map_variables` of the parameters."""

    def lift(m, x, ids, fields):
        starts = m.is_initializing()
        settings = {"trans_in_fn": change, "init": starts, "mutable": starts}
        return nn.map_variables(LinenBlock, "params", **settings)(**fields)(x, ids)

    return lift


def by_shape(params):
    """Biases and vectors are halved, and whatever else is small."""
    return jax.tree.map(lambda a: a * 0.5 if a.size <= 16 else a, params)


def by_path(params):
    def change(path, array):
        return array if path[-1].key in ("kernel", "w") else array * 0.5

    return jax.tree_util.tree_map_with_path(change, params)


def by_name(params):
    flat = flatten_dict(params)
    kept = {path: array for path, array in flat.items() if path[-1] in ("kernel", "w")}
    return unflatten_dict({path: array * 0.5 for path, array in flat.items()} | kept)


def rebuilt(params):
    """A new dict of what the author knows."""
    if not isinstance(params, Mapping):
        return params
    known = [key for key in ("params", "a", "b", "kernel", "bias", "w", "s")]
    return {key: rebuilt(params[key]) for key in known if key in params}


MAPPED = {
    "mapped to itself": lambda params: jax.tree.map(lambda a: a, params),
    "halved": lambda params: jax.tree.map(lambda a: a * 0.5, params),
    "stopped": lambda params: jax.tree.map(stop_gradient, params),
    "mapped by shape": by_shape,
    "mapped by path": by_path,
    "mapped by name": by_name,
    "mapped into a new dict": rebuilt,
}
OWN_GRADIENTS = {
    "half of dx": linen_custom_vjp(lambda dw, dx: (dw, 0.5 * dx)),
    "sign of dw": linen_custom_vjp(lambda dw, dx: (jax.tree.map(jnp.sign, dw), dx)),
}
LINEN_LIFTS = {
    "remat": lambda m, x, ids, fields: nn.remat(LinenBlock)(**fields)(x, ids),
    "jit": lambda m, x, ids, fields: nn.jit(LinenBlock)(**fields)(x, ids),
    "vmap": linen_vmap(0, 0, SHARED),
    "vmap of positions": linen_vmap(-2, -1, SHARED),
    "one for each position": linen_vmap(-2, -1, STACK),
    "scan": linen_scan,
    "experts": linen_experts,
    "cond": linen_cond,
    "one branch": linen_one_branch,
    "while": linen_while,
    "energy": linen_energy,
    "tangent": linen_tangent,
    **OWN_GRADIENTS,
    **{name: linen_mapped(change) for name, change in MAPPED.items()},
}


def nnx_scan(run, inner, x):
    axes = {"in_axes": (nnx.Carry, 0), "out_axes": nnx.Carry}
    return nnx.scan(lambda x, inner: run(inner, x), **axes)(x, inner)


def nnx_experts(run, inner, x):
    return nnx.vmap(run, in_axes=(0, None))(inner, x).sum(0)


def nnx_cond(run, inner, x):
    return nnx.cond(jnp.sum(x) > 0, run, lambda m, x: run(m, 2 * x), inner, x)


def nnx_one_branch(run, inner, x):
    return jax.lax.cond(jnp.sum(x) < 1e6, lambda: run(inner, x), lambda: x)


def nnx_while(run, inner, x):
    def body(state):
        return state[0] + 1, jnp.sin(run(inner, state[1]))

    return jax.lax.while_loop(lambda state: state[0] < 2, body, (0, x))[1]


def nnx_energy(run, inner, x):
    return jax.grad(lambda x: jnp.sum(jnp.sin(run(inner, x))))(x)


def nnx_tangent(run, inner, x):
    return jax.jvp(lambda x: run(inner, x), (x,), (jnp.cos(x),))[1]


NNX_LIFTS = {
    "remat": lambda run, inner, x: nnx.remat(run)(inner, x),
    "jit": lambda run, inner, x: nnx.jit(run)(inner, x),
    "scan": nnx_scan,
    "experts": nnx_experts,
    "cond": nnx_cond,
    "one branch": nnx_one_branch,
    "while": nnx_while,
    "energy": nnx_energy,
    "tangent": nnx_tangent,
}
"""The transformations of any block, which are right; Linen has `VMAPS` as well."""

VMAPS = "vmap", "vmap of positions", "one for each position"

CLOSURES = {"one branch", "while", "energy", "tangent"}
"""Those that are JAX's own, of functions that close over a module."""


# --- Layers ---


def layer(linen, twin, linen_args, twin_args, **shared):
    """A layer of classes of both APIs, with the settings that both have."""

    def settings(dtype):
        return {"param_dtype": dtype, **shared}

    return Layer(
        lambda dtype: linen(*linen_args, **settings(dtype)),
        lambda dtype, rngs: twin(*twin_args, rngs=rngs, **settings(dtype)),
    )


def dense(**settings):
    settings = {"kernel_init": normal, "bias_init": normal, **settings}
    return layer(nn.Dense, nnx.Linear, (WIDTH,), (WIDTH, WIDTH), **settings)


def general(ins, outs):
    settings = {"axis": tuple(range(-len(ins), 0)), "kernel_init": normal}
    return layer(nn.DenseGeneral, nnx.LinearGeneral, (outs,), (ins, outs), **settings)


def einsum():
    equation, shape = "...i,io->...o", (WIDTH, WIDTH)
    linen = functools.partial(nn.Einsum, use_bias=False)
    sizes = (shape, equation), (equation, shape)
    return layer(linen, nnx.Einsum, *sizes, kernel_init=normal)


def conv(**settings):
    settings = {"kernel_size": (3,), "kernel_init": normal, **settings}
    return layer(nn.Conv, nnx.Conv, (WIDTH,), (WIDTH, WIDTH), **settings)


def attention():
    twin = functools.partial(nnx.MultiHeadAttention, decode=False)
    settings = {"qkv_features": WIDTH, "kernel_init": normal}
    return layer(nn.MultiHeadDotProductAttention, twin, (2,), (2, WIDTH), **settings)


def embedding():
    sizes = VOCABULARY, WIDTH
    return layer(nn.Embed, nnx.Embed, sizes, sizes, embedding_init=normal)


def batch_norm():
    return layer(nn.BatchNorm, nnx.BatchNorm, (), (WIDTH,))


class Own(nn.Module):
    """A class of the user's own: (input, kernel, a vector) to its output."""

    compute: Callable[..., jax.Array]
    inputs: int
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        w = self.param("w", normal, (self.inputs, WIDTH), self.param_dtype)
        s = self.param("s", normal, (WIDTH,), self.param_dtype)
        return self.compute(x, w, s)


class OwnTwin(nnx.Module):
    """The same in NNX."""

    def __init__(self, compute, inputs, param_dtype, *, rngs):
        self.compute = compute
        self.w = nnx.Param(normal(rngs.params(), (inputs, WIDTH), param_dtype))
        self.s = nnx.Param(normal(rngs.params(), (WIDTH,), param_dtype))

    def __call__(self, x):
        return self.compute(x, self.w[...], self.s[...])


def registered(equation="...i,io->...o", scale=None):
    """Subclasses of both that have a rule of their own."""
    classes = type("OwnLayer", (Own,), {}), type("OwnLayer", (OwnTwin,), {})
    for cls in classes:
        register_layer(cls, equation=equation, kernel="w", scale=scale)
    return classes


def vector(layer):
    linen = isinstance(layer, nn.Module)
    return layer.get_variable("params", "s") if linen else layer.s[...]


RULES = {
    "no scale": registered(),
    "s": registered(scale="s"),
    "2 s": registered(scale=lambda layer: 2 * vector(layer)),
    "s of rows": registered(scale=lambda layer: vector(layer)[:, None]),
    "0.25": registered(scale=lambda layer: 0.25),
    "lookup": registered(Lookup()),
}


def own(compute, rule="no scale", inputs=WIDTH):
    """A layer of the user's own, and what is registered of its class."""
    return layer(*RULES[rule], (compute, inputs), (compute, inputs))


# --- Features ---


def of_first(c):
    return c.a(c.x)


def of_both(c):
    return c.b(jnp.sin(c.a(c.x)))


def biased(x, w, s):
    return x @ w + s


def masked_embedding(c):
    return c.x * jnp.where(c.ids[..., None] < VOCABULARY, c.a(c.ids), 1)


def tied_embedding(c):
    h = c.a(c.inside) + c.x
    return h * jnp.sum(jnp.sin(c.m.a.attend(h)), -1, keepdims=True)


SIMPLE: dict[str, tuple[Run, Mapping[str, Layer]]] = {
    "dense": (of_first, {"a": dense()}),
    "two dense": (of_both, {"a": dense(), "b": dense(use_bias=False)}),
    "dense twice": (lambda c: c.a(jnp.sin(c.a(c.x))), {"a": dense()}),
    "heads": (
        of_both,
        {"a": general((WIDTH,), (2, 4)), "b": general((2, 4), (WIDTH,))},
    ),
    "einsum": (of_first, {"a": einsum()}),
    "conv": (of_first, {"a": conv()}),
    "attention": (of_first, {"a": attention()}),
    "own": (of_first, {"a": own(biased)}),
    "embedding": (lambda c: c.x * c.a(c.inside), {"a": embedding()}),
    "masked embedding": (masked_embedding, {"a": embedding()}),
    "tied embedding": (tied_embedding, {"a": embedding()}),
}


def simple(draw, *names):
    """A block that anything can be done with."""
    name = draw.choice(names or [*SIMPLE])
    return Block(name, *SIMPLE[name], is_lookup="embedding" in name)


def plain():
    return Block("dense", *SIMPLE["dense"])


def indirect(draw):
    """A layer that is called by something other than its name."""
    dense_class = nn.Dense if draw.api == "linen" else nnx.Linear
    axis = draw.choice([0, -2])
    ways = {
        "a partial": lambda c: functools.partial(c.m.a)(c.x),
        "a bound method": lambda c: (lambda method: method(c.x))(c.m.a.__call__),
        "a keyword": lambda c: c.m.a(inputs=c.x),
        "a jitted closure": lambda c: jax.jit(lambda x: c.a(x))(c.x),
        f"a closure mapped over {axis}": lambda c: jax.vmap(
            lambda x: c.a(x), axis, axis
        )(c.x),
        "its class": lambda c: dense_class.__call__(c.m.a, c.x),
    }
    name = draw.choice([*ways])
    right = name != "its class"
    return Block(f"dense by {name}", ways[name], {"a": dense()}, right)


def held(draw):
    """A layer that the module calls by what it holds since it was made."""
    ways = {
        "a bound method": lambda m: m.a.__call__,
        "a partial": lambda m: functools.partial(m.a),
        "a closure": lambda m: lambda x, layer=m.a: layer(x),
    }
    name = draw.choice([*ways])

    def prepare(m):
        m.f = ways[name](m)

    run, text = (lambda c: c.m.f(c.x)), f"dense by {name} that it holds"
    return Block(text, run, {"a": dense()}, False, liftable=False, prepare=prepare)


def shared(draw):
    """A kernel or a bias that two layers of NNX hold."""
    name = draw.choice(["kernel", "bias"])

    def prepare(m):
        setattr(m.b, name, getattr(m.a, name))

    def run(c):
        return c.m.c(of_both(c))

    layers, fault = {"a": dense(), "b": dense(), "c": dense()}, "shared"
    text, right = f"three dense, two with one {name}", name == "bias"
    return Block(text, run, layers, right, fault, prepare=prepare)


def through(dtype):
    return lambda a: a.astype(dtype).astype(a.dtype)


LOSSY = {
    "int32": through(jnp.int32),
    "bool": through(jnp.bool_),
    "float8_e4m3fn": through(jnp.float8_e4m3fn),
    "float8_e5m2": through(jnp.float8_e5m2),
    "reduce_precision": lambda a: reduce_precision(a, 8, 3),
}
"""Conversions that lose more than a floating-point dtype of 16 bits does."""

FINE = {"float32": through(jnp.float32), "its own dtype": lambda a: a.astype(a.dtype)}
COARSE = {**FINE, "bfloat16": through(jnp.bfloat16), "float16": through(jnp.float16)}


def conversion(draw, lossy):
    """The name of a conversion, and a function of an array."""
    chosen = LOSSY if lossy else COARSE if draw.precision == "coarse" else FINE
    name = draw.choice([*chosen])
    return name, chosen[name]


def is_lossy(draw):
    # After products that are coarse, a step makes a difference of any size.
    return draw.precision != "coarse" and draw.random() < 0.7


def converted(draw):
    """An input, a kernel or a product through another dtype, in an own layer."""
    lossy = is_lossy(draw)
    name, change = conversion(draw, lossy)
    ways = {
        "input": lambda x, w, s: change(x) @ w + s,
        "kernel": lambda x, w, s: x @ change(w) + s,
        "product": lambda x, w, s: change(x @ w) + s,
    }
    place = draw.choice([*ways])
    fault = "conversions" if lossy else ""
    layers, text = {"a": own(ways[place])}, f"own, its {place} through {name}"
    return Block(text, of_first, layers, not lossy, fault, steps=lossy)


def promoted(draw):
    """A layer of Flax's, whose operands a function of the user's converts."""
    lossy = is_lossy(draw)
    name, change = conversion(draw, lossy)

    def product(x, w, *settings, **more):
        return multiply(change(x), change(w), *settings, **more)

    def product_of_input(x, w, *settings, **more):
        return multiply(change(x), w, *settings, **more)

    def promote(*arrays, **_):
        arrays = arrays[0] if isinstance(arrays[0], tuple) else arrays
        return [None if a is None else change(a) for a in arrays]

    kind, operation, multiply = draw.choice(
        [
            (dense, "dot_general", dot_general),
            (conv, "conv_general_dilated", conv_general_dilated),
        ]
    )
    ways = {
        "operands": {operation: product},
        "input": {operation: product_of_input},
        "operands, promoted": {"promote_dtype": promote},
    }
    where, fault = draw.choice([*ways]), "conversions" if lossy else ""
    text = f"{kind.__name__}, its {where} through {name}"
    layers = {"a": kind(**ways[where])}
    return Block(text, of_first, layers, False, fault, steps=lossy)


@jax.custom_vjp
def clipped(x):
    """The identity, whose gradient is halved and clipped."""
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(0.5 * g, -1, 1),))


@jax.custom_jvp
def straight(x):
    """Rounding that passes its gradient."""
    return jnp.round(4 * x) / 4


straight.defjvps(lambda dx, y, x: dx)


def activations(draw):
    """A change of the output of a layer, which is nobody's concern."""
    name, change = conversion(draw, lossy := is_lossy(draw))
    own_derivatives = {"clipping": clipped} | ({"straight": straight} if lossy else {})
    if draw.random() < 0.4:
        name = draw.choice([*own_derivatives])
        change = own_derivatives[name]
    run, text = (lambda c: c.a(c.x + jnp.sin(change(c.a(c.x))))), f"dense, then {name}"
    settings = {"steps": lossy, "reverse": change is clipped}
    return Block(text, run, {"a": dense()}, **settings)


def mixed(draw):
    """Layers that compute or store in another dtype than the model's."""
    coarse = [jnp.bfloat16, jnp.float16, jnp.float32]
    other = draw.choice(coarse) if draw.precision == "coarse" else jnp.float32
    names = draw.choice([["dtype"], ["param_dtype"], ["dtype", "param_dtype"]])
    cast = draw.random() < 0.5

    def run(c):
        x = c.x.astype(other) if cast else c.x
        return c.b(c.a(x)).astype(c.x.dtype)

    layers = {"a": dense(**dict.fromkeys(names, other)), "b": dense()}
    text = f"dense, {' and '.join(names)} {jnp.dtype(other).name}{', cast' * cast}"
    return Block(text, run, layers)


def one_slice(table, k):
    return jax.lax.dynamic_slice_in_dim(table, k, 1)[0]


def one_by_one(function, ids):
    """Under vmap for each axis of `ids`, however many those are."""
    return jnp.vectorize(function, signature="()->(n)")(ids)


LOOKUPS = {
    "t[ids]": lambda ids, t, s: t[ids],
    "take clip": lambda ids, t, s: jnp.take(t, ids, axis=0, mode="clip"),
    "take wrap": lambda ids, t, s: jnp.take(t, ids, axis=0, mode="wrap"),
    "take 0": lambda i, t, s: jnp.take(t, i, axis=0, mode="fill", fill_value=0),
    "one by one": lambda ids, t, s: one_by_one(lambda k: t[k], ids),
    "slices": lambda ids, t, s: one_by_one(lambda k: one_slice(t, k), ids),
    "get clip": lambda ids, t, s: t.at[ids].get(mode="clip"),
    "get 0": lambda ids, t, s: t.at[ids].get(mode="fill", fill_value=0),
    "get 1": lambda ids, t, s: t.at[ids].get(mode="fill", fill_value=1),
    "t[ids // 2]": lambda ids, t, s: t[ids // 2],
    "t[reversed ids]": lambda ids, t, s: t[ids[::-1]],
    "a clipped id": lambda ids, t, s: t[jnp.clip(ids, 0, VOCABULARY - 3)],
}


VIEWS = {
    "transposed twice": lambda x, w, s: x @ w.T.T,
    "by heads": lambda x, w, s: jnp.tensordot(x, w.reshape(WIDTH, 2, 4), 1),
    "in halves": lambda x, w, s: jnp.einsum("...hi,hio->...o", *halves(x, w)),
    "from the left": lambda x, w, s: (w.T @ x.mT).mT,
    "row by row": lambda x, w, s: jax.vmap(lambda x: x @ w)(x),
    "transposed": lambda x, w, s: x @ w.T,
    "reversed": lambda x, w, s: x @ w[::-1],
    "rolled": lambda x, w, s: x @ jnp.roll(w, 1, 1),
    "regrouped": lambda x, w, s: x @ regrouped(w),
    "of a permuted input": lambda x, w, s: x[..., jnp.arange(WIDTH)[::-1]] @ w,
    "of a regrouped input": lambda x, w, s: regrouped(x) @ w,
    "of a masked input": lambda x, w, s: jnp.where(x > 0, x, 0) @ w,
    "of a moved input": lambda x, w, s: jnp.roll(x, 1, 0) @ w,
    "with regrouped outputs": lambda x, w, s: regrouped(x @ w),
    "with reversed outputs": lambda x, w, s: (x @ w)[..., ::-1],
    "with moved outputs": lambda x, w, s: jnp.roll(x @ w, 1, 0),
    "with masked outputs": lambda x, w, s: jnp.where(s > 0, x @ w, 0),
    "in two sums": lambda x, w, s: x[..., :4] @ w[:4] + x[..., 4:] @ w[4:],
    "with its mean": lambda x, w, s: x @ w - jnp.mean(x @ w, -1, keepdims=True),
    "with a gate of x": lambda x, w, s: (x @ w) * x,
    "with a bias of x": lambda x, w, s: x @ w + jnp.cos(x),
}
"""Functions of input, kernel and vector; the first five are "...i,io->...o"."""


def halves(x, w):
    return x.reshape(*x.shape[:-1], 2, 4), w.reshape(2, 4, WIDTH)


def regrouped(x):
    """The features in another order, by reshapes and transposes alone."""
    x = x.reshape(*x.shape[:-1], 2, 4)
    return jnp.swapaxes(x, -1, -2).reshape(*x.shape[:-2], WIDTH)


def viewed(draw):
    """A product that moves the axes of what it multiplies, rightly or not."""
    name = draw.choice([*VIEWS])

    def compute(x, w, s):
        return VIEWS[name](x, w, s).reshape(x.shape)

    right = [*VIEWS].index(name) < 5
    return Block(f"own, {name}", of_first, {"a": own(compute)}, right)


def lookup(draw):
    """Rows of a table by index, within it and beyond."""
    name, kind = draw.choice([*LOOKUPS]), draw.choice([jnp.int32, jnp.int16, jnp.int8])
    beyond = draw.random() < 0.6
    layers = {"a": own(LOOKUPS[name], "lookup", VOCABULARY)}

    def run(c):
        return c.x * c.a((c.ids if beyond else c.inside).astype(kind))

    other_ids = name in ("t[ids // 2]", "t[reversed ids]", "a clipped id")
    where = " beyond the table" if beyond else ""
    fault = "lookups" if beyond or other_ids else ""
    # `t[ids]` clamps what is beyond the table, and its gradient drops it.
    no_gradient = beyond and name[:2] in ("t[", "on")
    settings = {"is_lookup": True, "no_gradient": no_gradient}
    right = not fault and name == "t[ids]"  # others need a `Lookup` that says more
    return Block(f"{name}{where}", run, layers, right, fault, **settings)


SCALED = {
    "as s says": ("s", lambda x, w, s: x @ (w * s)),
    "after the product": ("s", lambda x, w, s: (x @ w) * s),
    "by a number": ("0.25", lambda x, w, s: x @ (w * 0.25)),
    "by rows": ("s of rows", lambda x, w, s: x @ (w * s[:, None])),
    "by half of what is said": ("2 s", lambda x, w, s: x @ (w * s)),
    "by more than is said": ("s", lambda x, w, s: x @ (w * s * 1.5)),
    "by columns, not rows": ("s of rows", lambda x, w, s: x @ (w * s)),
    "by rows, not columns": ("s", lambda x, w, s: x @ (w * s[:, None])),
    "by another number": ("0.25", lambda x, w, s: x @ (w * 0.5)),
    "by another vector": ("s", lambda x, w, s: x @ (w * jnp.cos(s))),
}


def scaled(draw):
    """A layer that scales its kernel, as `register_layer(scale=)` says or not."""
    name = draw.choice([*SCALED])
    rule, compute = SCALED[name]
    place = [*SCALED].index(name)
    right = place < 3  # a trace may not know what a function returns
    fault, layers = "" if place < 4 else "scales", {"a": own(compute, rule)}
    return Block(f"own, scaled {name}", of_first, layers, right, fault)


COMPLEX = {
    "its kernel": lambda x, w, s: (x @ (w * (2 + 1j))).real,
    "its product": lambda x, w, s: ((x @ w) / (2 + 1j)).real,
    "parts of it": lambda x, w, s: (x @ jax.lax.complex(w, w.T)).imag,
    "a phase": lambda x, w, s: x * jnp.exp(1j * w[0]).real,
}


def by_complex_numbers(draw):
    """A layer that computes in complex numbers, of a class with a rule or without."""
    name, is_known = draw.choice([*COMPLEX]), draw.random() < 0.5
    settings = COMPLEX[name], WIDTH
    second = own(*settings[:1]) if is_known else layer(Own, OwnTwin, settings, settings)
    text = f"dense and {'' if is_known else 'un'}known, {name} by complex numbers"
    right = not is_known and name != "its product"  # which is of a real kernel
    return Block(text, of_both, {"a": dense(), "b": second}, right, "complex")


def elsewhere(draw):
    """A kernel that the model reads outside of its layer."""
    ways: dict[str, Run] = {
        "its array": lambda c: c.a(c.x) + c.x @ c.kernel(),
        "its transpose": lambda c: c.a(c.x) @ c.kernel().T,
        "its norm": lambda c: c.a(c.x) * jnp.sum(c.kernel() ** 2),
        "its first row": lambda c: c.a(c.x) + c.kernel()[0],
    }
    name = draw.choice([*ways, "a tied head"])
    if name in ways:
        return Block(f"dense and {name}", ways[name], {"a": dense()}, False)

    def run(c):
        logits = (c.a(c.inside) + c.x) @ c.kernel("embedding").T
        return jnp.sin(logits)[..., :WIDTH]

    return Block(f"embedding and {name}", run, {"a": embedding()}, False)


def another_call(draw):
    """A kernel that the model reads elsewhere in some calls, and not in others."""
    ways = {
        "its array": lambda c: c.x @ c.kernel(),
        "its norm": lambda c: c.x * jnp.mean(c.kernel() ** 2),
    }
    name, mode = draw.choice([*ways]), draw.choice(["train", "other", "mutable"])

    def sown(c):
        y = c.a(c.x)
        c.m.sow("losses", "norm", jnp.sum(c.kernel() ** 2))
        return y

    def run(c):
        y = c.a(c.x)
        return y + ways[name](c) if c.mode == mode else y

    if mode == "mutable" and draw.api == "linen":
        run, name = sown, "its norm sown"
    mode = "train" if mode == "mutable" and draw.api == "nnx" else mode
    text = f"dense, if {mode} and {name}"
    return Block(text, run, {"a": dense()}, False, "calls", calls=(mode,))


def right_calls(draw):
    """Calls that do different things, all of them right."""
    ways: dict[str, Run] = {
        "scaled": lambda c: c.a(c.x * (0.9 if c.mode == "train" else 1.0)),
        "one or the other": lambda c: (c.a if c.mode == "eval" else c.b)(c.x),
        "one or both": lambda c: (of_both if c.mode == "train" else of_first)(c),
    }
    name, calls = draw.choice([*ways]), draw.choice([("train",), ("train", "other")])

    def run(c):
        if c.linen and c.m.is_initializing() and not right:
            return of_both(c)  # makes all parameters
        return ways[name](c)

    # A kernel that the first call does not use is left out.
    layers, right = {"a": dense(), "b": dense()}, name == "scaled"
    if right:
        del layers["b"]
    return Block(f"dense by mode: {name}", run, layers, right, calls=calls)


def statistics(draw):
    """A state that some calls update."""

    def run(c):
        frozen = c.mode != "train"
        if c.linen:
            frozen = frozen or not c.m.is_mutable_collection("batch_stats")
        return c.m.norm(c.a(c.x), use_running_average=frozen)

    layers = {"a": dense(), "norm": batch_norm()}
    calls = ("train mutable",) if draw.api == "linen" else ("train",)
    return Block("dense, normalised", run, layers, calls=calls, liftable=False)


def mapped(draw):
    """Parameters that `nn.map_variables` changes before a block reads them."""
    block = simple(draw, "dense", "two dense", "own", "heads")
    lift = draw.choice([*MAPPED])
    right, fault = lift == "mapped to itself", "map_variables"
    if lift in ("mapped to itself", "halved"):
        fault = ""
    return dataclasses.replace(block, lifts=(lift,), right=right, fault=fault)


def itself(draw):
    """Code that looks at its own parts, and would see that they are adapted."""

    def arrays(c, *filters):
        params = c.m.variables["params"] if c.linen else nnx.state(c.m, *filters)
        return jax.tree.leaves(params)

    def size(c):
        y = c.a(c.x)
        return y * sum(a.size for a in arrays(c, *[nnx.Param] * (not c.linen))) / 100

    kinds = nnx.Linear, nn.Dense
    ways: dict[str, Run] = {
        "the number of its arrays": lambda c: c.a(c.x) * len(arrays(c)) / 2,
        "the size of its arrays": size,
        "the type of its layer": lambda c: c.a(c.x) if type(c.m.a) in kinds else c.x,
        "an instance check": lambda c: c.a(c.x) if isinstance(c.m.a, kinds) else c.x,
        "its attributes": lambda c: c.a(c.x) * len(vars(c.m.a)) / 8,
    }
    seen_in_linen = [*ways][:2]
    name = draw.choice(seen_in_linen if draw.api == "linen" else [*ways])
    right = name == "an instance check"
    fault = "" if right else "itself"
    return Block(f"dense by {name}", ways[name], {"a": dense()}, right, fault)


DERIVATIVES = {
    "half of dx": lambda dx, dw: (0.5 * dx, dw),
    "half of dw": lambda dx, dw: (dx, 0.5 * dw),
    "signs of dw": lambda dx, dw: (dx, jnp.sign(dw)),
    "both": lambda dx, dw: (dx, dw),
}


def derivative(draw):
    """A product with a derivative of the user's own."""
    name = draw.choice([*DERIVATIVES, "half of dx, forward"])

    def product(x, w, numbers, **_):
        def multiply(x, w):
            return dot_general(x, w, numbers)

        def backward(values, gradient):
            return DERIVATIVES[name](*jax.vjp(multiply, *values)[1](gradient))

        if name in DERIVATIVES:
            function = jax.custom_vjp(multiply)
            function.defvjp(lambda x, w: (multiply(x, w), (x, w)), backward)
        else:
            function = jax.custom_jvp(multiply)
            function.defjvps(
                lambda dx, y, x, w: multiply(0.5 * dx, w),
                lambda dw, y, x, w: multiply(x, dw),
            )
        return function(x, w)

    def compute(x, w, s):
        return product(x, w, (((x.ndim - 1,), (0,)), ((), ()))) + s

    kind = draw.choice(["dense", "own"])
    second = dense(dot_general=product) if kind == "dense" else own(compute)
    fault, reverse = "" if name == "both" else "derivatives", name in DERIVATIVES
    text = f"{kind} with a derivative of its own: {name}"
    layers = {"a": dense(), "b": second}
    return Block(text, of_both, layers, False, fault, reverse=reverse)


def lifted_derivative(draw):
    """`nn.custom_vjp` around a block, which changes its gradients."""
    block = simple(draw, "dense", "two dense", "heads")
    lift = draw.choice([*OWN_GRADIENTS])
    fault = "" if lift == "half of dx" else "derivatives"
    settings = {"right": False, "fault": fault, "reverse": True}
    return dataclasses.replace(block, lifts=(lift,), **settings)


RUNNING = ("pure_callback", "pallas_call", "custom_vmap_call", "custom_linear_solve")
RUNNING += ("swap", "addupdate")
"""Ways of `deciding.HIDDEN` and `deciding.MEMORY` that compute the same each time.

JAX takes no gradient through a mutable array that a branch or a loop writes to.
"""


def deciding(draw):
    """Numbers that decide: those of a kernel or of a product, or of an output."""
    ways = {**CONTROL, **CHOICES, **{name: WAYS[name] for name in RUNNING}}
    coarse = draw.precision == "coarse"  # where rounding would move a step
    name = draw.choice([*CONTROL] if coarse else [*ways])
    place = draw.choice(["kernel outside", "kernel", "product", "input", "output"])

    def decided(a, x):
        return ways[name](stop_gradient(a), stop_gradient(x)).astype(x.dtype)

    def of_kernel(c):
        return c.a(c.x) + decided(c.kernel(), c.x)

    def of_output(c):
        return c.a(c.x) + decided(c.a(c.x), c.x)

    def compute(x, w, s):
        y = x @ w
        return y + decided({"kernel": w, "product": y, "input": x}[place], x)

    runs = {"kernel outside": of_kernel, "output": of_output}
    layers = {"a": dense() if place in runs else own(compute)}
    settings = {"steps": True, "liftable": name in CONTROL}
    right = place in ("input", "output")
    run = runs.get(place, of_first)
    return Block(f"by {name} of its {place}", run, layers, right, **settings)


FEATURES = {
    simple: 6,
    deciding: 4,
    converted: 4,
    lookup: 3,
    scaled: 3,
    another_call: 3,
    by_complex_numbers: 2,
    mapped: 3,
    viewed: 3,
    elsewhere: 2,
    itself: 2,
    derivative: 2,
    indirect: 2,
    activations: 2,
    mixed: 2,
    promoted: 1,
    held: 1,
    right_calls: 1,
    shared: 1,
    statistics: 1,
    lifted_derivative: 1,
}
"""{function that draws a block: how often it is drawn}."""

NOT_IN = {"nnx": (mapped, lifted_derivative), "linen": (shared,)}


class Draw(Random):
    """Random choices for a model of an API and a precision."""

    api: str
    precision: str


def draw_model(
    seed: int, without: frozenset[str] = frozenset(), most: int = 3
) -> RandomModel:
    """The model of a seed, of as many blocks as `most`.

    Blocks with a fault in `without` are dense layers instead.
    """
    draw = Draw(seed)
    draw.api = draw.choice(["linen", "nnx"])
    draw.precision = draw.choice(["float64"] * 6 + ["float32"] * 2 + ["coarse"] * 2)
    features = [f for f in FEATURES if f not in NOT_IN[draw.api]]
    weights = [FEATURES[feature] for feature in features]
    count = min(draw.choice([1, 1, 2, 2, 3]), most)
    chosen = draw.choices(features, weights, k=count)
    blocks = [_lifted(draw, feature(draw)) for feature in chosen]
    blocks = [plain() if block.fault in without else block for block in blocks]
    if any(block.reverse for block in blocks):  # there is none through a loop
        blocks = [without_loop(block) for block in blocks]
    last = "other" if draw.api == "linen" else "eval"  # `nnx.plan` traces `__call__`
    first = draw.choice(["eval", "eval", "train", last])
    more = draw.choices(["eval", "train", "other"], k=draw.choice([0, 0, 1]))
    calls = dict.fromkeys([first, *(c for b in blocks for c in b.calls), *more])
    settings = {
        "operator": draw.choice(["rotation", "rotation", "sharing", "truncation"]),
        "execution": draw.choice(["auto", "auto", "activation", "fold"]),
    }
    planned, blocks = draw.random() < 0.3 and len(calls) > 1, tuple(blocks)
    parts = draw.api, draw.precision, blocks, tuple(calls), planned, settings
    return RandomModel(seed, *parts, draw.choice([*SWITCHES]))


def without_loop(block: Block) -> Block:
    """The block without a loop of unknown length."""
    lifts = tuple(lift for lift in block.lifts if lift != "while")
    return dataclasses.replace(block, lifts=lifts)


def _lifted(draw: Draw, block: Block) -> Block:
    lifts = [*NNX_LIFTS, *([draw.choice(VMAPS)] if draw.api == "linen" else [])]
    outer = draw.sample(lifts, draw.choice([0, 0, 0, 1, 1, 2]))
    derived = {"energy", "tangent"} & {*outer}
    if block.steps or block.reverse or "while" in outer or len(derived) > 1:
        outer = [lift for lift in outer if lift not in derived]
    if "mutable" in block.calls:  # Flax wants of both branches what one of them sows
        outer = [lift for lift in outer if lift != "one branch"]
    if not block.liftable:
        return block
    if draw.api == "nnx" and {*outer[:1]} & CLOSURES:
        outer = outer[:1]  # NNX's own transformations do not run in JAX's
    # These are right, and refused: a lookup in many tables, one for each expert; the
    # derivative of a branch; and a branch under vmap, which selects its operands.
    branches = {"cond", "one branch"} & {*outer}
    unknown = block.is_lookup and bool({"experts", VMAPS[2]} & {*outer})
    unknown |= bool(branches and {*VMAPS, *derived} & {*outer})
    right = block.right and not unknown
    return dataclasses.replace(block, lifts=(*outer, *block.lifts), right=right)
