"""Adapters on a mesh: numbers as on one device, and no traffic but their own."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, FEW_CASES
from collectives import collectives
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mora_jax
from mora_jax import FrozenDense, MoRAConfig, mora_apply, sharding
from mora_jax.layout import Layout
from mora_jax.operators import OPERATORS

P = PartitionSpec
MESH = jax.make_mesh(
    (2, 2, 2), ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3
)
BATCH = ("data", "fsdp")

SPLITS = {
    "columns": (P(None, "model"), P(BATCH), P(BATCH, None, "model")),
    "rows": (P("model"), P(BATCH, None, "model"), P(BATCH)),
    "fsdp": (P("fsdp"), P(BATCH), P(BATCH)),
    "fsdp-columns": (P("fsdp", "model"), P(BATCH), P(BATCH, None, "model")),
    "fsdp-rows": (P("model", "fsdp"), P(BATCH, None, "model"), P(BATCH)),
    "both": (P("model", "fsdp"), P("data", None, "model"), P("data", None, "fsdp")),
}
"""Of a kernel, its layer's inputs and outputs."""


def put(array, spec, mesh=MESH):
    return jax.device_put(array, NamedSharding(mesh, spec))


def constrain(array, spec):
    return jax.lax.with_sharding_constraint(array, NamedSharding(MESH, spec))


def layout(split):
    """What `sharding.plan_on_mesh` makes of the kernel's specification."""
    kernel, x, _ = SPLITS[split]
    batch = BATCH if x[0] == BATCH else ("data",)
    entries = [*kernel, *[None] * (2 - len(kernel))]
    axes = tuple(() if e is None else (e,) for e in reversed(entries))
    return Layout(MESH, axes, batch)


def layer(case, split, execution, ins=32, outs=48, q=12, dtype=jnp.float32):
    """A layer with its arguments, whole and as the mesh splits them."""
    rng = np.random.default_rng(0)
    op = case.make(ins, outs, q)
    arrays = {
        "m": rng.standard_normal((q, q)),
        "x": rng.standard_normal((8, 3, ins)),
        "kernel": rng.standard_normal((ins, outs)) / np.sqrt(ins),
        "y": rng.standard_normal((8, 3, outs)),
    }
    arrays = {name: jnp.asarray(a, dtype) for name, a in arrays.items()}
    kernel, x, y = SPLITS[split]
    specs = {"m": P(), "x": x, "kernel": kernel, "y": y}
    split_arrays = {name: put(a, specs[name]) for name, a in arrays.items()}
    frozen = FrozenDense(arrays["kernel"], None, op, alpha=0.75, execution=execution)
    return frozen, arrays, split_arrays


def step(frozen, x_spec, y_spec):
    """Output, and gradients by M and x, of arrays that are arguments."""

    def run(m, x, kernel, y):
        def apply(m, x):
            one = dataclasses.replace(frozen, kernel=kernel)
            return constrain(mora_apply({"kernel_mora": m}, one, x), y_spec)

        out, backward = jax.vjp(apply, m, x)
        by_m, by_x = backward(y)
        return out, constrain(by_m, P()), constrain(by_x, x_spec)

    return jax.jit(run)


def base_step(x_spec, y_spec):
    """The same without an adapter."""

    def run(x, kernel, y):
        out, backward = jax.vjp(lambda x: constrain(x @ kernel, y_spec), x)
        return out, constrain(backward(y)[0], x_spec)

    return jax.jit(run)


NORMAL = [
    case
    for case in CASES
    if case.label in ("sharing-strided-strided-normalised", *OPERATORS)
]
by_split = pytest.mark.parametrize("split", SPLITS)


def check_layer(case, split, execution, dtype=jnp.float32, m_spec=None, **sizes):
    frozen, arrays, on_mesh = layer(case, split, execution, dtype=dtype, **sizes)
    on_mesh["m"] = put(arrays["m"], m_spec or P())
    _, x_spec, y_spec = SPLITS[split]
    expected = step(frozen, P(), P())(**arrays)
    frozen = dataclasses.replace(frozen, layout=layout(split))
    got = step(frozen, x_spec, y_spec)(**on_mesh)
    tolerance = 2e-5 if dtype == jnp.float32 else 0.05
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(a, np.float64) for a in (one, other))
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize("case", FEW_CASES, ids=lambda case: case.label)
@pytest.mark.parametrize("split", ["columns", "rows"])
def test_layer_is_as_on_one_device(case, split):
    check_layer(case, split, "activation")


