"""Starts of adapters: which ones combine, and what a newcomer gives them by mistake."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import bare, close, random, random_like

import mora_jax
from mora_jax import (
    MoRAConfig,
    MoRAWarning,
    directions,
    gradient_bases,
    gradient_start,
    input_damping,
    remora,
)

X, Y = random(0, 12, 16), random(1, 12, 8)
PARAMS = {
    "up": {"kernel": random(2, 16, 16) / 4, "bias": random(3, 16)},
    "down": {"kernel": random(4, 16, 8) / 4},
}


def planned(**settings):
    settings = {"rank": 1, "operator": "sharing", "train": "up/bias", **settings}
    return mora_jax.plan(PARAMS, MoRAConfig(**settings))


def made(key=None, **settings):
    return mora_jax.init(planned(**settings), key, params=PARAMS)


def outputs(adapters, params, x):
    bias = adapters["up"].get("bias")
    bias = params["up"]["bias"] if bias is None else bias.m
    h = x @ params["up"]["kernel"] + adapters["up"]["kernel_mora"](x)
    h = jnp.tanh(h + bias)
    return h @ params["down"]["kernel"] + adapters["down"]["kernel_mora"](h)


@jax.jit
def loss(adapters, params, x, y):
    return jnp.mean((outputs(adapters, params, x) - y) ** 2)


BATCH = PARAMS, X, Y


def damped(adapters):
    run = jax.jit(outputs)
    return input_damping(lambda a: run(a, PARAMS, X), adapters, directions=3)


def along(adapters):
    return directions(loss, adapters, [BATCH])


def started(adapters):
    return gradient_start(lambda a: loss(a, *BATCH), adapters)


STARTS = {"input_damping": damped, "directions": along, "gradient_start": started}
ALLOWED = {
    "zeros": {"input_damping", "directions", "gradient_start"},
    "gaussian": {"gradient_start"},
    "input_damping": {"directions", "gradient_start"},
    "directions": {"input_damping", "directions", "gradient_start"},
    "gradient_start": {"gradient_start"},
    "trained": {"gradient_start"},
}


@functools.cache
def after(first):
    """Adapters of a start, one of `STARTS` or a config's."""
    if first in STARTS:
        return STARTS[first](made())
    if first == "trained":
        return random_like(made(), 0.01)
    return made(jax.random.key(0), init=first)


@pytest.mark.parametrize("first, then", [*itertools.product(ALLOWED, STARTS)])
def test_which_starts_combine(first, then):
    """What combines has both, and what does not is an error that says why."""
    adapters = after(first)
    if then not in ALLOWED[first]:
        with pytest.raises(ValueError, match="delta of an adapter must be|damped in"):
            STARTS[then](adapters)
        return
    new = STARTS[then](adapters)
    op = new["up"]["kernel_mora"].operator
    assert (op.name == "damped") == ("input_damping" in (first, then))
    inner = getattr(op, "inner", op)
    assert (inner.name == "subspace") == ("directions" in (first, then))
    assert new["up"]["bias"].m.shape == (16,)
    if then == "gradient_start":
        assert new["up"]["kernel_mora"].spec.init == "gradient"
        assert loss(new, *BATCH) < loss(adapters, *BATCH)
    else:  # the model computes what its base does
        close(loss(new, *BATCH), loss(made(), *BATCH))


@pytest.mark.slow
def test_all_starts_in_the_order_of_the_docs(tmp_path):
    """Then files hold them, they are trained, merged, and renewed."""
    adapters = started(along(damped(made())))
    assert loss(adapters, *BATCH) < loss(made(), *BATCH)
    mora_jax.save(tmp_path, adapters)
    again = mora_jax.load(tmp_path, PARAMS)
    close(loss(again, *BATCH), loss(adapters, *BATCH))
    with pytest.raises(ValueError, match="delta of an adapter must be zero"):
        along(again)
    merged = mora_jax.merge(PARAMS, adapters)
    close(outputs(made(), merged, X), outputs(adapters, PARAMS, X), 1e-4)

    def of_run(adapters, params, x, y):
        return loss(adapters, params, x, y)

    init, step, _ = remora.renewing(of_run, optax.adam(1e-2), every=2)
    run, _ = step(init(PARAMS, along(damped(made()))), X, Y)
    assert run.adapters["up"]["kernel_mora"].operator.name == "damped"


def test_arrays_that_train_themselves_in_a_start_along_the_gradient():
    """Of adapters, and of plain arrays that a plan makes adapters of."""
    plan, adapters = planned(), made()
    new = gradient_start(lambda a: loss(plan.adapters(bare(a)), *BATCH), adapters)
    close(bare(new), bare(started(adapters)))
    np.testing.assert_array_equal(new["up"]["bias"].m, PARAMS["up"]["bias"])


def test_a_kernel_without_a_gradient_stays_as_it_is():
    """The others get theirs, in a tree, in a plan and of gradients that are given."""

    def of_one(adapters, params, x):
        return jnp.sum(jnp.tanh(x @ params + adapters["down"]["kernel_mora"](x)))

    kernel = PARAMS["down"]["kernel"]
    plan = planned(train=())
    batch = kernel, X
    grads = jax.tree.map(jnp.zeros_like, PARAMS)
    grads["down"]["kernel"] = jnp.ones_like(kernel)
    with pytest.warns(MoRAWarning, match="up/kernel is zero"):
        adapters = directions(of_one, made(), [batch])
    assert adapters["up"]["kernel_mora"].spec == made()["up"]["kernel_mora"].spec
    assert adapters["down"]["kernel_mora"].operator.name == "subspace"
    with pytest.warns(MoRAWarning, match="up/kernel is zero"):
        found = directions(of_one, plan, [batch])
    with pytest.warns(MoRAWarning, match="up/kernel is zero"):
        of_grads = gradient_bases(grads, plan)
    for new in (found, of_grads):
        assert new["up/kernel"] == plan["up/kernel"]
        assert new["down/kernel"].operator.name == "subspace"
    with pytest.raises(ValueError, match="up/kernel.* is zero"):
        directions(lambda adapters: jnp.zeros(()), made())
    with pytest.raises(ValueError, match="up/kernel.* is zero"):
        gradient_bases(jax.tree.map(jnp.zeros_like, PARAMS), plan)


