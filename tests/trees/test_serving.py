"""A different adapter for each row of a batch, which is as with that one alone."""

import dataclasses
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_files import slow
from cases import by_kind
from flax import nnx
from helpers import bare, close, random, trained
from jax.sharding import PartitionSpec as P
from meshes import make_mesh, put, shardings
from platforms import as_if_on
from programs import case_of
from twins import TWINS, nnx_model

import mora_jax
from mora_jax import MoRAConfig, linen, serving, sharding
from mora_jax import nnx as mora

INDICES = np.array([[0, 2], [2, -1], [1, 1]], np.int32)
"""Of batches of two rows; three adapters are in four slots."""


def several(plan, number=3, dtype=None):
    """Adapters as after training, each another."""
    first = trained(plan)
    return [
        jax.tree.map(lambda m, k=k: jnp.roll(m, k, -1).astype(dtype or m.dtype), first)
        for k in range(number)
    ]


def assert_rows_are_as_alone(case, tolerance=1e-5, dtype=None):
    """For all `INDICES`, by one compiled program."""
    adapters, traces = several(case.plan, dtype=dtype), []
    stacked = serving.stack(adapters, slots=4)

    @jax.jit
    def by_row(stacked, params, index, x):
        traces.append(None)
        return case.adapted(params, serving.select(stacked, index), x)

    @jax.jit
    def alone(adapters, params, x):
        return case.base(params, x), [case.adapted(params, a, x) for a in adapters]

    base, each = alone(adapters, case.params, case.x)
    for index in INDICES:
        own = [base[b] if k < 0 else each[k][b] for b, k in enumerate(index)]
        close(by_row(stacked, case.params, index, case.x), jnp.stack(own), tolerance)
    assert np.abs(np.asarray(each[0] - base, np.float32)).max() > 5e-3
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("name", "api"),
    [
        ("einsums", "linen"),
        ("scan-remat", "nnx"),
        slow("scan-remat", "linen"),
        slow("einsums", "nnx"),
        slow("groups", "linen"),
        slow("two-batches", "nnx"),
        slow("tied", "linen"),
        slow("scan-scan", "linen"),
        slow("jit", "linen"),
    ],
)
def test_models(name, api):
    """Kernels of many axes, experts, scanned layers, convolutions, embeddings."""
    assert_rows_are_as_alone(case_of(name, api))


def test_sixteen_bits():
    assert_rows_are_as_alone(case_of("dense-bfloat16", "linen"), 0.02, jnp.bfloat16)


@by_kind
def test_every_kind_of_operator(case):
    """One layer, also as chips compute it, and its gradients by slots and input."""
    config = MoRAConfig(operator=case.spec, square_rank=10, alpha=0.5)
    model, x = nn.Dense(36), random(0, 4, 3, 24)
    params = {"kernel": random(1, 24, 36), "bias": random(2, 36)}
    plan = mora_jax.plan(params, config)
    apply, adapters, weights = linen.wrap(model, plan), several(plan), random(3, 4, 36)
    stacked, index = serving.stack(adapters), np.array([2, 0, -1, 2])

    def loss(stacked, x):
        y = apply(serving.select(stacked, index), {"params": params}, x)
        return jnp.sum(weights[:, None] * y), y

    def loss_alone(adapters, x):
        rows = [
            apply(adapters[k], {"params": params}, row) if k >= 0 else row @ w + bias
            for k, row in zip(index, x, strict=True)
        ]
        return jnp.sum(weights[:, None] * jnp.stack(rows)), jnp.stack(rows)

    w, bias = params["kernel"], params["bias"]
    derive = {"argnums": (0, 1), "has_aux": True}
    (_, expected), (by_m, by_x) = jax.jit(jax.value_and_grad(loss_alone, **derive))(
        adapters, x
    )
    by_slots = jax.tree.map(lambda *ms: jnp.stack(ms), *by_m)["kernel_mora"].m
    for platform in ("cpu", "tpu"):
        with as_if_on(platform):
            run = jax.jit(jax.value_and_grad(loss, **derive))
            (_, y), (slots, back) = run(stacked, x)
        got = y, slots["kernel_mora"].m.m, back
        close(got, (expected, by_slots, by_x))


