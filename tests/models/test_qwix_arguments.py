"""What `mora_jax.qwix` takes, and what it says of the rest."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import bare, close, random, random_like

import mora_jax
from mora_jax import nnx as mora
from mora_jax.qwix import (
    MoRAProvider,
    MoRARule,
    dequantize,
    merge_adapters,
    plan_of,
)

qwix = pytest.importorskip("qwix")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
KEY, X = jax.random.key(0), random(0, 3, 16)
NF4 = {"weight_qtype": "nf4", "tile_size": 8}


def merge(base, adapters, **settings):
    return mora_jax.merge(dequantize(base), adapters, **settings)


class Net(nn.Module):
    """A model with static inputs and one that is left out by default."""

    @nn.compact
    def __call__(self, x, kind, train=False, mask=None):
        x = nn.Dense(16 if kind == "wide" else 8)(x)
        x = 2 * x if train else x
        return x if mask is None else jnp.where(mask, x, 0)


def test_plans_of_calls_with_static_inputs():
    model = qwix.apply_lora_to_model(Net(), MoRAProvider(rank=2, **NF4))
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    mask = jax.ShapeDtypeStruct((3, 16), bool)
    plan = plan_of(model, X, "wide")
    assert plan["Dense_0/kernel"].kernel_shape == (16, 16)
    assert plan_of(model, shape, "wide", True) == plan
    assert plan_of(model, shape, "wide", train=False, mask=mask) == plan
    assert plan_of(model, X, "narrow")["Dense_0/kernel"].kernel_shape == (16, 8)


@pytest.fixture(scope="module")
def adapted():
    """A quantized Linen layer, its params, and random adapters."""
    model = qwix.apply_lora_to_model(nn.Dense(16), MoRAProvider(rank=2, **NF4))
    base, zeros = mora_jax.split(model.init(KEY, X)["params"])
    return model, base, random_like(zeros)


def test_merging_in_jit(adapted):
    _, base, adapters = adapted
    close(jax.jit(lambda b, a: merge(b, a))(base, adapters), merge(base, adapters))


def test_params_on_the_host_and_shapes(adapted):
    model, base, adapters = adapted
    host = jax.device_get(base)
    close(dequantize(host), dequantize(base), 0)
    close(merge(host, adapters), merge(base, adapters), 0)
    params = mora_jax.combine(host, adapters)
    y = model.apply({"params": mora_jax.combine(base, adapters)}, X)
    close(model.apply({"params": params}, X), y, 0)
    shapes = jax.eval_shape(lambda: base)
    found = dequantize(shapes)["kernel"]
    assert isinstance(found, jax.ShapeDtypeStruct) and found.shape == (16, 16)
    with pytest.raises(TypeError, match="kernel in params must be an array, got Shape"):
        merge(shapes, adapters)


def test_the_base_of_an_nnx_model(tmp_path):
    plain = nnx.Sequential(*[nnx.Linear(16, 16, rngs=nnx.Rngs(k)) for k in (0, 1)])
    rules = [MoRARule(module_path="layers/0", rank=2, **NF4)]
    rules += [qwix.QuantizationRule(**NF4)]
    model = qwix.apply_lora_to_model(plain, MoRAProvider(rules), X, rngs=nnx.Rngs(0))
    mora.set_adapters(model, random_like(mora.adapters(model)))
    adapters = mora.adapters(model)
    base = dequantize(model)
    shapes, expected = (
        jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
        for state in (base, nnx.state(plain, nnx.Param))
    )
    assert shapes == expected
    y = model(X)
    nnx.update(plain, mora_jax.merge(base, adapters))
    close(plain(X), y)
    mora_jax.save(tmp_path / "a", adapters, params=base)
    found = mora_jax.load(tmp_path / "a")
    other = jax.tree.map(lambda a: a + 1, base)
    with pytest.raises(ValueError, match="other weights than the base"):
        mora_jax.merge(other, found)
    close(merge_adapters(model)(X), y)  # the model stays as it is
    with pytest.raises(TypeError, match="kernel 'layers/0/kernel', .*dequantize.model"):
        dequantize(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("params", [None, 3, nn.Dense(4)])
def test_what_is_no_tree_of_params(params):
    with pytest.raises(TypeError, match="params must be a tree of arrays, got"):
        dequantize(params)


def test_a_base_of_integers(adapted):
    _, base, adapters = adapted
    integers = jax.tree.map(lambda a: np.asarray(a).astype(int), dequantize(base))
    with pytest.raises(TypeError, match="^kernel in params must have a floating"):
        merge(integers, adapters)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: MoRAProvider(MoRARule()), TypeError, r"as in MoRAProvider\(\[rule"),
        (
            lambda: MoRAProvider([3, MoRARule()]),
            TypeError,
            "rules must be a list of .* got .3, MoRA",
        ),
        (lambda: MoRAProvider(".*"), TypeError, "list of .* got '.\\*'"),
        (lambda: MoRAProvider(module_path="("), ValueError, "'.', .* expression: mis"),
        (lambda: MoRAProvider(module_path=3), TypeError, "module_path must .* got 3"),
        (lambda: MoRARule(module_path=["a"]), TypeError, r"got \['a'\]; for several"),
        (
            lambda: MoRAProvider([MoRARule(), qwix.QuantizationRule(module_path="*")]),
            ValueError,
            "module_path holds '.', which is not a regular expression",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_rules_are_refused_when_they_are_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_plain_arrays_in_place_of_adapters_are_refused(adapted):
    """They do not say which product of their kernel they are meant for."""
    model, base, adapters = adapted
    params = {**base, **bare(adapters)}
    with pytest.raises(TypeError, match="kernel_mora in params must be an adapter"):
        model.apply({"params": params}, X)
    made = plan_of(model, X).adapters(bare(adapters))
    y = model.apply({"params": mora_jax.combine(base, adapters)}, X)
    close(model.apply({"params": mora_jax.combine(base, made)}, X), y, 0)
