"""The parts of an operator add up to the whole, however features are divided."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, FEW_CASES
from helpers import close, random

from mora_jax._compute.delta import Delta
from mora_jax._mesh.parts import part_of

SIZES = [
    (24, 36, 10, 4, 4),  # blocks on two devices; the first features complete the last
    (24, 36, 10, 1, 3),
    (36, 24, 10, 6, 1),
    (32, 16, 4, 4, 2),  # each device has whole blocks; more of them than outputs have
    (16, 48, 4, 2, 8),  # fewer features than q on a device; outputs repeat
    (8, 8, 8, 4, 4),  # one block
    (6, 8, 14, 3, 2),  # q beyond the inputs, which come more than once
]


def check(case, ins, outs, q, in_parts, out_parts):
    if q > min(ins, outs) and case.bounded:
        return
    op = case.make(ins, outs, q)
    m, x = random(0, q, q), random(1, 3, ins)
    here, there = ins // in_parts, outs // out_parts

    @jax.jit
    def parts(op, m, x):
        products, deltas = [], []
        for k, inputs in enumerate(jnp.split(x, in_parts, axis=-1)):
            here_and_there = [
                part_of(op, jnp.int32(k * here), jnp.int32(n * there), here, there)
                for n in range(out_parts)
            ]
            local = [Delta(part, m, (here, there), "io") for part in here_and_there]
            products.append([delta.rows(inputs) for delta in local])
            deltas.append([delta.kernel() for delta in local])
        added = [sum(column) for column in zip(*products, strict=True)]
        whole = op.apply(m, x), op.delta_weight(m)
        return jnp.concatenate(added, axis=-1), jnp.block(deltas), whole

    product, delta, whole = parts(op, m, x)
    close(product, whole[0], 1e-5 * np.sqrt(ins))
    close(delta, whole[1])


@pytest.mark.parametrize("case", FEW_CASES, ids=lambda case: case.label)
@pytest.mark.parametrize("size", [SIZES[0], SIZES[3], SIZES[6]], ids=str)
def test_parts_make_the_whole(case, size):
    check(case, *size)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parts_make_the_whole_at_all_sizes(case, size):
    check(case, *size)
