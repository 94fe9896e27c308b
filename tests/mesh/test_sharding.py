"""Adapters on a mesh: numbers as on one device, and no traffic but their own."""

import dataclasses
import functools
import itertools
import math
from itertools import repeat

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import assert_same, made, single, slow
from cases import CASES, KINDS, by_kind, in_turns
from jax.sharding import PartitionSpec as P
from meshes import (
    assert_close,
    assert_shardings,
    make_mesh,
    placed,
    put,
    sent,
    shardings,
    sums_of_m,
)
from platforms import as_if_on

import mora_jax
from mora_jax import Adapter, AdapterSpec, FrozenDense, MoRAConfig, mora_apply, sharding
from mora_jax.operators import OPERATORS, Truncation

MESH = make_mesh(data=2, fsdp=2, model=2)
EXPLICIT = make_mesh("Explicit", data=2, fsdp=2, model=2)
BATCH = ("fsdp", "data")
ALPHA = 0.75

SPLITS = {
    "columns": (P(None, "model"), P(BATCH), P(BATCH, None, "model")),
    "rows": (P("model"), P(BATCH, None, "model"), P(BATCH)),
    "fsdp": (P("fsdp"), P(BATCH), P(BATCH)),
    "fsdp-columns": (P("fsdp", "model"), P(BATCH), P(BATCH, None, "model")),
    "fsdp-rows": (P("model", "fsdp"), P(BATCH, None, "model"), P(BATCH)),
    "both": (P("model", "fsdp"), P("data", None, "model"), P("data", None, "fsdp")),
}
"""Of a kernel, its layer's inputs and outputs."""


def on(mesh, frozen, kernel, batch=BATCH):
    """The layer with what `on_mesh` makes of the kernel's specification."""
    plan = single(Truncation(32, 48, 1), path=("kernel",))
    plan = sharding.on_mesh(plan, {"kernel": kernel}, batch_axes=batch, mesh=mesh)
    return dataclasses.replace(frozen, layout=plan["kernel"].layout)


def layer(case, execution="activation", dtype="float32", q=12, dropout=0.0):
    """A layer without its kernel, its arrays, and by the oracle what it computes.

    The arrays are M, inputs, the kernel and the outputs' cotangent; the results are
    the output, and gradients by M and inputs.
    """
    normal, op = np.random.default_rng(0).standard_normal, case.make(32, 48, q)
    arrays = {"m": normal(op.m_shape), "x": normal((8, 3, 32))}
    arrays |= {"kernel": normal((32, 48)) / np.sqrt(32), "y": normal((8, 3, 48))}
    arrays = {name: np.asarray(array, dtype) for name, array in arrays.items()}
    m, x, kernel, y = (np.asarray(array, np.float64) for array in arrays.values())
    adapted = kernel + ALPHA * case.delta(op, m)
    by_m = ALPHA * case.m_gradient(op, m, x, y)
    settings = dict(alpha=ALPHA, dropout=dropout, execution=execution)
    frozen = FrozenDense(None, None, op, **settings)
    return frozen, arrays, (x @ adapted, by_m, y @ adapted.T)


def on_mesh(arrays, split, m_spec=None, mesh=MESH):
    kernel, x, y = SPLITS[split]
    return put(arrays, mesh, {"m": m_spec or P(), "x": x, "kernel": kernel, "y": y})


def apply_to(frozen, m, x, kernel):
    if frozen is None:
        return x @ kernel
    frozen, key = dataclasses.replace(frozen, kernel=kernel), jax.random.key(0)
    return mora_apply({"kernel_mora": m}, frozen, x, key=key)


def program(frozen, arrays, split=None):
    """For arrays that are arguments: the output, and gradients by M and inputs.

    Of the base if `frozen` is None. They are where `split` says, or as JAX likes.
    """

    def run(m, x, kernel, y):
        out, backward = jax.vjp(lambda m, x: apply_to(frozen, m, x, kernel), m, x)
        return out, *backward(y)

    _, x, y = SPLITS[split or "rows"]
    results = shardings((y, P(), x), MESH) if split else None
    return jax.jit(run, out_shardings=results).lower(**arrays).compile()


