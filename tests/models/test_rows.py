"""Rows with adapters of their own: a program keeps them in order, or is refused."""

from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import slow
from flax import nnx
from helpers import random, random_like
from programs import plan_of, shapes_of
from twins import TWINS

import mora_jax
from mora_jax import MoRAConfig, linen, serving
from mora_jax import nnx as mora
from mora_jax._trace_check import follow, row_faults

ROWS, TIME, WIDTH = 4, 6, 8
ORDER = np.array([2, 0, 3, 1])
CONFIG = MoRAConfig(square_rank=2, operator="sharing", targets=".*(kernel|embedding)")
X, KEY = random(0, ROWS, TIME, WIDTH), jax.random.key(0)


def faults_of(make_plan, rows=ROWS, states=0):
    """The faults of rows in the call that a plan traces, after so many states."""
    traced = []

    def record(jaxpr, names, *others):
        traced.append((jaxpr, names))
        return follow(jaxpr, names, *others)

    with mock.patch("mora_jax._flax.survey.follow", record):
        plan = make_plan()
    ((jaxpr, names),) = traced
    batched = [False] * len(names) + [None] * states
    batched += [True] * (len(jaxpr.invars) - len(batched))
    return row_faults(jaxpr, rows, batched, list(plan))


def faults_in(model, *args, variables=None, states=0, **settings):
    if variables is None:
        variables = jax.eval_shape(model.init, KEY, *args)

    def make_plan():
        return linen.plan(model, variables, CONFIG, *args, **settings)

    return faults_of(make_plan, args[0].shape[0], states)


class Between(nn.Module):
    """A function of a batch, before a layer and behind another one."""

    function: object

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="last")(self.function(nn.Dense(WIDTH)(x)))


# --- What keeps rows, and what does not ---


def place(x):
    """A place in time for each row."""
    return (x[..., 0] > 0).argmax(1)


def through_heads(x):
    """Attention with its heads joined to the batch."""
    h = x.reshape(ROWS, TIME, 2, 4).swapaxes(1, 2).reshape(2 * ROWS, TIME, 4)
    h = nn.softmax(h @ h.swapaxes(1, 2)) @ h
    return h.reshape(ROWS, 2, TIME, 4).swapaxes(1, 2).reshape(x.shape)


def experts(x):
    """Each row's tokens in slots of three experts, and back again."""
    best = jax.nn.one_hot(x[..., :3].argmax(-1), 3)
    slots = jax.nn.one_hot((jnp.cumsum(best, 1) * best).astype(int), 5)
    y = jnp.tanh(jnp.einsum("btes,btd->ebsd", slots, x))
    return jnp.einsum("ebsd,btes->btd", y, slots)


def turned(x):
    """Rotary positions, by arrays that no row has."""
    angle = jnp.arange(TIME)[:, None] * jnp.arange(4.0)
    left, right = jnp.split(x, 2, -1)
    both = left * jnp.cos(angle) - right, right * jnp.sin(angle) + left
    return jnp.stack(both, -1).reshape(x.shape)


def write(row, k):
    return jax.lax.dynamic_update_slice(row, row[:1], (k, 0))


