"""One dense layer as a pure function."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import by_few_cases, by_kind
from helpers import close, largest, random, wide
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_jax import (
    AdapterSpec,
    FrozenDense,
    MoRAConfig,
    delta_weight,
    init,
    mora_apply,
)

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


def make(case, axes="io", shape=(12, 10), **settings):
    sizes = dict(zip(("in", "out"), (12, 10), strict=True))
    op = case.make(sizes["in"], sizes["out"], 4)
    return FrozenDense(random(9, *shape), None, op, axes=axes, alpha=ALPHA, **settings)


def adapter(frozen, seed=1):
    return {"kernel_mora": random(seed, *frozen.spec.shape)}


@jax.jit
def adapted(params, frozen, x):
    """What the layer gives, and its update as a kernel."""
    return mora_apply(params, frozen, x), delta_weight(params, frozen)


@by_kind
@pytest.mark.parametrize(("axes", "shape", "x_shape", "equation"), LAYOUTS)
def test_forward_is_the_merged_kernel(case, axes, shape, x_shape, equation):
    frozen = make(case, axes, shape)
    params, x = adapter(frozen), random(2, *x_shape)
    base, _ = adapted(init(frozen), frozen, x)
    close(base, np.einsum(equation, wide(x), wide(frozen.kernel)))
    y, delta = adapted(params, frozen, x)
    close(y, np.einsum(equation, wide(x), wide(frozen.kernel) + wide(delta)))
    assert largest(y - base) > 1e-3


@by_few_cases
def test_oracle(case):
    """y = x W + b + alpha D(C(x) M) in numpy, for a plain kernel."""
    frozen = make(case)
    frozen = FrozenDense(frozen.kernel, random(5, 10), frozen.operator, alpha=ALPHA)
    params, x = adapter(frozen), random(2, 6, 12)
    c, d = case.matrices(frozen.operator)
    update = ALPHA * oracle.update(c, d, params["kernel_mora"])
    expected = wide(x) @ (wide(frozen.kernel) + update) + wide(frozen.bias)
    y, delta = adapted(params, frozen, x)
    close(y, expected)
    close(delta, update)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    operator=st.sampled_from(["rotation", "sharing", "hadamard", "permutation"]),
    ins=st.integers(2, 30),
    outs=st.integers(2, 30),
    rank=st.integers(1, 40),
)
def test_any_size_and_budget(operator, ins, outs, rank):
    config = MoRAConfig(rank=rank, operator=operator, alpha=ALPHA)
    frozen = FrozenDense.from_config(random(0, ins, outs), config=config)
    q = frozen.operator.square_rank
    assert q * q <= rank * (ins + outs) and q <= min(ins, outs)
    params, x = adapter(frozen), random(2, 3, ins)
    y, delta = adapted(params, frozen, x)
    close(y, wide(x) @ (wide(frozen.kernel) + wide(delta)))


@by_few_cases
def test_gradients(case):
    """Against the merged layer's, for M, x and the kernel."""
    frozen = make(case, "ioo", (12, 2, 5))
    params, x = adapter(frozen), random(2, 3, 12)

    def loss(params, kernel, x):
        layer = FrozenDense(kernel, None, frozen.operator, "ioo", alpha=ALPHA)
        return jnp.sum(jnp.sin(mora_apply(params, layer, x)))

    def merged_loss(params, kernel, x):
        update = delta_weight(params, frozen)
        return jnp.sum(jnp.sin(jnp.einsum("bi,iho->bho", x, kernel + update)))

    @jax.jit
    def both(*args):
        return jax.grad(loss, (0, 1, 2))(*args), jax.grad(merged_loss, (0, 1, 2))(*args)

    close(*both(params, frozen.kernel, x))


