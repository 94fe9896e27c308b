"""Adapters in models that qwix quantizes, in both of Flax's APIs.

The delta is the oracle's in float64, and a base is qwix's own model without adapters.
"""

import dataclasses
import importlib
import itertools
import sys
from collections.abc import Callable
from importlib.metadata import version

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from adapter_files import slow
from cases import in_turns
from flax import nnx
from flax.errors import ScopeParamNotFoundError
from helpers import bare, close, largest, orthonormal, random, random_like, wide
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh

import mora_jax
from mora_jax import LeftOutWarning, MoRAConfig, diagnostics, linen
from mora_jax import nnx as mora
from mora_jax.qwix import (
    MoRAProvider,
    MoRARule,
    dequantize,
    merge_adapters,
    plan_of,
)

qwix = pytest.importorskip("qwix")
# `pytest.warns` hides from filters that they come from qwix.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
KEY, VERSION = jax.random.key(0), version("qwix")
APIS = ["linen", "nnx"]
INT8 = {"weight_qtype": "int8"}
TYPES = {
    "none": {},
    "int8": INT8,
    "int4": {"weight_qtype": "int4"},
    "nf4": {"weight_qtype": "nf4", "tile_size": 8},
    "fp8": {"weight_qtype": "float8_e4m3fn"},
    "int8 inputs": {"weight_qtype": "int8", "act_qtype": "int8"},
}


def merge(base, adapters, **settings):
    return mora_jax.merge(dequantize(base), adapters, **settings)


class LeftLinen(nn.Module):
    """A layer that has its kernel on the left."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (24, 16))
        return jnp.einsum("oi,...i->...o", kernel, x)


class LeftNNX(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(random(7, 24, 16))

    def __call__(self, x):
        return jnp.einsum("oi,...i->...o", self.kernel[...], x)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of 16 features: how it is made, and what it computes of x and kernel."""

    linen: Callable
    nnx: Callable
    axes: str
    product: Callable

    def kernel_of(self, delta, shape):
        """(in, out) in the shape of the kernel."""
        return delta.T if self.axes == "oi" else delta.reshape(shape)


LAYERS = {
    "dense": Layer(
        lambda: nn.Dense(24), lambda r: nnx.Linear(16, 24, rngs=r), "io", np.matmul
    ),
    "heads": Layer(
        lambda: nn.DenseGeneral((4, 6)),
        lambda r: nnx.LinearGeneral(16, (4, 6), rngs=r),
        "ioo",
        lambda x, w: np.einsum("ni,iho->nho", x, w),
    ),
    "einsum": Layer(
        lambda: nn.Einsum((16, 4, 6), "ni,iho->nho", use_bias=False),
        lambda r: nnx.Einsum("ni,iho->nho", (16, 4, 6), rngs=r),
        "ioo",
        lambda x, w: np.einsum("ni,iho->nho", x, w),
    ),
    "left": Layer(LeftLinen, LeftNNX, "oi", lambda x, w: x @ w.T),
}


class Adapted:
    """A layer with M's, in one API: what tests do with it is the same in the other."""

    def __init__(self, api, layer, rules=None, **settings):
        self.api, self.x = api, random(1, 3, 16)
        rules = rules or [MoRARule(**{"rank": 2, "operator": "rotation", **settings})]
        provider, self.rules = MoRAProvider(rules), rules
        if api == "linen":
            self.plain = nn.Sequential([layer.linen()])
            self.model = qwix.apply_lora_to_model(self.plain, provider)
            params = jax.jit(self.model.init)(KEY, self.x)["params"]
            self.base, self.adapters = mora_jax.split(params)
            self.plan = plan_of(self.model, self.x)
        else:
            self.plain = nnx.Sequential(layer.nnx(nnx.Rngs(0)))
            self.model = qwix.apply_lora_to_model(
                self.plain, provider, self.x, rngs=nnx.Rngs(1)
            )
            self.adapters, self.plan = mora.adapters(self.model), plan_of(self.model)

    def __call__(self, adapters, **kwargs):
        if self.api == "linen":
            params = mora_jax.combine(self.base, adapters)
            return self.model.apply({"params": params}, self.x, **kwargs)
        model = nnx.clone(self.model)
        mora.set_adapters(model, adapters)
        return model(self.x)

    def merged(self, adapters):
        """The output of the merged model."""
        if self.api == "linen":
            return self.plain.apply({"params": merge(self.base, adapters)}, self.x)
        model = nnx.clone(self.model)
        mora.set_adapters(model, adapters)
        merged = merge_adapters(model)
        assert type(merged) is type(self.plain)
        close(
            jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(merged))),
            jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(self.plain))),
        )
        return merged(self.x)


