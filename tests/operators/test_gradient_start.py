"""Adapters that start as one step of gradient descent."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import slow
from flax import nnx
from helpers import ROUNDED, close, random
from jax.flatten_util import ravel_pytree

import mora_jax
from mora_jax import MoRAConfig, MoRAWarning, gradient_bases, gradient_start
from mora_jax.nnx import MoRAParam
from mora_jax.operators import OPERATORS

SHAPES = {"a": (24, 36), "b": (20, 28), "c": (3, 16, 24)}
AXES = {"b/kernel": {"axes": "oi"}, "c/kernel": {"axes": "sio"}}
LINEAR = [name for name, cls in OPERATORS.items() if cls.linear]


def params_of(seed=0):
    return {k: {"kernel": random(seed, *shape)} for k, shape in SHAPES.items()}


def planned(operator="auto", **settings):
    settings = {"rank": 1, "multiple_of": 1, "overrides": AXES, **settings}
    plan = mora_jax.plan(params_of(), MoRAConfig(operator=operator, **settings))
    return plan


@jax.jit
def distance(params):
    """From other params, with a gradient that is not the same for each kernel."""
    wanted = params_of(1)
    terms = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params, wanted)
    return terms["a"]["kernel"] + 3 * terms["b"]["kernel"] + terms["c"]["kernel"]


@jax.jit
def loss(adapters):
    return distance(mora_jax.fold(params_of(), adapters))


def started(plan):
    return gradient_start(loss, mora_jax.init(plan))


def starts(adapters):
    return {a.spec.init for a in jax.tree.leaves(adapters, is_leaf=is_adapter)}


def is_adapter(node):
    return isinstance(node, mora_jax.Adapter)


def projected(plan, name, gradient):
    """The part of a gradient that is a delta of some M, by least squares in float64."""
    return np.concatenate(
        [
            part(plan[name].operator.at(index), gradient[index])
            for index in np.ndindex(gradient.shape[:-2])
        ]
    )


def part(op, gradient):
    size = int(np.prod(op.m_shape))
    units = np.eye(size).reshape(size, *op.m_shape)
    deltas = np.asarray(jax.jit(jax.vmap(op.delta_weight))(units.astype("f")))
    deltas = deltas.reshape(size, -1).astype(np.float64)
    found = np.linalg.lstsq(deltas.T, gradient.ravel(), rcond=None)[0]
    return found @ deltas


def is_isometry(op):
    """True if C and D are orthonormal."""
    c = np.asarray(op.compress(np.eye(op.in_features, dtype="f")))
    c = c.reshape(op.in_features, -1)
    shape = *op.compressed_shape[:-1], op.m_shape[-1]  # of C(x) M
    units = np.eye(math.prod(shape), dtype="f").reshape(-1, *shape)
    d = np.asarray(op.decompress(units))
    grams = c.T @ c, d @ d.T
    return all(np.allclose(gram, np.eye(len(gram)), atol=1e-5) for gram in grams)


# Those that are no isometry, those that are, with blocks and without.
FEW = ("sharing", "rotation", "subspace")


@pytest.mark.slow
@pytest.mark.parametrize(
    "operator",
    [name if name in FEW else slow(name) for name in [*LINEAR, "subspace"]],
)
def test_the_step_is_the_gradient_between_the_maps(operator):
    """Of an isometry it is the nearest to the kernel's own step; the loss is lower."""
    plan = planned("auto" if operator == "subspace" else operator)
    grads = jax.grad(distance)(params_of())
    if operator == "subspace":
        plan = gradient_bases(grads, plan)
    adapters = jax.jit(functools.partial(gradient_start, loss))(mora_jax.init(plan))
    assert loss(adapters) < 0.99 * loss(mora_jax.init(plan))
    assert starts(adapters) == {"gradient"} and starts(mora_jax.init(plan)) == {"zeros"}
    assert "init" not in str(plan) and " gradient " in mora_jax.summary(adapters)
    # Directions are rounded, and orthonormal but for that.
    lengths, tolerance = [], ROUNDED if operator == "subspace" else 1e-4
    for name, delta in mora_jax.delta_weight(adapters).items():
        both = delta["kernel"], grads[name]["kernel"]
        delta, gradient = (np.asarray(array, np.float64) for array in both)
        if name == "b":
            delta, gradient = delta.T, gradient.T
        if operator == "subspace" or is_isometry(plan[f"{name}/kernel"].operator):
            expected = projected(plan, f"{name}/kernel", gradient)
            lengths.append(-delta.ravel() @ expected / (expected @ expected))
            close(delta.ravel(), -lengths[-1] * expected, tolerance)
    assert all(t == pytest.approx(lengths[0], rel=tolerance) for t in lengths)