@by_kind
def test_transforms(case):
    """jit, vmap, scan and remat give what eager gives; one compilation serves."""
    frozen = make(case)
    params, x = adapter(frozen), random(2, 4, 12)
    eager = mora_apply(params, frozen, x)
    traces = []

    @jax.jit
    def jitted(params, frozen, x):
        traces.append(None)
        return mora_apply(params, frozen, x)

    close(jitted(params, frozen, x), eager)
    again = make(case)  # another, equal layer
    close(jitted(adapter(again), again, x), eager)
    assert len(traces) == 1
    many = jax.tree.map(lambda m: jnp.stack([m, 2 * m]), params)

    @jax.jit
    def transformed(params, many, frozen, x):
        def loss(params):
            return jnp.sum(mora_apply(params, frozen, x) ** 2)

        def row(_, x):
            return None, mora_apply(params, frozen, x)

        both = jax.vmap(mora_apply, (0, None, None))(many, frozen, x)
        gradient = jax.grad(loss)(params)
        return (
            (jax.vmap(mora_apply, (None, None, 0))(params, frozen, x), both[0]),
            (both[1], jax.lax.scan(row, None, x)[1]),
            (jax.grad(jax.checkpoint(loss))(params), gradient),
        )

    (over_x, first), (second, rows), (remat, gradient) = transformed(
        params, many, frozen, x
    )
    for y in (over_x, first, rows):
        close(y, eager)
    close(second, jitted(jax.tree.map(lambda m: 2 * m, params), frozen, x))
    close(remat, gradient)


@by_few_cases
def test_arguments_are_not_constants(case):
    """A jitted layer takes kernel and random arrays as arguments: none is baked in."""
    frozen = make(case)
    jaxpr = jax.make_jaxpr(mora_apply)(adapter(frozen), frozen, random(2, 4, 12))
    baked = [const for const in jaxpr.consts if np.size(const) >= 12]
    assert len(baked) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("m_dtype", ["float32", "bfloat16", "float64"])
def test_dtypes(dtype, m_dtype, float64):
    """The sum keeps the base output's dtype, whatever M's."""
    config = MoRAConfig(rank=2, operator="rotation", param_dtype=m_dtype)
    kernel, x = (
        jnp.asarray(random(k, *s), dtype) for k, s in [(0, (12, 10)), (1, (3, 12))]
    )
    frozen = FrozenDense.from_config(kernel, config=config)
    params = init(frozen)
    assert params["kernel_mora"].dtype == m_dtype
    params = jax.tree.map(lambda m: jnp.asarray(random(2, *m.shape), m.dtype), params)
    y = mora_apply(params, frozen, x)
    assert y.dtype == dtype
    exact = kernel.astype(float) + delta_weight(params, frozen).astype(float)
    error = np.abs(np.asarray(y, float) - np.asarray(x.astype(float) @ exact))
    assert error.max() < 100 * float(jnp.finfo(dtype).eps)


def test_bias_and_promotion():
    config = MoRAConfig(rank=2)
    kernel = jnp.asarray(random(0, 3, 12, 2, 5), jnp.bfloat16)
    bias = random(1, 3, 2, 5)
    frozen = FrozenDense.from_config(kernel, bias, config=config, axes="sioo")
    y = mora_apply(init(frozen), frozen, jnp.zeros((3, 7, 12), jnp.bfloat16))
    assert y.dtype == jnp.float32 and y.shape == (3, 7, 2, 5)
    np.testing.assert_array_equal(y, np.broadcast_to(bias[:, None], y.shape))
    whole = mora_apply(init(frozen), frozen, jnp.ones((3, 7, 12), int))
    assert whole.dtype == jnp.float32


def test_abstract_shapes():
    """init, forward and update of shapes alone, under eval_shape."""
    kernel = jax.ShapeDtypeStruct((4, 64, 32), jnp.bfloat16)
    frozen = FrozenDense.from_config(kernel, axes="sio")
    params = jax.eval_shape(init, frozen)
    x = jax.ShapeDtypeStruct((4, 5, 64), jnp.bfloat16)
    y = jax.eval_shape(mora_apply, params, frozen, x)
    assert (y.shape, y.dtype) == ((4, 5, 32), jnp.bfloat16)
    assert jax.eval_shape(delta_weight, params, frozen).shape == kernel.shape
    assert init(frozen)["kernel_mora"].shape == params["kernel_mora"].shape


def test_dropout():
    config = MoRAConfig(operator="truncation", square_rank=8, dropout=0.25)
    frozen = FrozenDense.from_config(np.zeros((8, 8), np.float32), config=config)
    params = {"kernel_mora": np.eye(8, dtype=np.float32)}
    x = np.ones((4000, 8), np.float32)
    key = jax.random.key(0)
    y = mora_apply(params, frozen, x, key=key)
    # Each input is dropped or scaled up, on its own; the mean stays.
    assert set(np.unique(y).round(5)) == {0.0, np.float32(1 / 0.75).round(5)}
    assert abs(float((y == 0).mean()) - 0.25) < 0.01
    np.testing.assert_array_equal(y, mora_apply(params, frozen, x, key=key))
    other = mora_apply(params, frozen, x, key=jax.random.key(1))
    assert not np.array_equal(y, other)
    np.testing.assert_array_equal(mora_apply(params, frozen, x, deterministic=True), x)
    with pytest.raises(ValueError, match="dropout=0.25 needs a key"):
        mora_apply(params, frozen, x)