def delta_of(adapted, layer, adapters):
    """The delta of the one kernel, in its shape, in float64."""
    (spec,), (m,) = adapted.plan.values(), jax.tree.leaves(adapters)
    delta = spec.factor * oracle.delta_of(spec.operator, wide(m))
    return layer.kernel_of(delta, spec.kernel_shape)


def combination(api, name, types, operator):
    """Those are quick that show each layer, and each way to quantize one.

    Beside them the APIs take turns.
    """
    shown = types == "none" or (name == "dense" and types in ("int8", "nf4"))
    quick = shown and (operator == "rotation" or name in ("dense", "left"))
    k = [*LAYERS].index(name) + OPERATORS.index(operator)
    turn = api == APIS[k % 2] or types == "int8"
    marks = [] if quick else [pytest.mark.slow]
    marks += [] if turn else [pytest.mark.slow]
    return pytest.param(api, name, types, operator, marks=marks)


OPERATORS = ["rotation", "low_rank"]


@pytest.mark.law
@pytest.mark.parametrize(
    "api, name, types, operator",
    [combination(*case) for case in itertools.product(APIS, LAYERS, TYPES, OPERATORS)],
)
def test_the_delta_is_added_to_what_qwix_computes(api, name, types, operator):
    layer, settings = LAYERS[name], TYPES[types]
    adapted = Adapted(api, layer, operator=operator, **settings)
    (spec,) = adapted.plan.values()
    assert spec.axes == layer.axes
    adapters = random_like(adapted.adapters)
    base = adapted(adapted.adapters)  # M is zero
    if api == "linen":
        rule = qwix.QuantizationRule(**settings)
        own = qwix.quantize_model(adapted.plain, qwix.PtqProvider([rule]))
        assert (base == own.apply({"params": adapted.base}, adapted.x)).all()
    delta = layer.product(wide(adapted.x), delta_of(adapted, layer, adapters))
    close(adapted(adapters) - base, jnp.asarray(delta, jnp.float32))


@pytest.mark.slow
@in_turns("operator, api", OPERATORS, APIS)
def test_gradients_and_transformations(operator, api):
    adapted = Adapted(api, LAYERS["dense"], operator=operator, **TYPES["nf4"])
    adapters = random_like(adapted.adapters)

    def loss(adapters):
        return jnp.sum(adapted(adapters) ** 2) / 2

    grads = jax.grad(loss)(adapters)
    for way in (jax.jit(loss), jax.checkpoint(loss), jax.jit(jax.checkpoint(loss))):
        close(jax.grad(way)(adapters), grads)
    (spec,) = adapted.plan.values()
    (m,), y = jax.tree.leaves(adapters), adapted(adapters)
    arrays = map(wide, (m, adapted.x, y))
    expected = spec.factor * oracle.m_gradient_of(spec.operator, *arrays)
    close(jax.tree.leaves(grads)[0], jnp.asarray(expected, jnp.float32))


@pytest.mark.parametrize("api", APIS)
def test_plans_and_files_are_those_of_wrap(api, tmp_path):
    adapted = Adapted(api, LAYERS["heads"], **INT8)
    config = MoRAConfig(rank=2, operator="rotation")
    if api == "linen":
        variables = adapted.plain.init(KEY, adapted.x)
        plan = linen.plan(adapted.plain, variables, config, adapted.x)
    else:
        plan = mora.plan(adapted.plain, config)
    assert adapted.plan.specs == plan.specs
    adapters = random_like(mora_jax.init(plan))
    params = dequantize(adapted.base) if api == "linen" else None
    mora_jax.save(tmp_path / "a", adapters, params=params)
    loaded = mora_jax.load(tmp_path / "a")
    close(bare(loaded), bare(adapters), 0)
    assert np.isfinite(adapted(loaded)).all()
    if api == "linen":
        other = jax.tree.map(lambda a: a + 1, adapted.base)
        with pytest.raises(ValueError, match="other weights than the base"):
            merge(other, loaded)
        merge(other, loaded, any_base=True)


