"""Restarts: the function stays, the rank grows, and all but the M's goes on."""

import dataclasses

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from adapter_files import assert_same, slow
from flax import nnx
from helpers import bare, close, random, wide
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import mora_jax
from mora_jax import Adapter, MoRAConfig, remora
from mora_jax._layer.rounding import share_lost
from mora_jax.nnx import MoRAParam
from mora_jax.operators import SignedDecoupling, _pytree

SIZES = {"a": (12, 12), "b": (12, 8), "s": (3, 8, 12)}
CHANGING = ["sharing", "signed_decoupling"]
CHANGING += map(slow, ("signed_sharing", "signed_decoupling", "orthogonal", "hadamard"))


def made(operator="signed_decoupling", dtype="float32", **settings):
    """Params with biases, and adapters that are not zero."""
    params = {
        name: {"kernel": jnp.asarray(random(k, *size), dtype), "bias": jnp.ones(2)}
        for k, (name, size) in enumerate(SIZES.items())
    }
    overrides = {"s/kernel": {"axes": "sio"}}
    config = MoRAConfig(operator=operator, square_rank=4, **settings)
    plan = mora_jax.plan(params, dataclasses.replace(config, overrides=overrides))
    adapters = jax.tree.map(
        lambda m: jnp.asarray(random(9, *m.shape)), mora_jax.init(plan, params=params)
    )
    return params, adapters


@pytest.mark.slow
@pytest.mark.parametrize("operator", CHANGING)
def test_the_function_stays_and_the_rank_grows(operator):
    params, adapters = made(operator, alpha=0.5, scale="fine-tuning")
    first = jax.tree.map(np.asarray, params)
    tx, expected = optax.adam(1e-3), jax.tree.map(wide, params)
    ranks = []
    for k in range(4):
        adapters = jax.tree.map(lambda m, k=k: random(20 + k, *m.shape), adapters)
        delta = mora_jax.delta_weight(adapters)
        for name in SIZES:
            expected[name]["kernel"] += wide(delta[name]["kernel"])
        bias = params["a"]["bias"]
        params, zeros, _ = remora.restart(params, adapters, tx.init(adapters), tx)
        assert params["a"]["bias"] is bias
        close(params, expected)
        assert not any(m.any() for m in jax.tree.leaves(zeros))
        shapes = (jax.tree.map(jnp.shape, bare(tree)) for tree in (zeros, adapters))
        assert next(shapes) == next(shapes)
        adapters = zeros
        learned = wide(params["a"]["kernel"]) - first["a"]["kernel"]
        ranks.append(int(np.linalg.matrix_rank(learned, tol=1e-3)))
    assert ranks == sorted(ranks)
    if not adapters["a"]["kernel_mora"].operator.block:
        assert ranks[0] == 4 < ranks[-1]


def test_the_cycle_of_groups_is_the_references():
    params, adapters = made("sharing")
    found, tx = [], optax.sgd(1.0)
    for _ in range(5):
        adapter = adapters["a"]["kernel_mora"]
        op = adapter.operator
        found.append(op.compress_groups[0] + op.decompress_groups[0])
        assert adapter.m.shape == adapter.spec.shape == (4, 4)
        params, adapters, _ = remora.restart(params, adapters, tx.init(adapters), tx)
    assert found == ["ss", "cc", "cs", "sc", "ss"]


def seeds_of(tree):
    """The seeds of all operators, also of those that moments belong to."""
    adapters = jax.tree.leaves(tree, is_leaf=lambda a: isinstance(a, Adapter))
    found = [a for a in adapters if isinstance(a, Adapter)]
    return {a.operator.seed for a in found if a.of_kernel}


@pytest.mark.slow
@pytest.mark.parametrize("combined", [False, True])
def test_the_state_of_the_ms_is_reset_and_no_other(combined):
    """Counts of a schedule go on; Adam's own start again with its moments."""
    params, adapters = made(train="a/bias" if combined else ())
    schedule = optax.cosine_decay_schedule(1e-2, 100)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1)
    )
    trained = adapters
    if combined:
        trained = mora_jax.combine(params, adapters)
        tx = mora_jax.optimizer(tx, trained)
    state = tx.init(trained)
    for _ in range(3):
        _, state = tx.update(jax.tree.map(jnp.ones_like, trained), state, trained)
    after = remora.restart(params, adapters, state, tx).opt_state
    kept = jax.tree.unflatten(jax.tree.structure(after), jax.tree.leaves(state))
    assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, after)
    assert jax.tree.structure(bare(after)) == jax.tree.structure(bare(state))
    assert seeds_of(after) == {1} and seeds_of(state) == {0}
    before, now = (
        {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(s)}
        for s in (state, after)
    )
    for name, value in now.items():
        if "_mora" in name:
            assert before[name].any() and not value.any()
        elif ".count" in name:
            adams = ".mu" in str([n for n in now if n.startswith(name[:-6])])
            expected = 0 if adams and not combined else 3
            assert before[name] == 3 and value == expected, name
        else:
            np.testing.assert_array_equal(value, before[name])
    assert combined == any("bias" in name for name in now)


