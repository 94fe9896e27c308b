"""Restarts along new gradients, and what they learned as one adapter."""

import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_files import assert_same
from flax import nnx
from helpers import bare, close, random, wide
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import mora_jax
from mora_jax import MoRAConfig, Plan, gradient_bases, linen, remora
from mora_jax._layer.rounding import share_lost
from mora_jax._tree.paths import adapters_in
from mora_jax.nnx import MoRAParam

SIZES = {"a": (12, 12), "b": (12, 8), "s": (3, 8, 12)}
TX = optax.adam(1e-2)


def gradients(seed):
    return {name: {"kernel": random(seed, *size)} for name, size in SIZES.items()}


def made(dtype="float32"):
    """Params with biases, and a plan along a gradient."""
    params = jax.tree.map(lambda k: jnp.asarray(k, dtype), gradients(0))
    params["a"]["bias"] = jnp.ones(2)
    overrides = {"s/kernel": {"axes": "sio"}}
    config = MoRAConfig(square_rank=4, operator="orthogonal", overrides=overrides)
    return params, gradient_bases(gradients(1), mora_jax.plan(params, config))


def moved(plan, seed, size=1.0):
    start = mora_jax.init(plan)
    return jax.tree.map(lambda m: jnp.asarray(size * random(seed, *m.shape)), start)


def renew(params, adapters, seed, **settings):
    args = params, adapters, TX.init(adapters), TX
    return remora.restart(*args, grads=lambda _: gradients(seed), **settings)


def plan_of(adapters):
    return Plan({path: a.spec for path, a in adapters_in(adapters).items()})


def test_the_function_stays_and_the_rank_grows():
    params, plan = made()
    first, ranks = jax.tree.map(wide, params), []
    expected = jax.tree.map(wide, params)
    for k in range(3):
        adapters = moved(plan, 20 + k)
        delta = mora_jax.delta_weight(adapters)
        for name in SIZES:
            expected[name]["kernel"] += wide(delta[name]["kernel"])
        old, bias = plan, params["a"]["bias"]
        params, zeros, state = renew(params, adapters, 30 + k)
        assert params["a"]["bias"] is bias
        close(params, expected)
        plan = gradient_bases(gradients(30 + k), old)
        assert plan_of(zeros).parts == plan.parts != old.parts
        assert plan_of(state[0].mu).parts == plan.parts
        assert not any(m.any() for m in jax.tree.leaves((zeros, state)))
        difference = wide(params["a"]["kernel"]) - first["a"]["kernel"]
        ranks.append(int(np.linalg.matrix_rank(difference, tol=1e-3)))
    assert ranks == [4, 8, 12]


def test_gradients_are_of_the_merged_params():
    params, plan = made()
    adapters, seen = moved(plan, 5), []

    def pairs(merged):
        seen.append(merged)
        return ((f"{k}/kernel", g["kernel"]) for k, g in gradients(6).items())

    args = params, adapters, TX.init(adapters), TX
    after = remora.restart(*args, grads=pairs)
    (merged,) = seen
    assert all(map(operator.is_, *map(jax.tree.leaves, (merged, after.params))))
    assert plan_of(after.adapters).parts == gradient_bases(gradients(6), plan).parts