KEPT = {
    "itself": lambda x: nn.gelu(x) / (1 + x.std(-1, keepdims=True)),
    "heads": through_heads,
    "time-major and back": lambda x: jnp.cumsum(x.swapaxes(0, 1), 0).swapaxes(0, 1),
    "tokens": lambda x: jnp.tanh(x.reshape(-1, WIDTH)).reshape(x.shape),
    "patches": lambda x: x.reshape(ROWS, 3, 2, 8).swapaxes(1, 2).reshape(ROWS, -1),
    "other sizes": lambda x: x.reshape(ROWS, -1).reshape(ROWS, 16, 3),
    "last token": lambda x: x[jnp.arange(ROWS), place(x)],
    "its token": lambda x: jnp.take_along_axis(x, place(x)[:, None, None], 1),
    "mapped token": lambda x: jax.vmap(lambda row, k: row[k])(x, place(x)),
    "a write": lambda x: x.at[jnp.arange(ROWS), place(x)].set(x[:, 0]),
    "a mapped write": lambda x: jax.vmap(write)(x, place(x)),
    "a write for all": lambda x: x.at[:, 2].add(x[:, 0])[:, ::-1],
    "a cache": lambda x: jax.lax.dynamic_update_slice(
        jnp.zeros((ROWS, 9, WIDTH)), x, (0, 2, 0)
    ),
    "columns": lambda x: jnp.moveaxis(
        X[0].T[:, place(x)[:, None] + jnp.arange(2)], 0, 2
    ),
    "other axes": lambda x: jnp.roll(jnp.sort(x, -1)[..., jnp.argsort(X[0, 0])], 1, 1),
    "windows": lambda x: nn.avg_pool(nn.max_pool(x, (2,)), (2,), padding="SAME"),
    "spectrum": lambda x: jnp.fft.fft2(x).real,
    "scores": lambda x: jnp.einsum("btd,bsd->bts", x, x),
    "best": lambda x: jax.lax.top_k(jnp.pad(x, ((0, 0), (1, 0), (0, 0))), 3)[0],
    "experts": experts,
    "turned": turned,
    "a first token": lambda x: jnp.concatenate([jnp.zeros((ROWS, 1, WIDTH)), x], 1),
    "statistics": lambda x: (x - x.mean((0, 1))) / jnp.abs(x).max(),
    "a branch": lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
    "until all are done": lambda x: jax.lax.while_loop(
        lambda x: jnp.any(x < 9), lambda x: x + 1, x
    ),
    "scan": lambda x: jax.lax.associative_scan(jnp.add, x, axis=1),
    "gradient": jax.grad(lambda x: jnp.sum(jnp.sin(jax.checkpoint(jnp.sin)(x)))),
}
LOST = {
    "reversed": (lambda x: x[::-1], "rev"),
    "permuted": (lambda x: x[ORDER], "gather"),
    "taken": (lambda x: jnp.take(x, (jnp.arange(ROWS) + 1) % ROWS, 0), "gather"),
    "chosen": (lambda x: x[jnp.where(ORDER > 1, 0, jnp.arange(ROWS)), 0], "gather"),
    "sorted": (lambda x: jnp.sort(x, 0), "sort"),
    "by a key": (lambda x: x[jnp.argsort(x[:, 0, 0])], "gather"),
    "rolled": (lambda x: x + jnp.roll(x, 1, 0), "slice"),
    "padded": (lambda x: jax.lax.pad(x, 0.0, [(1, -1, 0), *[(0, 0, 0)] * 2]), "pad"),
    "a product": (lambda x: jnp.einsum("ab,btd->atd", jnp.eye(4)[ORDER], x), "dot_gen"),
    "tokens by a product": (
        lambda x: x + (random(1, 24, 24) @ x.reshape(-1, 8)).reshape(x.shape),
        "dot_general",
    ),
    "a sum": (lambda x: x + (x * X[:, 0, :4, None, None]).sum(1), "broadcast|reduce"),
    "a scatter": (lambda x: jnp.zeros_like(x).at[ORDER].set(x), "scatter"),
    "sorted tokens": (
        lambda x: x.reshape(-1, 8)[jnp.argsort(x[..., 0].ravel())].reshape(x.shape),
        "gather",
    ),
    "in pairs": (lambda x: x.reshape(2, 2, TIME, 8)[::-1].reshape(x.shape), "reshape"),
    "the first": (lambda x: jnp.broadcast_to(x[:1], x.shape), "slice"),
    "a loop": (lambda x: jax.lax.fori_loop(0, 3, lambda _, x: x[::-1], x), "rev"),
    "in a branch": (
        lambda x: jax.lax.cond(x.sum() < 999, lambda x: x[::-1], abs, x),
        "rev",
    ),
    "sums": (lambda x: jnp.cumsum(x, 0), "cumsum"),
    "the host": (lambda x: jax.pure_callback(lambda x: x[::-1], x, x), "pure_callback"),
}
UNPROVEN = {
    "row by row": (lambda x: jax.lax.map(jnp.sin, x), "scan"),
    "sorted and back": (
        lambda x: x[jnp.argsort(x[:, 0, 0])][jnp.argsort(jnp.argsort(x[:, 0, 0]))],
        "gather",
    ),
}


