"""Keras 3 on JAX, whose models are functions of their variables, through `fold`."""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close, python_blocks, random, trained
from processes import ROOT

import mora_jax
from mora_jax import MoRAConfig

if find_spec("keras") is None:
    pytest.skip("keras is not installed", allow_module_level=True)

X = random(0, 4, 6, 16)
OVERRIDES = {
    r".*/(query|key|value)/kernel": {"axes": "ioo"},
    r".*/attention_output/kernel": {"axes": "iio"},
}


@pytest.fixture
def model():
    """Attention and a feed-forward part, each with a way past it."""
    import keras  # pyright: ignore

    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((6, 16))
    x = x + keras.layers.MultiHeadAttention(2, 8)(x, x)
    x = keras.layers.LayerNormalization()(x)
    h = keras.layers.EinsumDense("btd,df->btf", (6, 32), activation="gelu")(x)
    x = x + keras.layers.Dropout(0.1)(keras.layers.Dense(16)(h))
    return keras.Model(inputs, x)


@pytest.fixture
def planned(model):
    """The params by their paths, and a plan of them.

    They are copies, since Keras donates the arrays of a model that predicts or trains.
    """
    params = {v.path: jnp.copy(v.value) for v in model.trainable_variables}
    config = MoRAConfig(rank=2, operator="rotation", overrides=OVERRIDES)
    return params, mora_jax.plan(params, config)


def call(model, params, x, training=False):
    """The model as a function of its params."""
    trainable = [params[v.path] for v in model.trainable_variables]
    others = [v.value for v in model.non_trainable_variables]
    return model.stateless_call(trainable, others, x, training=training)[0]


def test_every_kernel_is_found_and_merging_is_exact(model, planned):
    params, plan = planned
    assert set(plan) == {p for p in params if "kernel" in p}
    adapters = trained(plan)
    folded = jax.jit(lambda a, p: mora_jax.fold(p, a))(adapters, params)
    expected = call(model, folded, X)
    assert jnp.abs(expected - call(model, params, X)).max() > 0.1
    for variable in model.trainable_variables:
        variable.assign(mora_jax.merge(params, adapters)[variable.path])
    close(model.predict(np.asarray(X), verbose=0), np.asarray(expected))


def test_a_jitted_step_trains_m_alone(model, planned):
    params, plan = planned
    optimizer, adapters = optax.adam(1e-2), mora_jax.init(plan)
    state = optimizer.init(adapters)

    @jax.jit
    def step(adapters, state, params):
        def loss(adapters):
            folded = mora_jax.fold(params, adapters)
            return jnp.mean(call(model, folded, X, training=True) ** 2)

        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(adapters, updates), state, value

    losses = []
    for _ in range(5):
        adapters, state, value = step(adapters, state, params)
        losses.append(value)
    assert losses[-1] < losses[0] and step._cache_size() == 1


def test_the_code_of_the_page_runs():
    scope = {}
    blocks = python_blocks(ROOT / "docs/maxtext-and-keras.md")
    (first,) = [k for k, block in enumerate(blocks) if "import keras" in block]
    for block in blocks[first:]:
        exec(block, scope)
    found, merged = scope["model"].trainable_variables, scope["merged"]
    assert all((v.value == merged[v.path]).all() for v in found)


def test_lora_of_keras_forms_kernels_and_their_gradients():
    """As the page says: kernel + A B, and a gradient of the kernel's shape."""
    import keras  # pyright: ignore

    layer = keras.layers.Dense(48)
    layer.build((None, 32))
    layer.enable_lora(4)
    trainable = [v.value for v in layer.trainable_variables]
    others = [v.value for v in layer.non_trainable_variables]

    def loss(trainable, x):
        return jnp.sum(layer.stateless_call(trainable, others, x)[0] ** 2)

    program = jax.make_jaxpr(jax.grad(loss))(trainable, jnp.ones((8, 32))).eqns
    made = [
        e.outvars[0].aval.shape for e in program if e.primitive.name == "dot_general"
    ]
    assert made.count((32, 48)) == made.count((48, 32)) == 1
