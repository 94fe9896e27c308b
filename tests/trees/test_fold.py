"""Models that are any function of a params tree: plain dicts, Equinox."""

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import pytest
from cases import by_few_cases

from mora_jax import MoRAConfig, fold, init, merge, plan

X = jax.random.normal(jax.random.key(0), (6, 12))


def trained(plan):
    return jax.tree.map(
        lambda m: 0.3 * jax.random.normal(jax.random.key(m.size), m.shape), init(plan)
    )


def dict_model():
    """(params, apply, config) of an MLP whose second kernel is (out, in)."""
    keys = jax.random.split(jax.random.key(1), 2)
    params = {
        "layers": [
            {"kernel": jax.random.normal(keys[0], (12, 20)), "bias": jnp.ones(20)},
            {"w": jax.random.normal(keys[1], (8, 20)), "scale": jnp.ones(8)},
        ]
    }

    def apply(params, x):
        first, second = params["layers"]
        h = jnp.tanh(x @ first["kernel"] / 4 + first["bias"])
        return h @ second["w"].T * second["scale"]

    return params, apply, {"layers/1/w": {"axes": "oi"}}, ("layers/0/kernel",)


def equinox_model():
    """Equinox's MLP; its weights are (out, in), and its tree holds functions too."""
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MLP(12, 8, 20, 2, key=jax.random.key(1))
    params, static = equinox.partition(model, equinox.is_array)

    def apply(params, x):
        return jax.vmap(equinox.combine(params, static))(x)

    return params, apply, {".*/weight": {"axes": "oi"}}, (".*/weight",)


def make(name, operator="rotation"):
    params, apply, overrides, targets = {
        "dict": dict_model,
        "equinox": equinox_model,
    }[name]()
    config = MoRAConfig(
        rank=2,
        operator=operator,
        alpha=0.5,
        targets={*targets, *overrides},
        overrides=overrides,
    )
    return params, apply, plan(params, config)


by_model = pytest.mark.parametrize("name", ["dict", "equinox"])


@by_model
def test_axes_and_paths(name):
    params, _, chosen = make(name)
    axes = {
        spec.name: (spec.axes, spec.in_features, spec.out_features)
        for spec in chosen.specs
    }
    assert (
        axes
        == {
            "dict": {"layers/0/kernel": ("io", 12, 20), "layers/1/w": ("oi", 20, 8)},
            "equinox": {
                "layers/0/weight": ("oi", 12, 20),
                "layers/1/weight": ("oi", 20, 20),
                "layers/2/weight": ("oi", 20, 8),
            },
        }[name]
    )
    folded = fold(params, trained(chosen), chosen)
    chex.assert_trees_all_equal_shapes_and_dtypes(folded, params)
    assert jax.tree.structure(folded) == jax.tree.structure(params)


@by_model
def test_zero_changes_nothing_and_folded_is_merged(name):
    params, apply, chosen = make(name)
    y = jax.jit(lambda a, p: apply(fold(p, a, chosen), X))(init(chosen), params)
    chex.assert_trees_all_equal(y, jax.jit(apply)(params, X))
    adapters = trained(chosen)
    folded = jax.jit(lambda a, p: apply(fold(p, a, chosen), X))(adapters, params)
    merged = apply(merge(params, adapters, chosen), X)
    np.testing.assert_allclose(folded, merged, atol=1e-5)
    assert np.abs(folded - y).max() > 1e-2


@by_few_cases
def test_gradients_are_those_of_the_layer(case):
    """One dense layer: the gradient through `fold` against a float64 formula."""
    kernel = jax.random.normal(jax.random.key(2), (12, 20))
    config = MoRAConfig(square_rank=6, operator=case.spec, alpha=0.5)
    chosen = plan({"kernel": kernel}, config)
    adapters = trained(chosen)

    def loss(adapters, params):
        return jnp.sum(jnp.sin(X @ fold(params, adapters, chosen)["kernel"]))

    grad = jax.jit(jax.grad(loss))(adapters, {"kernel": kernel})["kernel_mora"]
    compress, decompress = case.matrices(chosen.specs[0].operator)
    m = np.asarray(adapters["kernel_mora"], np.float64)
    delta = np.einsum("inq,qr,nro->io", compress, m, decompress)
    x = np.asarray(X, np.float64)
    g = np.cos(x @ (np.asarray(kernel, np.float64) + 0.5 * delta))
    expected = 0.5 * np.einsum("bi,inq,nro,bo->qr", x, compress, decompress, g)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(grad, expected, atol=2e-5 * scale, rtol=0)


@by_model
def test_it_trains(name):
    params, apply, chosen = make(name)
    before = jax.tree.map(np.asarray, params)
    adapters = init(chosen)
    tx = optax.adam(3e-2)
    traces = []

    @jax.jit
    def step(adapters, state, params):
        traces.append(None)

        def loss(adapters):
            return jnp.mean((apply(fold(params, adapters, chosen), X) - 1) ** 2)

        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(adapters, updates), state, value

    state, losses = tx.init(adapters), []
    for _ in range(10):
        adapters, state, value = step(adapters, state, params)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0] and len(traces) == 1
    chex.assert_trees_all_equal(params, before)


def test_dtypes_and_transformations():
    params = {"kernel": jnp.ones((12, 12), jnp.bfloat16)}
    chosen = plan(params)
    adapters = trained(chosen)
    assert fold(params, adapters, chosen)["kernel"].dtype == jnp.bfloat16
    wide = fold(params, adapters, chosen, jnp.float32)["kernel"]
    assert wide.dtype == jnp.float32
    several = jax.tree.map(lambda m: jnp.stack([m, 2 * m]), adapters)
    folded = jax.vmap(lambda a: fold(params, a, chosen, jnp.float32))(several)
    np.testing.assert_allclose(folded["kernel"][0], wide, atol=1e-6)
    jax.test_util.check_grads(
        lambda a: fold(params, a, chosen, jnp.float32), (adapters,), 2, atol=1e-2
    )


@pytest.mark.usefixtures("unchecked")
def test_bad_input():
    params, _, chosen = make("dict")
    with pytest.raises(ValueError, match="adapters lack 'layers/0/kernel_mora'"):
        fold(params, {}, chosen)
    with pytest.raises(ValueError, match="params lack the kernel 'layers/0/kernel'"):
        fold({"layers": [{"k": X}]}, init(chosen), chosen)
    shapes = jax.eval_shape(lambda: params)
    with pytest.raises(TypeError, match="under jax.eval_shape"):
        fold(shapes, init(chosen), chosen)
    folded = jax.eval_shape(lambda p, a: fold(p, a, chosen), shapes, init(chosen))
    chex.assert_trees_all_equal_shapes_and_dtypes(folded, params)