@pytest.mark.law
@in_turns(
    "case, types",
    [
        (name, operator, api)
        for name, operator in [
            ("heads", "rotation"),
            ("dense", "rotation"),
            ("dense", "low_rank"),
        ]
        for api in APIS
    ],
    ["int8", "nf4", "none"],
    each=2,
)
def test_merged_kernels(case, types):
    name, operator, api = case
    layer = LAYERS[name]
    adapted = Adapted(api, layer, operator=operator, **TYPES[types])
    adapters = random_like(adapted.adapters)
    close(adapted.merged(adapters), adapted(adapters))
    if api == "linen":
        losses = diagnostics.merge_loss(dequantize(adapted.base), adapters)
        assert list(losses) == list(adapted.plan) and max(losses.values()) < 1e-6


def test_merging_keeps_what_has_no_adapter():
    rules = [
        MoRARule(module_path="layers_1", rank=2, **INT8),
        qwix.QuantizationRule(**INT8),
    ]
    model = nn.Sequential([nn.Dense(16), nn.Dense(16)])
    adapted, x = qwix.apply_lora_to_model(model, MoRAProvider(rules)), random(1, 2, 16)
    base, adapters = mora_jax.split(jax.jit(adapted.init)(KEY, x)["params"])
    adapters = random_like(adapters)
    assert list(plan_of(adapted, x)) == ["layers_1/kernel"]
    plain = merge(base, adapters)
    y = jax.jit(adapted.apply)({"params": mora_jax.combine(base, adapters)}, x)
    close(jax.jit(model.apply)({"params": plain}, x), y)


class Scanned(nn.Module):
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        def body(layer, x, _):
            return nn.relu(layer(x)), None

        axes = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        layer = nn.remat(nn.Dense)(16, name="layer")
        return nn.scan(body, length=3, **axes)(layer, x, None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("types", [slow("none"), "int8"])
def test_scanned_layers(types):
    """qwix itself has no tiles there."""
    model, x = Scanned(), random(1, 2, 16)
    provider = MoRAProvider(rank=2, operator="rotation", **TYPES[types])
    adapted = qwix.apply_lora_to_model(model, provider)
    base, zeros = mora_jax.split(jax.jit(adapted.init)(KEY, x)["params"])
    plan, adapters = plan_of(adapted, x), random_like(zeros)
    (spec,) = plan.values()
    assert spec.axes == "sio" and spec.shape == (3, 8, 8)
    close(bare(mora_jax.init(plan)), bare(zeros), 0)
    assert zeros["layer"]["kernel_mora"].spec.axes == "io"  # which is of one layer
    y, apply = x, adapted.apply
    for k, kernel in enumerate(dequantize(base)["layer"]["kernel"]):
        m = adapters["layer"]["kernel_mora"].m[k]
        delta = oracle.delta(*oracle.rotation(spec.operator), wide(m))
        bias = base["layer"]["bias"][k]
        y = nn.relu(y @ (kernel + jnp.float32(spec.factor * delta)) + bias)
    whole = plan.adapters(bare(adapters))
    for way, given in ((apply, adapters), (jax.jit(apply), adapters), (apply, whole)):
        close(way({"params": mora_jax.combine(base, given)}, x), y)
    close(merge(base, whole), merge(base, adapters), 0)
    close(model.apply({"params": merge(base, adapters)}, x), y, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("types", ["none", slow("int8")])
def test_scanned_layers_on_other_axes(types, axis):
    """Flax stacks M where it stacks the kernel; in a tree the stack is in front."""
    model, x = Scanned(axis), random(1, 2, 16)
    provider = MoRAProvider(rank=2, operator="rotation", **TYPES[types])
    adapted = qwix.apply_lora_to_model(model, provider)
    params = jax.jit(adapted.init)(KEY, x)["params"]
    base, zeros = mora_jax.split(params)
    (spec,) = plan_of(adapted, x).values()
    assert spec.axes == {1: "iso", -1: "ios"}[axis] and spec.shape == (3, 8, 8)
    adapters = random_like(zeros)
    whole = jax.tree.map(jnp.shape, (mora_jax.combine(base, zeros), params))
    assert jax.tree.leaves(whole[0]) == jax.tree.leaves(whole[1])
    y = adapted.apply({"params": mora_jax.combine(base, adapters)}, x)
    close(model.apply({"params": merge(base, adapters)}, x), y, 1e-5)
    assert largest(y - adapted.apply({"params": params}, x)) > 1e-2


class ScannedNNX(nnx.Module):
    """Layers under a scan of JAX, as MaxText has them, whatever qwix adds to them."""

    def __init__(self, axis, layers):
        make = nnx.vmap(
            lambda key: nnx.Linear(16, 16, use_bias=False, rngs=nnx.Rngs(key)),
            out_axes=nnx.StateAxes({...: axis}),
        )
        self.layers, self.axis = make(jax.random.split(KEY, layers)), axis

    def __call__(self, x):
        graph, params, rest = nnx.split(self.layers, nnx.Param, ...)
        params = jax.tree.map(lambda w: jnp.moveaxis(w, self.axis, 0), params)
        count = jax.tree.leaves(params)[0].shape[0]
        rest = jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), rest)

        def body(x, state):
            return nnx.tanh(nnx.merge(graph, *state)(x)), None

        return jax.lax.scan(body, x, (params, rest))[0]


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "axes"), [(0, "sio"), (1, "iso"), (-1, "ios")])
def test_layers_under_a_scan_in_nnx(axis, axes):
    base, x = ScannedNNX(axis, 3), random(1, 2, 16)
    provider = MoRAProvider(rank=2, operator="rotation")
    model = qwix.apply_lora_to_model(base, provider, x, rngs=nnx.Rngs(0))
    assert plan_of(model)["layers/kernel"].axes == axes
    assert model.layers.kernel_mora.shape[axis] == 3
    close(model(x), base(x), 1e-6)
    mora_jax.nnx.set_adapters(model, random_like(mora_jax.nnx.adapters(model)))
    close(merge_adapters(model)(x), model(x), 1e-5)
    assert largest(model(x) - base(x)) > 1e-2
    as_many = ScannedNNX(axis, 16)
    with pytest.raises(ValueError, match="which of its axes is the stack's"):
        qwix.apply_lora_to_model(as_many, provider, x, rngs=nnx.Rngs(0))


