"""Directions of a gradient that nobody forms, by gradients of LoRAs alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import slow
from flax import nnx
from helpers import ROUNDED, close, made_for, orthonormal, random, wide

import mora_jax
from mora_jax import MoRAConfig, directions, gradient_bases, linen

# Inputs have more in some directions than in others, as those of real layers do.
SIZES = np.array([9, 6, 4, 3, 2], np.float32)
X = random(0, 24, 5) * SIZES @ random(2, 5, 20) / 5 + 0.1 * random(3, 24, 20)
Y = random(1, 24, 12)


class Net(nn.Module):
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        dtypes = {"dtype": self.dtype, "param_dtype": self.dtype}
        h = jnp.tanh(nn.Dense(28, name="up", **dtypes)(x))
        return nn.Dense(12, name="down", **dtypes)(h)


class Twin(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(20, 28, rngs=rngs)
        self.down = nnx.Linear(28, 12, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def losses(dtype="float32", **settings):
    """A plan, variables, and a loss of adapters and one of the params."""
    net = Net(dtype)
    variables = made_for(net, X.astype(dtype))
    config = MoRAConfig(**{"square_rank": 4, "operator": "rotation", **settings})
    plan = linen.plan(net, variables, config, X)
    apply = linen.wrap(net, plan)

    def loss(adapters, variables, x, y):
        return jnp.mean((apply(adapters, variables, x) - y) ** 2, dtype="float32")

    def of_params(params, x, y):
        y_hat = net.apply({"params": params}, x)
        return jnp.mean((y_hat - y) ** 2, dtype="float32")  # pyright: ignore

    return plan, variables, loss, of_params


def held(gradient, op):
    """The share of its squares between directions, and between the best."""
    rows = wide(gradient)
    between = orthonormal(op.in_basis).T @ rows @ orthonormal(op.out_basis)
    values = np.linalg.svd(rows, compute_uv=False)
    return np.sum(between**2), np.sum(values[: op.square_rank] ** 2)


def check(found, grads):
    for path, spec in found.items():
        layer, _ = path.split("/")
        got, best = held(grads[layer]["kernel"], spec.operator)
        assert got >= 0.98 * best, path


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16")])
def test_several_batches_have_the_directions_of_their_sum(dtype):
    plan, variables, loss, of_params = losses(dtype)
    batches = [(X[k::3], Y[k::3]) for k in range(3)]
    passes = []
    found = directions(
        loss, plan, [(variables, *batch) for batch in batches], progress=passes.append
    )
    grads = jax.grad(
        lambda params: sum(of_params(params, *batch) for batch in batches)
    )(variables["params"])
    check(found, grads)
    assert passes == [1] * 6
    again = gradient_bases(grads, plan)
    for name, spec in found.items():
        op, other = spec.operator, again[name].operator
        assert spec.scale == again[name].scale and op.m_shape == other.m_shape
        if dtype == "float32":  # in the same order, with one sign or the other
            along = (wide(op.in_basis) * wide(other.in_basis)).sum(0)
            close(abs(along), np.ones(4), ROUNDED)


@pytest.mark.slow
def test_nnx_states_and_trees_alike():
    plan, variables, loss, _ = losses()
    tree = directions(loss, mora_jax.init(plan), [(variables, X, Y)])
    model = Twin()
    nnx.update(model, variables["params"])
    wrapped = mora_jax.nnx.wrap(model, plan)
    split, ms, rest = nnx.split(wrapped, mora_jax.nnx.MoRAParam, ...)

    def of_state(ms, rest, x, y):
        return jnp.mean((nnx.merge(split, ms, rest)(x) - y) ** 2)

    state = directions(of_state, ms, [(rest, X, Y)])
    nnx.update(wrapped, jax.tree.map(lambda m: m + 1, state))
    for name in ("up", "down"):
        spec, other = getattr(wrapped, name).kernel_mora.spec, tree[name]["kernel_mora"]
        assert spec.operator.name == "subspace"
        close(spec.operator.in_basis, other.operator.in_basis, 1e-3)
    close(
        jax.tree.leaves(
            mora_jax.delta_weight(nnx.state(wrapped, mora_jax.nnx.MoRAParam))
        ),
        jax.tree.leaves(mora_jax.delta_weight(jax.tree.map(lambda m: m + 1, tree))),
        1e-3,
    )


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["low_rank", "block_diagonal"])
def test_blocks_and_loras_become_squares_of_their_budget(operator):
    plan, variables, loss, _ = losses(operator=operator, rank=2, square_rank=None)
    found = directions(loss, plan, [(variables, X, Y)])
    for name, spec in found.items():
        ins, outs = spec.in_features, spec.out_features
        q = mora_jax.square_rank(2, ins, outs, "orthogonal")
        assert spec.shape == (q, q) and plan[name].shape != (q, q)


def test_arrays_that_train_themselves_stay():
    plan, variables, loss, _ = losses(train="down/bias")
    adapters = mora_jax.init(plan, params=variables["params"])
    found = directions(loss, adapters, [(variables, X, Y)])
    assert found["down"]["bias"] is adapters["down"]["bias"]
    assert found["down"]["kernel_mora"].operator.name == "subspace"
    with pytest.raises(ValueError, match=r"'down/bias'; give init\(plan, params="):
        directions(loss, plan, [(variables, X, Y)])


@pytest.mark.slow
def test_damped_adapters_follow_the_gradient_that_they_see():
    plan, variables, loss, of_params = losses()
    adapters = mora_jax.init(plan)
    call = jax.jit(lambda adapters: linen.wrap(Net(), plan)(adapters, variables, X))
    damped = mora_jax.input_damping(call, adapters, directions=3)
    found = directions(loss, damped, [(variables, X, Y)])
    grads = jax.grad(of_params)(variables["params"], X, Y)
    for name, layer in found.items():
        op = layer["kernel_mora"].operator
        assert op.name == "damped" and op.inner.name == "subspace"
        seen = op.damped(grads[name]["kernel"].T).T
        got, best = held(seen, op.inner)
        assert got >= 0.98 * best


@pytest.mark.slow
def test_an_expert_that_saw_nothing_has_directions():
    """Those of the one that saw most, or its delta would be zero for ever."""
    params = {"w": random(2, 3, 12, 16)}
    config = MoRAConfig(square_rank=2, operator="rotation", targets="w")
    config = mora_jax.MoRAConfig(
        square_rank=2,
        operator="rotation",
        targets="w",
        overrides={"w": {"axes": "sio"}},
    )
    plan = mora_jax.plan(params, config)
    seen = jnp.asarray([1.0, 5.0, 0.0])

    def loss(adapters):
        kernels = mora_jax.fold(params, adapters)["w"]
        return jnp.sum(seen[:, None, None] * jnp.sin(kernels))

    op = directions(loss, plan)["w"].operator
    grads = gradient_bases({"w": seen[:, None, None] * jnp.cos(params["w"])}, plan)
    for found in (op, grads["w"].operator):
        np.testing.assert_array_equal(found.in_basis[2], found.in_basis[1])
        np.testing.assert_array_equal(found.out_basis[2], found.out_basis[1])
        assert not np.allclose(found.in_basis[0], found.in_basis[1])


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments():
    plan, variables, loss, _ = losses()
    batch, adapters = (variables, X, Y), mora_jax.init(plan)
    moved = jax.tree.map(lambda m: m + 1, adapters)
    nan = jax.tree.map(lambda leaf: leaf * np.nan, variables)
    cases = [
        (("loss", plan, [batch]), TypeError, "loss must be a function"),
        ((loss, variables, [batch]), TypeError, "adapters must hold adapters"),
        ((loss, plan, []), ValueError, "batches must hold one batch at least"),
        ((loss, plan, [X]), TypeError, "batches must hold a tuple or list"),
        ((loss, plan, batch), TypeError, "batches must hold a tuple or list"),
        ((loss, moved, [batch]), ValueError, "delta of an adapter must be zero"),
        ((loss, plan, [(nan, X, Y)]), ValueError, "gradient of .* holds NaN"),
        ((lambda adapters: jnp.zeros(()), plan), ValueError, "is zero, and has no di"),
    ]
    for args, error, message in cases:
        with pytest.raises(error, match=message):
            directions(*args)
    with pytest.raises(TypeError, match="must be a concrete array"):
        jax.jit(lambda a: directions(loss, a, [batch]) and a)(adapters)
