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
VARIABLES = random_like(jax.eval_shape(MODEL.init, jax.random.key(1), X))
PLAN = linen.plan(MODEL, VARIABLES, MoRAConfig(rank=2), X)
APPLY = linen.wrap(MODEL, PLAN)
CLIPPED = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2))


def loss(adapters, params, x):
    return jnp.mean((APPLY(adapters, {"params": params}, x) - 3) ** 2)


class Alone:
    """Adapters as a tree of their own."""

    def __init__(self, tx):
        self.tx, self.params = tx, mora_jax.init(PLAN)
        self.step = jax.jit(self.one)

    def one(self, params, state, x):
        """The next params and the next state of the optimizer."""
        updates, state = self.tx.update(self.gradient(params, x), state, params)
        return optax.apply_updates(params, updates), state

    def run(self, batches):
        """All adapters and states, from the first to the last."""
        history = [(self.params, self.tx.init(self.params))]
        for x in batches:
            history.append(self.step(*history[-1], x))
        return [(self.adapters(params), state) for params, state in history]

    @staticmethod
    def gradient(params, x):
        return jax.grad(loss)(params, VARIABLES["params"], x)

    @staticmethod
    def adapters(params):
        return params


class Combined(Alone):
    """Adapters among the base's params, for `mora_jax.optimizer`."""

    def __init__(self, tx):
        super().__init__(tx)
        self.params = mora_jax.combine(VARIABLES["params"], self.params)
        self.tx = mora_jax.optimizer(tx, self.params)

    @staticmethod
    def gradient(params, x):
        return jax.grad(lambda params: loss(*mora_jax.split(params)[::-1], x))(params)

    @staticmethod
    def adapters(params):
        base, adapters = mora_jax.split(params)
        assert_same(base, VARIABLES["params"])
        return adapters


def assert_close(got, expected):
    close(got, expected, 1e-6)
    assert all(largest(m) > 1e-3 for m in jax.tree.leaves(expected))


ways = pytest.mark.parametrize("way", [Alone, Combined])


@ways
def test_accumulated_batches_are_one_big_batch(way):
    small = way(optax.MultiSteps(CLIPPED, 4).gradient_transformation())
    history = small.run([*X.reshape(4, 2, -1)] * 2)
    assert_close(history[-1][0], way(CLIPPED).run([X] * 2)[-1][0])
    for adapters, _ in history[:4]:  # nothing moves before all four are there
        assert_same(adapters, history[0][0])


def test_the_norm_to_clip_by_is_that_of_the_adapters():
    alone, combined = Alone(optax.sgd(1.0)), Combined(optax.sgd(1.0))
    gradient = jax.jit(alone.gradient)(alone.params, X)
    own = norm(gradient)
    everything = norm(jax.jit(combined.gradient)(combined.params, X))
    assert everything > 1.2 * own > 0.2  # to clip by that would be seen
    expected = jax.tree.map(lambda m, g: m - 0.1 * g / own, alone.params, gradient)
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))
    for way in (Alone, Combined):
        assert_close(way(tx).run([X])[-1][0], expected)


@ways
def test_a_batch_with_nan_is_left_out(way):
    """Also in the midst of an accumulation, which goes on as if it had not been."""
    tx = optax.MultiSteps(CLIPPED, 2).gradient_transformation()
    run = way(optax.apply_if_finite(tx, max_consecutive_errors=100))
    good, bad = [*X.reshape(4, 2, -1)], X[:2].at[0, 0].set(jnp.nan)
    assert np.isnan(norm(jax.jit(run.gradient)(run.params, bad)))
    history = run.run([*good[:3], bad, bad, *good[3:], bad, *good])
    for before, after in ((3, 4), (3, 5), (6, 7)):
        (adapters, state), (old, old_state) = history[after], history[before]
        assert_same((adapters, guarded(state)), (old, guarded(old_state)))
    expected = run.run([*good, *good])[-1][0]
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