@pytest.mark.slow
@pytest.mark.parametrize("case", NORMAL, ids=lambda case: case.label)
@pytest.mark.parametrize("execution", ["activation", "fold"])
@pytest.mark.parametrize("split", ["fsdp-columns", "fsdp-rows", "both"])
def test_layer_is_as_on_one_device_whatever_the_split(case, split, execution):
    check_layer(case, split, execution)
    check_layer(case, split, execution, ins=48, outs=16, q=8)  # blocks on one shard


@by_split
def test_folds_are_as_on_one_device(split):
    (case,) = (case for case in CASES if case.label == "rotation")
    check_layer(case, split, "fold")


@pytest.mark.parametrize("split", ["columns", "fsdp-rows"])
def test_m_may_be_split(split):
    (case,) = (case for case in CASES if case.label == "rotation")
    check_layer(case, split, "activation", m_spec=P("data", "model"))


@pytest.mark.parametrize("label", ["rotation", "sharing-contiguous-strided"])
def test_bfloat16(label):
    (case,) = (case for case in CASES if case.label == label)
    check_layer(case, "fsdp-rows", "activation", jnp.bfloat16)


def traffic(case, split, execution, known):
    """The collectives of a layer, and those that its adapter adds."""
    frozen, _, on_mesh = layer(case, split, execution)
    _, x_spec, y_spec = SPLITS[split]
    arrays = [on_mesh[name] for name in ("x", "kernel", "y")]
    base = collectives(base_step(x_spec, y_spec).lower(*arrays).compile())
    frozen = dataclasses.replace(frozen, layout=layout(split) if known else None)
    program = step(frozen, x_spec, y_spec).lower(**on_mesh).compile()
    # What the base does stays, though an adapted layer may gather a kernel but once.
    assert set(base) <= set(collectives(program))
    return base, collectives(program) - base


by_operator = pytest.mark.parametrize("case", NORMAL, ids=lambda case: case.label)


@by_operator
@pytest.mark.parametrize(
    "execution", ["activation", pytest.param("fold", marks=pytest.mark.slow)]
)
@by_split
def test_no_hidden_traffic(case, split, execution):
    """M's gradient is added up, and C(x) where features are split; all else stays.

    Block operators add up nothing but that gradient. Folds gather a kernel once more.
    """
    base, extra = traffic(case, split, execution, known=True)
    q, rows = 12, 4 if split == "both" else 2  # of one device
    allowed = {("all-reduce", (q, q))}
    split_features = {"columns", "rows"} & set(split.split("-")) or split == "both"
    if split_features and not case.make(32, 48, q).block:
        allowed.add(("all-reduce", (rows, 3, q)))
    if execution == "fold" and layout(split).gathers:
        allowed |= set(base)
    assert set(extra) <= allowed
    for kind, count in extra.items():
        assert count <= 2 or kind in base, kind


@by_operator
def test_traffic_of_a_split_m(case):
    """M is gathered, and its gradient left where it is kept; nothing else moves."""
    frozen, _, on_mesh = layer(case, "fsdp-columns", "activation")
    _, x_spec, y_spec = SPLITS["fsdp-columns"]
    frozen = dataclasses.replace(frozen, layout=layout("fsdp-columns"))
    one = step(frozen, x_spec, y_spec)
    whole = collectives(one.lower(**on_mesh).compile())
    on_mesh["m"] = put(np.asarray(on_mesh["m"]), P("model"))
    split = collectives(one.lower(**on_mesh).compile())
    assert set(split - whole) == {("all-gather", (12, 12))}


