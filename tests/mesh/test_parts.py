"""The parts of an operator add up to the whole, however features are divided."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import slow
from cases import by_few_cases
from helpers import close, random

from mora_jax._compute.delta import Delta
from mora_jax._mesh.parts import part_of

SIZES = [
    # Blocks on two devices; the first features complete the last.
    (24, 36, 10, 4, 4),
    slow((24, 36, 10, 1, 3)),
    slow((36, 24, 10, 6, 1)),
    (32, 16, 4, 4, 2),  # each device has whole blocks; more of them than outputs have
    slow((16, 48, 4, 2, 8)),  # fewer features than q on a device; outputs repeat
    slow((8, 8, 8, 4, 4)),  # one block
    (6, 8, 14, 3, 2),  # q beyond the inputs, which come more than once
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@by_few_cases
def test_parts_make_the_whole(case, size):
    ins, outs, q, in_parts, out_parts = size
    if q > min(ins, outs) and case.bounded:
        return
    op = case.make(ins, outs, q)
    m, x = random(0, *op.m_shape), random(1, 3, ins)
    here, there = ins // in_parts, outs // out_parts

    @jax.jit
    def parts(op, m, x):
        products, deltas = [], []
        for k, inputs in enumerate(jnp.split(x, in_parts, axis=-1)):
            local = [
                part_of(op, jnp.int32(k * here), jnp.int32(n * there), here, there)
                for n in range(out_parts)
            ]
            local = [Delta(part, m, (here, there), "io") for part in local]
            products.append([delta.rows(inputs) for delta in local])
            deltas.append([delta.kernel() for delta in local])
        added = [sum(column) for column in zip(*products, strict=True)]
        whole = op.apply(m, x), op.delta_weight(m)
        return jnp.concatenate(added, axis=-1), jnp.block(deltas), whole

    product, delta, whole = parts(op, m, x)
    close(product, whole[0], 1e-5 * np.sqrt(ins))
    close(delta, whole[1])