def is_in_order(function):
    """True if the rows of the output are in the order of the rows of the input."""
    other = np.array([1, 2, 0, 3])
    one, two = jax.jit(lambda x: (function(x[other]), function(x)[other]))(X)
    return np.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("name", KEPT)
def test_rows_that_are_kept(name):
    assert is_in_order(KEPT[name])
    assert faults_in(Between(KEPT[name]), X) == {}


@pytest.mark.parametrize("name", [*LOST, *UNPROVEN])
def test_rows_that_are_lost(name):
    function, primitive = (LOST | UNPROVEN)[name]
    assert is_in_order(function) == (name in UNPROVEN)
    faults = faults_in(Between(function), X)
    assert list(faults) == ["last/kernel"]
    fault = faults["last/kernel"]
    assert fault.startswith("Dense.__call__ gets rows of the batch mixed or in another")
    assert primitive.split("|")[0] in fault or primitive.split("|")[-1] in fault


# --- Models ---


class Recurrent(nn.Module):
    """A recurrent layer; `time_major` where it takes the batch for time."""

    time_major: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.GRUCell(WIDTH), time_major=self.time_major)(x)
        return nn.Bidirectional(nn.RNN(nn.LSTMCell(4)), nn.RNN(nn.LSTMCell(4)))(x)


class Latents(nn.Module):
    """Queries of the model's own, a copy for each row, that look at the input."""

    @nn.compact
    def __call__(self, x):
        own = self.param("own", nn.initializers.normal(), (5, WIDTH))
        own = nn.Dense(WIDTH)(jnp.broadcast_to(own, (len(x), *own.shape)))
        return nn.Dense(2)(nn.MultiHeadDotProductAttention(2)(own, x))


class Positions(nn.Module):
    """Positions go through a layer of their own, or (None) only to the input."""

    layer: type[nn.Module] | None = None

    @nn.compact
    def __call__(self, x):
        places = self.param("places", nn.initializers.normal(), x.shape[1:])
        x = x + (self.layer(WIDTH, name="own")(places) if self.layer else places)
        mask = nn.make_causal_mask(x[..., 0])
        return nn.MultiHeadDotProductAttention(2)(x, mask=mask)


