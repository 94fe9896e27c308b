"""What long runs lean on: optax's accumulation, clipping and guard against NaN."""

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_files import assert_same
from helpers import close, largest, random, random_like

import mora_jax
from mora_jax import MoRAConfig, linen

MODEL = nn.Sequential([nn.Dense(24), nn.relu, nn.Dense(16)])
X = random(0, 8, 16)
GOOD, BAD = [*X.reshape(4, 2, -1)], X[:2].at[0, 0].set(jnp.nan)
VARIABLES = random_like(jax.eval_shape(MODEL.init, jax.random.key(1), X))
PLAN = linen.plan(MODEL, VARIABLES, MoRAConfig(rank=2, scale="paper"), X)
APPLY, BASE = linen.wrap(MODEL, PLAN), VARIABLES["params"]
# A tree of their own, or among the base's params, for `mora_jax.optimizer`.
ADAPTERS = {"alone": mora_jax.init(PLAN)}
ADAPTERS["combined"] = mora_jax.combine(BASE, ADAPTERS["alone"])
by_way = pytest.mark.parametrize("way", ADAPTERS)
CLIPPED = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2))


def parts(params):
    """The base and the adapters."""
    combined = "kernel" in params["layers_0"]
    return mora_jax.split(params) if combined else (BASE, params)


@jax.jit
def gradient(params, x):
    def loss(params):
        base, adapters = parts(params)
        return jnp.mean((APPLY(adapters, {"params": base}, x) - 3) ** 2)

    return jax.grad(loss)(params)


def run(way, tx, batches):
    """All adapters and states of the optimizer, from the first to the last."""
    params = ADAPTERS[way]
    tx = mora_jax.optimizer(tx, params) if way == "combined" else tx

    @jax.jit
    def step(params, state, x):
        updates, state = tx.update(gradient(params, x), state, params)
        return optax.apply_updates(params, updates), state

    history = [(params, tx.init(params))]
    for x in batches:
        history.append(step(*history[-1], x))
    for params, _ in history:
        assert_same(parts(params)[0], BASE)
    return [(parts(params)[1], state) for params, state in history]


def assert_close(got, expected):
    close(got, expected, 1e-6)
    assert all(largest(m) > 1e-3 for m in jax.tree.leaves(expected))


@by_way
def test_accumulated_batches_are_one_big_batch(way):
    small = optax.MultiSteps(CLIPPED, 4).gradient_transformation()
    history = run(way, small, GOOD * 2)
    assert_close(history[-1][0], run(way, CLIPPED, [X] * 2)[-1][0])
    for adapters, _ in history[:4]:  # nothing moves before all four are there
        assert_same(adapters, history[0][0])


def test_the_norm_to_clip_by_is_that_of_the_adapters():
    alone, combined = (gradient(params, X) for params in ADAPTERS.values())
    own = norm(alone)
    assert norm(combined) > 1.2 * own > 0.2  # to clip by that would be seen
    expected = jax.tree.map(lambda m, g: m - 0.1 * g / own, ADAPTERS["alone"], alone)
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))
    for way in ADAPTERS:
        assert_close(run(way, tx, [X])[-1][0], expected)


@by_way
def test_a_batch_with_nan_is_left_out(way):
    """Also in the midst of an accumulation, which goes on as if it had not been."""
    tx = optax.MultiSteps(CLIPPED, 2).gradient_transformation()
    tx = optax.apply_if_finite(tx, max_consecutive_errors=100)
    assert np.isnan(norm(gradient(ADAPTERS[way], BAD)))
    history = run(way, tx, [*GOOD[:3], BAD, BAD, *GOOD[3:], BAD, *GOOD])
    for before, after in ((3, 4), (3, 5), (6, 7)):
        (adapters, state), (old, old_state) = history[after], history[before]
        assert_same((adapters, guarded(state)), (old, guarded(old_state)))
    expected = run(way, tx, GOOD * 2)[-1][0]
    assert_same(history[-1][0], expected)
    assert largest(expected) > 1e-2


def norm(tree):
    return np.linalg.norm(jax.flatten_util.ravel_pytree(tree)[0])


def guarded(state):
    """The state inside of `apply_if_finite`, without its counts."""
    kind = optax.ApplyIfFiniteState
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    [inner] = [node.inner_state for node in nodes if isinstance(node, kind)]
    return inner
