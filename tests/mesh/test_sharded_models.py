"""Whole models on a mesh: scanned layers, heads, experts; Linen and NNX."""

import functools
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
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mora_jax
from benchmarks.traffic import collectives
from models import llama
from mora_jax import MoRAConfig, linen, sharding
from mora_jax.nnx import MoRAParam, wrap
from mora_jax.operators import OPERATORS

P = PartitionSpec
NAMES = ("data", "expert", "model")
MESH = jax.make_mesh((2, 2, 2), NAMES, axis_types=(AxisType.Auto,) * 3)
RULES = (
    ("batch", "data"),
    ("embed", "data"),  # as in FSDP
    ("heads", "model"),
    ("mlp", "model"),
    ("experts", "expert"),
    ("layers", None),
)
X = np.random.default_rng(0).standard_normal((4, 3, 16), np.float32)


def named(*axes):
    return nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)


def dense(features, *axes, name):
    return nn.Dense(features, kernel_init=named(*axes), name=name)


class Expert(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.relu(dense(24, "embed", "mlp", name="up")(x))
        return dense(16, "mlp", "embed", name="down")(h)


class Layer(nn.Module):
    """Both of Megatron's splits, attention's heads, and a layer of experts."""

    @nn.compact
    def __call__(self, x, _):
        attention = {
            "kernel_init": named("embed", "heads", None),
            "out_kernel_init": named("heads", None, "embed"),
        }
        x = x + nn.MultiHeadDotProductAttention(4, **attention, name="attention")(x)
        x = x + dense(16, "mlp", "embed", name="down")(
            nn.relu(dense(48, "embed", "mlp", name="up")(x))
        )
        experts = nn.vmap(
            Expert,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=2,
            metadata_params={nn.PARTITION_NAME: "experts"},
        )
        return x + experts(name="experts")(x).mean(0), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return layers(name="layers")(x, None)[0]


BOXED = jax.eval_shape(Model().init, jax.random.key(1), X)


def filled(boxed):
    """Variables of these shapes without their boxes, whose products stay small."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32) / 4, nn.unbox(boxed)
    )


def base_shardings(rules=RULES):
    specs = nn.get_partition_spec(BOXED)
    return logical_to_mesh_sharding(specs, MESH, rules)


def assert_close(got, expected):
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def losses(model, plan, by=(0, 1), **settings):
    """The model's loss, and its gradients by adapters and inputs."""
    apply = linen.wrap(model, plan)

    def loss(adapters, x, variables):
        return jnp.mean(apply(adapters, variables, x, **settings) ** 2)

    return jax.jit(jax.value_and_grad(loss, by))


def on_mesh(plan, boxed=BOXED, rules=RULES):
    """The plan and the shardings of its adapters."""
    with nn.logical_axis_rules(rules):
        shardings = sharding.adapter_shardings(plan, boxed["params"], mesh=MESH)
        plan = sharding.plan_on_mesh(
            plan, boxed["params"], batch_axes="data", mesh=MESH
        )
    return plan, shardings


FEW = ("sharing", "rotation")
NO_FSDP = tuple(rule for rule in RULES if rule[0] != "embed")
BY_X = NamedSharding(MESH, P("data"))


def sent(program):
    return collectives(program.as_text())


@functools.cache
def base_collectives():
    """Those of the base's gradient by its inputs, without FSDP."""

    def loss(x, variables):
        return jnp.mean(Model().apply(variables, x) ** 2)

    x = jax.device_put(X, BY_X)
    variables = jax.device_put(filled(BOXED), base_shardings(NO_FSDP))
    return sent(jax.jit(jax.value_and_grad(loss)).lower(x, variables).compile())


@pytest.mark.parametrize(
    ("operator", "execution", "rules"),
    [
        ("sharing", "auto", NO_FSDP),
        slow("rotation", "auto", NO_FSDP),
        *(slow(name, "auto", RULES) for name in OPERATORS),
        *(slow(name, "fold", RULES) for name in FEW),
    ],
)
def test_a_model_learns_as_on_one_device(operator, execution, rules):
    """And without FSDP no more is sent than gradients of M and what C gives.

    FSDP's gathers XLA splits up in other ways than the base's.
    """
    config = MoRAConfig(square_rank=8, operator=operator, execution=execution)
    plan, variables = linen.plan(Model(), BOXED, config, X), filled(BOXED)
    assert len(plan) == 8
    adapters = made(plan, scale=1 / 8)
    expected = losses(Model(), plan)(adapters, X, variables)
    plan, shardings = on_mesh(plan, rules=rules)
    arrays = (
        jax.device_put(adapters, shardings),
        jax.device_put(X, BY_X),
        jax.device_put(variables, base_shardings(rules)),
    )
    program = losses(Model(), plan).lower(*arrays).compile()
    assert_close(program(*arrays), expected)
    if rules is NO_FSDP:
        allowed = {("all-reduce", (8, 8))}
        if operator == "sharing":
            allowed.add(("all-reduce", (2, 3, 8)))
        assert set(sent(program) - base_collectives()) == allowed


@pytest.mark.slow
@pytest.mark.parametrize("operator", FEW)
def test_no_hidden_traffic_in_a_llama(operator):
    """With FSDP, tensor parallelism and remat: as above, and no more is gathered."""
    mesh = llama.make_mesh(2, 2, 2)
    model = llama.Llama(llama.SHAPES["tiny"], mesh)
    tokens = jax.ShapeDtypeStruct(
        (8, 16), jnp.int32, sharding=NamedSharding(mesh, P(llama.BATCH_AXES))
    )
    boxed = jax.eval_shape(model.init, jax.random.key(0), tokens)
    specs = nn.get_partition_spec(boxed)
    places = logical_to_mesh_sharding(specs, mesh, llama.RULES)
    variables = as_placed(nn.unbox(boxed), places)
    table = variables["params"].pop("embed_tokens")
    plan = linen.plan(
        model, boxed, MoRAConfig(square_rank=40, operator=operator), tokens
    )
    plan = sharding.plan_on_mesh(plan, places["params"], batch_axes=llama.BATCH_AXES)
    shardings = sharding.adapter_shardings(plan, places["params"])
    adapters = as_placed(made(plan), shardings)
    apply = linen.wrap(model, plan)

    def whole(variables, table):
        return {"params": {**variables["params"], "embed_tokens": table}}

    def loss(adapters, table, variables, tokens):
        return jnp.mean(apply(adapters, whole(variables, table), tokens) ** 2)

    def base_loss(table, variables, tokens):
        return jnp.mean(model.apply(whole(variables, table), tokens) ** 2)

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    program = sent(step.lower(adapters, table, variables, tokens).compile())
    step = jax.jit(jax.value_and_grad(base_loss))
    base = sent(step.lower(table, variables, tokens).compile())
    rows = {("all-reduce", (2, 16, 40))} if operator == "sharing" else set()
    assert set(program - base) == {("all-reduce", (40, 40))} | rows


def as_placed(tree, places):
    return jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
        tree,
        places,
    )


