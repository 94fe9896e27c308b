"""The parts of an operator add up to the whole, however features are divided."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import slow
from cases import FEW_CASES, by_kind, in_turns
from helpers import close, random
from platforms import as_if_on

from mora_jax._layer.chips import add
from mora_jax._mesh.parts import part_of

SIZES = [
    # Blocks on two devices; the first features complete the last.
    (24, 36, 10, 4, 4),
    slow((24, 36, 10, 1, 3)),
    slow((36, 24, 10, 6, 1)),
    # Each device has whole blocks; more of them than outputs have.
    slow((32, 16, 4, 4, 2)),
    slow((16, 48, 4, 2, 8)),  # fewer features than q on a device; outputs repeat
    slow((8, 8, 8, 4, 4)),  # one block
    (8, 16, 8, 4, 1),  # one block of inputs, and more outputs
    (24, 36, 12, 2, 3),  # whole blocks, some of which have inputs and outputs apart
    (6, 8, 14, 3, 2),  # q beyond the inputs, which come more than once
]


@pytest.mark.law
@in_turns("case, size", FEW_CASES, SIZES, each=2)
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
            products.append([part.rows(inputs, m) for part in local])
            deltas.append([part.matrix(m) for part in local])
        added = [sum(column) for column in zip(*products, strict=True)]
        whole = op.apply(m, x), op.delta_weight(m)
        return jnp.concatenate(added, axis=-1), jnp.block(deltas), whole

    product, delta, whole = parts(op, m, x)
    close(product, whole[0], 1e-5 * np.sqrt(ins))
    close(delta, whole[1])


FOLDS = [
    (24, 36, 10, 4, 4),
    (32, 16, 4, 4, 2),  # whole blocks, of which the inputs have more
    (16, 48, 4, 2, 4),  # of which the outputs have more
    (32, 32, 8, 8, 2),  # each device has half a block of inputs
    (16, 64, 16, 2, 8),  # half a block of inputs and of outputs
]
FEW = ("cpu", FOLDS[1]), ("tpu", FOLDS[3])
by_fold = pytest.mark.parametrize(
    ("platform", "size"),
    [
        fold if fold in FEW else slow(*fold)
        for fold in itertools.product(("cpu", "tpu"), FOLDS)
    ],
    ids=str,
)


@pytest.mark.law
@by_fold
@by_kind
def test_parts_of_a_fold_make_the_whole(case, platform, size):
    """Bit for bit in bfloat16, whose dither is that of the whole kernel."""
    ins, outs, q, in_parts, out_parts = size
    op, here, there = case.make(ins, outs, q), ins // in_parts, outs // out_parts
    m, kernel = random(0, *op.m_shape), random(1, ins, outs)

    def folds(op, m, kernel):
        rows = []
        for k, part in enumerate(jnp.split(kernel, in_parts)):
            rows.append([])
            for n, block in enumerate(jnp.split(part, out_parts, axis=1)):
                starts = jnp.int32(k * here), jnp.int32(n * there)
                rows[-1].append(add(part_of(op, *starts, here, there), m, block))
        return jnp.block(rows), add(op, m, kernel)

    with as_if_on(platform):
        close(*jax.jit(folds)(op, m, kernel))
        if op.block:
            got, expected = jax.jit(folds)(op, m, kernel.astype(jnp.bfloat16))
            assert got.dtype == jnp.bfloat16
            np.testing.assert_array_equal(got, expected)
