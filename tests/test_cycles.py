"""Features over and over, and their transpose, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_jax.operators._blocks import MANY, add_cycles, cycle, places, to_blocks

SIZES = st.integers(1, 9), st.integers(1, 40)


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


def check(width, features):
    """Both maps, and JAX's transposes of both."""
    rng = np.random.default_rng(width * features)
    x = jnp.asarray(rng.standard_normal((2, width)), jnp.float32)
    y = jnp.asarray(rng.standard_normal((2, features)), jnp.float32)
    index = np.arange(features) % width
    repeated, added = np.asarray(x)[:, index], np.zeros((2, width))
    np.add.at(added, (slice(None), index), y)
    close(cycle(x, features), repeated)
    close(add_cycles(y, width), added)
    close(jax.linear_transpose(lambda x: cycle(x, features), x)(y)[0], added)
    close(jax.linear_transpose(lambda y: add_cycles(y, width), y)(x)[0], repeated)


@settings(max_examples=25, deadline=None)
@given(*SIZES)
def test_cycles(width, features):
    check(width, features)


@pytest.mark.parametrize("rest", [-1, 0, 1])
def test_more_cycles_than_are_written_out(rest):
    check(3, 3 * (MANY + 1) + rest)


@settings(max_examples=25, deadline=None)
@given(*SIZES)
def test_places_are_where_blocks_have_features(square_rank, features):
    held = to_blocks(jnp.arange(1.0, features + 1), square_rank)
    block, offset = places(np.arange(features), features, square_rank)
    found = np.zeros(held.shape)
    feature, place = np.nonzero(offset < square_rank)
    found[block[feature, place], offset[feature, place]] = feature + 1
    np.testing.assert_array_equal(found, held)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_of_16_bits_are_rounded_once(dtype):
    """In bfloat16 256 + 1 is 256, so 62 ones added one by one would be lost."""
    big = 256 if dtype == "bfloat16" else 2048
    y = jnp.ones(63, dtype).at[0].set(big)
    assert add_cycles(y, 1)[0] == big + 62
    steps = jax.make_jaxpr(lambda y: add_cycles(y, 1))(y).jaxpr.eqns[0].params["call"]
    adds = jax.make_jaxpr(steps)(y).jaxpr.eqns
    added = [e.outvars[0].aval.dtype for e in adds if e.primitive.name == "add"]
    assert set(added) == {jnp.dtype("float32")}