def test_optimizers_that_know_the_adapters_start_again():
    """A rate for each kernel by labels; and several steps in one, of a schedule."""
    params, adapters = made()
    rates = {"slow": optax.adam(1e-3), "fast": optax.adam(1e-2)}
    labels = jax.tree.map(lambda _: "slow", bare(adapters))
    labels["a"]["kernel_mora"] = "fast"
    tx = optax.transforms.partition(rates, labels)
    tx = optax.MultiSteps(tx, lambda step: jnp.where(step < 2, 1, 4))
    tx = tx.gradient_transformation()
    ones = jax.tree.map(jnp.ones_like, adapters)
    state = tx.init(adapters)
    for _ in range(4):
        _, state = tx.update(ones, state, adapters)
    assert (state.gradient_step, state.mini_step) == (2, 2)
    with pytest.warns(mora_jax.MoRAWarning, match="mini_step"):
        after = remora.restart(params, adapters, state, tx).opt_state
    assert jax.tree.structure(bare(after)) == jax.tree.structure(bare(state))
    assert (after.gradient_step, after.mini_step) == (2, 0)
    restarted = jax.tree.leaves((after.acc_grads, after.inner_opt_state))
    assert not any(map(np.any, restarted))


@_pytree.operator
class FromOnes(SignedDecoupling):
    """An operator whose trained array has a start of its own."""

    name = "from_ones"

    def start(self, stack, init, key, dtype):
        assert init == "zeros" and key is not None
        return jnp.ones((*stack, *self.m_shape), dtype)


def test_restarts_begin_as_the_operator_says():
    """In the adapters, in their dtype; and in what an optimizer keeps of them."""
    params, adapters = made("signed_decoupling")

    def with_start(adapter):
        spec = adapter.spec
        op = FromOnes(spec.in_features, spec.out_features, 4, seed=1)
        spec = dataclasses.replace(spec, operator=op)
        return adapter.replace(m=adapter.m.astype(jnp.bfloat16), spec=spec)

    adapters = jax.tree.map(
        with_start, adapters, is_leaf=lambda a: isinstance(a, Adapter)
    )
    tx = optax.contrib.schedule_free(optax.sgd(1e-2), 1e-2, b1=0.9)
    after = remora.restart(params, adapters, tx.init(adapters), tx)
    for m in jax.tree.leaves(after.adapters):
        assert m.dtype == jnp.bfloat16 and (m == 1).all()
    for z in jax.tree.leaves(after.opt_state.z):
        assert (z == 1).all()


@pytest.mark.slow
def test_small_deltas_add_up_in_16_bits():
    """Each restart rounds with another dither, where nearest would lose them all."""
    params, adapters = made("signed_decoupling", "bfloat16")
    first = adapters = jax.tree.map(lambda m: 0 * m + 1e-4, adapters)
    tx, total = optax.sgd(1.0), 0
    merged = params
    for _ in range(8):
        total += wide(mora_jax.delta_weight(adapters)["s"]["kernel"])
        merged, zeros, _ = remora.restart(merged, adapters, tx.init(adapters), tx)
        adapters = jax.tree.map(lambda m: m + 1e-4, zeros)
    change = wide(merged["s"]["kernel"]) - wide(params["s"]["kernel"])
    assert merged["s"]["kernel"].dtype == jnp.bfloat16
    # Errors of one number cancel over restarts only if their dithers differ.
    assert share_lost(change, total) < 0.5
    nearest = mora_jax.merge(params, first, rounding="nearest")
    change = wide(nearest["s"]["kernel"]) - wide(params["s"]["kernel"])
    assert share_lost(change, total) > 0.9


@pytest.mark.slow
def test_a_saved_run_goes_on_as_it_would_have(tmp_path):
    """The adapters say where in the cycle a run is."""
    params, adapters = made("sharing")
    tx = optax.adam(1e-2)
    x = random(3, 5, 12)

    def loss(adapters, params):
        kernels = mora_jax.fold(params, adapters)
        return jnp.sum(jnp.sin(x @ kernels["a"]["kernel"]))

    def run(after, restarts):
        for _ in range(restarts):
            params, adapters, state = after
            for _ in range(3):
                grads = jax.grad(loss)(adapters, params)
                updates, state = tx.update(grads, state)
                adapters = optax.apply_updates(adapters, updates)
            after = remora.restart(params, adapters, state, tx)
        return after

    start = remora.Restarted(params, adapters, tx.init(adapters))
    whole, half = run(start, 4), run(start, 2)
    mora_jax.save(tmp_path / "run", half.adapters, params=half.params)
    adapters = mora_jax.load(tmp_path / "run", half.params)
    # The state from a file gets its meaning from the adapters that it is restored for.
    stored = flax.serialization.to_state_dict(half.opt_state)
    state = flax.serialization.from_state_dict(tx.init(adapters), stored)
    with pytest.raises(ValueError, match="another base|other weights|trained on"):
        remora.restart(params, adapters, state, tx)
    remora.restart(params, adapters, state, tx, any_base=True)
    resumed = run(remora.Restarted(half.params, adapters, state), 2)
    assert_same(resumed, whole)


