"""Adapters on a mesh: numbers as on one device, and no traffic but their own."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from adapter_files import assert_same, made, single, slow
from cases import CASES, KINDS
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mora_jax
from benchmarks.traffic import collectives
from mora_jax import FrozenDense, MoRAConfig, mora_apply, sharding
from mora_jax.operators import OPERATORS, Truncation

P = PartitionSpec
MESH = jax.make_mesh(
    (2, 2, 2), ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3
)
BATCH = ("data", "fsdp")
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


def put(array, spec, mesh=MESH):
    return jax.device_put(array, NamedSharding(mesh, spec))


def constrain(array, spec):
    return jax.lax.with_sharding_constraint(array, NamedSharding(MESH, spec))


@functools.cache
def layout(split):
    """What `sharding.plan_on_mesh` makes of the kernel's specification."""
    kernel, x, _ = SPLITS[split]
    plan = single(Truncation(32, 48, 1), path=("kernel",))
    batch = BATCH if x[0] == BATCH else "data"
    plan = sharding.plan_on_mesh(plan, {"kernel": kernel}, batch_axes=batch, mesh=MESH)
    return plan.specs[0].layout


def numbers(ins, outs, q, dtype):
    """M, inputs, kernel and the outputs' cotangent of a layer."""
    rng = np.random.default_rng(0)
    arrays = {
        "m": rng.standard_normal((q, q)),
        "x": rng.standard_normal((8, 3, ins)),
        "kernel": rng.standard_normal((ins, outs)) / np.sqrt(ins),
        "y": rng.standard_normal((8, 3, outs)),
    }
    return {name: np.asarray(array, dtype) for name, array in arrays.items()}


def layer(case, execution="activation", sizes=(32, 48, 12), dtype="float32"):
    """A layer without its kernel, its arrays, and by the oracle what it computes.

    That is the output, and gradients by M and x.
    """
    op = case.make(*sizes)
    arrays = numbers(*sizes, dtype)
    m, x, kernel, y = (np.asarray(array, np.float64) for array in arrays.values())
    c, d = case.matrices(op)
    adapted = kernel + ALPHA * oracle.update(c, d, m)
    by_m = ALPHA * np.einsum("bti,inq,bto,nro->qr", x, c, y, d, optimize=True)
    frozen = FrozenDense(None, None, op, alpha=ALPHA, execution=execution)
    return frozen, arrays, (x @ adapted, by_m, y @ adapted.T)


def assert_close(got, expected, dtype=jnp.float32):
    tolerance = 2e-5 if dtype == jnp.float32 else 0.05
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == dtype
        one = np.asarray(one, np.float64)
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())


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


def on_mesh(arrays, split, m_spec=None):
    kernel, x, y = SPLITS[split]
    specs = {"m": m_spec or P(), "x": x, "kernel": kernel, "y": y}
    return {name: put(array, specs[name]) for name, array in arrays.items()}


@functools.cache
def base_collectives(split):
    """Those of a layer without an adapter."""
    arrays = on_mesh(numbers(32, 48, 12, "float32"), split)
    del arrays["m"]
    _, x_spec, y_spec = SPLITS[split]
    return sent(base_step(x_spec, y_spec).lower(**arrays).compile())


def sent(program):
    return collectives(program.as_text())


def check_layer(case, split, execution="activation", m_spec=None, **settings):
    """Compile a layer for the mesh, hold its numbers against the oracle's.

    Returns:
      The program's collectives.
    """
    frozen, arrays, expected = layer(case, execution, **settings)
    frozen = dataclasses.replace(frozen, layout=layout(split))
    arrays = on_mesh(arrays, split, m_spec)
    _, x_spec, y_spec = SPLITS[split]
    program = step(frozen, x_spec, y_spec).lower(**arrays).compile()
    assert_close(program(**arrays), expected, arrays["x"].dtype)
    return sent(program)


LABELLED = {case.label: case for case in CASES}
NORMAL = (
    "sharing-strided-strided-normalised",
    *(o for o in OPERATORS if o in LABELLED),
)
BOTH_KINDS = ("sharing-strided-strided-normalised", "rotation")
"""One whose C(x) is short, and one that works on blocks."""


def by_default(label, split, execution):
    """Each operator where inputs are split and where outputs are."""
    if execution == "fold":
        return label == "rotation" and split in ("fsdp-rows", "both")
    if split == "both":
        return label in BOTH_KINDS
    return label in NORMAL and split in ("fsdp-columns", "fsdp-rows")


