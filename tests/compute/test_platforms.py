"""What programs for other platforms compute, computed here, is what the oracle says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import slow
from cases import by_kind
from helpers import close, random
from jax.test_util import check_grads
from platforms import as_if_on

import mora_jax
from mora_jax import Adapter, FrozenDense, mora_apply

ALPHA = 0.7
WAYS = ("activation", "fold")
# Widths, q and the shape of the rows: whole blocks that widen and narrow; tiles as a
# TPU stores them, with a batch; whole blocks that stay, and blocks that are not whole.
SIZES = [(8, 24, 4, (5,)), (24, 8, 4, (5,)), (128, 320, 128, (2, 8))]
MORE = [(12, 12, 6, (2, 3)), (256, 256, 128, (8,)), (10, 7, 4, (3,))]


@pytest.fixture(scope="module", params=["tpu", slow("cuda")])
def platform(request):
    with as_if_on(request.param):
        yield request.param


def made(case, ins, outs, q, way, dtype):
    op, kernel = case.make(ins, outs, q), random(0, ins, outs, dtype=dtype)
    return FrozenDense(kernel, None, op, alpha=ALPHA, execution=way)


def apply(m, frozen, x):
    return mora_apply({"kernel_mora": m}, frozen, x)


def loss(m, kernel, x, frozen):
    return jnp.sum(jnp.sin(apply(m, dataclasses.replace(frozen, kernel=kernel), x)))


@pytest.mark.law
@by_kind
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", [SIZES, slow(MORE)], ids=["some", "more"])
def test_the_output_and_all_derivatives(platform, case, way, sizes, float64):
    for ins, outs, q, batch in sizes:
        frozen = made(case, ins, outs, q, way, float)
        op = frozen.operator
        m, x = random(1, *op.m_shape, dtype=float), random(2, *batch, ins, dtype=float)
        kernel = frozen.kernel + ALPHA * case.delta(op, m)
        rows = x.reshape(-1, ins)
        by_y = np.cos(rows @ kernel)
        by_m = ALPHA * case.m_gradient(op, m, rows, by_y)
        both = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        value, got = both(m, frozen.kernel, x, frozen)
        close(value, np.sin(rows @ kernel).sum())
        close(got, (by_m, rows.T @ by_y, (by_y @ kernel.T).reshape(x.shape)))


@pytest.mark.law
@by_kind
@pytest.mark.parametrize("rows", [0, slow(1025)])
def test_the_gradient_of_many_rows_or_none(platform, case, rows, float64):
    for ins, outs in ((16, 8), (8, 16)):
        frozen = made(case, ins, outs, 4, "fold", float)
        op = frozen.operator
        m, x = random(1, *op.m_shape, dtype=float), random(2, rows, ins, dtype=float)
        by_y = np.cos(x @ (frozen.kernel + ALPHA * case.delta(op, m)))
        by_m = ALPHA * case.m_gradient(op, m, x, by_y)
        close(jax.jit(jax.grad(loss))(m, frozen.kernel, x, frozen), by_m)


@by_kind
@pytest.mark.parametrize("way", [slow("activation"), slow("fold")])
def test_higher_derivatives_and_maps(platform, case, way, float64):
    """Of whole blocks; differences of first derivatives, and a loop, are the judges."""
    frozen = made(case, 8, 16, 4, way, float)
    shape = frozen.operator.m_shape
    args = random(1, *shape, dtype=float), frozen.kernel, random(2, 5, 8, dtype=float)
    gradients = jax.jit(lambda *args: jax.grad(loss, (0, 1, 2))(*args, frozen))
    check_grads(gradients, args, order=1, rtol=1e-4)
    remat = jax.grad(jax.checkpoint(loss), (0, 2))(*args, frozen)
    by_m, _, by_x = gradients(*args)
    close(remat, (by_m, by_x))
    ms, xs = random(3, 3, *shape, dtype=float), random(4, 3, 5, 8, dtype=float)
    grad = jax.grad(loss, (0, 2))
    mapped = jax.vmap(grad, (0, None, 0, None))(ms, args[1], xs, frozen)
    each = [grad(m, args[1], x, frozen) for m, x in zip(ms, xs, strict=True)]
    close(mapped, jax.tree.map(lambda *leaves: np.stack(leaves), *each))


@pytest.mark.law
@by_kind
@pytest.mark.parametrize("dtype", ["bfloat16", slow("float16")])
def test_the_merged_kernel_is_the_one_that_was_trained(platform, case, dtype):
    """Number by number: a fold in training and a merge round alike."""
    for ins, outs, q in ((16, 32, 8), (32, 16, 8), (12, 10, 4)):
        frozen = made(case, ins, outs, q, "fold", "float32")
        frozen = dataclasses.replace(frozen, kernel=jnp.asarray(frozen.kernel, dtype))
        m = 1e-2 * random(1, *frozen.operator.m_shape)
        adapters = {"kernel_mora": Adapter(m, frozen.spec)}
        merged = mora_jax.merge({"kernel": frozen.kernel}, adapters)["kernel"]
        trained = apply(m, frozen, jnp.eye(ins, dtype=dtype))
        np.testing.assert_array_equal(trained, merged)
        assert not (merged == frozen.kernel).all()
