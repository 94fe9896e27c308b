"""What programs send between devices is counted rightly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import make_mesh

from benchmarks.mesh import traffic


def local(x):  # (8, 16) float32, 512 bytes
    def outer(x, _):
        x = jnp.sin(jax.lax.psum(x, ("a", "b")))  # 5 x 2 x 512 x 3/4
        return jax.lax.scan(inner, x, None, length=3)[0], None

    def inner(x, _):
        swapped = jax.lax.ppermute(x, "a", ((0, 1), (1, 0)))  # 15 x 512
        return jnp.cos(swapped) * x, None

    x, _ = jax.lax.scan(outer, x, None, length=5)
    y = jax.lax.all_gather(x, "b", tiled=True)  # (16, 16): 1024 x 1/2
    z = jax.lax.psum_scatter(x, "b", tiled=True)  # (4, 16): 256 x 1
    w = jax.lax.all_to_all(x, ("a", "b"), 0, 0, tiled=True)  # 512 x 3/4
    return x * jnp.sum(y) * jnp.sum(z) * w


def test_traffic_of_a_known_program():
    mesh, both = make_mesh(a=2, b=2), P(("a", "b"))
    f = jax.shard_map(local, mesh=mesh, in_specs=both, out_specs=both, check_vma=False)
    text = jax.jit(f).lower(np.ones((32, 16), np.float32)).compile().as_text()
    expected = {"all-reduce": 5 * 2 * 512 * 3 / 4, "collective-permute": 15 * 512}
    expected |= {"all-gather": 512, "reduce-scatter": 256, "all-to-all": 384}
    assert traffic.traffic(text) == expected
    found = {("all-reduce", (8, 16)), ("all-gather", (16, 16))}
    assert found <= set(traffic.collectives(text))


def hlo(loop="", groups="[2,4]<=[8]"):
    return f"""HloModule step, num_partitions=8

%body.1 (p: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {{
  %sum = (f32[4,2]{{1,0}}, /*index=1*/bf16[8]{{0}}) all-reduce(%x, %y), \
channel_id=1, replica_groups={groups}, to_apply=%add
}}

%cond.1 (p: (s32[], f32[4,2])) -> pred[] {{
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

%add (a: f32[], b: f32[]) -> f32[] {{
  ROOT %c = f32[] add(%a, %b)
}}

ENTRY %main (x: f32[4,2]) -> f32[4,2] {{
  %loop = (s32[], f32[4,2]) while(%t), condition=%cond.1, body=%body.1{loop}
  ROOT %out = f32[4,2] get-tuple-element(%loop), index=1
}}
"""


TRIPS = ', backend_config={"known_trip_count":{"n":"7"}}'


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", 4),
        ("mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'b','a'}", 8),
        ("mesh['a'=4,'b'=2] {'a':(1)2,'b'}", 4),
    ],
)
def test_groups_and_loops(groups, size):
    expected = {"all-reduce": 7 * (32 + 16) * 2 * (size - 1) / size}
    assert traffic.traffic(hlo(TRIPS, groups)) == expected
    halved = traffic.traffic(hlo(TRIPS, groups), {**traffic.SIZES, "f32": 2})
    assert halved["all-reduce"] == pytest.approx(expected["all-reduce"] * 2 / 3)


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="how often"):
        traffic.traffic(hlo())
    with pytest.raises(ValueError, match="must have groups"):
        traffic.traffic(hlo(TRIPS, "?"))
    with pytest.raises(ValueError, match="asynchronous"):
        traffic.traffic(hlo(TRIPS).replace("all-reduce(", "all-reduce-start("))