LAYERS = [
    one if by_default(*one) else slow(*one)
    for label in LABELLED
    for split in SPLITS
    for execution in ("activation", "fold")
    for one in [(label, split, execution)]
]


@pytest.mark.parametrize(("label", "split", "execution"), LAYERS)
def test_a_layer_is_as_on_one_device_without_hidden_traffic(label, split, execution):
    """M's gradient is added up, and C(x) where features are split; all else stays.

    Block operators add up nothing but that gradient. Folds gather a kernel once more.
    """
    case = LABELLED[label]
    found, base = check_layer(case, split, execution), base_collectives(split)
    # What the base does stays, though an adapted layer may gather a kernel but once.
    assert set(base) <= set(found)
    q, rows = 12, 4 if split == "both" else 2  # of one device
    allowed = {("all-reduce", (q, q))}
    if split != "fsdp" and not case.make(32, 48, q).block:
        allowed.add(("all-reduce", (rows, 3, q)))
    if execution == "fold" and split.startswith("fsdp"):
        allowed |= set(base)
    extra = found - base
    assert set(extra) <= allowed
    for kind, count in extra.items():
        assert count <= 2 or kind in base, kind


@pytest.mark.slow
@pytest.mark.parametrize("label", NORMAL)
@pytest.mark.parametrize("execution", ["activation", "fold"])
@pytest.mark.parametrize("split", ["fsdp-columns", "fsdp-rows", "both"])
def test_blocks_may_lie_on_one_device(label, split, execution):
    check_layer(LABELLED[label], split, execution, sizes=(48, 16, 8))


@pytest.mark.parametrize("split", ["columns", slow("fsdp-rows")])
def test_m_may_be_split(split):
    check_layer(LABELLED["rotation"], split, m_spec=P("data", "model"))


@pytest.mark.parametrize("label", [slow("rotation"), "sharing-contiguous-strided"])
def test_bfloat16(label):
    check_layer(LABELLED[label], "fsdp-rows", dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    "label", [label if label in BOTH_KINDS else slow(label) for label in NORMAL]
)
def test_traffic_of_a_split_m(label):
    """M is gathered, and its gradient left where it is kept; nothing else moves."""
    whole, split = (
        check_layer(LABELLED[label], "fsdp-columns", m_spec=spec)
        for spec in (P(), P("model"))
    )
    assert set(split - whole) == {("all-gather", (12, 12))}


def test_traffic_is_noticed():
    """Without a layout there is some, which is what `sharding.plan_on_mesh` is for."""
    frozen, arrays, _ = layer(LABELLED["rotation"])
    _, x_spec, y_spec = SPLITS["rows"]
    program = step(frozen, x_spec, y_spec).lower(**on_mesh(arrays, "rows")).compile()
    extra = sent(program) - base_collectives("rows")
    assert {kind for kind, _ in extra} > {"all-reduce"}


