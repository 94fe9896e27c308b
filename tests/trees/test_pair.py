"""An adapter is a pytree node that knows what it is, whatever is done with it."""

import copy
import pickle
import re

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from adapter_files import assert_same, slow
from cases import FEW_CASES, FEW_SIZES, in_turns
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import bare, close, random, random_like
from jax.sharding import PartitionSpec as P
from meshes import assert_shardings, make_mesh

import mora_jax
from mora_jax import Adapter, AdapterSpec, MoRAConfig, linen
from mora_jax import nnx as mora

PARAMS = {
    "a": {"kernel": random(0, 12, 8), "bias": random(1, 8)},
    "s": {"kernel": random(2, 3, 8, 12)},
}
SETTINGS = {"overrides": {"s/kernel": {"axes": "sio"}}, "train": "a/bias"}
PLAN = mora_jax.plan(PARAMS, MoRAConfig(rank=2, **SETTINGS))
ADAPTERS = random_like(mora_jax.init(PLAN, params=PARAMS))
NEW = mora_jax.init(PLAN, params=PARAMS)
CALLS = {
    "map": lambda tree: jax.tree.map(lambda m: m, tree),
    "flatten": lambda tree: jax.tree.unflatten(*jax.tree.flatten(tree)[::-1]),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda tree: pickle.loads(pickle.dumps(tree)),
    "jit": jax.jit(lambda tree: tree),
    "donated": lambda tree: jax.jit(lambda tree: tree, donate_argnums=0)(
        jax.tree.map(jnp.copy, tree)
    ),
    "checkpoint": jax.checkpoint(lambda tree: tree),
    "scan": lambda tree: jax.lax.scan(lambda t, _: (t, None), tree, length=2)[0],
    "cond": lambda tree: jax.lax.cond(True, lambda: tree, lambda: tree),
    "vector": lambda tree: jax.flatten_util.ravel_pytree(tree)[1](
        jax.flatten_util.ravel_pytree(tree)[0]
    ),
    "flatten_dict": lambda tree: unflatten_dict(flatten_dict(tree)),
    "names": lambda tree: unflatten_dict(flatten_dict(tree, sep="/"), sep="/"),
    "state": lambda tree: flax.serialization.from_state_dict(
        NEW, flax.serialization.to_state_dict(tree)
    ),
    "msgpack": lambda tree: flax.serialization.from_bytes(
        NEW, flax.serialization.to_bytes(tree)
    ),
    "pure dict of nnx": lambda tree: nnx.to_pure_dict(nnx.State(tree)),
    "plan": lambda tree: PLAN.adapters(bare(tree)),
}


@pytest.mark.parametrize("name", CALLS)
def test_it_stays_what_it_is(name):
    assert_same(CALLS[name](ADAPTERS), ADAPTERS)


def test_its_one_leaf_is_its_array():
    adapter = ADAPTERS["a"]["kernel_mora"]
    (leaf,) = jax.tree.leaves(adapter)
    assert leaf is adapter.m
    paths = jax.tree_util.tree_leaves_with_path(ADAPTERS)
    names = [
        jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in paths
    ]
    assert names == ["a/bias/m", "a/kernel_mora/m", "s/kernel_mora/m"]
    assert flatten_dict(ADAPTERS, sep="/").keys() == {
        "a/bias",
        "a/kernel_mora",
        "s/kernel_mora",
    }


def test_a_state_is_of_arrays_alone_and_of_its_adapters():
    state = flax.serialization.to_state_dict(ADAPTERS)
    assert_same(state, bare(ADAPTERS))
    other = random_like(
        mora_jax.init(
            mora_jax.plan(PARAMS, MoRAConfig(rank=1, **SETTINGS)), params=PARAMS
        )
    )
    with pytest.raises(ValueError, match="the state of Adapter.* must have its shape"):
        flax.serialization.from_state_dict(other, state)


def test_donated_buffers_are_gone():
    adapters = jax.tree.map(jnp.copy, ADAPTERS)
    after = jax.jit(lambda a: jax.tree.map(lambda m: m + 1, a), donate_argnums=0)
    close(after(adapters), jax.tree.map(lambda m: m + 1, ADAPTERS))
    assert all(m.is_deleted() for m in jax.tree.leaves(adapters))


