"""Merging into 16 bits: to one of the two neighbours, and in the mean to the sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random, wide

import mora_jax
from mora_jax import MoRAConfig, diagnostics
from mora_jax._layer.rounding import add_rounded

by_dtype = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def rounded(kernel, delta, axes="io", rounding="dither"):
    return add_rounded(kernel, delta, axes, kernel.dtype, rounding)


@by_dtype
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 1.0])
def test_each_number_is_a_neighbour_and_the_mean_is_right(dtype, size):
    """Of numbers of all sizes; the neighbours are NumPy's."""
    scales = 2.0 ** np.random.default_rng(0).integers(-12, 4, (256, 256))
    kernel = jnp.asarray(random(0, 256, 256) * scales, dtype)
    delta = jnp.full_like(kernel, size, jnp.float32)
    exact, got = wide(kernel) + size, rounded(kernel, delta)
    assert got.dtype == kernel.dtype
    nearest = np.asarray(exact.astype(kernel.dtype))
    below, above = (
        wide(np.nextafter(nearest, np.asarray(end, nearest.dtype)))
        for end in (-np.inf, np.inf)
    )
    below = np.where(wide(nearest) <= exact, wide(nearest), below)
    above = np.where(wide(nearest) >= exact, wide(nearest), above)
    assert ((wide(got) == below) | (wide(got) == above)).all()
    # A rounding that is right in the mean has a variance of gap^2 p (1 - p).
    share = np.where(
        above > below, (exact - below) / np.maximum(above - below, 1e-30), 0
    )
    deviation = np.sqrt((((above - below) ** 2) * share * (1 - share)).sum())
    assert abs((wide(got) - exact).sum()) < 4 * deviation + 1e-9


@by_dtype
def test_small_deltas_stay_in_what_a_layer_computes(dtype):
    """To nearest they are lost, all of them."""
    params = {"kernel": jnp.asarray(random(0, 512, 64), dtype)}
    config = MoRAConfig(operator="sharing", square_rank=32, scale="paper")
    plan = mora_jax.plan(params, config)
    adapters = plan.adapters({"kernel_mora": jnp.full((32, 32), 1e-4)})
    x = 1 + random(1, 8, 512)
    delta = wide(mora_jax.delta_weight(adapters)["kernel"])
    change = {}
    for rounding in ("dither", "nearest"):
        merged = mora_jax.merge(params, adapters, rounding=rounding)["kernel"]
        change[rounding] = wide(x) @ (wide(merged) - wide(params["kernel"]))
        settings = {"rounding": rounding}
        lost = diagnostics.merge_loss(params, adapters, **settings)["kernel"]
        assert lost < 0.1 if rounding == "dither" else lost > 0.5
    expected = wide(x) @ delta
    error = {k: abs(y.mean() / expected.mean() - 1) for k, y in change.items()}
    assert error["dither"] < 0.2 < 0.5 < error["nearest"]


@pytest.mark.slow
@by_dtype
def test_kernels_stay_where_nothing_is_added_or_all_is_too_much(dtype):
    grid = jnp.finfo(dtype)
    ends = jnp.asarray(
        [0.0, -0.0, grid.tiny, grid.max, -grid.max, np.inf, np.nan], dtype
    )
    kernel = jnp.concatenate([ends, jnp.asarray(random(0, 25), dtype)]).reshape(4, 8)
    zero = jnp.zeros(kernel.shape)
    np.testing.assert_array_equal(wide(rounded(kernel, zero)), wide(kernel))
    top = jnp.full((64, 64), grid.max, dtype)
    little = jnp.full(top.shape, float(grid.max) * float(grid.eps) / 8)
    assert (rounded(top, little) == top).all()
    assert jnp.isinf(rounded(top, 8 * little)).all()


def test_where_the_kernel_is_off_the_grid_all_is_rounded_to_nearest():
    """What is beyond the grid is a dither already."""
    kernel, delta = random(0, 16, 16), random(1, 16, 16)
    for dtype in ("bfloat16", "float16", "float32"):
        settings = "io", jnp.dtype(dtype)
        one, other = (
            add_rounded(kernel, delta, *settings, way) for way in ("dither", "nearest")
        )
        np.testing.assert_array_equal(one, other)


def test_the_numbers_do_not_depend_on_how_a_kernel_is_stored():
    """Transposed, as heads, in a stack; compiled or not; and each time the same."""
    kernel, delta = (
        jnp.asarray(random(0, 12, 20), jnp.bfloat16),
        1e-2 * random(1, 12, 20),
    )
    expected = rounded(kernel, delta)
    for axes, form in {
        "oi": lambda a: a.T,
        "ioo": lambda a: a.reshape(12, 4, 5),
        "oio": lambda a: a.reshape(12, 4, 5).transpose(1, 0, 2),
        "sio": lambda a: jnp.stack([a, a]),
    }.items():
        got = rounded(form(kernel), form(delta), axes)
        np.testing.assert_array_equal(got, form(expected))
    compiled = jax.jit(rounded, static_argnames=("axes", "rounding"))
    np.testing.assert_array_equal(compiled(kernel, delta), expected)


@pytest.mark.usefixtures("unchecked")
def test_bad_input():
    params = {"kernel": jnp.ones((8, 8), jnp.bfloat16)}
    plan = mora_jax.plan(params)
    for wrong in ("stochastic", None, 3):
        with pytest.raises(ValueError, match=r"rounding must be one of \('dither', "):
            mora_jax.merge(params, mora_jax.init(plan), rounding=wrong)
