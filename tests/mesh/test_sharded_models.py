"""Whole models on a mesh: scanned layers, heads, experts; Linen and NNX."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_files import made, slow
from flax import nnx
from flax.linen.spmd import logical_to_mesh_sharding
from helpers import random, random_like
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import assert_close, assert_shardings, put, sent, shardings, sums_of_m

import mora_jax
from models import llama
from mora_jax import MoRAConfig, linen, register_layer, sharding
from mora_jax.nnx import MoRAParam, set_adapters, wrap
from mora_jax.operators import OPERATORS
from mora_jax.products import Lookup

MESH = llama.make_mesh(2, 2, 2)
BATCH = NamedSharding(MESH, P(llama.BATCH_AXES))
KEY = jax.random.key(0)
X = random(0, 8, 3, 16)
SHAPE = llama.Shape(2, 48, 96, heads=4, kv_heads=2, vocabulary=32, head_width=16)
TOKENS = np.random.default_rng(0).integers(32, size=(8, 6), dtype=np.int32)


def without_table(params):
    """The embeddings, whose gradient is the layers' by their inputs, and the rest."""
    return params["embed_tokens"], {k: params[k] for k in params if k != "embed_tokens"}


def llama_program(apply, arrays):
    """The loss, and its gradients by adapters and embeddings."""

    def loss(adapters, table, params, tokens):
        variables = {"params": {**params, "embed_tokens": table}}
        return jnp.mean(apply(adapters, variables, tokens) ** 2)

    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays).compile()


RUNS = [slow(name, "auto") for name in OPERATORS]
RUNS += [slow("sharing", "fold"), slow("rotation", "fold")]


@pytest.mark.parametrize(("operator", "execution"), RUNS)
def test_a_llama_learns_as_on_one_device(operator, execution):
    """With FSDP, tensor parallelism and remat; only M's gradient is sent.

    A gradient is where its M is, so that no step is compiled again.
    """
    alone, split = (llama.Llama(SHAPE, mesh, jnp.float32) for mesh in (None, MESH))
    boxed = jax.eval_shape(alone.init, KEY, TOKENS)
    config = MoRAConfig(square_rank=24, operator=operator, execution=execution)
    plan = linen.plan(alone, boxed, config, TOKENS)
    assert len(plan) == 7
    params = random_like(nn.unbox(boxed)["params"])
    arrays = made(plan, scale=1 / 8), *without_table(params), TOKENS
    expected = llama_program(linen.wrap(alone, plan), arrays)(*arrays)
    names = nn.get_partition_spec(boxed)["params"]
    places = logical_to_mesh_sharding(names, MESH, llama.RULES)
    laid = sharding.on_mesh(plan, places, batch_axes=llama.BATCH_AXES)
    adapter_places = sharding.adapter_shardings(laid, places)
    arrays = made(laid, scale=1 / 8), *arrays[1:]
    arrays = jax.device_put(arrays, (adapter_places, *without_table(places), BATCH))
    adapted = llama_program(linen.wrap(split, plan), arrays)
    got = adapted(*arrays)
    assert_close(got, expected)
    assert_shardings(got[1][0], adapter_places)
    if execution == "auto":
        base = llama_program(lambda _, *args: split.apply(*args), arrays)
        found = set(sent(adapted) - sent(base))
        assert found and found <= set().union(
            *(sums_of_m(spec.operator) for spec in plan.values())
        )


def on_mesh(arrays, params, batch_axes="data"):
    """Arguments of a program, whose first one are adapters that know the mesh."""
    adapters, *others = arrays
    where = {"batch_axes": batch_axes, "mesh": MESH}
    return sharding.on_mesh(adapters, params, **where), *others


def drawn(key, shape, dtype, **settings):
    """An initialiser that compiles nothing."""
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape) / 4, dtype)


class Others(nn.Module):
    """Layers that are no plain product: an embedding, its tied head, heads, experts."""

    vocabulary: tuple = ("model", None)
    heads: tuple = (None, "model", None)

    @nn.compact
    def __call__(self, ids):
        def init(*axes):
            return nn.with_partitioning(drawn, axes)

        table = nn.Embed(12, 16, embedding_init=init(*self.vocabulary), name="table")
        x = table(ids)
        up, down = init(*self.heads), init("model", None, None)
        x = nn.Einsum((16, 4, 6), "btd,dhk->bthk", kernel_init=up, name="up")(x)
        x = nn.Einsum((4, 6, 16), "bthk,hkd->btd", kernel_init=down, name="down")(x)
        experts = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=None,
            axis_size=2,
            metadata_params={nn.PARTITION_NAME: "fsdp"},
        )
        x = experts(16, kernel_init=init(None, "model"), name="experts")(x).mean(0)
        return table.attend(x)


