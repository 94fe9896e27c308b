"""What convolutions and embeddings alone have; the laws are in test_model_laws.py."""

import contextlib
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, by_case, in_turns
from flax import nnx
from helpers import close, random, random_like, wide
from programs import case_of
from twins import ALL, IDS, Table, TableTwin

import mora_jax
from mora_jax import AdapterSpec, linen, make_operator
from mora_jax._flax.layers import convolution
from mora_jax._layer.equation import Delta
from mora_jax.products import ATTEND, Contraction, Lookup

KEY = jax.random.key(0)


@in_turns("name, operator", ["pad-pairs", "t-kernel", "tied"], ["sharing", "rotation"])
def test_derivatives_are_those_of_the_merged_model(name, operator):
    """Forward and backward, by the adapters and by the input; and under vmap."""
    case = case_of(name, "linen", operator)
    floating = jnp.issubdtype(case.x.dtype, jnp.floating)
    args = (case.adapters, case.x) if floating else (case.adapters,)
    tangents = jax.tree.map(lambda a: random(7, *a.shape), args)

    @jax.jit
    def derivatives(args):
        found = []
        for function in (case.adapted, case.merged):

            def of(adapters, x=case.x, function=function):
                return function(case.params, adapters, x)

            y, pull = jax.vjp(of, *args)
            rows = jax.vmap(functools.partial(of, case.adapters))(case.x)
            found.append((jax.jvp(of, args, tangents)[1], pull(jnp.cos(y)), rows))
        return found

    close(*derivatives(args))


# --- Against numpy ---


def exact(case, model):
    """The adapted kernel, as (in, out)."""
    (spec,), (m,) = model.plan.values(), jax.tree.leaves(model.adapters)
    kernel = next(leaf for leaf in jax.tree.leaves(model.params) if leaf.ndim > 1)
    delta = case.delta(spec.operator, m)
    return wide(kernel).reshape(delta.shape) + spec.factor * delta


def with_operator(name, case):
    model = case_of(name, "linen", tuple(case.spec.items()))
    return model, jax.jit(model.adapted)(model.params, model.adapters, model.x)


@pytest.mark.law
@by_case
def test_convolution_is_the_oracle(case):
    model, y = with_operator("pad-pairs", case)
    x = np.pad(wide(model.x), [(0, 0), (0, 2), (3, 1), (0, 0)])
    windows = [
        [x[:, i : i + 3, j : j + 2].reshape(len(x), -1) for j in range(x.shape[2] - 1)]
        for i in range(0, x.shape[1] - 2, 2)
    ]
    expected = np.moveaxis(np.array(windows) @ exact(case, model), 2, 0)
    close(y, expected + wide(model.params["bias"]))


@pytest.mark.law
@by_case
def test_embedding_is_the_oracle(case):
    model, y = with_operator("tied", case)
    table = exact(case, model)
    close(y, np.tanh(table[np.asarray(model.x)]) @ table.T)


@pytest.mark.law
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "uint32"])
def test_indices_of_any_integer_type(dtype):
    """A vocabulary may be larger than the type's range."""
    m, ids = random(1, 4, 4), np.array([3, 50], dtype)
    for compress in ("strided", "contiguous"):
        op = make_operator({"name": "sharing", "compress_groups": compress}, 302, 6, 4)

        @jax.jit
        def found(m, ids, op):
            delta = Delta.of(AdapterSpec(op, (302, 6)), m)
            whole = op.delta_weight(m)
            return whole, (delta.lookup(ids), Lookup().delta(delta, ids))

        whole, rows = found(m, ids, op)
        close(rows, (whole[np.array([3, 50])],) * 2)


def test_no_indices():
    for case in CASES:
        op = case.make(12, 10, 4)
        empty = jax.eval_shape(op.unit_rows, IDS[:0], random(1, *op.m_shape))
        assert empty.shape == (0, 10)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("operator", ["sharing", "rotation", "orthogonal"])
def test_bad_arrays(operator):
    op, m, y = make_operator(operator, 12, 10, 4), random(1, 4, 4), random(0, 3, 12)
    for call in (lambda: op.apply(m[:3], y), lambda: op.apply(m, y[:, :10])):
        with pytest.raises(ValueError, match="must have shape"):
            call()


# --- Cost: the delta of a kernel is not formed ---