def test_a_call_without_adapters():
    adapted = Adapted("linen", LAYERS["dense"], **INT8)
    with pytest.raises(ScopeParamNotFoundError, match="kernel_mora"):
        adapted.model.apply({"params": adapted.base}, adapted.x)


@pytest.mark.parametrize("api", APIS)
def test_dropout_in_training_alone(api):
    adapted = Adapted(api, LAYERS["dense"], dropout=0.5)
    adapters = random_like(adapted.adapters)
    if api == "linen":
        at_test = adapted(adapters)
        one, two, again = (
            adapted(adapters, rngs={"dropout": jax.random.key(k)}) for k in (1, 2, 1)
        )
    else:
        one, again = adapted(adapters), adapted(adapters)
        two = adapted(jax.tree.map(lambda m: m + 0.1, adapters))
        adapted.model.eval()
        at_test = adapted(adapters)
    still = jax.tree.map(
        lambda a: a.replace(spec=dataclasses.replace(a.spec, dropout=0.0)),
        adapters,
        is_leaf=lambda a: isinstance(a, mora_jax.Adapter),
    )
    without = Adapted(api, LAYERS["dense"])(still)
    close(at_test, without)
    assert (one == again).all() and not np.allclose(one, two)
    assert not np.allclose(one, at_test)


def test_it_trains_beside_a_quantized_base():
    adapted = Adapted("nnx", LAYERS["dense"], **TYPES["nf4"])
    model, y = adapted.model, random(2, 3, 24)
    before = jax.tree.leaves(nnx.state(model, nnx.Not(mora.MoRAParam)))
    optimizer = mora.adapter_optimizer(model, optax.adam(3e-2))

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(adapted.x) - y) ** 2)

        found, grads = mora.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return found

    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    after = jax.tree.leaves(nnx.state(model, nnx.Not(mora.MoRAParam)))
    for one, other in zip(before, after, strict=True):
        assert (one == other).all()


# --- Rules ---


def test_the_first_rule_that_matches_counts():
    rules = [
        MoRARule(module_path="layers_0", rank=1, alpha=2.0),
        MoRARule(module_path=".*", rank=2, seed=3, operator="orthogonal", **INT8),
    ]
    model = nn.Sequential([nn.Dense(16), nn.Dense(16)])
    adapted, x = qwix.apply_lora_to_model(model, MoRAProvider(rules)), random(1, 2, 16)
    first, second = plan_of(adapted, x).values()
    assert (first.shape, first.alpha) == ((8, 2, 2), 2)
    assert second.shape == (8, 8) and second.operator.seed == 3
    params = adapted.init(KEY, x)["params"]
    assert isinstance(params["layers_0"]["kernel"], jax.Array)
    assert not isinstance(params["layers_1"]["kernel"], jax.Array)


