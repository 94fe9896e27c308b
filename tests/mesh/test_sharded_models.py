"""Whole models on a mesh: scanned layers, heads, experts; Linen and NNX."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import llama
import numpy as np
import optax
import pytest
from flax import nnx
from flax.linen.spmd import logical_to_mesh_sharding
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from traffic import collectives

import mora_jax
from mora_jax import MoRAConfig, init, linen, sharding
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
X = jax.random.normal(jax.random.key(0), (4, 3, 16))


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


@pytest.fixture(scope="module")
def variables():
    return nn.unbox(Model().init(jax.random.key(1), X))


def base_shardings(rules=RULES):
    specs = nn.get_partition_spec(BOXED)
    return logical_to_mesh_sharding(specs, MESH, rules)


def some(plan):
    """Adapters that are not zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda m: jnp.asarray(rng.standard_normal(m.shape) / 8, m.dtype),
        mora_jax.init(plan),
    )


def losses(plan):
    apply = linen.wrap(Model(), plan)

    def loss(adapters, variables, x):
        return jnp.mean(apply(adapters, variables, x) ** 2)

    return jax.jit(jax.value_and_grad(loss))


def on_mesh(plan, boxed=BOXED, rules=RULES):
    """The plan and the shardings of its adapters."""
    with nn.logical_axis_rules(rules):
        shardings = sharding.adapter_shardings(plan, boxed["params"], mesh=MESH)
        plan = sharding.plan_on_mesh(
            plan, boxed["params"], batch_axes="data", mesh=MESH
        )
    return plan, shardings


FEW = ("sharing", "rotation")


@pytest.mark.parametrize(
    ("operator", "execution"),
    [
        *((name, "auto") for name in FEW),
        *(
            pytest.param(name, "auto", marks=pytest.mark.slow)
            for name in OPERATORS
            if name not in FEW
        ),
        *(pytest.param(name, "fold", marks=pytest.mark.slow) for name in FEW),
    ],
)
def test_linen_learns_as_on_one_device(variables, operator, execution):
    config = MoRAConfig(square_rank=8, operator=operator, execution=execution)
    plan = linen.plan(Model(), variables, config, X)
    assert len(plan) == 8
    adapters = some(plan)
    loss, grads = losses(plan)(adapters, variables, X)
    plan, shardings = on_mesh(plan)
    arrays = (
        jax.device_put(adapters, shardings),
        jax.device_put(variables, base_shardings()),
        jax.device_put(X, NamedSharding(MESH, P("data"))),
    )
    step = losses(plan)
    got, got_grads = step(*arrays)
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    for one, other in zip(
        jax.tree.leaves(got_grads), jax.tree.leaves(grads), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())
    step(*arrays)
    assert step._cache_size() == 1


@pytest.mark.parametrize("operator", FEW)
def test_no_hidden_traffic(operator):
    """Of a whole model: gradients of M's are added up, and what C gives; no more.

    Without FSDP, whose gathers XLA splits up in other ways than the base's.
    """
    plan = linen.plan(Model(), BOXED, MoRAConfig(square_rank=8, operator=operator), X)
    rules = tuple(rule for rule in RULES if rule[0] != "embed")
    plan, shardings = on_mesh(plan, rules=rules)
    apply = linen.wrap(Model(), plan)
    by_x = NamedSharding(MESH, P("data"))

    def loss(adapters, x, variables):
        return jnp.mean(apply(adapters, variables, x) ** 2)

    def base_loss(x, variables):
        return jnp.mean(Model().apply(variables, x) ** 2)

    def program(function, *args):
        argnums = tuple(range(len(args) - 1))
        gradient = jax.jit(jax.value_and_grad(function, argnums))
        return collectives(gradient.lower(*args).compile())

    variables = as_placed(nn.unbox(BOXED), base_shardings(rules))
    x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=by_x)
    adapters = as_placed(mora_jax.init(plan), shardings)
    extra = program(loss, adapters, x, variables) - program(base_loss, x, variables)
    expected = {("all-reduce", (8, 8))}
    if operator == "sharing":
        expected.add(("all-reduce", (2, 3, 8)))
    assert set(extra) == expected


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
    adapters = as_placed(mora_jax.init(plan), shardings)
    apply = linen.wrap(model, plan)

    def whole(variables, table):
        return {"params": {**variables["params"], "embed_tokens": table}}

    def loss(adapters, table, variables, tokens):
        return jnp.mean(apply(adapters, whole(variables, table), tokens) ** 2)

    def base_loss(table, variables, tokens):
        return jnp.mean(model.apply(whole(variables, table), tokens) ** 2)

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    program = collectives(step.lower(adapters, table, variables, tokens).compile())
    step = jax.jit(jax.value_and_grad(base_loss))
    base = collectives(step.lower(table, variables, tokens).compile())
    rows = {("all-reduce", (2, 16, 40))} if operator == "sharing" else set()
    assert set(program - base) == {("all-reduce", (40, 40))} | rows


def as_placed(tree, places):
    return jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
        tree,
        places,
    )


def make_nnx():
    """Two layers whose kernels have names of mesh axes, on that mesh."""
    init = nnx.initializers.lecun_normal()

    def linear(ins, outs, *axes, seed):
        named = nnx.with_partitioning(init, axes)
        return nnx.Linear(ins, outs, kernel_init=named, rngs=nnx.Rngs(seed))

    return nnx.Sequential(
        linear(16, 48, "data", "model", seed=0),
        nnx.relu,
        linear(48, 16, "model", "data", seed=1),
    )