class Swapped(nn.Module):
    """A layer that gets time first."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH)(x.swapaxes(0, 1)).swapaxes(0, 1)


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.MultiHeadDotProductAttention(2, decode=True)(x), None


SQUARE = random(0, ROWS, ROWS, WIDTH)
"""As many moments as rows."""


@pytest.mark.parametrize("x", [X, SQUARE], ids=["batch", "square"])
@pytest.mark.parametrize("model", [Recurrent(), Latents(), Positions()], ids=type)
def test_models_that_keep_rows(model, x):
    assert faults_in(model, x) == {}


@pytest.mark.parametrize(
    ("model", "kernel", "fault"),
    [
        (Swapped(), "Dense_0/kernel", "on axis 1 of its input, and not on axis 0"),
        (Positions(nn.Dense), "own/kernel", "on no axis, though one has their number"),
        (Positions(nn.jit(nn.Dense)), "own/kernel", "on no axis, though one has their"),
        (Recurrent(True), "GRUCell_0/in/kernel", "in another order, by `scan`"),
    ],
    ids=["swapped", "positions", "jitted positions", "recurrent"],
)
def test_another_axis_of_the_same_length(model, kernel, fault):
    assert fault in faults_in(model, SQUARE)[kernel]


@pytest.mark.parametrize("layers", [3, ROWS])
@pytest.mark.parametrize("size", [TIME, ROWS])
def test_caches_of_stacked_layers(layers, size):
    """Any axis of a cache may be that of the rows."""
    stack = {"variable_axes": {"params": 0, "cache": 0}, "split_rngs": {"params": True}}
    model = nn.scan(Decoder, **stack, length=layers)()
    shape = jax.ShapeDtypeStruct((ROWS, size, WIDTH), np.float32)
    variables = jax.eval_shape(model.init, KEY, shape)
    states = len(jax.tree.leaves(variables["cache"]))
    one = jax.ShapeDtypeStruct((ROWS, 1, WIDTH), np.float32)
    rest = {"variables": variables, "states": states, "mutable": ["cache"]}
    assert faults_in(model, one, None, **rest) == {}


def test_an_old_key_is_no_row():
    """It has two numbers, as a batch of two rows has."""
    model, x = nn.Sequential([nn.Dropout(0.5, deterministic=False), nn.Dense(3)]), X[:2]
    rngs = {"dropout": jax.random.PRNGKey(0)}
    variables = jax.eval_shape(model.init, {"params": KEY, **rngs}, x)
    assert faults_in(model, x, variables=variables, rngs=rngs) == {}


def test_a_cache_in_another_order():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            memory = self.variable("cache", "memory", jnp.zeros, x.shape).value
            return nn.Dense(WIDTH)(x + memory[ORDER])

    variables = jax.eval_shape(Model().init, KEY, X)
    faults = faults_in(Model(), X, variables=variables, states=1)
    assert "in another order, by `gather`" in faults["Dense_0/kernel"]


@pytest.mark.parametrize(
    ("name", "api"),
    [
        ("scan-remat", "nnx"),
        ("experts", "linen"),
        *(
            slow(name, api)
            for name, twin in TWINS.items()
            for api in ("linen", "nnx")
            if getattr(twin, api)
        ),
    ],
)
def test_models_under_test_keep_rows(name, api):
    """Those that `serving.select` can serve, and others say themselves why not."""
    twin = TWINS[name]
    model, variables, _ = shapes_of(twin, api)
    rows = twin.x.shape[0] if twin.x.ndim else 1
    assert faults_of(lambda: plan_of(model, variables, twin, twin.x), rows) == {}


class BetweenNNX(nnx.Module):
    """The twin of `Between`."""

    def __init__(self, function):
        self.function, rngs = function, nnx.Rngs(0)
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.last = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.function(self.first(x)))


def caller(api, function):
    """A function of adapters and a batch, and the plan of the adapters."""
    x = jnp.zeros((ROWS, ROWS, WIDTH))
    if api == "nnx":
        model = BetweenNNX(function)
        plan = mora.plan(model, CONFIG, x)
        adapted = mora.wrap(model, plan)

        def call(adapters, x):
            mora.set_adapters(adapted, adapters)
            return adapted(x)

        return call, plan
    model = Between(function)
    variables = model.init(KEY, x)
    apply = linen.wrap(model, CONFIG, variables, x)
    return lambda adapters, x: apply(adapters, variables, x), apply.plan


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda x: x[::-1], "mixed or in another order, by `rev`"),
        (lambda x: x[ORDER], "mixed or in another order, by `gather`"),
        (lambda x: jnp.sort(x, 0), "mixed or in another order, by `sort`"),
        (lambda x: x.swapaxes(0, 1), "on axis 1 of its input, and not on axis 0"),
        (jnp.tanh, ""),
    ],
)
def test_a_call_with_an_adapter_for_each_row_is_refused_or_right(api, function, told):
    """As many moments as rows, so that no shape tells; and one adapter is right."""
    call, plan = caller(api, function)
    adapters = [random_like(mora_jax.init(plan), 0.3) for _ in range(3)]
    index, x = np.array([2, 0, -1, 1]), random(1, ROWS, ROWS, WIDTH)
    rows = serving.select(serving.stack(adapters), index)
    alone = [call(a, x) for a in (*adapters, jax.tree.map(jnp.zeros_like, adapters[0]))]
    if told:
        with pytest.raises(ValueError, match=rf"last/kernel: .*{told}.* another's"):
            call(rows, x)
    else:
        expected = jnp.stack([alone[k][row] for row, k in enumerate(index)])
        np.testing.assert_allclose(call(rows, x), expected, 1e-5, 1e-5)