def test_a_rule_has_the_settings_and_the_defaults_of_a_config():
    config = MoRAConfig()
    own = {f.name for f in dataclasses.fields(MoRARule)}
    own -= {f.name for f in dataclasses.fields(qwix.QuantizationRule)}
    for name in own:
        assert getattr(MoRARule(), name) == getattr(config, name)
    left = {f.name for f in dataclasses.fields(MoRAConfig)} - own
    assert left == {"targets", "exclude", "overrides", "execution", "train"}


@pytest.mark.parametrize("api", APIS)
def test_rules_that_adapt_nothing(api):
    with pytest.raises(ValueError, match=r"no kernel .*module_path=\['.*mlp.*'\]"):
        Adapted(api, LAYERS["dense"], module_path=".*mlp.*")


def test_rules_for_some_operations():
    rules = [MoRARule(op_names=("einsum",), rank=1), MoRARule(rank=2)]
    adapted = Adapted("linen", LAYERS["dense"], rules)
    (spec,) = adapted.plan.values()
    assert spec.rank == 2


# --- Meshes ---


@pytest.mark.slow
def test_m_is_on_the_mesh_of_its_kernel():
    mesh = make_mesh(fsdp=2, model=2)
    net, x = nnx.Linear(16, 24, rngs=nnx.Rngs(0)), random(1, 4, 16)
    net.kernel[...] = jax.device_put(
        net.kernel[...], NamedSharding(mesh, P("fsdp", "model"))
    )
    provider = MoRAProvider(rank=2, operator="rotation", **INT8)
    model = qwix.apply_lora_to_model(net, provider, x, rngs=nnx.Rngs(0))
    m = mora.adapters(model)["kernel_mora"].m
    assert m.sharding.mesh == mesh and m.sharding.is_fully_replicated
    adapters = random_like(mora.adapters(model))
    mora.set_adapters(model, adapters)
    assert np.isfinite(jax.jit(lambda x: model(x))(x)).all()
    merged = merge_adapters(model)
    close(merged(x), model(x))
    assert merged.kernel[...].sharding == net.kernel[...].sharding


# --- What is refused ---


class Own(nn.Module):
    """A layer of one kernel, which it multiplies in a way of its own."""

    product: Callable
    features: int = 16

    @nn.compact
    def __call__(self, x):
        shape = (16, self.features)
        return self.product(x, self.param("kernel", nn.initializers.normal(), shape))


def three(x, kernel):
    return jnp.einsum("ni,io,n->no", x, kernel, jnp.ones(len(x)))