PARAMS = {
    "layers": {
        "up": {"kernel": np.ones((4, 8, 16), np.float32)},
        "scale": np.ones((4, 8), np.float32),
    },
    "mlp": {"kernel": np.ones((8, 12), np.float32)},
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
    placed = jax.device_put(made(PLAN), EXPECTED)
    initialised = jax.jit(lambda: mora_jax.init(PLAN), out_shardings=EXPECTED)()
    for adapters in (placed, initialised):
        assert jax.tree.map(lambda m: m.sharding, adapters) == EXPECTED


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
    adapters = jax.device_put(made(PLAN), found)
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
    frozen, arrays, (y, _, _) = layer(LABELLED[BOTH_KINDS[0]])
    plan = single(Truncation(32, 48, 1), path=("kernel",))
    place = {"kernel": P("model", "data")}
    plan = sharding.plan_on_mesh(plan, place, batch_axes="data", mesh=mesh)
    frozen = dataclasses.replace(frozen, layout=plan.specs[0].layout)

    def run(m, x, kernel):
        def one(x, each):
            m, kernel = each
            known = dataclasses.replace(frozen, kernel=kernel)
            return x, mora_apply({"kernel_mora": m}, known, x)

        return jax.lax.scan(one, x, (m[None], kernel[None]))[1][0]

    args = arrays["m"], put(arrays["x"], P("data"), mesh)
    kernel = put(arrays["kernel"], place["kernel"], mesh)
    assert_close([jax.jit(run)(*args, kernel)], [y])


def test_merges_where_the_kernel_is():
    """As on one device, and nothing is gathered."""
    named = jax.tree.map(lambda spec: NamedSharding(MESH, spec), SPECS, **is_spec)
    adapters = made(PLAN)
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
    assert not sent(merge.lower(placed, on_mesh).compile())


def test_saved_from_a_mesh(tmp_path):
    """Files know nothing of meshes."""
    plan = sharding.plan_on_mesh(PLAN, SPECS, batch_axes=BATCH, mesh=MESH)
    adapters = jax.device_put(made(plan), EXPECTED)
    mora_jax.save(tmp_path, adapters, plan)
    back, loaded = mora_jax.load(tmp_path)
    assert_same(back, made(plan))
    assert loaded == PLAN
    assert sharding.plan_on_mesh(loaded, SPECS, batch_axes=BATCH, mesh=MESH) == plan


def explicit_mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def explicit(case, kernel_spec, x_spec, execution):
    """Hold the numbers of a layer whose arrays' types say where they are.

    Returns:
      The program's collectives.
    """
    mesh = explicit_mesh()
    frozen, arrays, expected = layer(case, execution)

    def run(m, x, kernel, y):
        def apply(m, x):
            one = dataclasses.replace(frozen, kernel=kernel)
            return mora_apply({"kernel_mora": m}, one, x)

        out, backward = jax.vjp(apply, m, x)
        return out, *backward(y)

    specs = {"m": P(), "x": x_spec, "kernel": kernel_spec}
    specs["y"] = P("data", None, *kernel_spec[1:])
    with jax.set_mesh(mesh):
        arrays = {name: put(a, specs[name], mesh) for name, a in arrays.items()}
        program = jax.jit(run).lower(**arrays).compile()
        got = program(**arrays)
    assert got[1].sharding.is_fully_replicated
    assert got[2].sharding.is_equivalent_to(arrays["x"].sharding, 3)
    assert_close(got, expected)
    return sent(program)


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.label)
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
    explicit(LABELLED["rotation"], P(None, "model"), P("data"), execution)


def test_explicit_merge():
    mesh, adapters = explicit_mesh(), made(PLAN)
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
    frozen, arrays, _ = layer(LABELLED["rotation"])
    frozen = dataclasses.replace(
        frozen, kernel=arrays["kernel"], layout=layout("columns")
    )
    args = {"kernel_mora": arrays["m"]}, frozen, arrays["x"]
    with pytest.raises(ValueError, match="incompatible devices"):
        jax.jit(mora_apply)(*jax.device_put(args, jax.devices()[0]))


@pytest.mark.parametrize(
    ("label", "split"),
    [
        ("rotation", "rows"),
        slow("hadamard", "columns"),
        slow("rotation", "columns"),
        slow("hadamard", "rows"),
    ],
)
def test_transformations(label, split):
    """Forward mode, second derivatives, a batch of M's, remat; and without jit."""
    case = LABELLED[label]
    frozen, arrays, (y, _, _) = layer(case)
    known = dataclasses.replace(frozen, layout=layout(split))
    c, d = (jnp.asarray(one, jnp.float32) for one in case.matrices(frozen.operator))

    def adapted(m, x, kernel):
        one = dataclasses.replace(known, kernel=kernel)
        return mora_apply({"kernel_mora": m}, one, x)

    def dense(m, x, kernel):
        return x @ (kernel + ALPHA * jnp.einsum("inq,qr,nro->io", c, m, d))

    def results(apply, m, x, kernel):
        def loss(m, x):
            return jnp.mean(jnp.sin(jax.checkpoint(apply)(m, x, kernel)))

        both, tangents = (m, x), (jnp.cos(m), jnp.cos(x))
        _, along = jax.jvp(loss, both, tangents)
        _, curved = jax.jvp(jax.grad(loss, argnums=(0, 1)), both, tangents)
        batch = jax.vmap(loss, (0, None))(jnp.stack([m, 2 * m]), x)
        return along, curved, batch

    results = jax.jit(results, static_argnums=0)
    placed = on_mesh(arrays, split)
    del arrays["y"], placed["y"]
    expected, got = results(dense, **arrays), results(adapted, **placed)
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())
    np.testing.assert_allclose(adapted(**placed), y, atol=1e-4)