@pytest.mark.slow
def test_the_length_lowers_the_loss_most_of_its_halves():
    plan = planned()
    adapters = started(plan)

    def at(factor):
        return float(loss(jax.tree.map(lambda m: factor * m, adapters)))

    assert at(1) < at(0) and at(1) <= at(0.5) and at(1) <= at(2)


@pytest.mark.slow
def test_a_steep_loss_takes_a_short_step():
    plan = planned()

    def steep(adapters):
        flat = ravel_pytree(adapters)[0]
        return 1 + jnp.sum(flat) + 1e3 * jnp.sum(flat**2)

    adapters = gradient_start(steep, mora_jax.init(plan))
    assert steep(adapters) < 1


@pytest.mark.slow
def test_what_no_step_lowers_is_said():
    plan = planned()
    start = mora_jax.init(plan)
    with pytest.warns(MoRAWarning, match="no step along the gradient lowers the loss"):
        adapters = gradient_start(lambda _: jnp.float32(1), start)
    for m, before in zip(*map(jax.tree.leaves, (adapters, start)), strict=True):
        np.testing.assert_array_equal(m, before)
    with pytest.raises(ValueError, match="the loss holds NaN"):
        gradient_start(lambda _: jnp.float32(jnp.nan), start)

    def kinked(adapters):
        return 1 + jnp.sqrt(jnp.sum(ravel_pytree(adapters)[0]))

    with pytest.raises(ValueError, match="the gradient of the loss holds NaN"):
        gradient_start(kinked, start)


def test_jit_and_low_precision():
    plan = planned(param_dtype="bfloat16")
    adapters = started(plan)
    same = jax.jit(lambda a: gradient_start(loss, a))(mora_jax.init(plan))
    for m, other in zip(jax.tree.leaves(adapters), jax.tree.leaves(same), strict=True):
        assert m.dtype == other.dtype == jnp.bfloat16
        close(m, other, 0.05)


@pytest.mark.slow
def test_nnx_and_files(tmp_path):
    model = nnx.Linear(12, 20, rngs=nnx.Rngs(0))
    x, wanted = random(0, 5, 12), random(1, 5, 20)
    wrapped = mora_jax.nnx.wrap(model, MoRAConfig(rank=1))
    graph, state, rest = nnx.split(wrapped, MoRAParam, ...)

    def of_state(state):
        return jnp.mean((nnx.merge(graph, state, rest)(x) - wanted) ** 2)

    state = gradient_start(of_state, state)
    assert of_state(state) < of_state(nnx.state(wrapped, MoRAParam))
    nnx.update(wrapped, state)
    close(jnp.mean((wrapped(x) - wanted) ** 2), of_state(state))
    assert wrapped.kernel_mora.spec.init == "gradient"
    mora_jax.save(tmp_path / "a", state)
    assert starts(mora_jax.load(tmp_path / "a")) == {"gradient"}


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_start():
    plan = planned("low_rank")
    with pytest.raises(ValueError, match="'low_rank' is not linear .* no such step"):
        started(plan)
    with pytest.raises(ValueError, match="init must be one of"):
        MoRAConfig(init="gradient")
    for tree in (params_of(), {"a": {"kernel_mora": jnp.ones(1)}}):
        with pytest.raises(TypeError, match=r"plan\.adapters\(tree\) makes them"):
            gradient_start(lambda a: 0.0, tree)
    with pytest.raises(TypeError, match="loss must be a function .*, got NoneType"):
        gradient_start(None, mora_jax.init(planned("rotation")))
