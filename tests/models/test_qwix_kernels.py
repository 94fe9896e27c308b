"""Which kernels of a model get an M beside them, and what each M means."""

from importlib.metadata import version

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from adapter_files import slow
from flax import nnx
from helpers import close, random, random_like

import mora_jax
from mora_jax import nnx as mora
from mora_jax.qwix import MoRAProvider, MoRARule, dequantize, merge_adapters, plan_of

qwix = pytest.importorskip("qwix")
# `pytest.warns` hides from filters that they come from qwix.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
KEY, VERSION = jax.random.key(0), version("qwix")
INT8 = {"weight_qtype": "int8"}
TYPES = pytest.mark.parametrize("types", [{}, INT8], ids=["none", "int8"])


def merge(base, adapters, **settings):
    return mora_jax.merge(dequantize(base), adapters, **settings)


class Own(nn.Module):
    """A module that computes anything of its input and of a kernel of its own."""

    function: object
    shape: tuple[int, int] = (16, 16)

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        return self.function(x, self.param("kernel", init, self.shape))  # type: ignore[operator]


class OwnNNX(nnx.Module):
    def __init__(self, function, shape=(16, 16)):
        self.function, self.kernel = function, nnx.Param(random(7, *shape) / 4)

    def __call__(self, x):
        return self.function(x, self.kernel[...])


def adapted_linen(function, x, wrapped, **settings):
    """(the adapted model, its plan, its base and random adapters)."""
    model = qwix.apply_lora_to_model(
        Own(function), MoRAProvider(rank=2, operator="rotation", **settings)
    )
    base, zeros = mora_jax.split(wrapped(model.init)(KEY, x)["params"])
    return model, plan_of(model, x), base, random_like(zeros)


def adapted_nnx(model, x, **settings):
    """The model with an adapter of random numbers."""
    provider = MoRAProvider(rank=2, **{"operator": "rotation", **settings})
    model = qwix.apply_lora_to_model(model, provider, x, rngs=nnx.Rngs(0))
    mora.set_adapters(model, random_like(mora.adapters(model)))
    return model


# --- One provider, several models ---


def test_a_provider_of_two_models_keeps_them_apart():
    provider, x = MoRAProvider(rank=2), random(0, 3, 16)
    equations = "ni,io->no", "ni,oi->no"
    models = [nn.Dense(16), nn.Dense(24)]
    models += [Own(lambda x, w, e=e: jnp.einsum(e, x, w)) for e in equations]
    models = [qwix.apply_lora_to_model(model, provider) for model in models]
    for _ in range(2):
        specs = [plan_of(model, x)["kernel"] for model in models]
        shapes = [(16, 16), (16, 24), (16, 16), (16, 16)]
        assert [spec.kernel_shape for spec in specs] == shapes
        assert [spec.axes for spec in specs] == ["io", "io", "io", "oi"]
    # An adapted model computes as its own adapters say, whichever came last.
    base, zeros = mora_jax.split(models[2].init(KEY, x)["params"])
    models[3].init(KEY, x)
    adapters = random_like(zeros)
    merged = merge(base, adapters)
    y = models[2].apply({"params": mora_jax.combine(base, adapters)}, x)
    close(y, x @ merged["kernel"])