@functools.cache
def base_collectives(split):
    """Those of a layer without an adapter."""
    _, arrays, _ = layer(LABELLED["rotation"])
    return sent(program(None, on_mesh(arrays, split), split))


def assert_results(got, expected, dtype=jnp.float32):
    assert {array.dtype for array in got} == {jnp.dtype(dtype)}
    assert_close(got, expected, 2e-5 if dtype == jnp.float32 else 0.05)


def check_layer(case, split, m_spec=None, **settings):
    """The collectives of a layer on the mesh, whose numbers are the oracle's."""
    frozen, arrays, expected = layer(case, **settings)
    kernel, x, _ = SPLITS[split]
    frozen = on(MESH, frozen, kernel, BATCH if x[0] == BATCH else "data")
    arrays = on_mesh(arrays, split, m_spec)
    compiled = program(frozen, arrays, split)
    assert_results(compiled(**arrays), expected, arrays["x"].dtype)
    return sent(compiled)


LABELLED = {case.label: case for case in CASES}
BOTH_KINDS = ("sharing-strided-strided-normalised", "rotation")
"""One whose C(x) is short, and one that works on blocks."""
NORMAL = (BOTH_KINDS[0], *(name for name in OPERATORS if name in LABELLED))


DEFAULT = {
    *zip(NORMAL, itertools.cycle(("fsdp-columns", "fsdp-rows")), repeat("activation")),
    *itertools.product(BOTH_KINDS, ("fsdp-columns", "fsdp-rows"), ["activation"]),
    *itertools.product(BOTH_KINDS, ["both"], ["activation"]),
    *itertools.product(["rotation"], ("fsdp-rows", "both"), ["fold"]),
}
"""Each operator where inputs are split or where outputs are, by turns, and a fold."""
GATHERED = {
    "fsdp": ("all-gather", (32, 48)),
    "fsdp-columns": ("all-gather", (32, 24)),
    "fsdp-rows": ("all-gather", (16, 48)),
}
"""What a device has of a kernel while it is used. XLA may gather it part by part, or
gather the inputs, but not if it is folded. It may then gather a factor of the delta,
which is smaller."""
LAYERS = [
    one if one in DEFAULT else slow(*one)
    for one in itertools.product(LABELLED, SPLITS, ("activation", "fold"))
]


@pytest.mark.law
@pytest.mark.parametrize(("label", "split", "execution"), LAYERS)
def test_a_layer_is_as_on_one_device_without_hidden_traffic(label, split, execution):
    """M's gradient is added up; all else stays. Folds may gather a kernel once more."""
    case, base = LABELLED[label], base_collectives(split)
    found = check_layer(case, split, execution=execution)
    op = case.make(32, 48, 12)
    by_m = sums_of_m(op)
    allowed = {*by_m}
    if execution == "fold" and split in GATHERED:
        gather, (_, outs) = GATHERED[split]
        factor = gather, (op.square_rank, outs)
        allowed |= {*base, GATHERED[split], factor}
    else:  # what the base does stays, though a kernel may be gathered but once
        assert set(base) <= set(found)
    extra = found - base
    assert set(extra) <= allowed
    sent_of_m = sum(extra[kind] * math.prod(kind[1]) for kind in by_m)
    directions = getattr(op, "directions", None)
    thin = 0 if directions is None else directions.size // 32 * (32 + 48)
    assert sent_of_m <= 2 * (math.prod(op.m_shape) + thin)
    for kind in set(extra) - by_m - set(base):
        assert extra[kind] <= 2, extra


