"""A different adapter for each row of a batch, which is as with that one alone."""

import contextlib
import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import slow
from cases import KINDS, in_turns
from flax import nnx
from helpers import bare, close, made_for, random, trained
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

MANY = "many adapters are for jax.vmap"
"""In the message where a model is called with them as if they were one."""


def several(plan, number=3, dtype=None):
    """Adapters as after training, each another."""
    first = trained(plan)
    return [
        jax.tree.map(lambda m, k=k: jnp.roll(m, k, -1).astype(dtype or m.dtype), first)
        for k in range(number)
    ]


def row_by_row(function, stacked, index, x):
    """`function` of an adapter and a batch, of each row with its adapter."""
    own = serving.select(stacked, index)
    return jax.vmap(lambda adapters, x: function(adapters, x[None])[0])(own, x)


def assert_rows_are_as_alone(case, tolerance=1e-5, dtype=None):
    """For all `INDICES`, by one compiled program, and for the base."""
    adapters, traces = several(case.plan, dtype=dtype), []
    stacked = serving.stack(adapters, slots=4)
    # A row and the same with other numbers; some twins have a batch of one, or none.
    x = jnp.stack([case.x, jnp.flip(case.x, -1)] if case.x.ndim else [case.x] * 2)

    @jax.jit
    def mapped(stacked, params, index, x):
        traces.append(None)
        own = serving.select(stacked, index)
        return jax.vmap(lambda a, x: case.adapted(params, a, x))(own, x)

    alone, base = jax.jit(case.adapted), jax.jit(case.base)
    rows = [
        (base(case.params, row), [alone(case.params, a, row) for a in adapters])
        for row in x
    ]
    for index in INDICES:
        own = [
            base if k < 0 else each[k]
            for k, (base, each) in zip(index, rows, strict=True)
        ]
        found = mapped(stacked, case.params, index, x)
        close(found, jax.tree.map(lambda *ys: jnp.stack(ys), *own), tolerance)
    assert len(traces) == 1


@pytest.mark.law
@pytest.mark.parametrize(
    ("name", "api"),
    [
        ("einsums", "linen"),
        ("scan-remat", "nnx"),
        ("bare-experts", "nnx"),
        ("tied", "linen"),
        *(
            slow(name, api)
            for name, twin in TWINS.items()
            for api in ("linen", "nnx")
            if getattr(twin, api)
        ),
    ],
)
def test_models(name, api):
    """Kernels of many axes, experts, scanned layers, convolutions, embeddings."""
    sixteen = "bfloat16" in name
    assert_rows_are_as_alone(case_of(name, api), 0.05 if sixteen else 2e-5)


def test_sixteen_bits():
    assert_rows_are_as_alone(case_of("dense-bfloat16", "linen"), 0.02, jnp.bfloat16)