def drawn(key, shape, dtype, **settings):
    """An initialiser that compiles nothing."""
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape) / 4, dtype)


def make_nnx():
    """Two layers whose kernels have names of mesh axes, on that mesh."""

    def linear(ins, outs, *axes):
        named = nnx.with_partitioning(drawn, axes)
        return nnx.Linear(ins, outs, kernel_init=named, rngs=nnx.Rngs(0))

    return nnx.Sequential(
        linear(16, 48, "data", "model"), nnx.relu, linear(48, 16, "model", "data")
    )


def make_plain():
    def linear(ins, outs):
        return nnx.Linear(ins, outs, kernel_init=drawn, rngs=nnx.Rngs(0))

    return nnx.Sequential(linear(16, 48), nnx.relu, linear(48, 16))


def nnx_loss(model, x):
    wrt = nnx.DiffState(0, MoRAParam)

    @nnx.jit
    def run(model, x):
        return nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2), argnums=wrt)(model)

    return run(model, x)


@pytest.mark.parametrize("operator", ["sharing", slow("rotation")])
def test_nnx_learns_as_on_one_device(operator):
    config = MoRAConfig(square_rank=8, operator=operator)
    with jax.set_mesh(MESH):
        model = make_nnx()
        first: Any = model.layers[0]
        assert first.kernel[...].sharding.spec == P("data", "model")
        plan = mora_jax.nnx.plan(model, config)
        state = nnx.state(model, nnx.Param)
        shardings = sharding.adapter_shardings(plan, state, mesh=MESH)
        named = nnx.get_named_sharding(state, MESH)
        assert sharding.adapter_shardings(plan, named) == shardings
        specs = nnx.get_partition_spec(state)
        assert sharding.adapter_shardings(plan, specs, mesh=MESH) == shardings
        plan = sharding.plan_on_mesh(plan, state, batch_axes="data", mesh=MESH)
        adapters = made(plan, scale=1 / 8)
        model = wrap(model, plan)
        mora_jax.nnx.set_adapters(model, jax.device_put(adapters, shardings))
        loss, grads = nnx_loss(model, jax.device_put(X, BY_X))
    alone = wrap(make_plain(), config)  # whose kernels are equal
    mora_jax.nnx.set_adapters(alone, adapters)
    expected, expected_grads = nnx_loss(alone, X)
    assert_close((loss, grads), (expected, expected_grads))


