"""What long runs lean on: optax's accumulation, clipping and guard against NaN."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_files import assert_same

import mora_jax
from mora_jax import MoRAConfig, linen

MODEL = nn.Sequential([nn.Dense(24), nn.relu, nn.Dense(16)])
RNG = np.random.default_rng(0)
X = RNG.standard_normal((8, 16), np.float32)
VARIABLES = jax.tree.map(
    lambda leaf: jnp.asarray(RNG.standard_normal(leaf.shape, np.float32) / 4),
    jax.eval_shape(MODEL.init, jax.random.key(1), X),
)
PLAN = linen.plan(MODEL, VARIABLES, MoRAConfig(rank=2), X)
APPLY = linen.wrap(MODEL, PLAN)


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
        """All params and states, from the first to the last."""
        history = [(self.params, self.tx.init(self.params))]
        for x in batches:
            history.append(self.step(*history[-1], x))
        return history

    def last(self, batches):
        """The adapters at the end."""
        return self.adapters(self.run(batches)[-1][0])

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
        def of_all(params):
            base, adapters = mora_jax.split(params)
            return loss(adapters, base, x)

        return jax.grad(of_all)(params)

    @staticmethod
    def adapters(params):
        base, adapters = mora_jax.split(params)
        assert_same(base, VARIABLES["params"])
        return adapters


def assert_close(got, expected):
    def one(got, expected):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
        assert np.abs(expected).max() > 1e-3

    jax.tree.map(one, got, expected)


ways = pytest.mark.parametrize("way", [Alone, Combined])


@ways
def test_accumulated_batches_are_one_big_batch(way):
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2))
    small = way(optax.MultiSteps(tx, 4).gradient_transformation())
    history = small.run([*X.reshape(4, 2, -1)] * 2)
    assert_close(small.adapters(history[-1][0]), way(tx).last([X] * 2))
    for params, _ in history[:4]:  # nothing moves before all four are there
        assert_same(params, history[0][0])


def test_the_norm_to_clip_by_is_that_of_the_adapters():
    alone, combined = Alone(optax.sgd(1.0)), Combined(optax.sgd(1.0))
    gradient = jax.jit(alone.gradient)(alone.params, X)
    own = norm(gradient)
    everything = norm(jax.jit(combined.gradient)(combined.params, X))
    assert everything > 1.2 * own > 0.2  # to clip by that would be seen
    expected = jax.tree.map(
        lambda m, g: np.asarray(m) - 0.1 * np.asarray(g) / own, alone.params, gradient
    )
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))
    for way in (Alone, Combined):
        assert_close(way(tx).last([X]), expected)


@ways
def test_a_batch_with_nan_is_left_out(way):
    """Also in the midst of an accumulation, which goes on as if it had not been."""
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2))
    tx = optax.MultiSteps(tx, 2).gradient_transformation()
    run = way(optax.apply_if_finite(tx, max_consecutive_errors=100))
    good, bad = [*X.reshape(4, 2, -1)], X[:2].copy()
    bad[0, 0] = np.nan
    assert np.isnan(norm(jax.jit(run.gradient)(run.params, bad)))
    history = run.run([*good[:3], bad, bad, *good[3:], bad, *good])
    for before, after in ((3, 4), (3, 5), (6, 7)):
        params, state = history[after]
        assert_same(run.adapters(params), run.adapters(history[before][0]))
        assert_same(guarded(state), guarded(history[before][1]))
    expected = run.last([*good, *good])
    assert_same(run.adapters(history[-1][0]), expected)
    assert norm(expected) > 1e-2


def norm(tree):
    return np.linalg.norm(np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]))


def guarded(state):
    """The state inside of `apply_if_finite`, without its counts."""
    kind = optax.ApplyIfFiniteState
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    [inner] = [node.inner_state for node in nodes if isinstance(node, kind)]
    return inner