def test_on_a_mesh():
    """Kernels stay split as they were, and the model computes as on one device."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "model"))
    split = NamedSharding(mesh, PartitionSpec("fsdp", "model"))
    model, x = nn.Dense(16, use_bias=False), random(0, 8, 32)
    whole = {"kernel": jnp.asarray(random(1, 32, 16))}
    config = MoRAConfig(square_rank=4, operator="orthogonal")
    plain = gradient_bases(whole, mora_jax.plan(whole, config))
    adapters = moved(plain, 2)
    new = {"kernel": jnp.asarray(random(3, 32, 16))}
    args = adapters, TX.init(adapters), TX
    expected = remora.restart(whole, *args, grads=lambda _: new)
    params, new = jax.device_put((whole, new), split)
    adapters = mora_jax.sharding.on_mesh(adapters, params, batch_axes=("fsdp",))
    layout, args = adapters["kernel_mora"].spec.layout, (adapters, *args[1:])
    apply = linen.wrap(model, plain)
    for grads in (new, jax.device_put(new, jax.devices()[0])):
        after = remora.restart(params, *args, grads=lambda _, g=grads: g)
        close(after.params, expected.params)
        assert after.params["kernel"].sharding == split
        renewed = after.adapters["kernel_mora"]
        assert renewed.spec.layout == layout is not None
        ms = {"kernel_mora": renewed.replace(m=random(4, 4, 4))}

        def mean(adapters, params=after.params):
            return jnp.mean(apply(adapters, {"params": params}, x) ** 2)

        with jax.set_mesh(mesh):
            found = jax.jit(jax.value_and_grad(mean))(ms)
        # Directions are unique but for their signs.
        merged = mora_jax.merge(after.params, ms)
        close(found[0], jnp.mean((x @ merged["kernel"]) ** 2), 1e-4)
        ways = wide(renewed.operator.in_basis)
        others = wide(expected.adapters["kernel_mora"].operator.in_basis)
        close(ways @ ways.T, others @ others.T, 1e-4)


def test_all_renewals_share_the_programs():
    """Of the sums, and of a step that takes the plan and bare arrays."""
    model, x = nn.Dense(12), random(0, 5, 12)
    variables = {"params": {"kernel": random(1, 12, 12), "bias": jnp.zeros(12)}}
    config = MoRAConfig(square_rank=4, operator="orthogonal")
    plan = gradient_bases(variables["params"], linen.plan(model, variables, config, x))
    params, adapters = variables["params"], mora_jax.init(plan)

    @jax.jit
    def gradient(ms, params, plan):
        def loss(ms):
            adapters = plan.adapters(ms)
            y = linen.wrap(model, plan)(adapters, {"params": params}, x)
            return jnp.mean((y - 1) ** 2)

        return jax.value_and_grad(loss)(ms)

    losses, added = [], remora._dithered._cache_size()
    for k in range(3):
        plan, ms = plan_of(adapters), bare(adapters)
        state = TX.init(ms)
        for _ in range(3):
            loss, grads = gradient(ms, params, plan)
            updates, state = TX.update(grads, state)
            ms = optax.apply_updates(ms, updates)
            losses.append(float(loss))
        adapters = plan.adapters(ms)
        args = params, adapters, TX.init(adapters), TX
        new = {"kernel": random(10 + k, 12, 12)}
        params, adapters, _ = remora.restart(*args, grads=lambda _, g=new: g)
    assert losses == sorted(losses, reverse=True)
    assert gradient._cache_size() == 1 and remora._dithered._cache_size() <= added + 1


def test_small_deltas_add_up_in_16_bits():
    """Each is below the last place of most numbers, and each has another dither."""

    # Of 128 x 128 numbers the dither loses or adds 3% in the mean; one dither for all
    # restarts, or rounding to nearest, would lose nearly all.
    def grads(seed):
        return {"a": {"kernel": random(seed, 128, 128)}}

    params = jax.tree.map(lambda k: jnp.asarray(k, "bfloat16"), grads(0))
    config = MoRAConfig(square_rank=16, operator="orthogonal")
    plan = gradient_bases(grads(1), mora_jax.plan(params, config))
    first, total = wide(params["a"]["kernel"]), 0
    for k in range(8):
        adapters = moved(plan, 40 + k, 1e-4)
        total = total + wide(mora_jax.delta_weight(adapters)["a"]["kernel"])
        args = params, adapters, TX.init(adapters), TX
        after = remora.restart(*args, grads=lambda _, k=k: grads(50 + k))
        params, plan = after.params, plan_of(after.adapters)
    change = wide(params["a"]["kernel"]) - first
    assert share_lost(jnp.asarray(change), jnp.asarray(total)) < 0.3
    assert params["a"]["kernel"].dtype == jnp.bfloat16


def test_a_run_goes_on_in_the_middle_of_a_cycle(tmp_path):
    params, plan = made()
    params, zeros, _ = renew(params, moved(plan, 1), 2)
    adapters = moved(plan_of(zeros), 3)
    mora_jax.save(tmp_path / "a", adapters, params=params)
    again = mora_jax.load(tmp_path / "a", params)
    assert_same(*(renew(params, tree, 4) for tree in (adapters, again)))


def test_a_model_of_nnx_and_its_optimizer():
    model = nnx.Linear(12, 12, rngs=nnx.Rngs(0))
    config = MoRAConfig(square_rank=4, operator="orthogonal")
    plan = gradient_bases(
        {"kernel": random(1, 12, 12)}, mora_jax.nnx.plan(model, config)
    )
    wrapped = mora_jax.nnx.wrap(model, plan)
    nnx.update(wrapped, jax.tree.map(lambda m: m + 0.1, nnx.state(wrapped, MoRAParam)))
    optimizer = mora_jax.nnx.adapter_optimizer(wrapped, TX)
    x, new = random(2, 5, 12), {"kernel": random(3, 12, 12)}
    expected = wrapped(x)
    after = remora.restart(
        nnx.state(wrapped, nnx.All(nnx.Param, nnx.Not(MoRAParam))),
        nnx.state(wrapped, MoRAParam),
        optimizer.opt_state,
        TX,
        grads=lambda _: new,
    )
    nnx.update(wrapped, after.params, after.adapters)
    close(wrapped(x), expected)
    spec = wrapped.kernel_mora.spec
    assert spec.operator == gradient_bases(new, plan)["kernel"].operator
    assert spec.operator != plan["kernel"].operator
    nnx.update(wrapped, jax.tree.map(lambda m: m + 0.1, nnx.state(wrapped, MoRAParam)))
    delta = mora_jax.delta_weight(nnx.state(wrapped, MoRAParam))["kernel"]
    close(wrapped(x), expected + x @ wide(delta))


def test_bad_gradients():
    params, plan = made()
    adapters = moved(plan, 1)
    args = params, adapters, TX.init(adapters), TX
    with pytest.raises(TypeError, match="dict. object is not callable"):
        remora.restart(*args, grads=gradients(2))  # pyright: ignore
    with pytest.raises(ValueError, match="grads lack the kernel"):
        remora.restart(*args, grads=lambda _: {"a": gradients(2)["a"]})
    with pytest.raises(TypeError, match="must be a concrete array"):
        jax.jit(lambda a: renew(params, a, 2) and a)(adapters)
    with pytest.raises(ValueError, match=r"the same maps .* restart\(grads=...\)"):
        remora.restart(*args)


def learned(base, merged, adapters, **settings):
    adapters, lost = remora.learned(base, merged, adapters, **settings)
    return adapters, lost, mora_jax.delta_weight(adapters)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_learned_is_one_adapter(dtype, tmp_path):
    base, plan = made(dtype)
    params, last = base, moved(plan, 0, 0.1)
    for k in range(2):
        params, zeros, _ = renew(params, last, 10 + k)
        last = moved(plan_of(zeros), 1, 0.1)
    exact = {n: wide(params[n]["kernel"]) - wide(base[n]["kernel"]) for n in SIZES}
    adapters, lost, deltas = learned(base, params, last, max_error=0)
    assert set(lost.values()) == {0.0}
    close({name: d["kernel"] for name, d in deltas.items()}, exact, 1e-5)
    adapters, lost, deltas = learned(base, params, last, max_error=0.3)
    for name, delta in exact.items():
        op = adapters[name]["kernel_mora"].operator
        values = np.linalg.svd(delta, compute_uv=False).reshape(
            -1, min(delta.shape[-2:])
        )
        shares = [
            np.sqrt((v[op.square_rank :] ** 2).sum() / (v**2).sum()) for v in values
        ]
        fewer = [
            np.sqrt((v[op.square_rank - 1 :] ** 2).sum() / (v**2).sum()) for v in values
        ]
        assert lost[f"{name}/kernel"] == pytest.approx(max(shares), abs=1e-5)
        assert max(shares) <= 0.3 < max(fewer)
    mora_jax.save(tmp_path / "a", adapters, params=base)
    again = mora_jax.merge(base, mora_jax.load(tmp_path / "a", base))
    close(
        wide(again["a"]["kernel"]),
        wide(base["a"]["kernel"]) + wide(deltas["a"]["kernel"]),
        2e-2,
    )


@pytest.mark.usefixtures("unchecked")
def test_learned_arrays_and_kernels_that_stayed():
    params, _ = made()
    config = MoRAConfig(square_rank=4, targets="b/kernel", train="a/bias")
    start = mora_jax.init(mora_jax.plan(params, config), params=params)
    merged = {**params, "a": {**params["a"], "bias": jnp.full(2, 3.0)}}
    adapters, lost, deltas = learned(params, merged, start)
    assert lost == {"b/kernel": 0.0} and not deltas["b"]["kernel"].any()
    assert adapters["b"]["kernel_mora"].operator.square_rank == 1
    close(adapters["a"]["bias"].m, jnp.full(2, 3.0))
    both = mora_jax.merge(params, adapters)
    jax.tree.map(np.testing.assert_array_equal, both, merged)
    broken = {**params, "b": {"kernel": params["b"]["kernel"].at[0, 0].set(jnp.nan)}}
    for args, settings, message in (
        ((params, broken, start), {}, "delta of 'b/kernel' .*NaN"),
        ((params, {"a": params["a"]}, start), {}, "lack the kernel 'b/kernel'"),
        ((params, merged, start), {"max_error": 2.0}, "max_error must be from 0 to 1"),
        ((params, merged, start), {"max_error": np.nan}, "max_error must be"),
    ):
        with pytest.raises(ValueError, match=message):
            remora.learned(*args, **settings)
    shapes = jax.eval_shape(lambda: merged)
    for one, name in ((start, "a/bias"), ({"b": start["b"]}, "b/kernel")):
        with pytest.raises(TypeError, match=f"{name} in merged must be"):
            remora.learned(params, shapes, one)
    with pytest.raises(TypeError, match="concrete array"):
        jax.jit(lambda p: remora.learned(params, p, start)[0])(merged)
    with pytest.raises(TypeError, match="adapters must hold adapters, got"):
        remora.learned(params, merged, params)