@pytest.mark.parametrize("operator", FEW)
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
        adapters = some(plan)
        model = wrap(model, plan)
        mora_jax.nnx.set_adapters(model, jax.device_put(adapters, shardings))
        x = jax.device_put(X, NamedSharding(MESH, P("data")))
        loss, grads = nnx_loss(model, x)
    plain = make_plain()
    for one, other in ((plain.layers[k], model.layers[k]) for k in (0, 2)):
        copy_kernel(one, other)
    alone = wrap(plain, config)
    mora_jax.nnx.set_adapters(alone, adapters)
    expected, expected_grads = nnx_loss(alone, X)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for got, other in zip(
        jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        np.testing.assert_allclose(got, other, atol=1e-5 * np.abs(other).max())


def make_plain():
    return nnx.Sequential(
        nnx.Linear(16, 48, rngs=nnx.Rngs(0)),
        nnx.relu,
        nnx.Linear(48, 16, rngs=nnx.Rngs(1)),
    )


def copy_kernel(to: Any, source: Any):
    to.kernel[...] = jnp.asarray(np.asarray(source.kernel))


def nnx_loss(model, x):
    wrt = nnx.DiffState(0, MoRAParam)

    @nnx.jit
    def run(model, x):
        return nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2), argnums=wrt)(model)

    return run(model, x)


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


@pytest.mark.parametrize(
    "names",
    [
        {},
        pytest.param(
            {"vocabulary": (None, "model"), "einsum": ("model", None, None)},
            marks=pytest.mark.slow,
        ),
        pytest.param(  # no run of features: left to XLA
            {"einsum": (None, None, "model")}, marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.parametrize("operator", FEW)
def test_other_layers_learn_as_on_one_device(names, operator):
    model = Others(**names)
    ids = jnp.arange(24).reshape(4, 6) % 12
    boxed = model.init(jax.random.key(0), ids)
    variables = nn.unbox(boxed)
    config = MoRAConfig(square_rank=6, operator=operator, dropout=0.25, targets=TARGETS)
    plan = linen.plan(model, variables, config, ids)
    assert len(plan) == 3
    adapters = some(plan)

    def losses(plan):
        apply = linen.wrap(model, plan)

        def loss(adapters, variables, ids):
            rngs = {"dropout": jax.random.key(5)}
            settings = {"adapter_deterministic": False, "rngs": rngs}
            return jnp.mean(apply(adapters, variables, ids, **settings) ** 2)

        return jax.jit(jax.value_and_grad(loss))

    loss, grads = losses(plan)(adapters, variables, ids)
    plan, shardings = on_mesh(plan, boxed)
    specs = nn.get_partition_spec(boxed)
    placed = jax.tree.map(
        lambda spec: NamedSharding(MESH, spec),
        specs,
        is_leaf=lambda s: isinstance(s, P),
    )
    got, got_grads = losses(plan)(
        jax.device_put(adapters, shardings),
        jax.device_put(variables, placed),
        jax.device_put(ids, NamedSharding(MESH, P("data"))),
    )
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    for one, other in zip(
        jax.tree.leaves(got_grads), jax.tree.leaves(grads), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


# --- M keeps its sharding, and a step its program ---

SPLIT = {0: P("data", "model"), 2: P("model", "data")}


def compiled(caplog, name):
    """How often `name` was compiled, by what JAX logs."""
    pattern = re.compile(rf"Compiling (jit\()?{name}\b")
    return sum(bool(pattern.match(record.getMessage())) for record in caplog.records)


def same_shardings(before, after):
    for one, other in zip(before, jax.tree.leaves(after), strict=True):
        assert other.sharding.is_equivalent_to(one, other.ndim)


@pytest.mark.parametrize("execution", ["activation", "fold"])
@pytest.mark.parametrize("operator", FEW)
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
    x = jax.device_put(X, NamedSharding(MESH, P("data")))

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
        losses = [float(nnx_step(model, optimizer, x)) for _ in range(3)]
    assert losses[2] < losses[0]
    same_shardings(before, nnx.state((model, optimizer)))
    assert compiled(caplog, "nnx_step") == 1


@pytest.mark.parametrize("operator", FEW)
def test_a_linen_step_is_compiled_once(operator, caplog):
    model = nn.Sequential([nn.Dense(48), nn.relu, nn.Dense(16)])
    places = {
        f"layers_{k}": {
            "kernel": NamedSharding(MESH, spec),
            "bias": NamedSharding(MESH, P()),
        }
        for k, spec in SPLIT.items()
    }
    params = jax.device_put(model.init(jax.random.key(0), X)["params"], places)
    config = MoRAConfig(square_rank=16, operator=operator)
    plan = linen.plan(model, {"params": params}, config, X)
    apply, shardings = linen.wrap(model, plan), sharding.adapter_shardings(plan, params)
    adapters = jax.device_put(init(plan), shardings)
    x = jax.device_put(X, NamedSharding(MESH, P("data")))

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
    model = make_plain()
    plain = wrap(model, MoRAConfig(square_rank=16))
    for k, spec in SPLIT.items():
        layer: Any = model.layers[k]
        place = NamedSharding(MESH, spec)
        layer.kernel[...] = jax.device_put(layer.kernel[...], place)
    grad = mora_jax.nnx.value_and_grad(lambda model, x: jnp.sum(model(x)))
    for x in (X, jax.device_put(X, NamedSharding(MESH, P("data")))):
        _, grads = grad(wrap(model, MoRAConfig(square_rank=16)), x)
        _, expected = grad(plain, X)
        for got, other in zip(
            jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(got, other, atol=1e-5 * np.abs(other).max())
