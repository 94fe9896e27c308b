"""A chip of a mesh makes no more of a delta than its share of the kernel needs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.chips import hlo, topologies
from mora_jax import FrozenDense, MoRAConfig, mora_apply, plan, sharding

INS, OUTS = 2048, 4096


@pytest.mark.parametrize("operator", ["block_diagonal", "low_rank"])
def test_a_fold_makes_the_share_of_a_chip(operator):
    mesh = Mesh(
        np.array(topologies.devices("v5e:8x8")).reshape(8, 8), ("fsdp", "model")
    )

    def shape(dtype, spec, *sizes):
        place = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    kernel = shape(jnp.bfloat16, ("fsdp", "model"), INS, OUTS)
    config = MoRAConfig(operator=operator, execution="fold")
    where = {"kernel": kernel}
    (spec,) = sharding.on_mesh(plan(where, config), where, batch_axes="fsdp").values()
    layer = FrozenDense(None, None, spec.operator, layout=spec.layout, execution="fold")

    def forward(m, kernel, x):
        adapted = dataclasses.replace(layer, kernel=kernel)
        return mora_apply({"kernel_mora": m}, adapted, x)

    m = shape(jnp.float32, (), *spec.shape)
    x = shape(jnp.bfloat16, ("fsdp",), 8, 512, INS)
    text = jax.jit(forward).lower(m, kernel, x).compile().as_text()
    wide = [a.bytes for a in hlo.written(text) if a.dtype == "f32"]
    assert max(wide, default=0) <= max(4 * INS * OUTS / mesh.size, 4 * spec.parameters)