def test_another_meaning_is_another_program():
    traces = []

    @jax.jit
    def deltas(adapters):
        traces.append(None)
        return mora_jax.delta_weight(adapters)

    other = mora_jax.init(
        mora_jax.plan(PARAMS, MoRAConfig(rank=2, alpha=0.5, **SETTINGS)), params=PARAMS
    )
    other = jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(ADAPTERS))
    first = deltas(ADAPTERS)
    close(deltas(other), jax.tree.map(lambda d: 0.5 * d, first))
    close(deltas(ADAPTERS), first)
    assert len(traces) == 2
    with pytest.raises(ValueError, match="pytree|Mismatch|tree"):
        jax.tree.map(jnp.add, ADAPTERS, other)


def test_adapters_in_a_stack_are_vmapped():
    several = [jax.tree.map(lambda m, k=k: m + k, ADAPTERS) for k in range(3)]
    stacked = jax.tree.map(lambda *ms: jnp.stack(ms), *several)
    found = jax.vmap(mora_jax.delta_weight)(stacked)
    for k, one in enumerate(several):
        mine = jax.tree.map(lambda d, k=k: d[k], found)
        close(mine, mora_jax.delta_weight(one))

    def product(adapter, x):
        return adapter(x)

    x = random(5, 3, 4, 12)
    got = jax.vmap(product)(stacked["a"]["kernel_mora"], x)
    close(got, jnp.einsum("kbi,kio->kbo", x, found["a"]["kernel"]))


@pytest.mark.filterwarnings("ignore")  # of Orbax
def test_orbax_saves_and_restores_them_also_onto_another_mesh(tmp_path):
    mesh = make_mesh(model=2)
    places = jax.tree.map(lambda _: jax.NamedSharding(mesh, P()), ADAPTERS)
    places["s"]["kernel_mora"] = places["s"]["kernel_mora"].replace(
        m=jax.NamedSharding(mesh, P(None, "model"))
    )
    shapes = jax.tree.map(
        lambda m, place: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=place),
        ADAPTERS,
        places,
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "adapters", ADAPTERS)
        checkpointer.wait_until_finished()
        assert_same(checkpointer.restore(tmp_path / "adapters", NEW), ADAPTERS)
        onto = checkpointer.restore(tmp_path / "adapters", shapes)
        assert_same(onto, ADAPTERS)
    assert_shardings(onto, places)


@pytest.mark.law
@in_turns("case, size", FEW_CASES, FEW_SIZES)
def test_an_adapter_is_a_function_of_inputs(case, size):
    ins, outs, _ = size
    op = case.make(*size)
    adapter = Adapter(random(0, *op.m_shape), AdapterSpec(op, (ins, outs), alpha=-0.5))
    x, delta = random(1, 2, 3, ins), -0.5 * case.delta(op, adapter.m)
    close(adapter.delta(), delta)
    close(adapter(x), x @ delta)
    close(jax.jit(lambda adapter, x: adapter(x))(adapter, x), x @ delta)
    assert repr(adapter) == f"Adapter({op.label}, float32{[*op.m_shape]})"


@pytest.mark.parametrize("operator", ["hadamard", "low_rank"])
def test_a_factor_is_not_rounded_to_the_16_bits_of_an_array(operator):
    """Neither alone nor in a layer of 32 bits, though no power of two."""
    config = MoRAConfig(rank=2, operator=operator, alpha=0.3, param_dtype="bfloat16")
    plan, x = mora_jax.plan({"kernel": PARAMS["a"]["kernel"]}, config), random(1, 4, 12)
    adapters = random_like(mora_jax.init(plan))
    adapter, kernel = adapters["kernel_mora"], PARAMS["a"]["kernel"]
    assert adapter.m.dtype == jnp.bfloat16
    delta = adapter.delta()
    close(adapter(x), x @ delta)
    apply = linen.wrap(nn.Dense(8, use_bias=False), plan)
    got = apply(adapters, {"params": {"kernel": kernel}}, x)
    close(got, x @ (kernel + delta))


