"""Models that are any function of a params tree: plain dicts, Equinox."""

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import pytest
from helpers import close, largest, random, trained

from mora_jax import MoRAConfig, fold, init, merge, plan

X = random(0, 6, 12)
SETTINGS = {"rank": 2, "operator": "rotation", "alpha": 0.5}


def dict_model():
    """An MLP whose second kernel is (out, in): params, apply, config, planned axes."""
    layers = [
        {"kernel": random(1, 12, 20), "bias": jnp.ones(20)},
        {"w": random(2, 8, 20), "scale": jnp.ones(8)},
    ]

    def apply(params, x):
        first, second = params["layers"]
        h = jnp.tanh(x @ first["kernel"] / 4 + first["bias"])
        return h @ second["w"].T * second["scale"]

    targets, overrides = "layers/./(kernel|w)", {"layers/1/w": {"axes": "oi"}}
    config = MoRAConfig(**SETTINGS, targets=targets, overrides=overrides)
    axes = {"layers/0/kernel": ("io", 12, 20), "layers/1/w": ("oi", 20, 8)}
    return {"layers": layers}, apply, config, axes


def equinox_model():
    """Equinox's MLP; its weights are (out, in), and its tree holds functions too."""
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MLP(12, 8, 20, 2, key=jax.random.key(1))
    params, static = equinox.partition(model, equinox.is_array)

    def apply(params, x):
        return jax.vmap(equinox.combine(params, static))(x)

    overrides = {".*/weight": {"axes": "oi"}}
    config = MoRAConfig(**SETTINGS, targets=".*/weight", overrides=overrides)
    widths = [(12, 20), (20, 20), (20, 8)]
    axes = {f"layers/{k}/weight": ("oi", *each) for k, each in enumerate(widths)}
    return params, apply, config, axes


@pytest.mark.slow
@pytest.mark.parametrize("make", [dict_model, equinox_model])
def test_a_model(make):
    """Zeros change nothing, folded is merged, and it trains in one program."""
    params, apply, config, axes = make()
    chosen = plan(params, config)
    for path, spec in chosen.items():
        assert axes.pop(path) == (spec.axes, spec.in_features, spec.out_features)
    assert not axes
    before, traces = jax.tree.map(np.array, params), []
    adapters, tx = init(chosen), optax.adam(3e-2)

    @jax.jit
    def step(adapters, state, params):
        traces.append(None)

        def loss(adapters):
            folded = fold(params, adapters)
            chex.assert_trees_all_equal_shapes_and_dtypes(folded, params)
            y = apply(folded, X)
            return jnp.mean((y - 1) ** 2), y

        (value, y), grads = jax.value_and_grad(loss, has_aux=True)(adapters)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(adapters, updates), state, value, y

    state, history = tx.init(adapters), []
    for _ in range(10):
        adapters, state, value, y = step(adapters, state, params)
        history.append((adapters, float(value), y))
    (_, first, base), *_, (last, _, _), (_, end, y) = history
    chex.assert_trees_all_equal(base, jax.jit(apply)(params, X))
    close(y, apply(merge(params, last), X))
    assert largest(y - base) > 1e-2
    assert end < 0.8 * first and len(traces) == 1
    chex.assert_trees_all_equal(params, before)


@pytest.mark.slow
def test_dtypes_and_transformations():
    params = {"kernel": jnp.ones((12, 12), jnp.bfloat16)}
    chosen = plan(params)
    adapters = trained(chosen)

    @jax.jit
    def wide(adapters):
        return fold(params, adapters, jnp.float32)["kernel"]

    assert fold(params, adapters)["kernel"].dtype == jnp.bfloat16
    assert wide(adapters).dtype == jnp.float32
    several = jax.tree.map(lambda m: jnp.stack([m, 2 * m]), adapters)
    close(jax.vmap(wide)(several)[0], wide(adapters))
    jax.test_util.check_grads(wide, (adapters,), 2, atol=1e-2)


@pytest.mark.usefixtures("unchecked")
def test_bad_input():
    params, _, config, _ = dict_model()
    chosen = plan(params, config)
    with pytest.raises(ValueError, match="adapters hold no adapter"):
        fold(params, {})
    with pytest.raises(ValueError, match="params lack the kernel 'layers/0/kernel'"):
        fold({"layers": [{"k": X}]}, init(chosen))
    shapes = jax.eval_shape(lambda: params)
    with pytest.raises(TypeError, match="must be an array, got ShapeDtypeStruct"):
        fold(shapes, init(chosen))
    folded = jax.eval_shape(lambda p, a: fold(p, a), shapes, init(chosen))
    chex.assert_trees_all_equal_shapes_and_dtypes(folded, params)