def test_dropout_leaves_the_frozen_path():
    config = MoRAConfig(operator="truncation", square_rank=8, dropout=0.9)
    kernel = random(0, 8, 8)
    frozen = FrozenDense.from_config(kernel, config=config)
    x = random(1, 5, 8)
    y = mora_apply(init(frozen), frozen, x, key=jax.random.key(0))
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-5)


def test_init():
    frozen = FrozenDense.from_config(
        np.zeros((64, 64), np.float32), config=MoRAConfig(rank=32, init="gaussian")
    )
    m = init(frozen, jax.random.key(0))["kernel_mora"]
    assert m.shape == (64, 64)
    np.testing.assert_allclose(m.std(), 1 / 8, rtol=0.1)
    with pytest.raises(ValueError, match="init='gaussian' needs a key, got None"):
        init(frozen)


def test_m_gets_a_gradient_at_zero():
    frozen = FrozenDense.from_config(random(0, 16, 16))
    x = random(1, 4, 16)
    grads = jax.grad(lambda p: mora_apply(p, frozen, x).sum())(init(frozen))
    assert np.abs(grads["kernel_mora"]).max() > 0


def test_spec_counts():
    frozen = FrozenDense.from_config(np.zeros((3, 64, 32), np.float32), axes="sio")
    spec = frozen.spec
    q = frozen.operator.square_rank
    assert spec.parameters == 3 * q * q == frozen.spec.shape[0] * q * q
    np.testing.assert_allclose(spec.lora_rank, q * q / 96)
    assert isinstance(hash(spec), int) and spec == frozen.spec


K = np.ones((8, 6), np.float32)
PARAMS = {"kernel_mora": np.zeros((4, 4), np.float32)}


def frozen_of(kernel=K, bias=None, axes="io", **config):
    config = MoRAConfig(**({"square_rank": 4, "operator": "rotation"} | config))
    return FrozenDense.from_config(kernel, bias, config=config, axes=axes)


BAD_INPUT = {
    TypeError: [
        (lambda: frozen_of(K.astype(int)), "floating-point dtype, got int"),
        (lambda: frozen_of([[1.0]]), "kernel must be an array, got list"),
        (
            lambda: mora_apply({"kernel_mora": np.eye(4, dtype=int)}, frozen_of(), K.T),
            "kernel_mora must have a floating-point dtype, got int",
        ),
        (
            lambda: mora_apply({"kernel_mora": 0.0}, frozen_of(), K.T),
            "kernel_mora must be an array, got float",
        ),
        (lambda: mora_apply(PARAMS, frozen_of(), [1.0]), "got list"),
        (
            lambda: mora_apply(
                PARAMS, frozen_of(), jax.ShapeDtypeStruct((8,), "float32")
            ),
            "under jax.eval_shape",
        ),
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
        (lambda: mora_apply({}, frozen_of(), K.T), "must hold 'kernel_mora'"),
        (
            lambda: mora_apply(PARAMS | {"bias": K}, frozen_of(), K.T),
            "nothing else, got .*bias",
        ),
        (
            lambda: mora_apply({"kernel_mora": K}, frozen_of(), K.T),
            r"kernel_mora must have shape \(4, 4\), got \(8, 6\)",
        ),
        (lambda: mora_apply(PARAMS, frozen_of(), K), r"expected \(8, 8\)"),
        (
            lambda: mora_apply(PARAMS, frozen_of(), np.float32(1)),
            "at least 1 axes, got 0",
        ),
        (
            lambda: mora_apply(PARAMS, frozen_of(bias=np.ones(8, np.float32)), K.T),
            r"bias must have shape \(6,\), got \(8,\)",
        ),
        (
            lambda: FrozenDense(K, None, frozen_of(np.ones((6, 8))).operator).spec,
            "6 -> 8 features does not fit",
        ),
        (
            lambda: AdapterSpec(frozen_of().operator, (8, 6), alpha=float("nan")),
            "alpha must be finite",
        ),
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
    y = mora_apply(PARAMS, frozen_of(), np.full((2, 8), np.nan, np.float32))
    assert np.isnan(y).all()