@pytest.mark.parametrize("split", ["columns", "rows", slow("fsdp-rows")])
def test_blocks_that_one_device_needs_are_summed_over_no_features(split):
    """Their gradients are summed over the rows of a batch, part by part."""
    case, (kernel, x, y) = LABELLED["block_diagonal"], SPLITS[split]
    frozen, arrays, expected = layer(case, q=8)
    frozen = on(MESH, frozen, kernel)
    spec = AdapterSpec(frozen.operator, (32, 48), alpha=ALPHA, layout=frozen.layout)
    known = {"kernel_mora": Adapter(arrays["m"], spec)}
    places = sharding.adapter_shardings(known, {"kernel": kernel}, mesh=MESH)
    m_spec = places["kernel_mora"].m.spec
    assert m_spec == P("model", None, None)

    def run(m, x, kernel, y):
        out, backward = jax.vjp(lambda m, x: apply_to(frozen, m, x, kernel), m, x)
        return out, *backward(y)

    args = on_mesh(arrays, split, m_spec)
    run = jax.jit(run, out_shardings=shardings((y, m_spec, x), MESH))
    compiled = run.lower(**args).compile()
    assert_results(compiled(**args), expected)
    ((_, shape), count), *others = (sent(compiled) - base_collectives(split)).items()
    here = math.prod(frozen.operator.m_shape) / MESH.shape["model"]
    assert not others and count * math.prod(shape) == here


@pytest.mark.parametrize(
    "label",
    ["rotation", slow("block_diagonal"), slow("decoupling")],
)
@pytest.mark.parametrize("split", ["fsdp-rows", slow("fsdp-columns"), slow("both")])
@pytest.mark.parametrize("execution", ["activation", slow("fold")])
def test_whole_blocks(label, split, execution):
    """q divides both widths, so that blocks may be slices.

    Under a dropout too, of nothing, with which layer and delta are never joined.
    """
    for dropout in (0.0, 1e-12):
        settings = dict(execution=execution, q=8, dropout=dropout)
        check_layer(LABELLED[label], split, **settings)


@pytest.mark.parametrize(
    "label", ["rotation", "sharing-strided-strided-normalised", slow("orthogonal")]
)
@pytest.mark.parametrize("split", ["fsdp-rows", slow("fsdp-columns"), slow("fsdp")])
def test_folds_of_a_tpu(label, split):
    """Each device folds its part of the kernel, and no whole kernel is ever folded."""
    with as_if_on("tpu"):
        extra = check_layer(LABELLED[label], split, execution="fold", q=8)
        extra -= base_collectives(split)
    allowed = {("all-reduce", (8, 8)), GATHERED[split]}
    assert set(extra) <= {*allowed, *base_collectives(split)}


@pytest.mark.parametrize("label", [slow("rotation"), "sharing-contiguous-strided"])
def test_bfloat16(label):
    check_layer(LABELLED[label], "fsdp-rows", dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    "label", [label if label in BOTH_KINDS else slow(label) for label in NORMAL]
)
def test_traffic_of_a_split_m(label):
    """M is gathered, and its gradient left where it is kept; nothing else moves."""
    whole, split = (
        check_layer(LABELLED[label], "fsdp-columns", spec) for spec in (P(), P("model"))
    )
    assert set(split - whole) == {
        ("all-gather", LABELLED[label].make(32, 48, 12).m_shape)
    }
    between = len(LABELLED[label].make(32, 48, 12).m_shape) - 2
    places = P("data", *[None] * between, "model")
    check_layer(LABELLED[label], "fsdp-rows", places)


def test_traffic_is_noticed():
    """Without a layout there is some, which is what `sharding.on_mesh` is for."""
    frozen, arrays, _ = layer(LABELLED["rotation"])
    compiled = program(frozen, on_mesh(arrays, "rows"), "rows")
    extra = sent(compiled) - base_collectives("rows")
    assert {kind for kind, _ in extra} > {"all-reduce"}


@by_kind
def test_explicit_sharding(case):
    """Types are enough: no layout is asked for, and nothing is folded."""
    op = case.make(32, 48, 12)
    allowed = sums_of_m(op) | {("all-reduce", (2, 3, 32))}  # that of the base
    if not op.block:
        allowed.add(("all-reduce", (2, 3, op.square_rank)))
    ways = ("activation", "auto", "fold") if case.label == "rotation" else ("auto",)
    for execution in ways:
        frozen, arrays, expected = layer(case, execution)
        with jax.set_mesh(EXPLICIT):
            arrays = on_mesh(arrays, "columns", mesh=EXPLICIT)
            compiled = program(frozen, arrays)
            got = _, by_m, by_x = compiled(**arrays)
        assert_results(got, expected)
        assert by_m.sharding.is_fully_replicated
        assert by_x.sharding.is_equivalent_to(arrays["x"].sharding, 3)
        assert set(sent(compiled)) <= allowed