def biggest(spec, product, x):
    """The largest array in the program of a delta and of its gradient."""

    def arrays(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (v.aval.size for v in eqn.outvars)
            for inner in jax.tree.leaves(eqn.params, is_leaf=has_equations):
                if has_equations(inner):
                    yield from arrays(getattr(inner, "jaxpr", inner))

    def f(m):
        return product.delta(Delta.of(spec, m), x)

    m = random(1, *spec.shape)
    closed = jax.make_jaxpr(lambda m: (f(m), jax.grad(lambda m: f(m).sum())(m)))(m)
    return max([*map(np.size, closed.consts), *arrays(closed.jaxpr)])


def has_equations(parameter):
    return hasattr(parameter, "eqns")


@by_case
def test_no_update_is_formed(case):
    op = case.make(27, 32, 4)
    conv = AdapterSpec(op, (3, 3, 3, 32), "iiio"), convolution(nn.Conv(32, (3, 3)))
    size = biggest(*conv, random(0, 1, 3, 4, 3))
    assert (size < 27 * 32) == (not op.block)  # blocks have no C of q outputs
    spec, head = AdapterSpec(case.make(512, 24, 8), (512, 24)), random(0, 3, 24)
    assert biggest(spec, Lookup(), jnp.array([0, 511, 9])) < 512 * 24
    assert biggest(spec, Contraction.parse(ATTEND, 2), head) < 512 * 24


# --- What is adapted ---


def test_convolutions_are_no_default_target():
    model = nn.Sequential([nn.Conv(8, (3,)), nn.Dense(8)])
    x = random(0, 2, 5, 3)
    variables = jax.eval_shape(model.init, KEY, x)
    assert list(linen.plan(model, variables, None, x)) == ["layers_1/kernel"]
    with pytest.raises(ValueError, match="targets: the default matches no path"):
        mora_jax.nnx.plan(nnx.Conv(4, 4, (3,), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_inputs_by_keyword(kind):
    model, x = getattr(nn, kind)(6, (3,)), random(0, 2, 5, 3)
    variables = jax.eval_shape(model.init, KEY, x)
    assert len(linen.plan(model, variables, ALL, inputs=x)) == 1


@pytest.mark.slow
def test_half_adapted_heads_are_refused():
    elsewhere = "embed/embedding: the model also reads this embedding outside of its"
    for use in ("array", "variables"):
        variables = jax.eval_shape(Table(use).init, KEY, IDS)
        with pytest.raises(ValueError, match=elsewhere):
            linen.plan(Table(use), variables, ALL, IDS)
    with pytest.raises(ValueError, match=elsewhere):
        mora_jax.nnx.plan(TableTwin("array", rngs=nnx.Rngs(0)), ALL, IDS)
    for use in ("array", "call", "tied"):  # without inputs the first call shows it
        adapted = mora_jax.nnx.wrap(TableTwin(use, rngs=nnx.Rngs(0)), ALL)
        told = contextlib.nullcontext()
        if use == "array":
            told = pytest.raises(ValueError, match=elsewhere)
        with told:
            adapted(IDS)


@pytest.mark.slow
def test_dropout_drops_whole_rows():
    config = dataclasses.replace(ALL, operator="sharing", dropout=0.25)
    ids, ones = jnp.arange(300).reshape(3, 100) % 11, nnx.initializers.ones
    model, twin = Table("call"), TableTwin("call", init=ones, rngs=nnx.Rngs(0))
    variables = {"params": nnx.to_pure_dict(nnx.state(twin, nnx.Param))}
    wrapped = linen.wrap(model, config, variables, ids)
    plan = wrapped.plan
    adapters = random_like(mora_jax.init(plan), 1.0)
    apply = functools.partial(wrapped, adapters, variables, ids)
    adapted, other = (mora_jax.nnx.wrap(twin, plan, seed=seed) for seed in (0, 1))
    for one in (adapted, other):
        mora_jax.nnx.set_adapters(one, adapters)
    dropped = apply(adapter_deterministic=False, rngs={"dropout": KEY})
    samples = [dropped, adapted(ids), other(ids)]
    adapted.eval()
    still = apply(adapter_deterministic=True)
    np.testing.assert_array_equal(adapted(ids), still)
    adapted.train()
    for y in (*samples, adapted(ids)):
        kept = np.abs(y - 1).max(-1, keepdims=True) > 1e-6
        assert abs(kept.mean() - 0.75) < 0.1
        close(y - 1, np.where(kept, (still - 1) / 0.75, 0))
    assert np.abs(samples[1] - samples[2]).max() > 0.1