def test_under_jit():
    params, adapters = made()
    tx = optax.adam(1e-3)

    @jax.jit
    def restarted(params, adapters, state):
        return remora.restart(params, adapters, state, tx)

    state = tx.init(adapters)
    direct = remora.restart(params, adapters, state, tx)
    close(restarted(params, adapters, state), direct)


def test_a_model_of_nnx():
    """Its states go in and come out, also into the model that it was wrapped in."""
    x, operator = random(0, 3, 16), "signed_decoupling"
    config = MoRAConfig(operator=operator, square_rank=4)
    model = mora_jax.nnx.wrap(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), config)
    params, adapters = (
        nnx.state(model, kind)
        for kind in (nnx.All(nnx.Param, nnx.Not(MoRAParam)), MoRAParam)
    )
    adapters = jax.tree.map(lambda m: m + 0.1, adapters)
    nnx.update(model, adapters)
    expected, tx = model(x), optax.adam(1e-3)
    state = tx.init(adapters)
    after = remora.restart(params, adapters, state, tx)
    nnx.update(model, after.params, after.adapters)
    close(model(x), expected)
    assert mora_jax.nnx.plan_of(model)["kernel"].operator.seed == 1
    updates, _ = tx.update(after.adapters, after.opt_state)
    assert jax.tree.structure(updates) == jax.tree.structure(after.adapters)


@pytest.mark.slow
def test_the_optimizer_of_a_model_of_nnx_goes_on():
    """As with a state of optax: its schedule counts on, its moments start again."""
    x, tx = random(0, 3, 8), optax.adam(optax.linear_schedule(0.1, 0.0, 10))
    config = MoRAConfig(operator="signed_decoupling", square_rank=2)
    layers = [nnx.Linear(8, 8, rngs=nnx.Rngs(k)) for k in range(11)]  # 10 is not 1, 0
    base = nnx.Sequential(*layers)
    model = mora_jax.nnx.wrap(base, config)
    opt = mora_jax.nnx.adapter_optimizer(model, tx)
    grad = mora_jax.nnx.value_and_grad(lambda model: jnp.mean((model(x) - 1) ** 2))
    opt.update(model, grad(model)[1])
    expected = model(x)
    adapters, params = nnx.state(model, MoRAParam), nnx.state(base, nnx.Param)
    after = remora.restart(params, adapters, opt.opt_state, tx)
    nnx.update(model, after.params, after.adapters)
    close(model(x), expected, 1e-5)
    opt.opt_state = nnx.data(after.opt_state)
    adam, schedule = opt.opt_state
    assert int(adam.count[...]) == 0 and int(schedule.count[...]) == 1
    assert not any(map(np.any, jax.tree.leaves((adam.mu, adam.nu))))
    opt.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, MoRAParam)))
    for m in jax.tree.leaves(mora_jax.nnx.adapters(model)):
        close(m, np.full((2, 2), -0.09), 1e-5)  # the first step of Adam, by 0.1 - 0.01


def test_on_a_mesh():
    """Kernels stay split as they were."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "model"))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp", "model"))
    kernel = jax.device_put(random(0, 16, 32), sharding)
    params, tx = {"kernel": kernel}, optax.adam(1e-3)
    for operator in ("sharing", "signed_decoupling"):
        plan = mora_jax.plan(params, MoRAConfig(operator=operator, square_rank=4))
        plan = mora_jax.sharding.on_mesh(plan, params, batch_axes=("fsdp",))
        adapters = jax.tree.map(lambda m: m + 0.1, mora_jax.init(plan))
        after = remora.restart(params, adapters, tx.init(adapters), tx)
        assert after.params["kernel"].sharding == sharding
        close(after.params, mora_jax.merge(params, adapters))
        assert after.adapters["kernel_mora"].spec.layout == plan["kernel"].layout


@pytest.mark.usefixtures("unchecked")
def test_bad_input():
    params, adapters = made()
    tx = optax.adam(1e-3)
    state = tx.init(adapters)
    with pytest.raises(ValueError, match="rotation has the same maps after each"):
        same = made("rotation")[1]
        remora.restart(params, same, tx.init(same), tx)
    with pytest.raises(ValueError, match="opt_state must be a state of tx"):
        remora.restart(params, adapters, optax.sgd(1.0).init(adapters), tx)
    with pytest.raises(TypeError, match="tx must be an optax transformation"):
        remora.restart(params, adapters, state, "adam")
    with pytest.raises(
        TypeError, match="adapters must hold adapters, .* are params swapped"
    ):
        remora.restart(params, params, state, tx)
    combined = mora_jax.combine(params, adapters)
    with pytest.raises(ValueError, match="params hold the adapter .* give the base"):
        remora.restart(combined, adapters, state, tx)
    broken = jax.tree.map(lambda m: m * np.nan, adapters)
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        remora.restart(params, broken, state, tx)