def test_an_adapter_of_a_stack_and_of_several_axes_is_one_too():
    for axes, shape, inputs, equation in (
        ("sio", (3, 8, 12), (3, 5, 8), "sbi,sio->sbo"),
        ("ioo", (8, 3, 4), (5, 8), "bi,ioh->boh"),
        ("iio", (3, 4, 8), (5, 3, 4), "bih,iho->bo"),
        ("oi", (8, 12), (5, 12), "bi,oi->bo"),
    ):
        spec = AdapterSpec.from_config(
            MoRAConfig(operator="signed_decoupling", square_rank=4), shape, axes
        )
        adapter, x = Adapter(random(0, *spec.shape), spec), random(1, *inputs)
        assert adapter.delta().shape == shape
        close(adapter(x), jnp.einsum(equation, x, adapter.delta()))


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_adapter_is_told():
    adapter, x = ADAPTERS["a"]["kernel_mora"], jnp.ones((2, 12))
    copied = ADAPTERS["a"]["bias"]
    cases = [
        (lambda: adapter(jnp.ones((2, 8))), "12.*8"),
        (lambda: adapter("x"), "x must be an array, got str"),
        (lambda: adapter.replace(m=adapter.m[:1])(x), "kernel_mora must have shape"),
        (lambda: adapter.replace(m=adapter.m[:1]).delta(), "must have shape"),
        (lambda: adapter.replace(m=adapter.m.astype(int)).delta(), "got int32"),
        (lambda: adapter.replace(m=3).delta(), "must be an array, got int"),
        (lambda: adapter.replace(m=None)(x), "must be an array, got NoneType"),
        (lambda: copied(x), "kernel has a product, got one of a TrainedArray"),
        (lambda: copied.delta(), "kernel has a delta, got one of a TrainedArray"),
        (lambda: copied.operator, "kernel has an operator, got one of a TrainedArray"),
        (lambda: adapter.replace(spec="x")(x), "has a product, got one of a str"),
        (lambda: adapter.replace(shape=3), "unexpected keyword argument 'shape'"),
    ]
    for call, message in cases:
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    broken = {"kernel_mora": adapter.replace(m=adapter.m * jnp.nan)}
    for call in (mora_jax.delta_weight, lambda a: mora_jax.merge(PARAMS["a"], a)):
        with pytest.raises(ValueError, match="kernel_mora holds NaN or infinity"):
            call(broken)
    odd = {"kernel_mora": adapter.replace(spec=PLAN["s/kernel"])}  # of one layer of it
    with pytest.raises(ValueError, match=r"must have shape \((8, 12|\d, \d, \d)\)"):
        mora_jax.merge(PARAMS["s"], odd)


def test_equal_arrays_with_equal_meanings_are_equal():
    """As trees of shapes or shardings are compared, by == of the trees."""
    shapes = jax.tree.map(jnp.shape, ADAPTERS)
    assert shapes == jax.tree.map(jnp.shape, NEW)
    assert hash(shapes["a"]["kernel_mora"]) == hash(
        shapes["a"]["kernel_mora"].replace()
    )
    other = mora_jax.plan(PARAMS, MoRAConfig(rank=2, alpha=2.0, **SETTINGS))
    meant = jax.tree.map(jnp.shape, mora_jax.init(other, params=PARAMS))
    assert shapes != meant and jax.tree.leaves(shapes) == jax.tree.leaves(meant)
    assert shapes["a"]["kernel_mora"] != shapes["a"]["kernel_mora"].m


def test_a_repr_is_short():
    assert repr(ADAPTERS["a"]) == (
        "{'bias': Adapter(trained, float32[8]), "
        "'kernel_mora': Adapter(block_diagonal, float32[2, 6, 4])}"
    )
    shapes = jax.eval_shape(lambda: ADAPTERS)["a"]["kernel_mora"]
    assert repr(shapes) == "Adapter(block_diagonal, float32[2, 6, 4])"
    assert repr(jax.tree.map(lambda _: None, shapes)) == "Adapter(block_diagonal, None)"


MODEL, X = nn.Sequential([nn.Dense(12), nn.tanh, nn.Dense(8)]), random(9, 4, 8)
VARIABLES = random_like(jax.eval_shape(MODEL.init, jax.random.key(0), X))
BASE = VARIABLES["params"]
GIVEN = MoRAConfig(rank=2, operator="rotation")
OTHERS = [
    MoRAConfig(rank=1, operator="sharing", alpha=0.5),
    MoRAConfig(square_rank=8, operator="orthogonal", scale="paper"),
    MoRAConfig(rank=3, operator="low_rank"),
    MoRAConfig(
        rank=2,
        operator="hadamard",
        param_dtype="bfloat16",
        overrides={"layers_2/.*": {"operator": "signed_decoupling", "alpha": 3.0}},
    ),
]


def operator_of(config):
    return config.operator


@pytest.mark.parametrize(
    "config", [OTHERS[0], *map(slow, OTHERS[1:3]), OTHERS[3]], ids=operator_of
)
def test_a_wrapped_model_computes_what_the_given_adapters_say(config):
    """With other operators, ranks and factors at the same kernels; compiled, too."""
    apply = linen.wrap(MODEL, linen.plan(MODEL, VARIABLES, GIVEN, X))
    mine = random_like(mora_jax.init(apply.plan))
    other = random_like(mora_jax.init(mora_jax.plan(BASE, config)))
    compiled = jax.jit(apply)
    for adapters in (mine, other, mine):
        merged = mora_jax.merge(BASE, adapters, jnp.float32)
        expected = MODEL.apply({"params": merged}, X)
        close(apply(adapters, VARIABLES, X), expected)
        close(compiled(adapters, VARIABLES, X), expected)