IN_HEADS = {"vocabulary": (None, "model"), "heads": ("model", None, None)}
NO_RUN = {"heads": (None, None, "model")}
"""Its features are in no run on a device: left to XLA."""


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["rotation", slow("sharing")])
@pytest.mark.parametrize("names", [{}, slow(IN_HEADS), slow(NO_RUN)])
@pytest.mark.parametrize("dropout", [0.0, slow(0.25)])
def test_other_layers_learn_as_on_one_device(operator, names, dropout):
    model, ids = Others(**names), np.arange(24).reshape(4, 6) % 12
    boxed = jax.eval_shape(model.init, KEY, ids)
    targets = ".*/(kernel|embedding)"
    config = MoRAConfig(
        square_rank=6, operator=operator, dropout=dropout, targets=targets
    )
    plan = linen.plan(model, boxed, config, ids)
    assert [spec.axes for spec in plan.values()] == ["iio", "sio", "io", "ioo"]

    apply = linen.wrap(model, plan)

    def loss_and_gradients(arrays):
        drops = {"adapter_deterministic": False, "rngs": {"dropout": KEY}}

        @jax.jit
        @jax.value_and_grad
        def run(adapters, ids, variables):
            return jnp.mean(apply(adapters, variables, ids, **drops) ** 2)

        return run(*arrays)

    arrays = made(plan, scale=1 / 8), ids, random_like(nn.unbox(boxed))
    expected = loss_and_gradients(arrays)
    adapter_places = sharding.adapter_shardings(plan, boxed["params"], mesh=MESH)
    specs = nn.get_partition_spec(boxed)
    rows = NamedSharding(MESH, P("data"))
    places = adapter_places, rows, shardings(specs, MESH)
    arrays = on_mesh(jax.device_put(arrays, places), boxed["params"])
    assert_close(loss_and_gradients(arrays), expected)


class Table(nn.Module):
    """A lookup, by what `jnp.take` does beyond the table."""

    mode: str

    @nn.compact
    def __call__(self, ids):
        init = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
        table = self.param("table", init, (12, 16))
        return jnp.take(table, ids, axis=0, mode=self.mode, fill_value=0)


@pytest.mark.parametrize("mode", ["clip", "fill", slow("wrap")])
def test_lookups_beyond_the_table_are_as_on_one_device(mode):
    register_layer(Table, equation=Lookup(mode), kernel="table")
    model, ids = Table(mode), np.arange(-16, 16).reshape(8, 4)
    boxed = jax.eval_shape(model.init, KEY, ids)
    config = MoRAConfig(operator="signed_decoupling", square_rank=6, targets="table")
    plan = linen.plan(model, boxed, config, ids)
    arrays = made(plan), random_like(nn.unbox(boxed)), ids
    expected = jax.jit(linen.wrap(model, plan))(*arrays)
    adapter_places = sharding.adapter_shardings(plan, boxed["params"], mesh=MESH)
    specs = shardings(nn.get_partition_spec(boxed), MESH)
    arrays = jax.device_put(arrays, (adapter_places, specs, NamedSharding(MESH, P())))
    arrays = on_mesh(arrays, boxed["params"])
    assert_close(jax.jit(linen.wrap(model, plan))(*arrays), expected)


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["rotation", slow("sharing")])
def test_attention_is_as_on_one_device_without_hidden_traffic(operator):
    """Heads, whose delta is summed with Flax's own product; XLA lays out the rest."""
    into, back = (
        nn.with_partitioning(drawn, axes)
        for axes in ((None, "model", None), ("model", None, None))
    )
    model = nn.MultiHeadDotProductAttention(4, kernel_init=into, out_kernel_init=back)
    boxed = jax.eval_shape(model.init, KEY, X)
    config = MoRAConfig(square_rank=8, operator=operator, execution="activation")
    plan = linen.plan(model, boxed, config, X)

    def program(apply, arrays):
        def loss(adapters, x, variables):
            return jnp.mean(apply(adapters, variables, x) ** 2)

        return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays).compile()

    arrays = made(plan, scale=1 / 8), X, random_like(nn.unbox(boxed))
    expected = program(linen.wrap(model, plan), arrays)(*arrays)
    places = sharding.adapter_shardings(plan, boxed["params"], mesh=MESH)
    specs = nn.get_partition_spec(boxed)
    arrays = jax.device_put(arrays, (places, BATCH, shardings(specs, MESH)))
    arrays = on_mesh(arrays, boxed["params"], llama.BATCH_AXES)
    adapted = program(linen.wrap(model, plan), arrays)
    assert_close(adapted(*arrays), expected)
    base = program(lambda _, *args: model.apply(*args), arrays)
    assert set(sent(adapted) - sent(base)) == {("all-reduce", (8, 8))}