@pytest.mark.law
@in_turns("case, execution", KINDS, ["activation", "fold"])
def test_in_a_shard_map_that_checks_types(case, execution):
    """Devices with rows of their own, as a step of data parallelism by hand."""
    frozen, arrays, expected = layer(case, execution)

    def run(m, x, kernel, y):
        out, backward = jax.vjp(lambda m, x: apply_to(frozen, m, x, kernel), m, x)
        return out, *backward(y)

    mesh = make_mesh(data=4)
    rows = P("data")
    specs = {"m": P(), "x": rows, "kernel": P(), "y": rows}
    local = jax.shard_map(
        run, mesh=mesh, in_specs=tuple(specs.values()), out_specs=(rows, P(), rows)
    )
    assert_results(jax.jit(local)(*(arrays[name] for name in specs)), expected)


def test_a_kernel_of_an_explicit_mesh_takes_inputs_without_types():
    """As layers do that have no adapter: of a plain batch, in a trace on the mesh."""
    frozen, arrays, (out, by_m, _) = layer(LABELLED[BOTH_KINDS[0]], "fold")

    @jax.jit
    def run(m, x, kernel, y):
        got, backward = jax.vjp(lambda m: apply_to(frozen, m, x, kernel), m)
        return got, *backward(y)

    with jax.set_mesh(EXPLICIT):
        placed = on_mesh(arrays, "columns", mesh=EXPLICIT) | {"x": arrays["x"]}
        placed["y"] = jax.device_put(arrays["y"], P(None, None, "model"))
        got = run(**placed)
    assert_close(got, (out, by_m))


PARAMS = {
    "layers": {
        "up": {"kernel": np.ones((4, 8, 16), np.float32)},
        "scale": np.ones((4, 8), np.float32),
    },
    "mlp": {"kernel": np.ones((8, 12), np.float32)},
}
CONFIG = MoRAConfig(
    operator="signed_decoupling",
    square_rank=4,
    overrides={"layers/.*": {"axes": "sio"}},
)
PLAN = mora_jax.plan(PARAMS, CONFIG)
SPECS = {
    "layers": {"up": {"kernel": P("fsdp", None, "model")}, "scale": P()},
    "mlp": {"kernel": P(BATCH)},
}
OF_M = {
    "layers": {"up": {"kernel_mora": P("fsdp", None, None)}},
    "mlp": {"kernel_mora": P(None, None)},
}
NAMED, EXPECTED = shardings(SPECS, MESH), shardings(OF_M, MESH)
RULES = (("layers", "fsdp"), ("mlp", "model"), ("embed", BATCH))


def boxed(kind, rules=()):
    """PARAMS in Linen's boxes, with other names for the axes that have rules."""
    names = {axis: name for name, axis in rules}

    def box(array, place):
        return kind(array, tuple(names.get(axis, axis) for axis in place.spec))

    return jax.tree.map(box, PARAMS, NAMED)