class Nnx(nnx.Module):
    """Two layers."""

    def __init__(self):
        self.a = nnx.Linear(8, 12, rngs=nnx.Rngs(0))
        self.b = nnx.Linear(12, 8, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.b(nnx.tanh(self.a(x)))


@pytest.mark.slow
@pytest.mark.parametrize("config", [slow(OTHERS[0]), *OTHERS[1:3]], ids=operator_of)
def test_a_wrapped_model_of_nnx_computes_what_it_is_given(config):
    base = Nnx()
    params = nnx.to_pure_dict(nnx.state(base, nnx.Param))
    model = mora.wrap(base, GIVEN)
    adapters = random_like(mora_jax.init(mora_jax.plan(params, config)))
    mora.set_adapters(model, adapters)
    assert_same(mora.adapters(model), adapters)
    other = nnx.clone(base)
    nnx.update(other, mora_jax.merge(params, adapters))
    close(model(X), other(X))
    _, grads = mora.value_and_grad(lambda model: jnp.sum(model(X) ** 2))(model)
    assert all(np.any(g) for g in jax.tree.leaves(grads))


def test_adapters_of_other_kernels_are_refused_by_name():
    """Of more, of fewer, of another shape, and of kernels that are read otherwise."""
    plan = linen.plan(MODEL, VARIABLES, GIVEN, X)
    apply, adapters = linen.wrap(MODEL, plan), mora_jax.init(plan)
    model = mora.wrap(Nnx(), GIVEN)

    def of(**shapes):
        params = {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}
        return mora_jax.init(mora_jax.plan(params, GIVEN))

    right = {"layers_0": (8, 12), "layers_2": (12, 8)}
    square = linen.plan(nn.Dense(8), nn.Dense(8).init(jax.random.key(0), X), GIVEN, X)
    turned = mora_jax.plan(
        {"kernel": jnp.ones((8, 8))},
        MoRAConfig(rank=2, overrides={"kernel": {"axes": "oi"}}),
    )
    cases = [
        (of(**right, more=(8, 8)), "'more/kernel', the plan nothing"),
        ({"layers_0": adapters["layers_0"]}, "nothing at 'layers_2/kernel', the plan"),
        (of(**right | {"layers_2": (16, 8)}), r"kernel \(16, 8\).* at 'layers_2/kern"),
        ({}, "adapters hold no adapter"),
        (bare(adapters), "at 'layers_0/kernel_mora': plan.adapters"),
    ]
    for given, message in cases:
        with pytest.raises((TypeError, ValueError), match=message):
            apply(given, VARIABLES, X)
    with pytest.raises(
        ValueError, match="axes 'oi' at 'kernel', the plan .* axes 'io'"
    ):
        linen.wrap(nn.Dense(8), square)(
            mora_jax.init(turned), {"params": {"kernel": jnp.ones((8, 8))}}, X
        )
    before = mora.adapters(model)
    for given, message in (
        (of(a=(8, 12)), "nothing at 'b/kernel', the plan a kernel"),
        (of(a=(8, 12), b=(16, 8)), r"kernel \(16, 8\) .*'b/kernel'"),
        (bare(before), "at 'a/kernel_mora': plan.adapters"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            mora.set_adapters(model, given)
    assert_same(mora.adapters(model), before)


@pytest.mark.usefixtures("unchecked")
def test_an_m_that_does_not_fit_is_told_with_the_shape_it_should_have():
    """Of fewer axes than an M has, and of a shape that stands for an array."""
    adapter = NEW["a"]["kernel_mora"]
    right, x = adapter.m.shape, jnp.ones((2, 12))
    for wrong in (jnp.ones((3, 3)), jnp.ones(3), jnp.ones(())):
        message = f"kernel_mora must have shape {right}, got {wrong.shape}"
        with pytest.raises(ValueError, match=re.escape(message)):
            adapter.replace(m=wrong)(x)
    shape = adapter.replace(m=jax.ShapeDtypeStruct(right, jnp.float32))
    for call in (lambda: shape(x), shape.delta):
        with pytest.raises(TypeError, match="kernel_mora must be an array, got Shape"):
            call()
    assert jax.eval_shape(lambda one: one(x), shape).shape == (2, 8)