def test_each_model_is_searched_for_kernels():
    x, rules = random(0, 3, 16), [MoRARule(module_path="layers/0", rank=2)]
    provider = MoRAProvider(rules)
    linear = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    first = nnx.Sequential(linear)
    qwix.apply_lora_to_model(first, provider, x, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no kernel is multiplied"):
        qwix.apply_lora_to_model(linear, provider, x, rngs=nnx.Rngs(0))


# --- What an M of an NNX model means ---


@TYPES
def test_an_nnx_model_computes_as_its_variables_say(types):
    x, base = random(0, 3, 16), nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    first = adapted_nnx(base, x, dropout=0.5, **types)
    second = adapted_nnx(base, x, operator="signed_decoupling", alpha=3.0, **types)
    first.eval()
    nnx.update(second, nnx.state(first, mora.MoRAParam))
    assert plan_of(second).specs == plan_of(first).specs
    close(second(x), first(x))
    close(merge_adapters(second)(x), second(x))


def test_a_model_that_has_adapters_gets_no_others():
    x, base = random(0, 3, 16), nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    adapted = adapted_nnx(base, x)
    with pytest.raises(ValueError, match="^kernel: model has an M there already: give"):
        adapted_nnx(adapted, x, operator="signed_decoupling")
    merged = merge_adapters(adapted)
    again = adapted_nnx(merged, x, operator="signed_decoupling")
    close(merge_adapters(again)(x), again(x))


# --- Which operand is a kernel ---


def twice(x, kernel):
    return jnp.dot(jnp.tanh(jnp.dot(x, kernel)), kernel)


def attend(x, kernel):
    """Attention; of 16 tokens, weights and values have the kernel's shape."""
    q = jnp.einsum("td,de->te", x, kernel)
    weights = jax.nn.softmax(jnp.einsum("td,sd->ts", q, x))
    return jnp.einsum("ts,sd->td", weights, x)


def input_first(x, kernel):
    """qwix would quantize the input in place of the kernel."""
    return jnp.dot(jnp.dot(x, x), kernel)


@pytest.mark.law
@TYPES
@pytest.mark.parametrize("function", [attend, input_first])
@pytest.mark.parametrize("api", ["eager", "jit", "nnx"])
def test_other_operands_of_the_shape_of_a_kernel_are_refused(function, api, types):
    x = random(0, 16, 16)
    with pytest.raises(ValueError, match="^kernel: .* this shape that is not the kern"):
        if api == "nnx":
            adapted_nnx(OwnNNX(function), x, **types)
        wrapped = jax.jit if api == "jit" else lambda f: f
        adapted_linen(function, x, wrapped, **types)


@pytest.mark.slow
@pytest.mark.parametrize(
    "api, function, rows, types",
    [
        ("eager", twice, 16, INT8),
        ("jit", twice, 16, {}),
        slow("jit", attend, 17, INT8),
        ("nnx", attend, 17, {}),
        slow("eager", twice, 16, {}),
        slow("eager", attend, 17, {}),
        slow("eager", attend, 17, INT8),
        slow("jit", twice, 16, INT8),
        slow("jit", attend, 17, {}),
        slow("nnx", twice, 16, {}),
        slow("nnx", twice, 16, INT8),
        slow("nnx", attend, 17, INT8),
    ],
)
def test_kernels_are_told_from_other_operands(function, rows, api, types):
    x = random(0, rows, 16) / 4
    if api == "nnx":
        adapted = adapted_nnx(OwnNNX(function), x, **types)
        assert list(plan_of(adapted)) == ["kernel"]
        y = adapted(x)
        close(merge_adapters(adapted)(x), y)
        close(nnx.jit(lambda model, x: model(x))(adapted, x), y)
        return
    wrapped = jax.jit if api == "jit" else lambda f: f
    model, plan, base, adapters = adapted_linen(function, x, wrapped, **types)
    assert list(plan) == ["kernel"]
    merged = merge(base, adapters)
    params = {"params": mora_jax.combine(base, adapters)}
    close(wrapped(model.apply)(params, x), Own(function).apply({"params": merged}, x))

    def loss(x):  # where operands are tracers of derivatives
        return jnp.sum(model.apply(params, x))

    def merged_loss(x):
        return jnp.sum(Own(function).apply({"params": merged}, x))

    close(jax.grad(loss)(x), jax.grad(merged_loss)(x), 1e-4)


class Coder(nn.Module):
    def setup(self):
        init = nn.initializers.lecun_normal()
        self.kernel = self.param("kernel", init, (16, 16))

    def encode(self, x):
        return jnp.tanh(jnp.dot(x, self.kernel))

    def decode(self, x):
        return jnp.dot(x, self.kernel)


class Both(nn.Module):
    coder: nn.Module

    def __call__(self, x):
        return self.coder.decode(self.coder.encode(x))  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrapped", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_two_methods_of_a_model_share_a_kernel(wrapped):
    methods, x = ("encode", "decode"), random(0, 3, 16)
    provider = MoRAProvider(rank=2, **INT8)
    model = Both(qwix.quantize_model(Coder(), provider, methods=methods))
    base, zeros = mora_jax.split(wrapped(model.init)(KEY, x)["params"])
    adapters = random_like(zeros)
    merged = merge(base, adapters)
    params = mora_jax.combine(base, adapters)
    y = wrapped(model.apply)({"params": params}, x)
    close(y, Both(Coder()).apply({"params": merged}, x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, kernel: jnp.dot(jnp.dot(x, kernel), 2 * kernel),
        lambda x, kernel: jnp.dot(x * kernel, x),
        lambda x, kernel: jnp.dot(jnp.dot(x, kernel) + kernel, x),
    ],
)
@pytest.mark.parametrize("api", ["eager", "jit", "nnx"])
def test_what_is_made_of_a_kernel_is_no_other_operand(function, api):
    x = random(0, 16, 16)
    with pytest.raises(ValueError, match="^kernel: .*what it makes of the kernel"):
        if api == "nnx":
            adapted_nnx(OwnNNX(function), x)
        adapted_linen(function, x, jax.jit if api == "jit" else lambda f: f)


@pytest.mark.parametrize("api", ["eager", "jit", "nnx"])
def test_a_transposed_kernel_of_another_shape_is_no_other_operand(api):
    """Without a trace, nothing tells that from an input."""
    x, shape = random(0, 3, 16), (16, 24)

    def tied(x, kernel):
        return jnp.dot(jnp.dot(x, kernel), kernel.T)

    with pytest.raises(ValueError, match="^kernel: .*what it makes of the kernel"):
        if api == "nnx":
            adapted_nnx(OwnNNX(tied, shape), x)
        model = qwix.apply_lora_to_model(Own(tied, shape), MoRAProvider(rank=2))
        if api == "jit":
            jax.jit(model.init)(KEY, x)
        plan_of(model, x)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_only_a_trace_tells_what_is_made_of_a_kernel(api):
    def function(x, kernel):
        return jnp.dot(x if x.sum() > 1e6 else jnp.sin(x), x) + jnp.dot(x, kernel)

    x = random(0, 16, 16)
    if api == "linen":
        with pytest.raises(ValueError, match="^kernel: .*what it makes of the kernel"):
            adapted_linen(function, x, lambda f: f)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        if api == "nnx":
            adapted_nnx(OwnNNX(function), x)
        model = qwix.apply_lora_to_model(Own(function), MoRAProvider(rank=2))
        plan_of(model, x)


def test_kernels_of_one_shape_in_one_module():
    """In another dtype, the numbers of an array that is known tell which it is."""

    class Two(nnx.Module):
        def __init__(self):
            self.a, self.b = (nnx.Param(random(k, 16, 16) / 4) for k in (1, 2))

        def __call__(self, x):
            x = jnp.dot(x, self.b[...].astype(x.dtype))
            return jnp.dot(jnp.tanh(x), self.a[...].astype(x.dtype))

    x = random(0, 16, 16).astype(jnp.float16)
    adapted = adapted_nnx(Two(), x)
    assert list(plan_of(adapted)) == ["a", "b"]
    y = adapted(x)
    close(nnx.jit(lambda model, x: model(x))(adapted, x), y, 0.02)
    close(merge_adapters(adapted)(x), y, 0.02)


def test_kernels_inside_of_nnx_transformations():
    class Stack(nnx.Module):
        def __init__(self):
            @nnx.vmap(in_axes=0, out_axes=0)
            def layers(key):
                return nnx.Linear(16, 16, rngs=nnx.Rngs(key))

            self.layers = layers(jax.random.split(KEY, 3))

        def __call__(self, x):
            scan = nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return scan(lambda x, layer: layer(x))(x, self.layers)

    x = random(0, 3, 16)
    model = qwix.quantize_model(Stack(), MoRAProvider(rank=2), x)
    mora_jax.nnx.set_adapters(model, random_like(mora_jax.nnx.adapters(model)))
    assert plan_of(model)["layers/kernel"].axes == "sio"
    close(merge_adapters(model)(x), model(x), 1e-5)


# --- Functions that JAX compiles for themselves ---


@jax.jit
def compiled(x, kernel):
    return jnp.einsum("ni,io->no", x, kernel)


@pytest.mark.law
@pytest.mark.skipif(VERSION == "0.1.5", reason="qwix turns their compilation off")
@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, kernel: x @ kernel,
        lambda x, kernel: jnp.dot(x, kernel) + x @ (2 * kernel),
        lambda x, kernel: jnp.dot(x, kernel) + compiled(x, 2 * kernel),
    ],
)
def test_a_plain_call_before_hides_no_kernel(function, api):
    """JAX keeps what it compiled for the plain model."""
    x, shape = random(0, 3, 16), (16, 24)
    with pytest.raises(ValueError, match="kernel: .*use jnp.dot or jnp.einsum"):
        if api == "nnx":
            plain = OwnNNX(function, shape)
            plain(x)
            adapted_nnx(plain, x)
        model = Own(function, shape)
        model.apply(model.init(KEY, x), x)
        plan_of(qwix.apply_lora_to_model(model, MoRAProvider(rank=2)), x)
