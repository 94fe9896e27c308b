"""One dense layer as a pure function."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import slow
from cases import CASES, by_case, in_turns
from helpers import close, largest, random, random_like, wide
from hypothesis import given, settings
from hypothesis import strategies as st

import mora_jax
from mora_jax import FrozenDense, MoRAConfig, delta_weight, init, mora_apply

ALPHA = 0.7

# axes of the kernel, its shape, the shape of an input, and what the layer computes
LAYOUTS = [
    ("io", (12, 10), (2, 3, 12), "bti,io->bto"),
    ("io", (12, 10), (12,), "i,io->o"),
    ("oi", (10, 12), (3, 12), "bi,oi->bo"),
    ("ioo", (12, 2, 5), (2, 3, 12), "bti,iop->btop"),
    ("iio", (4, 3, 10), (2, 3, 4, 3), "btij,ijo->bto"),
    ("oio", (2, 12, 5), (3, 12), "bi,oip->bop"),
    ("sio", (3, 12, 10), (3, 2, 12), "sbi,sio->sbo"),
    ("ssioo", (3, 2, 12, 5, 2), (3, 2, 4, 12), "stbi,stiop->stbop"),
    ("iso", (12, 3, 10), (3, 12), "si,iso->so"),
]
# Rotation in each, and other ways to compute in stacks; the slow tests take all.
STACKED = ("sharing-strided-strided-normalised", "signed_decoupling", "hadamard")


def in_layouts():
    for case, layout in itertools.product(CASES, LAYOUTS):
        stacked = layout[0] == "ssioo" and case.label in STACKED
        fast = stacked or case.label == "rotation"
        yield (case, *layout) if fast else slow(case, *layout)


def make(case, axes="io", shape=(12, 10)):
    op = case.make(12, 10, 4)
    return FrozenDense(random(9, *shape), None, op, axes=axes, alpha=ALPHA)


def adapter(frozen):
    return {"kernel_mora": random(1, *frozen.spec.shape)}


@jax.jit
def adapted(params, frozen, x):
    """What the layer gives, and its delta as a kernel."""
    return mora_apply(params, frozen, x), delta_weight(params, frozen)


@pytest.mark.law
@pytest.mark.parametrize(
    ("case", "axes", "shape", "x_shape", "equation"), [*in_layouts()]
)
def test_forward_is_the_merged_kernel(case, axes, shape, x_shape, equation):
    frozen = make(case, axes, shape)
    x = random(2, *x_shape)
    base, _ = adapted(init(frozen), frozen, x)
    close(base, np.einsum(equation, wide(x), wide(frozen.kernel)))
    y, delta = adapted(adapter(frozen), frozen, x)
    close(y, np.einsum(equation, wide(x), wide(frozen.kernel) + wide(delta)))
    assert largest(y - base) > 1e-3


@pytest.mark.filterwarnings("ignore:.* asks for q:mora_jax.MoRAWarning")
@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    operator=st.sampled_from(["rotation", "sharing", "hadamard", "signed_decoupling"]),
    ins=st.integers(2, 30),
    outs=st.integers(2, 30),
    rank=st.integers(1, 40),
)
def test_any_size_and_budget(operator, ins, outs, rank):
    config = MoRAConfig(rank=rank, operator=operator, alpha=ALPHA)
    frozen = FrozenDense.from_config(random(0, ins, outs), config=config)
    q = frozen.operator.square_rank
    assert q * q <= rank * (ins + outs) and q <= min(ins, outs)
    x = random(2, 3, ins)
    y, delta = adapted(adapter(frozen), frozen, x)
    close(y, wide(x) @ (wide(frozen.kernel) + wide(delta)))


@by_case
def test_arguments_are_not_constants(case):
    """A jitted layer takes kernel and random arrays as arguments: none is baked in."""
    frozen = make(case)
    jaxpr = jax.make_jaxpr(mora_apply)(adapter(frozen), frozen, random(2, 4, 12))
    assert not [const for const in jaxpr.consts if np.size(const) >= 12]


M_DTYPES = itertools.product(["bfloat16", "float32", "float64"], ["activation", "fold"])


@pytest.mark.law
@in_turns(
    "dtype, other", ["bfloat16", "float16", "float32", "float64"], [*M_DTYPES], each=3
)
def test_dtypes(dtype, other, float64):
    """The sum keeps the base output's dtype, the gradient M's, whatever both are."""
    m_dtype, execution = other
    settings = {"param_dtype": m_dtype, "execution": execution}
    config = MoRAConfig(rank=2, operator="rotation", **settings)
    kernel, x = random(0, 12, 10).astype(dtype), random(1, 3, 12).astype(dtype)
    frozen = FrozenDense.from_config(kernel, config=config)
    params = random_like(init(frozen), 1.0)
    y = mora_apply(params, frozen, x)
    assert y.dtype == dtype
    gradient = jax.grad(lambda params: mora_apply(params, frozen, x).sum())
    for tree in (params, jax.eval_shape(gradient, params)):
        assert tree["kernel_mora"].m.dtype == m_dtype
    exact = wide(kernel) + wide(delta_weight(params, frozen))
    assert largest(wide(y) - wide(x) @ exact) < 100 * float(jnp.finfo(dtype).eps)


def test_bias_and_promotion():
    config = MoRAConfig(rank=2)
    kernel, bias = random(0, 3, 12, 2, 5).astype(jnp.bfloat16), random(1, 3, 2, 5)
    frozen = FrozenDense.from_config(kernel, bias, config=config, axes="sioo")
    y = mora_apply(init(frozen), frozen, jnp.zeros((3, 7, 12), jnp.bfloat16))
    assert y.dtype == jnp.float32 and y.shape == (3, 7, 2, 5)
    np.testing.assert_array_equal(y, np.broadcast_to(bias[:, None], y.shape))
    whole = mora_apply(init(frozen), frozen, jnp.ones((3, 7, 12), int))
    assert whole.dtype == jnp.float32


def test_abstract_shapes():
    """Counts, init, forward and delta of shapes alone, under eval_shape."""
    kernel = jax.ShapeDtypeStruct((4, 64, 32), jnp.bfloat16)
    frozen = FrozenDense.from_config(kernel, axes="sio")
    spec = frozen.spec
    assert spec == frozen.spec and hash(spec) == hash(frozen.spec)
    assert spec.shape == (4, 4, 16, 8) and spec.parameters == 4 * 512
    assert spec.lora_rank == pytest.approx(512 / 96)
    params = jax.eval_shape(init, frozen)
    x = jax.ShapeDtypeStruct((4, 5, 64), jnp.bfloat16)
    y = jax.eval_shape(mora_apply, params, frozen, x)
    assert (y.shape, y.dtype) == ((4, 5, 32), jnp.bfloat16)
    assert jax.eval_shape(delta_weight, params, frozen).shape == kernel.shape
    assert init(frozen)["kernel_mora"].m.shape == params["kernel_mora"].m.shape


def test_dropout():
    """Each input is dropped or scaled up, on its own; the mean and the base stay."""
    config = MoRAConfig(operator="truncation", square_rank=8, dropout=0.25)
    frozen = FrozenDense.from_config(2 * np.eye(8, dtype=np.float32), config=config)
    params = {"kernel_mora": np.eye(8, dtype=np.float32)}
    x, key = np.ones((4000, 8), np.float32), jax.random.key(0)
    y = mora_apply(params, frozen, x, key=key)
    added = np.asarray(y) - 2
    assert set(np.unique(added).round(5)) == {0.0, np.float32(1 / 0.75).round(5)}
    assert abs((added == 0).mean() - 0.25) < 0.01
    np.testing.assert_array_equal(y, mora_apply(params, frozen, x, key=key))
    other = mora_apply(params, frozen, x, key=jax.random.key(1))
    assert not np.array_equal(y, other)
    whole = mora_apply(params, frozen, x, deterministic=True)
    np.testing.assert_array_equal(whole, 3 * x)


def test_gaussian_init():
    frozen = frozen_of(np.zeros((64, 64), np.float32), square_rank=64, init="gaussian")
    m = init(frozen, jax.random.key(0))["kernel_mora"].m
    assert m.shape == (64, 64)
    np.testing.assert_allclose(m.std(), 1 / 8, rtol=0.1)


K = np.ones((8, 6), np.float32)
M = np.zeros((4, 4), np.float32)


def frozen_of(kernel=K, bias=None, axes="io", **config):
    config = MoRAConfig(**({"square_rank": 4, "operator": "rotation"} | config))
    return FrozenDense.from_config(kernel, bias, config=config, axes=axes)


def call(m=M, x=K.T, more=None, **settings):
    return mora_apply({"kernel_mora": m, **(more or {})}, frozen_of(**settings), x)


def changed(**settings):
    return dataclasses.replace(frozen_of().spec, **settings)


SHAPE = jax.ShapeDtypeStruct((8,), "float32")
OTHER = mora_jax.make_operator("rotation", 6, 8, 4)

OTHER_M = init(frozen_of(alpha=2.0, scale="paper"))
OTHER_M = {"m": OTHER_M["kernel_mora"], "scale": "paper"}

BAD_INPUT = {
    TypeError: [
        (lambda: frozen_of(K.astype(int)), "floating-point dtype, got int"),
        (lambda: frozen_of([[1.0]]), "kernel must be an array, got list"),
        (
            lambda: call(np.eye(4, dtype=int)),
            "kernel_mora .* floating-point .* got int",
        ),
        (lambda: call(0.0), "kernel_mora must be an array, got float"),
        (lambda: call(x=[1.0]), "got list"),
        (lambda: call(x=SHAPE), "must be an array, got Shape"),
        (lambda: FrozenDense(K, None, "rotation").spec, "must be an Operator"),
        (lambda: init({"kernel": K}), "plan_or_frozen must be a Plan"),
    ],
    ValueError: [
        (lambda: frozen_of(K[0]), "at least two axes"),
        (lambda: frozen_of(K[:0]), "none of them empty"),
        (lambda: frozen_of(axes="ii"), "at least one i and one o"),
        (lambda: frozen_of(axes="ioo"), "one letter for each"),
        (lambda: frozen_of(axes="xo"), "letters s, i and o, got 'xo'"),
        (lambda: frozen_of(square_rank=7), "square_rank must be at most"),
        (lambda: init(frozen_of(init="gaussian")), "'gaussian' needs a key, got None"),
        (lambda: mora_apply({}, frozen_of(), K.T), "must hold 'kernel_mora'"),
        (lambda: call(more={"bias": K}), "nothing else, got .*bias"),
        (lambda: call(K), r"kernel_mora must have shape \(4, 4\), got \(8, 6\)"),
        (lambda: call(M[None]), r"kernel_mora must have shape \(4, 4\), got \(1, 4"),
        (lambda: call(**OTHER_M), "kernel_mora was made for alpha 2.0, not 1.0"),
        (lambda: call(x=K), r"expected \(8, 8\)"),
        (lambda: call(x=np.float32(1)), "at least 1 axes, got 0"),
        (lambda: call(bias=K[:, 0]), r"bias must have shape \(6,\), got \(8,\)"),
        (lambda: call(dropout=0.25), "dropout=0.25 needs a key"),
        (
            lambda: FrozenDense(K, None, OTHER).spec,
            r"must have the features \(8, 6\) of a kernel.* got \(6, 8\)",
        ),
        (lambda: changed(alpha=float("nan")), "alpha must be finite"),
        (lambda: changed(execution="fast"), "execution must be one of .* got 'fast'"),
    ],
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("error", "call", "message"),
    [(error, *row) for error, rows in BAD_INPUT.items() for row in rows],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_nan_input_stays_visible():
    assert np.isnan(call(x=np.full((2, 8), np.nan, np.float32))).all()