def test_shardings_of_adapters():
    """Whoever says where kernels are; stack axes are the kernel's, the rest whole."""
    said = NAMED, jax.device_put(PARAMS, NAMED), placed(PARAMS, NAMED), SPECS
    boxes = boxed(nn.Partitioned), boxed(nn.LogicallyPartitioned, RULES)
    with nn.logical_axis_rules(RULES):
        for tree in (*said, *boxes):
            found = sharding.adapter_shardings(PLAN, tree, mesh=MESH)
            assert leaves(found) == jax.tree.leaves(EXPECTED)
            adapters = mora_jax.init(PLAN)
            again = sharding.adapter_shardings(adapters, tree, mesh=MESH)
            assert leaves(again) == leaves(found)
            assert jax.tree.structure(again) == jax.tree.structure(adapters)
            plan, again = (
                sharding.on_mesh(PLAN, tree, batch_axes=BATCH, mesh=MESH)
                for _ in range(2)
            )
            layouts = [
                s.layout.mesh_axes for s in plan.values() if s.layout is not None
            ]
            assert layouts == [(("fsdp",), (), ("model",)), (BATCH, ())]
            assert hash(plan) == hash(again)
            laid = sharding.on_mesh(adapters, tree, batch_axes=BATCH, mesh=MESH)
            assert jax.tree.structure(laid) == jax.tree.structure(mora_jax.init(plan))
    adapters = jax.jit(lambda: mora_jax.init(PLAN), out_shardings=EXPECTED)()
    assert [m.sharding for m in jax.tree.leaves(adapters)] == leaves(EXPECTED)
    split = jax.tree.map(
        lambda place: jax.sharding.NamedSharding(
            MESH, P(*place.spec[:-2], None, "model")
        ),
        sharding.adapter_shardings(PLAN, NAMED),
    )
    specs = [m.sharding.spec for m in leaves(jax.device_put(adapters, split))]
    assert specs == [P("fsdp", None, "model"), P(None, "model")]


def leaves(tree):
    return jax.tree.leaves(tree)


ALL = ("data", "fsdp", "model")


def mlp(spec):
    return {**SPECS, "mlp": {"kernel": spec}}


@pytest.mark.parametrize(
    ("tree", "mesh", "error", "match"),
    [
        ({"mlp": SPECS["mlp"]}, MESH, ValueError, "lack the kernel 'layers/up/kernel'"),
        ({}, MESH, ValueError, "lack the kernel"),
        (mlp(None), MESH, ValueError, "lack the kernel 'mlp/kernel'"),
        (PARAMS, MESH, TypeError, "layers/up/kernel must have a NamedSharding"),
        (SPECS, None, ValueError, "mesh must be given"),
        (mlp(P("model", ALL)), MESH, ValueError, "mlp/kernel must be .*: .*model"),
        (mlp(P("layers")), MESH, ValueError, "mlp/kernel must be .* layers"),
        (mlp(P(None, ALL)), MESH, ValueError, "mlp/kernel must be split evenly"),
    ],
)
def test_refused(tree, mesh, error, match, unchecked):
    with pytest.raises(error, match=match):
        sharding.adapter_shardings(PLAN, tree, mesh=mesh)
    with pytest.raises(error, match=match):
        sharding.on_mesh(PLAN, tree, batch_axes=BATCH, mesh=mesh)


def test_refused_settings(unchecked):
    with pytest.raises(TypeError, match="batch_axes must be names .* got None"):
        sharding.on_mesh(PLAN, NAMED, batch_axes=None)
    free = mlp(P(P.UNCONSTRAINED, "model"))
    with pytest.raises(ValueError, match="must say which mesh axes split it"):
        sharding.adapter_shardings(PLAN, free, mesh=MESH)
    with pytest.raises(ValueError, match="batch_axes must be of the mesh's .*'rows'"):
        sharding.on_mesh(PLAN, NAMED, batch_axes="rows")
    with pytest.raises(TypeError, match="adapters must hold adapters, got ndarray"):
        sharding.adapter_shardings(PARAMS, NAMED)


