"""What other libraries do to JAX's products while a model runs does not reach ours."""

import inspect
import os
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import slow
from flax import nnx
from helpers import made_for

from mora_jax import FrozenDense, MoRAConfig, init, linen, mora_apply
from mora_jax import nnx as mora
from mora_jax._jax.tracing import intercepted, undisturbed

qwix = pytest.importorskip("qwix")

# qwix uses old names of Flax.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

KEY = jax.random.key(0)
SCRIPT = Path(__file__).parents[1] / "support" / "quantized.py"


@pytest.mark.parametrize("order", [slow("plain-first"), slow("quantized-first")])
def test_what_ran_before_makes_no_difference(order):
    """Linen and NNX, QT and PTQ, added and folded, in a process of their own."""
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    subprocess.run([sys.executable, str(SCRIPT), order], env=env, check=True)


def quantize(model, x):
    rule = qwix.QtRule(weight_qtype="int8", act_qtype="int8")
    return qwix.quantize_model(model, qwix.QtProvider([rule]), x)


def linear(**settings):
    return nnx.Linear(8, 12, rngs=nnx.Rngs(0), **settings)


def with_eye(model, **settings):
    adapted = mora.wrap(
        model, MoRAConfig(operator="signed_decoupling", square_rank=8, **settings)
    )
    eye = jax.tree.map(lambda _: jnp.eye(8), mora.adapters(adapted))
    mora.set_adapters(adapted, eye)
    return adapted


def test_an_input_of_the_shape_of_m_is_no_weight():
    """qwix looks for weights by their shapes."""
    model = linear(use_bias=False)
    adapted = with_eye(model)
    x = jax.random.normal(jax.random.key(0), (8, 8))
    own, both = (quantize(one, x)(x) for one in (model, adapted))
    np.testing.assert_allclose(both - own, adapted(x) - model(x), atol=1e-5)


@pytest.mark.parametrize("kind", [qwix.QtProvider, qwix.PtqProvider])
def test_a_linen_model_that_qwix_quantizes_follows_a_plan_of_the_plain_one(kind):
    """No product of arrays is there to be proven."""
    model, x = nn.Sequential([nn.Dense(12)]), jax.random.normal(KEY, (3, 8))
    variables = made_for(model, x)
    plan = linen.plan(
        model, variables, MoRAConfig(operator="signed_decoupling", square_rank=8), x
    )
    rule = qwix.QtRule if kind is qwix.QtProvider else qwix.QuantizationRule
    model = qwix.quantize_model(model, kind([rule(weight_qtype="int8")]))
    if kind is qwix.PtqProvider:
        shapes = jax.eval_shape(model.init, KEY, x)["params"]
        variables = {"params": qwix.quantize_params(variables["params"], shapes)}
    adapters = jax.tree.map(lambda _: jnp.eye(8), init(plan))
    y = linen.wrap(model, plan)(adapters, variables, x)
    expected = adapters["layers_0"]["kernel_mora"](x)
    np.testing.assert_allclose(y - model.apply(variables, x), expected, atol=1e-5)


class Raw(nnx.Module):
    """A product that JAX itself caches, as a quantized one."""

    def __init__(self, features):
        self.w = nnx.Param(jnp.ones((features, features)))

    def __call__(self, x):
        return jnp.matmul(x, self.w[...])


def knows_arguments_of_jax():
    """True if qwix's products take all that JAX's matmul gives to a product."""
    ours, theirs = (
        inspect.signature(call).parameters.keys()
        for call in (qwix.QtProvider.dot_general, jax.lax.dot_general)
    )
    return "reduction_order" in ours or "reduction_order" not in theirs


@pytest.mark.skipif(
    not knows_arguments_of_jax(), reason="this qwix cannot quantize jnp.matmul of JAX"
)
def test_a_quantized_product_in_jax_own_caches_is_not_ours():
    q, x = 11, jax.random.normal(jax.random.key(0), (13, 11))
    quantize(Raw(q), x)
    config = MoRAConfig(square_rank=q, operator="truncation", execution="activation")
    frozen = FrozenDense.from_config(jnp.zeros((q, q)), config=config)
    m = jax.random.normal(jax.random.key(1), (q, q))
    y = mora_apply({"kernel_mora": m}, frozen, x)
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ np.asarray(m), atol=1e-5)


def test_interception_by_any_library_is_seen(monkeypatch):
    """Its product is given the kernel as it is, without a delta in it."""
    original, operands = jax.lax.dot_general, []

    def dot_general(x, kernel, *args, **settings):
        operands.append(kernel)
        return original(x, kernel, *args, **settings)

    assert not intercepted()
    monkeypatch.setattr(jax.lax, "dot_general", dot_general)
    assert intercepted()
    model = linear(use_bias=False, dot_general=jax.lax.dot_general)
    adapted = with_eye(model, execution="fold")
    y = adapted(jnp.ones((4, 8)))
    (kernel,) = (one for one in operands if one.shape == (8, 12))
    np.testing.assert_array_equal(kernel, model.kernel[...])
    monkeypatch.undo()
    assert not intercepted()
    np.testing.assert_allclose(adapted(jnp.ones((4, 8))), y, atol=1e-5)


def test_a_qwix_that_cannot_be_turned_off_is_an_error(monkeypatch):
    model = mora.wrap(linear(), MoRAConfig(operator="signed_decoupling", square_rank=4))
    switch = sys.modules["qwix._src.interception"]
    monkeypatch.delattr(switch, "disable_interceptions")
    model(jnp.ones((3, 8)))  # no quantized model runs
    told = f"qwix {version('qwix')} off .* install one of qwix 0.1.4"
    with pytest.raises(RuntimeError, match=told):
        quantize(model, jnp.ones((3, 8)))


@pytest.mark.skipif(version("qwix") == "0.1.5", reason="it refuses a second thread")
def test_another_thread_is_not_turned_off():
    """Its model is quantized as if nobody else were there."""
    x = jnp.linspace(-1, 1, 24).reshape(3, 8)
    expected = quantize(linear(), x)(x)
    inside, go_on = threading.Event(), threading.Event()

    @undisturbed
    def wait():
        inside.set()
        go_on.wait(60)

    class Waits(nnx.Module):
        def __call__(self, x):
            wait()
            return x

    thread = threading.Thread(target=lambda: quantize(Waits(), x))
    thread.start()
    try:
        assert inside.wait(60)
        y = quantize(linear(), x)(x)
    finally:
        go_on.set()
        thread.join()
    np.testing.assert_array_equal(y, expected)