@pytest.mark.parametrize(
    "product, message",
    [
        (three, "an einsum with 3 operands"),
        (lambda x, kernel: jnp.dot(x, kernel.T), "what it makes of the kernel"),
        (lambda x, kernel: jnp.einsum("ni,oi->no", x, 2 * kernel), "what it makes of"),
    ],
)
@pytest.mark.parametrize("wrapped", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_products_that_have_no_adapter(product, message, wrapped):
    model = qwix.apply_lora_to_model(Own(product), MoRAProvider(rank=2))
    expected = f"^kernel: .*{message}.*leave it out of module_path='..'"
    with pytest.raises(ValueError, match=expected):
        wrapped(model.init)(KEY, random(1, 3, 16))


@pytest.mark.parametrize("wrapped", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_products_in_a_function_that_jax_compiles_for_itself(wrapped):
    """In 0.1.5 qwix turns that off, and the layer is adapted."""
    x, layers = random(1, 3, 16), [Own(jnp.matmul), Own(jnp.matmul)]
    model = qwix.apply_lora_to_model(nn.Sequential(layers), MoRAProvider(rank=2))
    if VERSION == "0.1.5":
        params = wrapped(model.init)(KEY, x)["params"]
        assert params["layers_1"]["kernel_mora"].m.shape == (4, 4, 4)
        return
    with pytest.raises(ValueError, match="layers_0/kernel: .*use jnp.dot or "):
        wrapped(model.init)(KEY, x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_kernels_in_another_dtype(dtype):
    """Which is another array, that only its numbers tell from a transposed one."""

    def product(x, kernel):
        return jnp.einsum("ni,io->no", x.astype(dtype), kernel.astype(dtype))

    model = qwix.apply_lora_to_model(Own(product), MoRAProvider(rank=2))
    x = random(1, 16, 16)  # of the kernel's shape, and of its dtype
    base, zeros = mora_jax.split(model.init(KEY, x)["params"])
    params = mora_jax.combine(base, random_like(zeros))
    eager = model.apply({"params": params}, x)
    close(jax.jit(model.apply)({"params": params}, x), eager, 0.02)
    merged = merge(base, random_like(zeros))
    plain = Own(product).apply({"params": merged}, x)
    close(eager, plain, 0.02)


def test_a_kernel_on_the_left_of_an_input_of_its_shape():
    def product(x, kernel):
        return jnp.einsum("oi,ni->no", kernel, x)

    model = qwix.apply_lora_to_model(Own(product), MoRAProvider(rank=2))
    x = random(1, 16, 16)
    base, zeros = mora_jax.split(model.init(KEY, x)["params"])
    (spec,) = plan_of(model, x).values()
    assert spec.axes == "oi"
    params = mora_jax.combine(base, random_like(zeros))
    merged = merge(base, random_like(zeros))
    y = jax.jit(model.apply)({"params": params}, x)
    close(y, Own(product).apply({"params": merged}, x))


def test_an_input_of_the_shape_of_m():
    """qwix takes what comes second and has a parameter's shape for that parameter."""

    def product(x, kernel):
        return jnp.dot(jnp.dot(x, kernel), x[:, :8].T @ x[:, :8])

    provider = MoRAProvider(operator="sharing", square_rank=8, **INT8)
    model = qwix.apply_lora_to_model(Own(product, 8), provider)
    x = random(1, 3, 16)
    params = model.init(KEY, x)["params"]
    assert params["kernel_mora"].m.shape == (8, 8)
    assert list(plan_of(model, x)) == ["kernel"]


def test_kernels_that_are_not_multiplied_are_named():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(8, 16, name="embed")(ids)
            return nn.DenseGeneral((4, 4), name="out")(x)

    model = qwix.apply_lora_to_model(Net(), MoRAProvider(rank=2))
    with pytest.warns(LeftOutWarning, match="^embed/embedding: no product") as found:
        model.init(KEY, jnp.arange(3))
    assert sum(issubclass(w.category, LeftOutWarning) for w in found) == 1
    net = nnx.Sequential(
        nnx.Embed(8, 16, rngs=nnx.Rngs(0)), nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    )
    with pytest.warns(LeftOutWarning, match="^layers/0/embedding: no product"):
        qwix.apply_lora_to_model(
            net, MoRAProvider(rank=2), jnp.arange(3), rngs=nnx.Rngs(0)
        )


def test_convolutions_are_left_out():
    net = nnx.Sequential(
        nnx.Conv(16, 16, (3,), rngs=nnx.Rngs(0)), nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    )
    with pytest.warns(LeftOutWarning, match="^layers/0/kernel: no product"):
        model = qwix.apply_lora_to_model(
            net, MoRAProvider(rank=2), random(0, 2, 5, 16), rngs=nnx.Rngs(0)
        )
    assert list(plan_of(model)) == ["layers/1/kernel"]


def plain_layer():
    return nnx.Linear(4, 4, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: MoRAProvider([MoRARule()], rank=2), ValueError, "exclude each other"),
        (
            lambda: MoRAProvider([qwix.QuantizationRule()]),
            ValueError,
            "hold a MoRARule",
        ),
        (lambda: MoRARule(rank=0), ValueError, "rank must"),
        (lambda: MoRARule(alpha=0.0), ValueError, "alpha"),
        (lambda: MoRARule(operator="rotations"), ValueError, "'rotation'"),
        (lambda: plan_of(3), TypeError, "model must be a Flax module, got int"),
        (lambda: plan_of(nn.Dense(4), jnp.ones(4)), ValueError, "no adapters"),
        (
            lambda: plan_of(plain_layer()),
            ValueError,
            "no adapters",
        ),
        (
            lambda: merge_adapters(nnx.Linear(4, 4, rngs=nnx.Rngs(0))),
            ValueError,
            "no ad",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.usefixtures("unchecked")
def test_bad_merges():
    adapted = Adapted("linen", LAYERS["dense"], **INT8)
    base, adapters = adapted.base, adapted.adapters
    with pytest.raises(
        ValueError, match="params hold the adapter layers_0/kernel_mora"
    ):
        merge(mora_jax.combine(base, adapters), adapters)
    with pytest.raises(ValueError, match="params lack the kernel 'layers_0/kernel'"):
        merge(base["layers_0"], adapters)
    nan = jax.tree.map(lambda m: m * jnp.nan, adapters)
    with pytest.raises(ValueError, match="NaN or infinity"):
        merge(base, nan)
    with pytest.raises(ValueError, match="mora_jax.qwix.dequantize"):
        mora_jax.merge(base, adapters)


def test_another_version_of_qwix(monkeypatch):
    """Of which nobody knows the private names."""
    names = [name for name in sys.modules if name.startswith("mora_jax.qwix")]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("qwix._src.providers.ptq.WithAux")
    with pytest.raises(ImportError, match=r"0\.1\.5 to 0\.1\.8: .*name 'WithAux'"):
        importlib.import_module("mora_jax.qwix")


@pytest.mark.slow
@pytest.mark.parametrize("api", APIS)
def test_each_row_of_a_batch_has_its_own_adapter(api):
    x, index = random(0, 3, 2, 16), [2, -1, 0]
    provider = MoRAProvider(
        module_path=".*", operator="signed_decoupling", square_rank=4, **INT8
    )
    if api == "linen":
        model = qwix.apply_lora_to_model(nn.Dense(24), provider)
        base, _ = mora_jax.split(jax.jit(model.init)(KEY, x)["params"])
        plan = plan_of(model, x)

        @jax.jit
        def apply(adapters, x):
            return model.apply({"params": mora_jax.combine(base, adapters)}, x)

    else:
        plain, rngs = nnx.Linear(16, 24, rngs=nnx.Rngs(0)), nnx.Rngs(0)
        model = qwix.apply_lora_to_model(plain, provider, x, rngs=rngs)
        plan = mora.plan_of(model)

        @jax.jit
        def apply(adapters, x):
            own = nnx.clone(model)
            mora.set_adapters(own, adapters)
            return own(x)

    first = random_like(jax.eval_shape(lambda: mora_jax.init(plan)))
    adapters = [jax.tree.map(lambda m, k=k: k * m, first) for k in (1, 2, 3, 0)]
    stacked = mora_jax.serving.stack(adapters[:3])
    alone = [apply(adapters[k], x[b : b + 1])[0] for b, k in enumerate(index)]
    own = mora_jax.serving.select(stacked, index)
    close(jax.vmap(lambda a, x: apply(a, x[None])[0])(own, x), jnp.stack(alone))


@pytest.mark.slow
def test_inputs_of_quantized_kernels_are_damped():
    """Their directions are found as those of any other, without a gradient of one."""
    model, x = nn.Sequential([nn.Dense(16), nn.Dense(16)]), random(1, 12, 16)
    rules = [MoRARule(module_path=".*", rank=2, **INT8)]
    adapted = qwix.apply_lora_to_model(model, MoRAProvider(rules))
    base, adapters = mora_jax.split(adapted.init(KEY, x)["params"])
    run = jax.jit(lambda a: adapted.apply({"params": mora_jax.combine(base, a)}, x))
    damped = mora_jax.input_damping(run, adapters, directions=2)
    op = damped["layers_0"]["kernel_mora"].operator
    directions = np.asarray(op.directions, np.float64)
    leading = np.linalg.svd(np.asarray(x, np.float64))[2][:2]
    inside = np.linalg.norm(leading @ directions) / np.linalg.norm(directions)
    assert inside > 0.999
    moved = jax.tree.map(jnp.ones_like, damped)
    assert jnp.abs(run(moved) - run(adapters)).max() > 0.1


def quantized_layers(types, operator="orthogonal"):
    """A model, its kernels of few bits, new adapters, and its input."""
    model, x = nn.Sequential([nn.Dense(24), nn.Dense(16)]), random(1, 12, 16)
    how = TYPES | {"int8 tiles": {"weight_qtype": "int8", "tile_size": 8}}
    rules = [MoRARule(module_path=".*", rank=1, operator=operator, **how[types])]
    adapted = qwix.apply_lora_to_model(model, MoRAProvider(rules))
    base, adapters = mora_jax.split(adapted.init(KEY, x)["params"])

    def apply(adapters, base):
        return adapted.apply({"params": mora_jax.combine(base, adapters)}, x)

    return apply, base, adapters, x


@pytest.mark.slow
@pytest.mark.parametrize("types", ["int8", "nf4"])
def test_directions_and_a_start_beside_kernels_that_have_no_gradient(types):
    """They are those of the gradient that the kernels would have."""
    apply, base, adapters, x = quantized_layers(types, "rotation")
    weights = random(2, 12, 16)

    def loss(adapters, base):
        return jnp.sum(weights * apply(adapters, base))

    found = mora_jax.directions(loss, adapters, [(base,)])
    kernels = {
        name: np.asarray(layer["kernel"]) for name, layer in dequantize(base).items()
    }
    grads = {
        "layers_0": x.T @ (weights @ kernels["layers_1"].T),
        "layers_1": (x @ kernels["layers_0"]).T @ weights,
    }
    for name, gradient in grads.items():
        op = found[name]["kernel_mora"].operator
        assert op.name == "subspace"
        rows = np.asarray(gradient, np.float64)
        ins, outs = orthonormal(op.in_basis), orthonormal(op.out_basis)
        held = np.sum((ins.T @ rows @ outs) ** 2)
        values = np.linalg.svd(rows, compute_uv=False)[: op.square_rank]
        assert held > 0.98 * np.sum(values**2)
    started = mora_jax.gradient_start(lambda a: (loss(a, base) + 1e3) ** 2, found)
    assert loss(started, base) < loss(found, base)


@pytest.mark.slow
@pytest.mark.parametrize("types", ["int8", slow("int4"), slow("int8 tiles")])
def test_deltas_are_kept_in_whole_steps_in_the_mean(types):
    _, base, adapters, _ = quantized_layers(types)
    merged = jax.jit(mora_jax.qwix.merge_quantized)
    for old, new in zip(
        *map(jax.tree.leaves, (base, merged(base, adapters))), strict=True
    ):
        np.testing.assert_array_equal(old, new)
    moved = jax.tree.map(lambda m: 5e-4 * random(3, *m.shape), adapters)
    deltas, before = mora_jax.delta_weight(moved), dequantize(base)
    sums, count = jax.tree.map(jnp.zeros_like, before), 400
    for shift in range(count):
        after = dequantize(merged(base, moved, 12345 * shift))
        sums = jax.tree.map(lambda s, a, b: s + (a - b) / count, sums, after, before)
    for name, layer in base.items():
        array = layer["kernel"].array
        step = float(jnp.max(array.scale))
        inside = (
            jnp.abs(array.qvalue.astype("int32")) < jnp.iinfo(array.qvalue.dtype).max
        )
        delta, got = deltas[name]["kernel"], sums[name]["kernel"]
        assert float(jnp.abs(delta).max()) < step
        # A number's error has a deviation of half a step at most.
        error = float(jnp.abs(jnp.where(inside, got - delta, 0)).max())
        assert error < 5 * step / 2 / count**0.5, name


def test_kernels_without_whole_steps_are_refused():
    _, base, adapters, _ = quantized_layers("nf4")
    with pytest.raises(TypeError, match="layers_0/kernel: .* got nf4"):
        mora_jax.qwix.merge_quantized(base, adapters)
    with pytest.raises(TypeError, match="layers_0/kernel: .* is not quantized"):
        mora_jax.qwix.merge_quantized(dequantize(base), adapters)
    _, base, adapters, _ = quantized_layers("int8")
    other = {"layers_0": base["layers_1"], "layers_1": base["layers_0"]}
    with pytest.raises(
        ValueError, match=r"layers_0/kernel is \(24, 16\), and \(16, 24"
    ):
        mora_jax.qwix.merge_quantized(other, adapters)
    bad = jax.tree.map(lambda m: m * jnp.nan, adapters)
    with pytest.raises(ValueError, match="NaN"):
        mora_jax.qwix.merge_quantized(base, bad)


@pytest.mark.slow
def test_a_renewal_beside_kernels_of_8_bits():
    apply, base, adapters, _ = quantized_layers("int8")
    wanted = random(2, 12, 16)

    def loss(adapters, base):
        return jnp.mean((apply(adapters, base) - wanted) ** 2)

    init, step, _ = mora_jax.remora.renewing(
        loss, optax.adam(1e-2), 3, merge=mora_jax.qwix.merge_quantized
    )
    state, step, losses = init(adapters=adapters, params=base), jax.jit(step), []
    for _ in range(9):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0] and step._cache_size() == 1
    for name in base:
        old, new = (tree[name]["kernel"].array for tree in (base, state.params))
        np.testing.assert_array_equal(old.scale, new.scale)
        assert new.qvalue.dtype == old.qvalue.dtype and (new.qvalue != old.qvalue).any()
    # It is what a merge of all adapters so far would be, but for rounding.
    close(loss(state.adapters, state.params), losses[-1], 0.2)