def test_axes_of_one_device_split_nothing():
    """XLA's partitioner fails to add up over them, in a scan."""
    mesh = make_mesh(data=8, model=1)
    frozen, arrays, (y, _, _) = layer(LABELLED[BOTH_KINDS[0]])
    frozen = on(mesh, frozen, P("model", "data"), "data")
    x, kernel = arrays["x"], arrays["kernel"][None]
    x, kernel = put((x, kernel), mesh, (P("data"), P(None, "model", "data")))

    @jax.jit
    def run(ms, x, kernels):
        def one(x, each):
            return x, apply_to(frozen, each[0], x, each[1])

        return jax.lax.scan(one, x, (ms, kernels))[1]

    assert_close(run(arrays["m"][None], x, kernel), y[None], 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "dtype"),
    [
        pytest.param(MESH, "float32", id="auto-float32"),
        pytest.param(EXPLICIT, "bfloat16", id="explicit-bfloat16"),
        pytest.param(MESH, "bfloat16", id="auto-bfloat16", marks=pytest.mark.slow),
        pytest.param(
            EXPLICIT, "float32", id="explicit-float32", marks=pytest.mark.slow
        ),
    ],
)
def test_merges_where_the_kernel_is(mesh, dtype):
    """As on one device, and nothing is gathered."""
    whole = jax.tree.map(lambda kernel: jnp.asarray(kernel, dtype), PARAMS)
    expected = mora_jax.merge(whole, made(PLAN))
    tolerance = 1e-6 if dtype == "float32" else 1e-2  # a number may round otherwise
    places = shardings(SPECS, mesh)
    with jax.set_mesh(mesh):
        params = jax.device_put(whole, places)
        plan = sharding.on_mesh(PLAN, params, batch_axes=BATCH)
        adapter_places = sharding.adapter_shardings(PLAN, params)
        adapters = jax.device_put(made(PLAN), adapter_places)
        laid = sharding.on_mesh(adapters, params, batch_axes=BATCH)
        for given in (adapters, laid, made(PLAN), made(plan)):
            merged = mora_jax.merge(params, given)
            chex.assert_trees_all_close(merged, expected, rtol=tolerance)
            assert_shardings(merged, places)
        merge = jax.jit(mora_jax.fold, out_shardings=places)
        assert not sent(merge.lower(params, laid).compile())


def test_saved_from_a_mesh(tmp_path):
    """Files know nothing of meshes."""
    plan = sharding.on_mesh(PLAN, NAMED, batch_axes=BATCH)
    mora_jax.save(tmp_path, jax.device_put(made(plan), EXPECTED))
    back = mora_jax.load(tmp_path)
    assert_same(back, made(PLAN))
    assert_same(sharding.on_mesh(back, NAMED, batch_axes=BATCH), made(plan))


def test_other_devices_are_refused():
    frozen, arrays, _ = layer(LABELLED["rotation"])
    frozen = on(MESH, frozen, P(None, "model"))
    frozen = dataclasses.replace(frozen, kernel=arrays["kernel"])
    args = {"kernel_mora": arrays["m"]}, frozen, arrays["x"]
    with pytest.raises(ValueError, match="incompatible devices"):
        jax.jit(mora_apply)(*jax.device_put(args, jax.devices()[0]))


@pytest.mark.parametrize("split", ["rows", slow("columns")])
@pytest.mark.parametrize("label", ["rotation", slow("hadamard")])
def test_transformations(label, split):
    """Forward mode, second derivatives, a batch of M's, remat; and without jit."""
    case = LABELLED[label]
    frozen, arrays, (y, _, _) = layer(case)
    adapted = functools.partial(apply_to, on(MESH, frozen, SPLITS[split][0]))
    c, d = (jnp.asarray(one, jnp.float32) for one in case.matrices(frozen.operator))

    def dense(m, x, kernel):
        return x @ (kernel + ALPHA * jnp.einsum("inq,qr,nro->io", c, m, d))

    @functools.partial(jax.jit, static_argnums=0)
    def results(apply, m, x, kernel):
        def loss(m, x):
            return jnp.mean(jnp.sin(jax.checkpoint(apply)(m, x, kernel)))

        both, tangents = (m, x), (jnp.cos(m), jnp.cos(x))
        _, along = jax.jvp(loss, both, tangents)
        _, curved = jax.jvp(jax.grad(loss, argnums=(0, 1)), both, tangents)
        return along, curved, jax.vmap(loss, (0, None))(jnp.stack([m, 2 * m]), x)

    args = on_mesh(arrays, split)
    del arrays["y"], args["y"]
    assert_close(results(adapted, **args), results(dense, **arrays))
    np.testing.assert_allclose(adapted(**args), y, atol=1e-4)
