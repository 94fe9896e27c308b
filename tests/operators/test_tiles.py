"""Vectors that repeat, and their sums, against numpy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, random
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_jax._jax.tiles import sum_tiles, tile_to
from mora_jax._jax.tracing import MAX_UNROLLED_SLICES
from mora_jax.operators import Decoupling
from mora_jax.operators.decoupling import block_positions

SIZES = st.integers(1, 9), st.integers(1, 40)


def check(width, features):
    """Both maps, and JAX's transposes of both."""
    x, y = (np.asarray(random(k, 2, n)) for k, n in enumerate((width, features)))
    index = np.arange(features) % width
    repeated, added = x[:, index], np.zeros((2, width))
    np.add.at(added, (slice(None), index), y)

    @jax.jit
    def all_four(x, y):
        (by_x,) = jax.linear_transpose(lambda x: tile_to(x, features), x)(y)
        (by_y,) = jax.linear_transpose(lambda y: sum_tiles(y, width), y)(x)
        return tile_to(x, features), by_y, sum_tiles(y, width), by_x

    tiled, by_y, summed, by_x = all_four(x, y)
    for got in (tiled, by_y):
        close(got, repeated)
    for got in (summed, by_x):
        close(got, added)


@settings(max_examples=12, deadline=None)
@given(*SIZES)
def test_tiles(width, features):
    check(width, features)


@pytest.mark.parametrize("rest", [-1, 0, 1])
def test_more_tiles_than_are_written_out(rest):
    check(3, 3 * (MAX_UNROLLED_SLICES + 1) + rest)


@settings(max_examples=25, deadline=None)
@given(*SIZES)
def test_positions_are_where_blocks_have_features(square_rank, features):
    op = Decoupling(features, features, square_rank)
    held = np.asarray(jax.jit(op.compress)(np.arange(1, features + 1, dtype="f")))
    block, offset = block_positions(np.arange(features), features, square_rank)
    found = np.zeros(held.shape)
    feature, place = np.nonzero(offset < square_rank)
    found[block[feature, place], offset[feature, place]] = feature + 1
    np.testing.assert_array_equal(found, held)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_of_16_bits_are_rounded_once(dtype):
    """In bfloat16 256 + 1 is 256, so 62 ones added one by one would be lost."""
    big = 256 if dtype == "bfloat16" else 2048
    y = jnp.ones(63, dtype).at[0].set(big)
    assert sum_tiles(y, 1)[0] == big + 62
    program = jax.jit(lambda y: sum_tiles(y, 1)).lower(y).as_text()
    assert set(re.findall(r"stablehlo.add .*tensor<1x(\w+)>", program)) == {"f32"}
