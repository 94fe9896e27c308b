"""Damped inputs: what ordinary inputs have most of, adapters see least of."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from adapter_files import assert_same
from flax import nnx
from helpers import close, random, random_like

import mora_jax
from mora_jax import MoRAConfig, MoRAWarning, input_damping, linen, remora
from mora_jax import nnx as mora
from mora_jax.operators import Damped

WIDTH, DIRECTIONS = 24, 3
CONFIG = MoRAConfig(rank=4, operator="block_diagonal")
SIZES = np.array([9, 5, 3, 2, 1], np.float32)
X = np.asarray(random(0, 40, 5) * SIZES @ random(1, 5, WIDTH) + random(2, 40, WIDTH))


class Block(nn.Module):
    """Two layers with one input, and one with another."""

    @nn.compact
    def __call__(self, x, _=None):
        a = nn.Dense(WIDTH, use_bias=False, name="a")(x)
        b = nn.Dense(16, use_bias=False, name="b")(x)
        y = nn.Dense(WIDTH, use_bias=False, name="c")(jnp.tanh(a))
        return x + y + b.sum(-1, keepdims=True) / 16, None


class Stack(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(block, length=2, **axes)(name="blocks")(x, None)[0]


class Twin(nnx.Module):
    def __init__(self, rngs):
        plain = {"use_bias": False, "rngs": rngs}
        self.a = nnx.Linear(WIDTH, WIDTH, **plain)
        self.b = nnx.Linear(WIDTH, 16, **plain)
        self.c = nnx.Linear(WIDTH, WIDTH, **plain)

    def __call__(self, x):
        y = self.c(jnp.tanh(self.a(x)))
        return x + y + self.b(x).sum(-1, keepdims=True) / 16


def projection(x, count=DIRECTIONS, floor=0.03):
    """P by its definition, of rows of inputs, in float64."""
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    values, vectors = np.linalg.eigh(x.T @ x)
    mean, values = values.mean(), values.clip(0)
    rest = values[:-count].mean() if count < len(values) else 0
    factors = np.ones(len(values))
    leading = values[-count:] + floor * mean
    factors[-count:] = np.sqrt((rest + floor * mean) / leading).clip(max=1)
    return (vectors * factors) @ vectors.T


def found_of(adapter, layer=()):
    v = np.asarray(adapter.operator.directions, np.float64)[layer]
    return np.eye(len(v)) - v @ v.T


def damped(model, x=X, config=CONFIG, **settings):
    """New adapters of a Linen model, with and without damping, and its variables."""
    variables = random_like(jax.eval_shape(model.init, jax.random.key(0), x), scale=0.2)
    apply = linen.wrap(model, config, variables, x)
    run, adapters = jax.jit(apply), mora_jax.init(apply.plan)
    call = lambda adapters: run(adapters, variables, x)  # noqa: E731
    settings = {"directions": DIRECTIONS, **settings}
    return input_damping(call, adapters, **settings), adapters, variables, apply


@pytest.mark.slow
def test_inputs_are_scaled_to_the_mean_of_the_others():
    adapters, old, variables, apply = damped(Block())
    inner = np.tanh(X @ variables["params"]["a"]["kernel"])
    for name, x in (("a", X), ("b", X), ("c", inner)):
        adapter = adapters[name]["kernel_mora"]
        close(found_of(adapter), projection(x), 0.02)
        close(adapter.m, old[name]["kernel_mora"].m)
        assert adapter.operator.inner == old[name]["kernel_mora"].operator
        assert adapter.spec.scale == old[name]["kernel_mora"].spec.scale
    one, other = (adapters[name]["kernel_mora"].operator for name in "ab")
    np.testing.assert_array_equal(one.directions, other.directions)
    assert "block_diagonal, damped (3)" in mora_jax.summary(adapters)
    trained = random_like(adapters)
    merged = {"params": mora_jax.merge(variables["params"], trained)}
    close(apply(trained, variables, X)[0], Block().apply(merged, X)[0], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_layers_of_a_stack_have_their_own(remat):
    adapters, _, variables, apply = damped(Stack(remat))
    params, x = variables["params"]["blocks"], X
    for k in range(2):
        one = jax.tree.map(lambda p, k=k: p[k], params)
        close(found_of(adapters["blocks"]["a"]["kernel_mora"], k), projection(x), 0.02)
        x, _ = Block().apply({"params": one}, x)
    trained = random_like(adapters, scale=0.1)
    merged = {"params": mora_jax.merge(variables["params"], trained)}
    close(apply(trained, variables, X), Stack().apply(merged, X), 1e-4)


@pytest.mark.slow
def test_nnx():
    model = Twin(nnx.Rngs(0))
    adapted = mora.wrap(model, CONFIG, X)

    @nnx.jit
    def run(model, adapters):
        mora.set_adapters(model, adapters)
        return model(X)

    new = mora.adapters(adapted)
    adapters = input_damping(
        lambda adapters: run(nnx.clone(adapted), adapters), new, directions=DIRECTIONS
    )
    close(found_of(adapters["a"]["kernel_mora"]), projection(X), 0.02)
    mora.set_adapters(adapted, adapters)
    assert mora.adapters(adapted)["c"]["kernel_mora"].operator.name == "damped"
    close(adapted(X), model(X))


def test_bfloat16():
    model = Block()
    adapters, *_ = damped(model, jnp.asarray(X, jnp.bfloat16))
    close(found_of(adapters["b"]["kernel_mora"]), projection(X), 0.05)


@pytest.mark.slow
def test_few_inputs_and_many_directions():
    adapters, *_ = damped(Block(), X[:2], directions=WIDTH + 5)
    p = found_of(adapters["a"]["kernel_mora"])
    assert np.linalg.eigvalsh(p).min() > -0.01
    close(p, projection(X[:2], WIDTH), 0.05)


def test_files_and_restarts(tmp_path):
    adapters, _, variables, _ = damped(Block())
    adapters, params = random_like(adapters), variables["params"]
    mora_jax.save(tmp_path, adapters)
    assert_same(mora_jax.load(tmp_path, params), adapters)
    names = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert sum(name.startswith("damped/") for name in names) == 2  # a and b share one
    tx = optax.adam(1e-3)
    after = remora.restart(params, adapters, tx.init(adapters), tx)
    op = after.adapters["a"]["kernel_mora"].operator
    assert isinstance(op, Damped) and op.inner.seed == 1


@pytest.mark.slow
def test_what_has_no_rows_of_numbers_is_named():
    class Words(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(12, WIDTH, name="words")(ids)
            return nn.Dense(16, use_bias=False, name="head")(x)

    ids = np.arange(12)
    config = MoRAConfig(rank=2, targets=r"words/embedding|head/kernel")
    with pytest.warns(MoRAWarning, match="words/embedding"):
        adapters, *_ = damped(Words(), ids, config)
    assert adapters["head"]["kernel_mora"].operator.name == "damped"
    assert adapters["words"]["embedding_mora"].operator.name != "damped"


def test_bad_calls():
    adapters, new, variables, apply = damped(Block())
    run = lambda adapters: apply(adapters, variables, X)  # noqa: E731
    with pytest.raises(ValueError, match="damped inputs already"):
        input_damping(run, adapters)
    with pytest.raises(ValueError, match="delta of an adapter must be zero"):
        input_damping(run, random_like(new))
    with pytest.raises(TypeError, match="call must be a function .* got dict"):
        input_damping(new, new)
    for bad in (0, -1, True, 1.5):
        with pytest.raises((TypeError, ValueError), match="directions must be"):
            input_damping(run, new, directions=bad)
    with pytest.raises(ValueError, match="floating-point outputs"):
        input_damping(lambda adapters: jnp.argmax(run(adapters)[0], -1), new)
    with pytest.raises(ValueError, match="adapted kernel, got none"):
        input_damping(lambda adapters: jnp.ones(3), new)
    with pytest.raises(ValueError, match="NaN or infinity"):
        input_damping(lambda a: apply(a, variables, np.full_like(X, np.nan)), new)
    with pytest.raises((TypeError, ValueError), match="adapters"):
        input_damping(run, {})
    with pytest.raises(TypeError, match="kernel_mora.* concrete array, got .*Tracer"):
        jax.jit(lambda new: input_damping(run, new))(new)


def test_bad_operators():
    inner = mora_jax.make_operator("rotation", 8, 6, 4)
    good = np.eye(8, 2, dtype=np.float32)
    with pytest.raises(TypeError, match="inner must be an operator"):
        Damped(8, 6, 4, inner="rotation", directions=good)
    with pytest.raises(ValueError, match="inner must have the sizes"):
        Damped(8, 7, 4, inner=inner, directions=good)
    for bad in (2 * good, np.ones((8, 2), np.float32) / 3):
        with pytest.raises(ValueError, match="directions must be orthogonal"):
            Damped(8, 6, 4, inner=inner, directions=bad)
    for bad in (good[:5], good[:, :0], good[:, 0]):
        with pytest.raises(ValueError, match="directions must have shape"):
            Damped(8, 6, 4, inner=inner, directions=bad)
    with pytest.raises(TypeError, match="directions"):
        Damped(8, 6, 4, inner=inner, directions=good.astype(int))
    with pytest.raises(TypeError, match="inner must be"):
        Damped(
            8,
            6,
            4,
            inner=Damped(8, 6, 4, inner=inner, directions=good),
            directions=good,
        )