def test_traffic_is_noticed():
    """Without a layout there is some, which is what `sharding.plan_on_mesh` is for."""
    (rotation,) = (case for case in NORMAL if case.label == "rotation")
    _, extra = traffic(rotation, "rows", "activation", known=False)
    assert {kind for kind, _ in extra} > {"all-reduce"}


PARAMS = {
    "layers": {"up": {"kernel": jnp.ones((4, 8, 16))}, "scale": jnp.ones((4, 8))},
    "mlp": {"kernel": jnp.ones((8, 12))},
}
CONFIG = MoRAConfig(square_rank=4, overrides={"layers/.*": {"axes": "sio"}})
PLAN = mora_jax.plan(PARAMS, CONFIG)
SPECS = {
    "layers": {"up": {"kernel": P("fsdp", None, "model")}, "scale": P()},
    "mlp": {"kernel": P(("data", "fsdp"))},
}
EXPECTED = {
    "layers": {"up": {"kernel_mora": NamedSharding(MESH, P("fsdp", None, None))}},
    "mlp": {"kernel_mora": NamedSharding(MESH, P(None, None))},
}
is_spec = {"is_leaf": lambda leaf: isinstance(leaf, PartitionSpec)}


def boxes(kind):
    """PARAMS in Linen's boxes."""
    return jax.tree.map(lambda spec, p: kind(p, tuple(spec)), SPECS, PARAMS, **is_spec)


def test_shardings_of_adapters():
    """Whoever says where kernels are; stack axes are the kernel's, the rest whole."""
    named = jax.tree.map(lambda spec: NamedSharding(MESH, spec), SPECS, **is_spec)
    placed = jax.device_put(PARAMS, named)
    shapes = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), PARAMS, named
    )
    for tree in (named, placed, shapes, SPECS, boxes(nn.Partitioned)):
        found = sharding.adapter_shardings(PLAN, tree, mesh=MESH)
        assert found == EXPECTED
        plan = sharding.plan_on_mesh(PLAN, tree, batch_axes=BATCH, mesh=MESH)
        layouts = [spec.layout for spec in plan.specs]
        assert [one and one.axes for one in layouts] == [
            (("model",), (), ("fsdp",)),
            ((), BATCH),
        ]
        assert hash(plan) == hash(
            sharding.plan_on_mesh(PLAN, tree, batch_axes=BATCH, mesh=MESH)
        )
    adapters = jax.device_put(mora_jax.init(PLAN), EXPECTED)
    assert (
        adapters["layers"]["up"]["kernel_mora"].sharding
        == EXPECTED["layers"]["up"]["kernel_mora"]
    )
    made = jax.jit(lambda: mora_jax.init(PLAN), out_shardings=EXPECTED)()
    assert jax.tree.map(lambda m: m.sharding, made) == EXPECTED


def test_logical_names_follow_their_rules():
    logical = jax.tree.map(
        lambda p: nn.LogicallyPartitioned(p, ("layers", "embed", "mlp")[: p.ndim]),
        PARAMS,
    )
    with nn.logical_axis_rules((("layers", "fsdp"), ("embed", None), ("mlp", "model"))):
        found = sharding.adapter_shardings(PLAN, logical, mesh=MESH)
    assert found["layers"] == EXPECTED["layers"]


def test_square_can_be_split():
    found = sharding.adapter_shardings(PLAN, SPECS, mesh=MESH, square=(None, "model"))
    assert found["mlp"]["kernel_mora"].spec == P(None, "model")
    adapters = jax.device_put(mora_jax.init(PLAN), found)
    shapes = jax.tree.map(lambda m: m.addressable_shards[0].data.shape, adapters)
    assert shapes["mlp"]["kernel_mora"] == (4, 2)
    assert shapes["layers"]["up"]["kernel_mora"] == (2, 4, 2)