class Scanned(nn.Module):
    """Layers whose kernels are (in, layers, out), as MaxText has them."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(drawn, ("fsdp", "model"))
        layers = nn.scan(
            lambda layer, x, _: (nn.tanh(layer(x)), None),
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=4,
            metadata_params={nn.PARTITION_NAME: None},
        )
        dense = nn.Dense(16, kernel_init=init, use_bias=False, name="layer")
        return layers(dense, x, None)[0]


@pytest.mark.parametrize("operator", ["block_diagonal", slow("rotation")])
def test_layers_on_the_second_axis_learn_as_on_one_device(operator):
    """Also where the mesh splits the layers: M's stack is split as the kernel's is."""
    model, config = Scanned(), MoRAConfig(square_rank=8, operator=operator)
    boxed = jax.eval_shape(model.init, KEY, X)
    apply = linen.wrap(model, config, boxed, X)

    @jax.jit
    @jax.value_and_grad
    def loss(adapters, params, x):
        return jnp.mean(apply(adapters, {"params": params}, x) ** 2)

    adapters, params = made(apply.plan, scale=1 / 8), random_like(nn.unbox(boxed))
    expected = loss(adapters, params["params"], X)
    places = shardings(nn.get_partition_spec(boxed), MESH)["params"]
    assert places["layer"]["kernel"].spec == P("fsdp", None, "model")
    arrays = adapters, params["params"], X
    there = sharding.adapter_shardings(adapters, places)
    arrays = on_mesh(jax.device_put(arrays, (there, places, BATCH)), places)
    assert_close(loss(*arrays), expected)
    by_layer = {"layer": {"kernel": NamedSharding(MESH, P(None, "model", None))}}
    (split,) = jax.tree.leaves(sharding.adapter_shardings(adapters, by_layer))
    assert split.spec[0] == "model"


def test_a_stack_and_its_layers_have_the_layout_of_their_kernels():
    """Whichever of them `on_mesh` was told of."""
    kernel = jax.ShapeDtypeStruct((3, 16, 16), jnp.float32)
    where = {"k": NamedSharding(MESH, P(None, "fsdp", "model"))}
    config = MoRAConfig(targets="k", overrides={"k": {"axes": "sio"}})
    plan = mora_jax.plan({"k": kernel}, config)
    spec = sharding.on_mesh(plan, where, batch_axes="data")["k"]
    one = spec.with_stack(())
    assert one.layout and one.layout.mesh_axes == (("fsdp",), ("model",))
    assert one.with_stack((3,)).layout == spec.layout and one.axes == "io"


SPLIT = {0: P("fsdp", "model"), 2: P("model", "fsdp")}


def two_linears(kernel_init=lambda axes: drawn):
    """Two layers of NNX; `kernel_init` takes the mesh axes that a kernel has."""

    def linear(ins, outs, axes):
        init = kernel_init(tuple(axes))
        return nnx.Linear(ins, outs, kernel_init=init, rngs=nnx.Rngs(0))

    return nnx.Sequential(linear(16, 48, SPLIT[0]), nnx.relu, linear(48, 16, SPLIT[2]))


def place(model):
    for k, spec in SPLIT.items():
        layer: Any = model.layers[k]
        layer.kernel[...] = put(layer.kernel[...], MESH, spec)
        layer.bias[...] = put(layer.bias[...], MESH, P())


class ScannedNNX(nnx.Module):
    """The same in NNX."""

    def __init__(self):
        make = nnx.vmap(
            lambda key: nnx.Linear(16, 16, use_bias=False, rngs=nnx.Rngs(key)),
            out_axes=nnx.StateAxes({...: 1}),
        )
        self.layers: Any = make(jax.random.split(KEY, 4))

    def __call__(self, x):
        axes = nnx.StateAxes({...: 1}), nnx.Carry
        scan = nnx.scan(in_axes=axes, out_axes=nnx.Carry)
        return scan(lambda layer, x: nnx.tanh(layer(x)))(self.layers, x)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P("fsdp", None, "model"), P(None, "model", None)])
def test_nnx_layers_on_the_second_axis_learn_as_on_one_device(spec):
    """M is where its kernel is, with the layers on its second axis."""
    grad = nnx.jit(
        mora_jax.nnx.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2))
    )
    model, x = ScannedNNX(), X
    alone = wrap(model, MoRAConfig(square_rank=8, operator="rotation"), X)
    adapters = random_like(mora_jax.nnx.adapters(alone))
    set_adapters(alone, adapters)
    expected = grad(alone, X)
    kernel = model.layers.kernel
    kernel[...] = put(kernel[...], MESH, spec)
    adapted = wrap(model, mora_jax.nnx.plan_of(alone))
    set_adapters(adapted, adapters)
    m = adapted.layers.kernel_mora
    assert m.shape == (8, 4, 8) and m[...].sharding.mesh == MESH
    assert m[...].sharding.shard_shape(m.shape) == (
        8,
        4 // (1 + (spec[1] == "model")),
        8,
    )
    assert_close(grad(adapted, jax.device_put(x, BATCH)), expected)


@pytest.mark.parametrize("operator", ["sharing", slow("rotation")])
def test_nnx_learns_as_on_one_device(operator):
    @nnx.jit
    def loss(model, x):
        where = nnx.DiffState(0, MoRAParam)
        return nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2), argnums=where)(model)

    config = MoRAConfig(square_rank=8, operator=operator)
    with jax.set_mesh(MESH):
        model = two_linears(lambda axes: nnx.with_partitioning(drawn, axes))
        first: Any = model.layers[0]
        assert first.kernel[...].sharding.spec == SPLIT[0]
        plan = mora_jax.nnx.plan(model, config)
        state = nnx.state(model, nnx.Param)
        places = sharding.adapter_shardings(plan, state, mesh=MESH)
        named = nnx.get_named_sharding(state, MESH)
        specs = nnx.get_partition_spec(state)
        for where in (named, specs):
            again = sharding.adapter_shardings(plan, where, mesh=MESH)
            assert jax.tree.leaves(again) == jax.tree.leaves(places)
        adapters, model = made(plan, scale=1 / 8), wrap(model, plan)
        (laid,) = on_mesh([adapters], state, llama.BATCH_AXES)
        set_adapters(model, jax.device_put(laid, jax.tree.leaves(places)[0]))
        got = loss(model, jax.device_put(X, BATCH))
    alone = wrap(two_linears(), config)  # whose kernels are equal
    set_adapters(alone, adapters)
    assert_close(got, loss(alone, X))


SLOW_WAYS = slow("rotation", "activation"), slow("sharing", "fold")
WAYS = [("sharing", "activation"), ("rotation", "fold"), *SLOW_WAYS]


@pytest.mark.parametrize(("operator", "execution"), WAYS)
def test_an_nnx_step_is_compiled_once(operator, execution, caplog):
    """Nobody places M or the optimizer's state; the plan says nothing of the mesh."""
    model = two_linears()
    place(model)
    config = MoRAConfig(square_rank=16, operator=operator, execution=execution)
    model = wrap(model, config)
    # As of a file: on one device.
    set_adapters(model, jax.tree.map(np.zeros_like, mora_jax.nnx.adapters(model)))
    optimizer = mora_jax.nnx.adapter_optimizer(model, optax.adam(1e-2))
    x = jax.device_put(X, BATCH)

    @nnx.jit
    def nnx_step(model, optimizer, x):
        loss = mora_jax.nnx.value_and_grad(lambda m, x: jnp.mean(m(x) ** 2))
        value, grads = loss(model, x)
        optimizer.update(model, grads)
        return value

    state = nnx.state((model, optimizer))
    before = [leaf.sharding for leaf in jax.tree.leaves(state)]
    assert all(sharding.mesh == MESH for sharding in before)
    with jax.log_compiles():
        values = [float(nnx_step(model, optimizer, x)) for _ in range(3)]
    assert values[2] < values[0]
    assert_shardings(nnx.state((model, optimizer)), before)
    log = (record.getMessage() for record in caplog.records)
    assert sum(bool(re.match(r"Compiling (jit\()?nnx_step\b", m)) for m in log) == 1