TARGETS = ".*/(kernel|embedding)"


class Others(nn.Module):
    """Layers that are no plain product: an embedding, its tied head, an einsum."""

    vocabulary: tuple = ("model", None)
    einsum: tuple = (None, "model", None)

    @nn.compact
    def __call__(self, ids):
        init = nn.with_partitioning(nn.initializers.normal(1.0), self.vocabulary)
        table = nn.Embed(12, 16, embedding_init=init, name="table")
        x = table(ids)
        init = nn.with_partitioning(nn.initializers.normal(0.3), self.einsum)
        x = nn.Einsum((16, 4, 6), "btd,dhk->bthk", kernel_init=init, name="up")(x)
        init = nn.with_partitioning(nn.initializers.normal(0.3), ("model", None, None))
        x = nn.Einsum((4, 6, 16), "bthk,hkd->btd", kernel_init=init, name="down")(x)
        return table.attend(x)


HEADS = {"vocabulary": (None, "model"), "einsum": ("model", None, None)}
NO_RUN = {"einsum": (None, None, "model")}
"""Its features are in no run on a device: left to XLA."""


@pytest.mark.parametrize(
    ("operator", "names"),
    [
        ("rotation", {}),
        slow("sharing", {}),
        *(slow(operator, names) for operator in FEW for names in (HEADS, NO_RUN)),
    ],
)
def test_other_layers_learn_as_on_one_device(operator, names):
    model = Others(**names)
    ids = np.arange(24).reshape(4, 6) % 12
    boxed = jax.eval_shape(model.init, jax.random.key(0), ids)
    variables = filled(boxed)
    config = MoRAConfig(square_rank=6, operator=operator, dropout=0.25, targets=TARGETS)
    plan = linen.plan(model, variables, config, ids)
    assert len(plan) == 3
    adapters = made(plan, scale=1 / 8)
    drops = {"adapter_deterministic": False, "rngs": {"dropout": jax.random.key(5)}}
    expected = losses(model, plan, 0, **drops)(adapters, ids, variables)
    plan, shardings = on_mesh(plan, boxed)
    placed = jax.tree.map(
        lambda spec: NamedSharding(MESH, spec),
        nn.get_partition_spec(boxed),
        is_leaf=lambda s: isinstance(s, P),
    )
    got = losses(model, plan, 0, **drops)(
        jax.device_put(adapters, shardings),
        jax.device_put(ids, BY_X),
        jax.device_put(variables, placed),
    )
    assert_close(got, expected)