@pytest.mark.parametrize(
    ("tree", "settings", "error", "match"),
    [
        ({"mlp": SPECS["mlp"]}, {}, ValueError, "lack the kernel 'layers/up/kernel'"),
        ({}, {}, ValueError, "lack the kernel"),
        (PARAMS, {}, TypeError, "layers/up/kernel must have a NamedSharding"),
        (SPECS, {"mesh": None}, ValueError, "mesh must be given"),
        (
            {**SPECS, "mlp": {"kernel": P("model", ("data", "fsdp", "model"))}},
            {},
            ValueError,
            "mlp/kernel|model",
        ),
        ({**SPECS, "mlp": {"kernel": P("layers")}}, {}, ValueError, "layers"),
        (
            {**SPECS, "mlp": {"kernel": P(None, ("data", "fsdp", "model"))}},
            {},
            ValueError,
            "mlp/kernel",
        ),
        ({**SPECS, "mlp": {"kernel": None}}, {}, ValueError, "lack the kernel"),
    ],
)
def test_refused(tree, settings, error, match, unchecked):
    settings = {"mesh": MESH, **settings}
    with pytest.raises(error, match=match):
        sharding.adapter_shardings(PLAN, tree, **settings)
    with pytest.raises(error, match=match):
        sharding.plan_on_mesh(PLAN, tree, batch_axes=BATCH, **settings)


def test_refused_settings(unchecked):
    with pytest.raises(ValueError, match="batch_axes must be of the mesh's .*'rows'"):
        sharding.plan_on_mesh(PLAN, SPECS, batch_axes="rows", mesh=MESH)
    for square in ((("data", "fsdp", "model"), None), ("fsdp", None), ("x", None)):
        with pytest.raises(ValueError, match="square, with q of 4, must be"):
            sharding.adapter_shardings(PLAN, SPECS, mesh=MESH, square=square)
    with pytest.raises(TypeError, match="plan must be a Plan"):
        sharding.adapter_shardings(PARAMS, SPECS, mesh=MESH)