def test_a_gradient_is_where_its_m_is_without_on_mesh():
    """So that no step of a Linen model is compiled again."""
    model = nn.Sequential([nn.Dense(48), nn.relu, nn.Dense(16)])
    params = random_like(jax.eval_shape(model.init, KEY, X))["params"]
    specs = {f"layers_{k}": {"kernel": spec, "bias": P()} for k, spec in SPLIT.items()}
    params = put(params, MESH, specs)
    plan = linen.plan(
        model,
        {"params": params},
        MoRAConfig(operator="signed_decoupling", square_rank=16),
        X,
    )
    places, apply = sharding.adapter_shardings(plan, params), linen.wrap(model, plan)

    @jax.jit
    @jax.grad
    def gradient(adapters, params, x):
        return jnp.mean(apply(adapters, {"params": params}, x) ** 2)

    adapters = jax.device_put(made(plan), places)
    got = gradient(adapters, params, jax.device_put(X, BATCH))
    assert_shardings(got, places)


@pytest.mark.slow
def test_gradients_outside_of_a_program():
    """Where cotangents are made on one device, and the kernel is on a mesh."""
    model, config = (
        two_linears(),
        MoRAConfig(operator="signed_decoupling", square_rank=16),
    )
    grad = mora_jax.nnx.value_and_grad(lambda model, x: jnp.sum(model(x)))
    expected = grad(wrap(model, config), X)
    place(model)
    for x in (X, jax.device_put(X, BATCH)):
        assert_close(grad(wrap(model, config), x), expected)