class Layers(nn.Module):
    """A look-up, a convolution and a dense layer."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 24, name="table")(ids)
        x = nn.tanh(nn.Conv(24, (3,), name="conv")(x))
        return nn.Dense(36, name="dense")(x)


@pytest.mark.law
@in_turns("case, platform", KINDS, ["cpu", "tpu"])
def test_every_kind_of_operator(case, platform):
    """Also as chips compute it, and with the gradients by the slots."""
    settings = {"operator": case.spec, "square_rank": 10, "alpha": 0.5}
    model, ids = Layers(), jnp.arange(12).reshape(4, 3) % 11
    variables = made_for(model, ids)
    config = MoRAConfig(targets=".*", **settings)
    plan = linen.plan(model, variables, config, ids)
    assert len(plan) == 3
    apply, adapters, weights = linen.wrap(model, plan), several(plan), random(3, 4, 36)
    stacked, index = serving.stack(adapters), np.array([2, 0, -1, 2])

    def loss(stacked):
        run = lambda adapters, ids: apply(adapters, variables, ids)  # noqa: E731
        y = row_by_row(run, stacked, index, ids)
        return jnp.sum(weights[:, None] * y), y

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_alone(adapters, row, weights):
        y = apply(adapters, variables, row[None])[0]
        return jnp.sum(weights * y), y

    alone = jax.jit(loss_alone)
    by_m = jax.tree.map(jnp.zeros_like, adapters)
    expected = np.array(model.apply(variables, ids))
    for b, k in enumerate(index):
        if k >= 0:
            (_, expected[b]), own = alone(adapters[k], ids[b], weights[b])
            by_m[k] = jax.tree.map(jnp.add, by_m[k], own)
    by_slots = serving.stack(by_m)
    with as_if_on(platform) if platform != "cpu" else contextlib.nullcontext():
        (_, y), slots = jax.jit(jax.value_and_grad(loss, has_aux=True))(stacked)
    close((y, jax.tree.leaves(slots)), (expected, jax.tree.leaves(by_slots)), 1e-4)


ROWS, TOKENS, INS, OUTS = 3, 640, 24, 36
KERNEL = {"kernel": random(1, INS, OUTS)}


def programs_of(execution, operator="rotation"):
    """Programs of rows of many tokens: with slots, with one adapter, and a gradient."""
    config = MoRAConfig(operator=operator, square_rank=10, execution=execution)
    apply = linen.wrap(nn.Dense(OUTS, use_bias=False), mora_jax.plan(KERNEL, config))
    adapters, x = several(apply.plan), random(0, ROWS, TOKENS, INS)
    index, slots = jnp.array([2, 0, -1]), serving.stack(adapters)

    def run(adapters, x):
        return apply(adapters, {"params": KERNEL}, x)

    def mapped(slots, x):
        return row_by_row(run, slots, index, x)

    def loss(slots, x):
        return jnp.sum(jnp.tanh(mapped(slots, x)))

    one, many = jax.jit(run).lower(adapters[0], x), jax.jit(mapped).lower(slots, x)
    gradient = jax.jit(jax.grad(loss, (0, 1))).lower(slots, x)
    return (
        *(lowered.as_text() for lowered in (one, many, gradient)),
        many.compile()(slots, x),
        jax.tree.leaves(gradient.compile()(slots, x)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["rotation", "orthogonal", "low_rank"])
def test_no_kernel_is_folded_for_each_row(operator):
    """Where one adapter for all of these tokens would be folded."""
    kernels = f"tensor<{ROWS}x{INS}x{OUTS}x"
    one, mapped, gradient, y, by = programs_of("auto", operator)
    assert "optimization_barrier" in one or "bitcast_convert" in one  # it is folded
    assert kernels not in mapped and kernels not in gradient
    _, folded, _, y_folded, by_folded = programs_of("fold", operator)
    assert kernels in folded
    close((y, by), (y_folded, by_folded), 1e-4)


def test_float64_and_forward_mode(float64):
    x, params = random(0, 2, 12, dtype=np.float64), {"kernel": random(1, 12, 16)}
    plan = mora_jax.plan(
        params,
        MoRAConfig(operator="signed_decoupling", square_rank=4, param_dtype="float64"),
    )
    apply = linen.wrap(nn.Dense(16, use_bias=False, param_dtype=x.dtype), plan)
    params = jax.tree.map(lambda w: w.astype(x.dtype), params)
    adapters = several(plan)
    stacked = serving.stack(adapters)

    def run(adapters, x):
        return apply(adapters, {"params": params}, x)

    def mapped(stacked):
        return row_by_row(run, stacked, [2, 0], x)

    y, change = jax.jvp(mapped, (stacked,), (stacked,))
    rows = [run(adapters[k], x)[b] for b, k in enumerate([2, 0])]
    close(y, jnp.stack(rows), 1e-13)
    close(change, y - x @ params["kernel"], 1e-13)


def test_dropout_is_that_of_one_adapter():
    x, params = random(0, 2, 3, 12), {"kernel": random(1, 12, 16)}
    plan = mora_jax.plan(
        params, MoRAConfig(operator="signed_decoupling", square_rank=4, dropout=0.5)
    )
    apply, adapters = linen.wrap(nn.Dense(16, use_bias=False), plan), several(plan)
    rest = {"rngs": {"dropout": jax.random.key(0)}, "adapter_deterministic": False}

    def run(adapters, x):
        return apply(adapters, {"params": params}, x, **rest)

    y = row_by_row(run, serving.stack(adapters), [2, 0], x)
    alone = [run(adapters[k], x[b : b + 1])[0] for b, k in enumerate([2, 0])]
    close(y, jnp.stack(alone))


@pytest.mark.slow
def test_a_cache_is_mapped():
    """Rows are decoded token by token, each with its adapter and its part of it."""
    model = nn.MultiHeadDotProductAttention(num_heads=2, decode=True)
    x, index = random(0, 3, 4, 8), np.array([2, 0, -1])
    variables = made_for(model, x[:1])
    config = MoRAConfig(operator="signed_decoupling", square_rank=4)
    plan = linen.plan(model, variables, config, x[:1, :1], mutable=["cache"])
    apply, adapters = linen.wrap(model, plan), several(plan)
    empty = jax.tree.map(jnp.zeros_like, variables["cache"])

    @jax.jit
    def step(adapters, cache, x):
        given = {"params": variables["params"], "cache": cache}
        y, updated = apply(adapters, given, x[None, None], mutable=["cache"])
        return y[0, 0], updated["cache"]

    own = serving.select(serving.stack(adapters), index)
    many = jax.tree.map(lambda c: jnp.stack([c] * 3), empty)
    alone = [*adapters, mora_jax.init(plan)]  # the last one is what -1 takes
    caches = [empty] * 3
    for token in np.moveaxis(x, 1, 0):
        y, many = jax.jit(jax.vmap(step))(own, many, token)
        for row, k in enumerate(index):
            expected, caches[row] = step(alone[k], caches[row], token[row])
            close(y[row], expected)


@pytest.mark.law
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
            one = lambda a, x: adapted(a, {"params": params}, x)  # noqa: E731
            return row_by_row(one, stacked, index, x)

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
    MoRAConfig(
        operator="signed_decoupling",
        square_rank=4,
        overrides={"s/kernel": {"axes": "sio"}},
    ),
)
OTHER = dataclasses.replace(
    PLAN, parts={p: dataclasses.replace(s, alpha=0.5) for p, s in PLAN.specs.items()}
)


def test_slots_are_before_layers():
    adapters = several(PLAN)
    stacked = serving.stack(adapters, slots=5)
    one, other = stacked["a"]["kernel_mora"], stacked["s"]["kernel_mora"]
    assert (one.m.shape, other.m.shape) == ((5, 4, 4), (5, 3, 4, 4))
    assert (one.spec, other.spec) == (PLAN["a/kernel"], PLAN["s/kernel"])
    assert not other.m[3:].any()
    empty = serving.stack([mora_jax.init(PLAN)], slots=2)
    assert not any(map(np.any, jax.tree.leaves(empty)))


@functools.partial(jax.jit, donate_argnums=0)
def replaced(stacked, slot, adapters):
    """As docs/many-adapters.md has it."""
    return jax.tree.map(lambda slots, m: slots.at[slot].set(m), stacked, adapters)


def test_a_slot_is_replaced_in_place_by_one_program():
    adapters = several(PLAN)
    stacked = serving.stack(adapters[:2], slots=3)
    before = jax.tree.leaves(stacked)
    stacked = replaced(stacked, 2, adapters[2])
    assert all(m.is_deleted() for m in before)
    stacked = replaced(replaced(stacked, 0, adapters[1]), 1, adapters[0])
    assert replaced._cache_size() == 1
    order = serving.stack([adapters[k] for k in (1, 0, 2)])
    chex.assert_trees_all_equal(stacked, order)
    chex.assert_trees_all_equal(replaced(stacked, 3, adapters[0]), order)


def test_adapters_of_another_meaning_or_shape_go_into_no_slot():
    stacked, (one,) = serving.stack(several(PLAN)), several(PLAN, 1)
    for other in (
        mora_jax.init(OTHER),
        {"a": one["a"]},
        jax.tree.map(lambda m: m[..., :2], one),
    ):
        with pytest.raises(ValueError):
            replaced(stacked, 0, other)
    with pytest.raises(ValueError):
        replaced(one, 0, one)


def test_what_a_file_knows_of_its_base_goes_into_a_slot_as_well():
    (one,) = several(PLAN, 1)
    spec = dataclasses.replace(PLAN["a/kernel"], base_digest=("x",))
    loaded = one | {"a": {"kernel_mora": one["a"]["kernel_mora"].replace(spec=spec)}}
    expected = serving.stack([mora_jax.init(PLAN), one])
    for adapters in (loaded, PLAN.adapters(loaded)):
        stacked = serving.stack([mora_jax.init(PLAN)], slots=2)
        after = replaced(stacked, 1, adapters)
        chex.assert_trees_all_equal(after, expected)
        assert after["a"]["kernel_mora"].spec.base_digest is None


def test_no_rows_are_none():
    stacked = serving.stack(several(PLAN))
    assert serving.select(stacked, [])["a"]["kernel_mora"].m.shape == (0, 4, 4)


def test_a_slot_that_a_compiled_function_does_not_have_is_none():
    stacked, adapters = serving.stack(several(PLAN)), several(PLAN)
    chosen = jax.jit(serving.select)(stacked, jnp.array([-7, 3, 1, 99]))
    zeros = jax.tree.map(jnp.zeros_like, adapters[1])
    chex.assert_trees_all_equal(
        chosen, serving.stack([zeros, zeros, adapters[1], zeros])
    )


def test_in_nnx_many_train_by_their_slots():
    """Each gets the gradient that it has alone, on its rows."""
    x, settings = (
        random(0, 3, 8),
        MoRAConfig(operator="signed_decoupling", square_rank=4),
    )
    model = mora.wrap(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), settings)
    adapters = several(mora.plan_of(model))
    stacked = serving.stack(adapters)

    def run(adapters, x):
        own = nnx.clone(model)
        mora.set_adapters(own, adapters)
        return own(x)

    def loss(stacked, index):
        return jnp.sum(row_by_row(run, stacked, index, x) ** 2)

    (found,) = jax.tree.leaves(jax.jit(jax.grad(loss))(stacked, jnp.array([2, -1, 2])))
    alone = jax.grad(lambda adapters: jnp.sum(run(adapters, x[::2]) ** 2))(adapters[2])
    close(found[2], jax.tree.leaves(alone)[0])
    assert not found[:2].any()


def test_in_nnx_variables_are_mapped():
    """`nnx.split` gives the adapters of a model as its variables."""
    case = case_of("scan-remat", "nnx")
    model = mora.wrap(nnx_model(TWINS["scan-remat"]), case.plan)
    graph, held, rest = nnx.split(model, mora.MoRAParam, ...)
    states = [jax.tree.map(lambda m, k=k: m + k, held) for k in range(2)]
    many = jax.tree.map(lambda *ms: jnp.stack(ms), *states)

    def run(adapters, x):
        return nnx.merge(graph, adapters, rest, copy=True)(x)

    mapped = jax.jit(jax.vmap(lambda adapters, x: run(adapters, x[None])[0]))
    rows = [run(a, case.x)[k] for k, a in enumerate(states)]
    close(mapped(many, case.x), jnp.stack(rows), 2e-5)


@pytest.mark.parametrize("rows", [2, 3])
def test_a_model_that_is_not_mapped_refuses_many(rows, tmp_path):
    """Also where there are as many as a kernel has layers, or a batch rows."""
    adapters, x = several(PLAN), random(0, rows, 12)
    many = serving.select(serving.stack(adapters), np.arange(rows))
    of_a = {"a": many["a"]}
    layer = mora_jax.plan(
        {"kernel": PARAMS["a"]["kernel"]},
        MoRAConfig(operator="signed_decoupling", square_rank=4),
    )
    one, own = many["a"], {"params": PARAMS["a"]}
    for call in (
        lambda: linen.wrap(nn.Dense(16, use_bias=False), layer)(one, own, x),
        lambda: mora_jax.merge(PARAMS, many),
        lambda: mora_jax.fold(PARAMS, many),
        lambda: mora_jax.unmerge(PARAMS, many),
        lambda: mora_jax.io.save(tmp_path, many, params=PARAMS),
        lambda: mora_jax.io.save(tmp_path, of_a, params=PARAMS),
    ):
        with pytest.raises(ValueError, match=f"kernel.*{MANY}"):
            call()
    deltas = mora_jax.delta_weight(many)["s"]["kernel"]
    close(deltas[1], mora_jax.delta_weight(adapters[1])["s"]["kernel"])
    model = mora.wrap(
        nnx.Linear(12, 16, rngs=nnx.Rngs(0)),
        MoRAConfig(operator="signed_decoupling", square_rank=4),
    )
    with pytest.raises(ValueError, match=MANY):
        mora.set_adapters(model, many["a"])
    nnx.update(model, {"kernel_mora": many["a"]["kernel_mora"].m})
    for call in (lambda: model(x), lambda: mora.merge_adapters(model)):
        with pytest.raises(ValueError, match=f"kernel.*{MANY}"):
            call()


def with_other_number(stacked):
    """A tree in which a kernel has three slots."""
    one = stacked["a"]["kernel_mora"]
    return {**stacked, "a": {"kernel_mora": one.replace(m=one.m[:3])}}


def test_adapters_of_two_bases_are_refused():
    """Those that know no base are of any, and the slots know the one that is known."""
    one, other = several(PLAN, 2)

    def of_base(adapters, digest):
        adapter = adapters["a"]["kernel_mora"]
        spec = dataclasses.replace(adapter.spec, base_digest=(digest,))
        return adapters | {"a": {"kernel_mora": adapter.replace(spec=spec)}}

    stacked = serving.stack([one, of_base(other, "x")])
    assert stacked["a"]["kernel_mora"].spec.base_digest == ("x",)
    with pytest.raises(ValueError, match="of one base, got .* 'a/kernel'"):
        serving.stack([of_base(one, "x"), of_base(other, "y")])


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
            "have nothing at 's/kernel', the .* a kernel",
        ),
        (
            lambda s, a: serving.stack([a[0], mora_jax.init(OTHER)]),
            ValueError,
            "a/kernel_mora was made for alpha 0.5, not 1.0",
        ),
        (
            lambda s, a: serving.stack([jax.tree.map(lambda m: m / 0, a[0])]),
            ValueError,
            "holds NaN",
        ),
        (lambda s, a: serving.select(s, [0, 4]), ValueError, "from -1 to 3, got 4"),
        (lambda s, a: serving.select(s, 3), TypeError, "one for each row"),
        (lambda s, a: serving.select(s, [[0], [0, 1]]), TypeError, "one for each row"),
        (lambda s, a: serving.select(a[0], [0]), ValueError, "stacked must be .*slots"),
        (lambda s, a: serving.select({**s, **a[0]}, [0]), ValueError, "slots"),
        (lambda s, a: serving.select(bare(s), [0]), TypeError, "stacked must be"),
        (lambda s, a: serving.select(with_other_number(s), [0]), ValueError, "3, 4"),
    ],
)
def test_bad_input(call, error, message, unchecked):
    adapters = several(PLAN)
    with pytest.raises(error, match=message):
        call(serving.stack(adapters, slots=4), adapters)


def test_trained_arrays_are_refused():
    plan = mora_jax.plan(PARAMS, MoRAConfig(rank=1, train="s/kernel", exclude="s/.*"))
    adapters = mora_jax.init(plan, params=PARAMS)
    with pytest.raises(ValueError, match="s/kernel: this array is trained .* share it"):
        serving.stack([adapters], slots=2)