def test_axes_of_one_device_split_nothing():
    """XLA's partitioner fails to add up over them, in a scan."""
    mesh = jax.make_mesh((8, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    one = Layout(mesh, (("data",), ("model",)), ())
    assert one.of_rows("io", (8, 8)).ins == ()
    assert one.of_rows("io", (8, 8)).outs == ("data",)


def test_merges_where_the_kernel_is():
    """As on one device, and nothing is gathered."""
    named = jax.tree.map(lambda spec: NamedSharding(MESH, spec), SPECS, **is_spec)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda m: jnp.asarray(rng.standard_normal(m.shape), m.dtype),
        mora_jax.init(PLAN),
    )
    expected = mora_jax.merge(PARAMS, adapters, PLAN)
    placed = jax.device_put(PARAMS, named)
    on_mesh = jax.device_put(adapters, EXPECTED)
    for plan in (PLAN, sharding.plan_on_mesh(PLAN, placed, batch_axes=BATCH)):
        merged = mora_jax.merge(placed, on_mesh, plan)
        for one, other, where in zip(
            *map(jax.tree.leaves, (merged, expected, placed)), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-6)
            assert one.sharding.is_equivalent_to(where.sharding, one.ndim)
    plan = sharding.plan_on_mesh(PLAN, placed, batch_axes=BATCH)
    merge = jax.jit(lambda p, a: mora_jax.fold(p, a, plan), out_shardings=named)
    assert not collectives(merge.lower(placed, on_mesh).compile())


def test_saved_from_a_mesh(tmp_path):
    """Files know nothing of meshes."""
    plan = sharding.plan_on_mesh(PLAN, SPECS, batch_axes=BATCH, mesh=MESH)
    adapters = jax.device_put(mora_jax.init(plan), EXPECTED)
    mora_jax.save(tmp_path, adapters, plan)
    _, loaded = mora_jax.load(tmp_path)
    assert loaded == PLAN
    assert sharding.plan_on_mesh(loaded, SPECS, batch_axes=BATCH, mesh=MESH) == plan


def explicit(case, kernel_spec, x_spec, execution):
    """Output and gradients of a layer whose arrays' types say where they are."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    frozen, arrays, _ = layer(case, "rows", execution)

    def run(m, x, kernel, y):
        def apply(m, x):
            one = dataclasses.replace(frozen, kernel=kernel)
            return mora_apply({"kernel_mora": m}, one, x)

        out, backward = jax.vjp(apply, m, x)
        return out, *backward(y)

    expected = jax.jit(run)(**arrays)
    specs = {"m": P(), "x": x_spec, "kernel": kernel_spec}
    specs["y"] = P("data", None, *kernel_spec[1:])
    with jax.set_mesh(mesh):
        arrays = {name: put(a, specs[name], mesh) for name, a in arrays.items()}
        got = jax.jit(run)(**arrays)
        program = jax.jit(run).lower(**arrays).compile()
    assert got[1].sharding.is_fully_replicated
    assert got[2].sharding.is_equivalent_to(arrays["x"].sharding, 3)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max())
    return collectives(program)


@pytest.mark.parametrize("case", FEW_CASES, ids=lambda case: case.label)
def test_explicit_sharding(case):
    """Types are enough: no layout is asked for."""
    found = explicit(case, P(None, "model"), P("data"), "activation")
    q = 12
    allowed = {("all-reduce", (q, q)), ("all-reduce", (2, 3, 32))}  # the base's own
    if not case.make(32, 48, q).block:
        allowed.add(("all-reduce", (2, 3, q)))
    assert set(found) <= allowed


@pytest.mark.parametrize("execution", ["auto", "fold"])
def test_explicit_sharding_folds_nothing(execution):
    (case,) = (case for case in CASES if case.label == "rotation")
    explicit(case, P(None, "model"), P("data"), execution)


def test_explicit_merge():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    adapters = jax.tree.map(lambda m: m + 1, mora_jax.init(PLAN))
    expected = mora_jax.merge(PARAMS, adapters, PLAN)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda p: put(p, P("data"), mesh), PARAMS)
        plan = sharding.plan_on_mesh(PLAN, placed, batch_axes="data")
        trees = [mora_jax.merge(placed, adapters, known) for known in (PLAN, plan)]
    for merged in trees:
        for one, other in zip(*map(jax.tree.leaves, (merged, expected)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)
            assert one.sharding.spec[0] == "data"


def test_other_devices_are_refused():
    (case,) = (case for case in CASES if case.label == "rotation")
    frozen, arrays, _ = layer(case, "columns", "activation")
    frozen = dataclasses.replace(frozen, layout=layout("columns"))
    args = {"kernel_mora": arrays["m"]}, frozen, arrays["x"]
    with pytest.raises(ValueError, match="incompatible devices"):
        jax.jit(mora_apply)(*jax.device_put(args, jax.devices()[0]))


@pytest.mark.parametrize("label", ["rotation", "hadamard"])
@pytest.mark.parametrize("split", ["rows", "columns"])
def test_transformations(label, split):
    """Forward mode, second derivatives, a batch of M's, remat; and without jit."""
    (case,) = (case for case in CASES if case.label == label)
    frozen, arrays, on_mesh = layer(case, split, "activation")
    known = dataclasses.replace(frozen, layout=layout(split))

    def results(frozen, arrays):
        m, x = arrays["m"], arrays["x"]
        frozen = dataclasses.replace(frozen, kernel=arrays["kernel"])

        def loss(m, x):
            y = jax.checkpoint(mora_apply)({"kernel_mora": m}, frozen, x)
            return jnp.mean(jnp.sin(y))

        both, tangents = (m, x), (jnp.cos(m), jnp.cos(x))
        _, along = jax.jvp(loss, both, tangents)
        _, curved = jax.jvp(jax.grad(loss, argnums=(0, 1)), both, tangents)
        batch = jax.vmap(loss, (0, None))(jnp.stack([m, 2 * m]), x)
        return along, curved, batch

    expected = jax.jit(results)(frozen, arrays)
    got = jax.jit(results)(known, on_mesh)
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())
    known = dataclasses.replace(known, kernel=on_mesh["kernel"])
    frozen = dataclasses.replace(frozen, kernel=arrays["kernel"])
    np.testing.assert_allclose(
        mora_apply({"kernel_mora": on_mesh["m"]}, known, on_mesh["x"]),
        mora_apply({"kernel_mora": arrays["m"]}, frozen, arrays["x"]),
        atol=1e-4,
    )