def test_float64_and_forward_mode(float64):
    x, params = random(0, 2, 12, dtype=np.float64), {"kernel": random(1, 12, 16)}
    plan = mora_jax.plan(params, MoRAConfig(square_rank=4, param_dtype="float64"))
    apply = linen.wrap(nn.Dense(16, use_bias=False, param_dtype=x.dtype), plan)
    params = jax.tree.map(lambda w: w.astype(x.dtype), params)
    adapters = several(plan)
    stacked = serving.stack(adapters)

    def by_row(stacked):
        return apply(serving.select(stacked, [2, 0]), {"params": params}, x)

    y, change = jax.jvp(by_row, (stacked,), (stacked,))
    rows = [apply(adapters[k], {"params": params}, x)[b] for b, k in enumerate([2, 0])]
    close(y, jnp.stack(rows), 1e-13)
    close(change, y - x @ params["kernel"], 1e-13)


def test_dropout_is_that_of_one_adapter():
    x, params = random(0, 2, 3, 12), {"kernel": random(1, 12, 16)}
    plan = mora_jax.plan(params, MoRAConfig(square_rank=4, dropout=0.5))
    apply, adapters = linen.wrap(nn.Dense(16, use_bias=False), plan), several(plan)
    rest = {"rngs": {"dropout": jax.random.key(0)}, "adapter_deterministic": False}
    selected = serving.select(serving.stack(adapters), [2, 0])
    y = apply(selected, {"params": params}, x, **rest)
    alone = [apply(adapters[k], {"params": params}, x, **rest) for k in (2, 0)]
    close(y, jnp.stack([alone[0][0], alone[1][1]]))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("operator", ["sharing", "rotation"])
