"""An operator's parts make the whole, whatever the runs of features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, FEW_CASES
from jax.sharding import AbstractMesh

from mora_jax._mesh import FeatureMesh
from mora_jax.operators._shard import shard

SIZES = [
    (24, 36, 10, 4, 4),  # blocks across runs; the first features complete the last
    (24, 36, 10, 1, 3),
    (36, 24, 10, 6, 1),
    (32, 16, 4, 4, 2),  # a run is whole blocks; more of them than outputs have
    (16, 48, 4, 2, 8),  # runs shorter than q; outputs repeat
    (8, 8, 8, 4, 4),  # one block
    (6, 8, 14, 3, 2),  # q beyond the inputs, which come more than once
]


def check(case, ins, outs, q, in_runs, out_runs):
    if q > min(ins, outs) and case.bounded:
        return
    op = case.make(ins, outs, q)
    mesh = AbstractMesh((in_runs, out_runs), ("in", "out"))
    mesh = FeatureMesh(mesh, ("in",), ("out",))
    rng = np.random.default_rng(0)
    m = jnp.asarray(rng.standard_normal((q, q)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((3, ins)), jnp.float32)

    @jax.jit
    def parts(op, m, x):
        products, updates = [], []
        for k_in, run in enumerate(jnp.split(x, in_runs, axis=-1)):
            here = [
                shard(op, mesh, jnp.int32(k_in), jnp.int32(k_out))
                for k_out in range(out_runs)
            ]
            products.append([one.apply(m, run) for one in here])
            updates.append([one.delta_weight(m) for one in here])
        added = [sum(column) for column in zip(*products, strict=True)]
        return jnp.concatenate(added, axis=-1), jnp.block(updates)

    product, update = parts(op, m, x)
    scale = np.sqrt(ins)
    np.testing.assert_allclose(product, op.apply(m, x), atol=1e-5 * scale)
    np.testing.assert_allclose(update, op.delta_weight(m), atol=1e-5)


@pytest.mark.parametrize("case", FEW_CASES, ids=lambda case: case.label)
@pytest.mark.parametrize("size", [SIZES[0], SIZES[3], SIZES[6]], ids=str)
def test_parts_make_the_whole(case, size):
    check(case, *size)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parts_make_the_whole_at_all_sizes(case, size):
    check(case, *size)
