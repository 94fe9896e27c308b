"""LoRA as an operator, whose delta is not linear in what it trains."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import close, made_for, random
from jax.sharding import PartitionSpec
from merged import merge_errors
from meshes import make_mesh, put

import mora_jax
from mora_jax import Adapter, AdapterSpec, FrozenDense, MoRAConfig, remora, sharding
from mora_jax._layer.equation import Delta
from mora_jax.operators import LowRank, Operator

INS, OUTS, RANK, ALPHA, SCALE = 12, 10, 3, 1.5, 0.5


def plain(m, x, kernel):
    """The formula that the layer must compute, as JAX differentiates it."""
    a, b = m[:INS], m[INS:].T
    return x @ (kernel + ALPHA * SCALE * (a @ b))


@pytest.fixture
def arrays():
    return random(0, INS + OUTS, RANK), random(1, 5, INS), random(2, INS, OUTS)


@pytest.mark.parametrize("execution", ["activation", "fold"])
def test_a_layer_and_its_gradients(execution, arrays):
    m, x, kernel = arrays

    def adapted(m, x, kernel):
        op = LowRank(INS, OUTS, RANK)
        settings = {"alpha": ALPHA, "scale": SCALE, "execution": execution}
        frozen = FrozenDense(kernel, None, op, **settings)
        return mora_jax.mora_apply({"kernel_mora": m}, frozen, x)

    def results(function):
        y, gradients = jax.vjp(function, m, x, kernel)
        tangents = jax.jvp(function, (m, x, kernel), (m + 1, x - 1, kernel * 2))
        return y, gradients(jnp.cos(y)), tangents

    close(jax.jit(lambda: results(adapted))(), jax.jit(lambda: results(plain))())


@pytest.mark.parametrize("execution", ["activation", "fold"])
def test_its_delta_and_the_merged_kernel(execution, arrays):
    m, x, kernel = arrays
    settings = {"alpha": ALPHA, "scale": SCALE, "execution": execution}
    spec = AdapterSpec(LowRank(INS, OUTS, RANK), (INS, OUTS), **settings)
    adapters, base = {"kernel_mora": Adapter(m, spec)}, {"kernel": kernel}
    delta = mora_jax.delta_weight(adapters)["kernel"]
    merged = mora_jax.merge(base, adapters)["kernel"]
    close(x @ merged, plain(m, x, kernel))
    close(kernel + delta, merged)
    op = spec.operator
    close(Operator.matrix(op, m), op.delta_weight(m))
    close(op.unit_rows(jnp.arange(2), m), op.delta_weight(m)[:2])
    assert spec.parameters == (INS + OUTS) * RANK and spec.shape == m.shape


@pytest.mark.parametrize(
    "settings",
    [{"execution": "activation"}, {"execution": "fold"}, {"dropout": 1e-12}],
    ids=str,
)
def test_on_a_mesh(settings, arrays):
    """A layer, rows of its delta and the delta, with their gradients by M and x."""
    mesh, split = make_mesh(inputs=2, outputs=2), PartitionSpec("inputs", "outputs")
    spec = AdapterSpec(LowRank(INS, OUTS, RANK), (INS, OUTS))
    adapters, where = {"kernel_mora": Adapter(arrays[0], spec)}, {"kernel": split}
    adapters = sharding.on_mesh(adapters, where, batch_axes=(), mesh=mesh)
    known = adapters["kernel_mora"].spec.layout
    places = PartitionSpec(), PartitionSpec(None, "inputs"), split

    def adapted(m, x, kernel, layout=known):
        op = LowRank(INS, OUTS, RANK)
        frozen = FrozenDense(kernel, None, op, alpha=ALPHA, layout=layout, **settings)
        key = jax.random.key(0)
        y = mora_jax.mora_apply({"kernel_mora": m}, frozen, x, key=key)
        delta = Delta(op, m, kernel.shape, "io", layout=layout)
        return y, delta.lookup(jnp.arange(4)), delta.kernel()

    def results(m, x, kernel, **layout):
        apply = functools.partial(adapted, kernel=kernel, **layout)
        y, gradients = jax.vjp(apply, m, x)
        return y, gradients(jax.tree.map(jnp.cos, y))

    expected = jax.jit(functools.partial(results, layout=None))(*arrays)
    close(jax.jit(results)(*put(arrays, mesh, places)), expected)


@pytest.mark.parametrize("operator", ["low_rank", "sharing"])
def test_numbers_show_that_the_merged_model_is_the_same(operator):
    """Deltas of a given size are made by the operator, linear or not."""
    model, x = nn.Dense(OUTS), random(1, 5, INS)
    variables = made_for(model, x)
    config = mora_jax.MoRAConfig(operator=operator, rank=RANK)
    plan = mora_jax.plan(variables["params"], config)
    assert merge_errors(model, variables, plan, x)["kernel"] < 1e-5


def test_the_start_is_pefts():
    """A uniform up to 1/sqrt(in), B zero; each kernel and each seed has its own."""
    params = {name: {"kernel": jnp.zeros((400, 300))} for name in "ab"}

    def started(seed=0, key=None, **settings):
        config = MoRAConfig(rank=16, operator="low_rank", seed=seed, **settings)
        return mora_jax.init(mora_jax.plan(params, config), key)

    adapters = started()
    m = np.asarray(adapters["a"]["kernel_mora"].m)
    a, b = m[:400], m[400:]
    assert not b.any()
    bound = 1 / np.sqrt(400)
    assert 0.99 * bound < a.max() <= bound and -bound <= a.min() < -0.99 * bound
    assert abs(a.mean()) < 0.03 * bound
    assert abs(a.std() - bound / np.sqrt(3)) < 0.02 * bound
    others = adapters["b"], started(seed=1)["a"], started(key=jax.random.key(0))["a"]
    for other in others:
        assert not np.array_equal(other["kernel_mora"].m, m)
    with jax.default_prng_impl("rbg"):  # the plan determines it, and nothing else
        np.testing.assert_array_equal(started()["a"]["kernel_mora"].m, m)
    shapes = jax.eval_shape(started)
    assert jax.tree.structure(shapes) == jax.tree.structure(adapters)
    changed = started(key=jax.random.key(0), init="gaussian")["a"]["kernel_mora"].m
    assert changed[400:].all()


def test_a_rank_is_the_rank():
    """Also beyond the layer, and where no square of such a width would be taken."""
    params = {"kernel": jnp.zeros((24, 10))}
    for rank in (1, 7, 10, 100):
        config = MoRAConfig(rank=rank, operator="low_rank")
        spec = mora_jax.plan(params, config)["kernel"]
        assert spec.shape == (34, rank) and spec.lora_rank == rank
        assert spec.asked_square_rank is None


def test_a_restart_is_relora():
    params = {"fc": {"kernel": random(0, 24, 16)}}
    plan = mora_jax.plan(params, MoRAConfig(rank=2, operator="low_rank"))
    adapters = jax.tree.map(lambda m: m + 0.1, mora_jax.init(plan))
    tx = optax.adam(1e-3)
    again = remora.restart(params, adapters, tx.init(adapters), tx)
    close(again.params, mora_jax.merge(params, adapters))
    m = again.adapters["fc"]["kernel_mora"].m
    assert m[:24].all() and not m[24:].any()
    first = mora_jax.init(plan)["fc"]["kernel_mora"].m
    assert not np.array_equal(m[:24], first[:24])


@pytest.mark.parametrize("init", ["zeros", "gaussian"])
def test_a_layer_of_linen_and_of_nnx(init):
    """They make their adapters themselves, from the keys of their own."""
    config, x = MoRAConfig(rank=2, operator="low_rank", init=init), random(0, 3, 24)
    layer = mora_jax.MoRADense(16, config=config)
    variables = layer.init(jax.random.key(0), x)
    m = variables["params"]["kernel_mora"].m
    twin = mora_jax.nnx.MoRALinear(24, 16, config=config, rngs=nnx.Rngs(0))
    for array in (m, twin.kernel_mora[...]):
        assert array.shape == (40, 2) and array[:24].all()
        assert bool(array[24:].any()) == (init == "gaussian")


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_an_embedding_starts_with_the_other_factor_at_zero(api):
    """Or tokens that no example has would change with B, as PEFT's do not."""
    settings = {"targets": ".*", "exclude": ".*bias"}
    config = MoRAConfig(rank=4, operator="low_rank", **settings)
    ids = jnp.array([[1, 2]])
    if api == "linen":
        model = nn.Sequential([nn.Embed(300, 16), nn.Dense(16)])
        variables = made_for(model, ids)
        plan = mora_jax.linen.plan(model, variables, config, ids)
    else:
        rngs = nnx.Rngs(0)
        layers = nnx.Embed(300, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)
        plan = mora_jax.nnx.plan(nnx.Sequential(*layers), config, ids)
    table, dense = sorted(
        plan.values(), key=lambda spec: spec.in_features, reverse=True
    )
    assert table.init == "embedding" and dense.init == "zeros"
    leaves = {m.shape: np.asarray(m) for m in jax.tree.leaves(mora_jax.init(plan))}
    m = leaves[316, 4]
    assert not m[:300].any() and abs(m[300:].std() - 1) < 0.3
    assert leaves[32, 4][:16].all() and not leaves[32, 4][16:].any()


def test_a_square_starts_at_zero_in_an_embedding_too():
    plan = mora_jax.plan({"kernel": jnp.ones((8, 8))}, MoRAConfig(init="embedding"))
    assert not mora_jax.init(plan)["kernel_mora"].m.any()