def test_meshes(kind, operator):
    """Rows on some axes and features on others."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(32, name="up")(x)
            return x if kind == "Explicit" else nn.Dense(16, name="down")(nn.gelu(x))

    model, x, mesh = Model(), random(0, 4, 3, 16), make_mesh(kind, data=4, model=2)
    kernels = {"up": random(1, 16, 32), "down": random(2, 32, 16)}
    specs = {"up": P(None, "model"), "down": P("model", None)}
    if kind == "Explicit":  # where sums over devices must be asked for
        del kernels["down"]
    params = {k: {"kernel": w, "bias": w[0]} for k, w in kernels.items()}
    places = {k: {"kernel": specs[k], "bias": P(specs[k][1])} for k in kernels}
    plan = mora_jax.plan(params, MoRAConfig(operator=operator, square_rank=4))
    adapters, index = several(plan), np.array([2, 0, -1, 2])

    def apply(plan):
        adapted = linen.wrap(model, plan)

        def run(stacked, params, index, x):
            selected = serving.select(stacked, index)
            return adapted(selected, {"params": params}, x)

        return jax.jit(run)

    stacked = serving.stack(adapters)
    expected = apply(plan)(stacked, params, index, x)
    if kind == "Auto":
        where, settings = shardings(places, mesh), {"batch_axes": "data", "mesh": mesh}
        adapters = [sharding.on_mesh(one, where, **settings) for one in adapters]
        stacked = serving.stack(adapters)
    params = put(params, mesh, places)
    x, index = put((x, index), mesh, (P("data"), P("data")))
    stacked = jax.device_put(stacked, jax.NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        close(np.asarray(apply(plan)(stacked, params, index, x)), np.asarray(expected))


PARAMS = {"a": {"kernel": random(0, 12, 16)}, "s": {"kernel": random(1, 3, 8, 12)}}
PLAN = mora_jax.plan(
    PARAMS,
    MoRAConfig(square_rank=4, overrides={"s/kernel": {"axes": "sio"}}),
)
OTHER = dataclasses.replace(
    PLAN, parts={p: dataclasses.replace(s, alpha=0.5) for p, s in PLAN.specs.items()}
)


def test_slots_are_behind_layers():
    adapters = several(PLAN)
    stacked = serving.stack(adapters, slots=5)
    one, other = stacked["a"]["kernel_mora"], stacked["s"]["kernel_mora"]
    assert (one.m.shape, other.m.shape) == ((5, 4, 4), (3, 5, 4, 4))
    assert (one.spec, other.spec) == (PLAN["a/kernel"], PLAN["s/kernel"])
    assert not other.m.m[:, 3:].any()
    empty = serving.stack([mora_jax.init(PLAN)], slots=2)
    assert not any(map(np.any, jax.tree.leaves(empty)))


def test_a_slot_is_replaced_in_place_by_one_program():
    adapters = several(PLAN)
    stacked = serving.stack(adapters[:2], slots=3)
    before = jax.tree.leaves(stacked)
    stacked = serving.put(stacked, 2, adapters[2])
    assert all(m.is_deleted() for m in before)
    programs = serving._put._cache_size
    before, stacked = programs(), serving.put(stacked, jnp.int32(0), adapters[1])
    stacked = serving.put(stacked, 1, adapters[0])
    assert programs() == before
    order = [adapters[k] for k in (1, 0, 2)]
    chex.assert_trees_all_equal(stacked, serving.stack(order))
    same = jax.jit(serving.put, static_argnums=1)(stacked, 2, adapters[2])
    chex.assert_trees_all_equal(same, serving.stack(order))


def test_a_slot_that_a_compiled_function_does_not_have_changes_nothing():
    adapters = several(PLAN)
    put = jax.jit(serving.put)
    for slot in (-4, -1, 3, 7):
        stacked = serving.stack(adapters)
        chex.assert_trees_all_equal(put(stacked, jnp.int32(slot), adapters[0]), stacked)
    changed = put(serving.stack(adapters), jnp.int32(1), adapters[0])
    order = [adapters[k] for k in (0, 0, 2)]
    chex.assert_trees_all_equal(changed, serving.stack(order))


def test_no_number_becomes_infinite_in_a_slot():
    adapters = several(PLAN)
    half = [jax.tree.map(lambda m: m.astype(jnp.float16), one) for one in adapters]
    stacked = serving.stack(half)
    large = jax.tree.map(lambda m: m * 0 + 1e6, adapters[0])
    with pytest.raises(ValueError, match="infinity in float16, the dtype of the slots"):
        serving.put(stacked, 0, large)
    chex.assert_trees_all_equal(stacked, serving.stack(half))


def test_no_rows_are_none():
    stacked = serving.stack(several(PLAN))
    assert serving.select(stacked, [])["a"]["kernel_mora"].m.rows == 0


def test_in_nnx_many_train_by_their_slots_and_not_by_the_model():
    """Each gets the gradient that it has alone, on its rows."""
    x, settings = random(0, 2, 8), MoRAConfig(square_rank=4)
    model = mora.wrap(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), settings)
    plan = mora.plan_of(model)
    adapters, parts = several(plan), nnx.split(model)
    stacked = serving.stack(adapters)

    def loss(stacked, index):
        own = nnx.merge(*parts, copy=True)
        mora.set_adapters(own, serving.select(stacked, index))
        return jnp.sum(own(x) ** 2)

    grads = jax.grad(loss)(stacked, jnp.array([2, -1]))

    def alone(adapters):
        own = nnx.merge(*parts, copy=True)
        mora.set_adapters(own, adapters)
        return jnp.sum(own(x)[0] ** 2)

    (expected,) = jax.tree.leaves(jax.grad(alone)(adapters[2]))
    (found,) = jax.tree.leaves(grads)
    close(found[2], expected)
    assert not found[:2].any()
    mora.set_adapters(model, serving.select(stacked, [0, 1]))
    for call in (
        lambda: mora.adapter_optimizer(model, optax.sgd(0.1)),
        lambda: mora.value_and_grad(lambda model: jnp.sum(model(x)))(model),
    ):
        with pytest.raises(ValueError, match="one for each row .* serving.stack"):
            call()


def test_in_a_compiled_function_of_nnx_the_model_is_changed():
    case, traces = case_of("scan-remat", "nnx"), []
    model = mora.wrap(nnx_model(TWINS["scan-remat"]), case.plan)
    adapters = several(case.plan)
    stacked = serving.stack(adapters)
    mora.set_adapters(model, serving.select(stacked, [-1, -1]))

    @nnx.jit
    def apply(model, stacked, index, x):
        traces.append(None)
        mora.set_adapters(model, serving.select(stacked, index))
        return model(x)

    ys = [apply(model, stacked, index, case.x) for index in INDICES]
    assert len(traces) == 1 and mora.plan_of(model) == case.plan
    mora.set_adapters(model, adapters[2])
    close(ys[0][1], model(case.x)[1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, a: serving.stack(PLAN), TypeError, "must be a sequence .* got Plan"),
        (lambda s, a: serving.stack([PLAN]), TypeError, "got the Plan: adapters are"),
        (lambda s, a: serving.stack([bare(a[0])]), TypeError, "plan.adapters"),
        (lambda s, a: serving.stack(a[0]), TypeError, "must be a sequence .* got dict"),
        (lambda s, a: serving.stack([], slots=2), ValueError, "one at least, such as"),
        (lambda s, a: serving.stack(a, slots=2), ValueError, "at least .* 3"),
        (
            lambda s, a: serving.stack([a[0], {"a": a[0]["a"]}]),
            ValueError,
            "of the same kernels, and 's/kernel' is not",
        ),
        (
            lambda s, a: serving.stack([a[0], mora_jax.init(OTHER)]),
            ValueError,
            "a/kernel_mora was made for alpha 0.5, not 1.0",
        ),
        (
            lambda s, a: serving.put(s, 0, mora_jax.init(OTHER)),
            ValueError,
            "a/kernel_mora was made for alpha 0.5, not 1.0",
        ),
        (lambda s, a: serving.put(s, 4, a[0]), ValueError, "from 0 to 3, got 4"),
        (lambda s, a: serving.put(s, -1, a[0]), ValueError, "from 0 to 3, got -1"),
        (lambda s, a: serving.put(s, 0.5, a[0]), TypeError, "slot must be integers"),
        (lambda s, a: serving.put(a[0], 0, a[0]), TypeError, "stacked must be"),
        (
            lambda s, a: serving.put(s, 0, {"a": a[0]["a"]}),
            ValueError,
            "of the same kernels, and 's/kernel' is not",
        ),
        (
            lambda s, a: serving.put(s, 0, jax.tree.map(lambda m: m / 0, a[0])),
            ValueError,
            "holds NaN",
        ),
        (
            lambda s, a: serving.put(s, 0, jax.tree.map(lambda m: m[..., :2], a[0])),
            ValueError,
            "must have shape",
        ),
        (lambda s, a: serving.select(s, [0, 4]), ValueError, "from -1 to 3, got 4"),
        (lambda s, a: serving.select(s, 3), ValueError, "an integer for each row"),
        (lambda s, a: serving.select(a[0], [0]), TypeError, "stacked must be"),
        (lambda s, a: mora_jax.delta_weight(s), TypeError, "serving.select"),
        (
            lambda s, a: mora_jax.delta_weight(serving.select(s, [0])),
            TypeError,
            "only linen.wrap and nnx.set_adapters",
        ),
    ],
)
def test_bad_input(call, error, message, unchecked):
    adapters = several(PLAN)
    with pytest.raises(error, match=message):
        call(serving.stack(adapters, slots=4), adapters)


@pytest.mark.parametrize(
    ("name", "api", "message"),
    [
        ("generals", "linen", "batched/kernel: axis 1 .* (2, 3, 2, 5)"),
        ("bare-experts", "nnx", "up: the layer reads its kernel .*products.Folded"),
    ],
)
def test_layers_without_rows_are_refused(name, api, message):
    case = case_of(name, api)
    stacked = serving.stack(several(case.plan))
    with pytest.raises(ValueError, match=re.sub(r"([()])", r"\\\1", message)):
        case.adapted(case.params, serving.select(stacked, [0, 1]), case.x)


def test_trained_arrays_are_refused():
    plan = mora_jax.plan(PARAMS, MoRAConfig(rank=1, train="s/kernel", exclude="s/.*"))
    adapters = mora_jax.init(plan, params=PARAMS)
    with pytest.raises(ValueError, match="s/kernel: this array is trained .* share it"):
        serving.stack([adapters], slots=2)