class Loader:
    """Batches as loaders give them: lists, of arrays that the next batch overwrites."""

    def __init__(self, kind=list):
        self.kind = kind

    def __iter__(self):
        x, y = np.empty((6, 16), np.float32), np.empty((6, 8), np.float32)
        for k in range(2):
            x[:], y[:] = X[k::2], Y[k::2]
            yield self.kind((PARAMS, x, y))


def test_batches_are_read_once_whatever_gives_them():
    expected = directions(loss, made(), [(PARAMS, X[k::2], Y[k::2]) for k in range(2)])
    for batches in (Loader(), iter(Loader(tuple))):
        got = directions(loss, made(), batches)
        for one, other in zip(*map(operators, (got, expected)), strict=True):
            np.testing.assert_array_equal(one.in_basis, other.in_basis)
            np.testing.assert_array_equal(one.out_basis, other.out_basis)


def operators(adapters):
    return [adapters[name]["kernel_mora"].operator for name in ("up", "down")]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "batches, error, got",
    [
        (None, TypeError, "NoneType"),
        ("text", TypeError, "str"),
        ({"x": X}, TypeError, "dict"),
        (X, TypeError, "ArrayImpl"),
        ([{"x": X}], TypeError, "dict"),
        ([("some", "words")], TypeError, "str"),
        ([np.array(["a"])], TypeError, "ndarray"),
        ([(np.array(["a"]),)], TypeError, "dtype <U1"),
        ([], ValueError, "none"),
        (iter([]), ValueError, "none"),
    ],
)
def test_bad_batches(batches, error, got):
    with pytest.raises(error, match=f"^batches must .*got .*{got}"):
        directions(loss, made(), batches)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "value, got",
    [
        (lambda y: (y, {"aux": y}), "tuple"),
        (lambda y: y.astype(int), "int32"),
        (lambda y: y + jnp.zeros(3), r"shape \(3,\)"),
        (lambda y: y + 1j, "complex64"),
        (lambda y: {"loss": y}, "dict"),
        (lambda y: None, "NoneType"),
    ],
)
def test_bad_losses(value, got):
    """In JAX's own words they would be about functions that nobody wrote."""

    def bad(adapters):
        return value(loss(adapters, *BATCH))

    rule = f"^loss must return one floating-point number, got .*{got}"
    with pytest.raises(TypeError, match=rule):
        directions(bad, made())
    with pytest.raises(TypeError, match=rule):
        gradient_start(bad, made())
    for start in (directions, gradient_start):
        with pytest.raises(TypeError, match="^loss must be a function .* got float"):
            start(1.0, made())
    with pytest.raises(TypeError, match="^progress must be a function, got int"):
        directions(loss, made(), [BATCH], progress=1)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad])
def test_starts_are_outside_of_transformations(transform):
    """But for `gradient_start`, which works in all of them."""
    adapters = made()

    def refused(start):
        def of(x):
            return jax.tree.leaves(start(x[None] if x.ndim == 1 else x))[0].sum()

        with pytest.raises(TypeError, match="outside of jit, vmap and grad"):
            transform(of)(X)

    refused(lambda x: directions(loss, adapters, [(PARAMS, x, Y)]))
    refused(lambda x: directions(lambda a: loss(a, PARAMS, x, Y), adapters))
    refused(lambda x: input_damping(lambda a: outputs(a, PARAMS, x), adapters))
    many = lambda x: jax.tree.map(lambda p: p * x.sum(), PARAMS)  # noqa: E731
    refused(lambda x: gradient_bases(many(x), planned()))


def test_a_start_along_the_gradient_for_each_batch():
    """`gradient_start` is a function of arrays alone, under vmap too."""

    def moved(x, y):
        adapters = gradient_start(lambda a: loss(a, PARAMS, x, y), made())
        return adapters["down"]["kernel_mora"].m

    many = jax.vmap(moved)(X.reshape(2, 6, 16), Y.reshape(2, 6, 8))
    close(many[1], moved(X[6:], Y[6:]), 1e-3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("start", [*STARTS.values(), lambda a: a and along(planned())])
def test_bad_adapters(start):
    shapes = jax.eval_shape(made)
    nan = jax.tree.map(lambda leaf: leaf * jnp.nan, made())
    cases = [
        (shapes, TypeError, "kernel_mora must be an array, got ShapeDtypeStruct"),
        (nan, ValueError, "kernel_mora holds NaN"),
        ({}, ValueError, "adapters hold no adapter"),
        (None, ValueError, "adapters hold no adapter"),
        (PARAMS, TypeError, "adapters must hold adapters"),
    ]
    if start not in STARTS.values():
        with pytest.raises(ValueError, match=r"^adapters_or_plan .*'up/bias'"):
            start(made())
        with pytest.raises(ValueError, match="^adapters_or_plan .*'gaussian' .*kernel"):
            along(planned(init="gaussian", train=()))
        return
    for given, error, message in cases:
        with pytest.raises(error, match=message):
            start(given)