# --- M keeps its sharding, and a step its program ---

SPLIT = {0: P("data", "model"), 2: P("model", "data")}


def compiled(caplog, name):
    """How often `name` was compiled, by what JAX logs."""
    pattern = re.compile(rf"Compiling (jit\()?{name}\b")
    return sum(bool(pattern.match(record.getMessage())) for record in caplog.records)


def same_shardings(before, after):
    for one, other in zip(before, jax.tree.leaves(after), strict=True):
        assert other.sharding.is_equivalent_to(one, other.ndim)


@pytest.mark.parametrize(
    ("operator", "execution"),
    [
        ("sharing", "activation"),
        ("rotation", "fold"),
        slow("rotation", "activation"),
        slow("sharing", "fold"),
    ],
)
def test_an_nnx_step_is_compiled_once(operator, execution, caplog):
    """Nobody places M or the optimizer's state; the plan says nothing of the mesh."""
    model, everywhere = make_plain(), NamedSharding(MESH, P())
    for k, spec in SPLIT.items():
        layer: Any = model.layers[k]
        layer.bias[...] = jax.device_put(layer.bias[...], everywhere)
        place = NamedSharding(MESH, spec)
        layer.kernel[...] = jax.device_put(layer.kernel[...], place)
    config = MoRAConfig(square_rank=16, operator=operator, execution=execution)
    model = wrap(model, config)
    # As of a file: on one device.
    zeros = jax.tree.map(np.zeros_like, mora_jax.nnx.adapters(model))
    mora_jax.nnx.set_adapters(model, zeros)
    optimizer = mora_jax.nnx.adapter_optimizer(model, optax.adam(1e-2))
    x = jax.device_put(X, BY_X)

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
    same_shardings(before, nnx.state((model, optimizer)))
    assert compiled(caplog, "nnx_step") == 1


@pytest.mark.parametrize("operator", ["rotation", slow("sharing")])
def test_a_linen_step_is_compiled_once(operator, caplog):
    model = nn.Sequential([nn.Dense(48), nn.relu, nn.Dense(16)])
    places = {
        f"layers_{k}": {
            "kernel": NamedSharding(MESH, spec),
            "bias": NamedSharding(MESH, P()),
        }
        for k, spec in SPLIT.items()
    }
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    params = jax.device_put(filled(shapes)["params"], places)
    config = MoRAConfig(square_rank=16, operator=operator)
    plan = linen.plan(model, {"params": params}, config, X)
    apply, shardings = linen.wrap(model, plan), sharding.adapter_shardings(plan, params)
    adapters = jax.device_put(made(plan), shardings)
    x = jax.device_put(X, BY_X)

    @jax.jit
    def linen_step(adapters, params, x):
        def loss(adapters):
            return jnp.mean(apply(adapters, {"params": params}, x) ** 2)

        grads = jax.grad(loss)(adapters)
        return jax.tree.map(lambda m, g: m - 0.1 * g, adapters, grads)

    with jax.log_compiles():
        for _ in range(3):
            adapters = linen_step(adapters, params, x)
    same_shardings(jax.tree.leaves(shardings), adapters)
    assert compiled(caplog, "linen_step") == 1


def test_gradients_outside_of_a_program():
    """Where cotangents are made on one device, and the kernel is on a mesh."""
    model = nnx.Sequential(make_plain().layers[0])
    grad = mora_jax.nnx.value_and_grad(lambda model, x: jnp.sum(model(x)))
    config = MoRAConfig(square_rank=16)
    expected = grad(wrap(model, config), X)
    layer: Any = model.layers[0]
    place = NamedSharding(MESH, SPLIT[0])
    layer.kernel[...] = jax.device_put(layer.kernel[...], place)
    for x in (X, jax.device_put(X, BY_X)):
        assert_close(grad(wrap(model, config), x), expected)
