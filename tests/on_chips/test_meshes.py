"""A training step on a mesh of TPUs sends what the frozen model does, and little more.

Layers are scanned and rematerialised, and their kernels split by FSDP and by tensor
parallelism.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import slow
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mora_jax
from benchmarks.chips import roofline, topologies
from benchmarks.chips.on_meshes import TOPOLOGIES, MeshLlama
from benchmarks.mesh.mesh_steps import make_step
from benchmarks.mesh.traffic import collectives
from mora_jax import FrozenDense, MoRAConfig, mora_apply, sharding

LLAMA = MeshLlama("8b", layers=2)
DEVICES = topologies.devices(TOPOLOGIES["v5e"])


@functools.cache
def compiled(method):
    """A step, the arrays that its program sends, and what it costs."""
    step = make_step(LLAMA.case(method), DEVICES)
    program, _ = step.compile({})
    cost = roofline.measure(program, "v5e")
    assert not cost.notes
    return step, set(collectives(program.as_text())), cost


@pytest.mark.parametrize("operator", ["sharing", "rotation", slow("orthogonal")])
def test_a_step_sends_the_gradient_of_m_and_nothing_else(operator):
    """Kernels are gathered as often as XLA gathers those of the frozen model.

    It may decide otherwise on one of them, since it keeps a gathered kernel for the
    backward pass if that follows soon.
    """
    _, base_arrays, base = compiled("frozen")
    step, arrays, cost = compiled(operator)
    squares = jax.tree.leaves(step.trained)
    sums = {array for array in arrays - base_arrays if array[0] != "all-gather"}
    assert sums <= {("all-reduce", m.shape[1:]) for m in squares}
    of_m = sum(2 * m.size * m.dtype.itemsize for m in squares)
    assert sum(cost.received.values()) <= 1.05 * sum(base.received.values()) + of_m


@pytest.mark.parametrize("operator", ["sharing", "rotation", slow("orthogonal")])
def test_a_step_needs_little_memory(operator):
    """No folded or gathered kernel is kept, and no C(x) of all rows."""
    _, _, base = compiled("frozen")
    step, _, cost = compiled(operator)
    adapters = sum(m.size * m.dtype.itemsize for m in jax.tree.leaves(step.trained))
    assert cost.temporary <= 1.03 * base.temporary + 2 * adapters


def test_mora_costs_less_than_lora():
    operators = "block_diagonal", "rotation", "sharing"
    costs = {name: compiled(name)[2] for name in ("lora", *operators)}
    for operator in operators:
        assert costs[operator].seconds <= 0.96 * costs["lora"].seconds


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("operator", ["sharing", "rotation", "block_diagonal"])
def test_rows_alone_are_split(operator, planned):
    """Whether or not the plan knows of the mesh, one sum of M's gradient is sent."""
    mesh = Mesh(np.array(topologies.devices("v5e:2x2")), ("data",))
    here = {name: NamedSharding(mesh, P(*name)) for name in ((), ("data",))}
    whole, rows = here.values()
    kernel = jax.ShapeDtypeStruct((1024, 2048), jnp.bfloat16, sharding=whole)
    config = MoRAConfig(operator=operator)
    plan = mora_jax.plan({"kernel": kernel}, config)
    if planned:
        plan = sharding.on_mesh(plan, {"kernel": kernel}, batch_axes="data")
    (spec,) = plan.values()
    layer = FrozenDense(None, None, spec.operator, layout=spec.layout)

    def loss(m, kernel, x):
        adapted = dataclasses.replace(layer, kernel=kernel)
        y = mora_apply({"kernel_mora": m}, adapted, x).astype(jnp.float32)
        return jnp.square(y).sum()

    args = (
        jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=whole),
        kernel,
        jax.ShapeDtypeStruct((8, 2048, 1024), jnp.bfloat16, sharding=rows),
    )
    step = jax.jit(
        jax.value_and_grad(loss, (0, 2)), out_shardings=(whole, (whole, rows))
    )
    program = step.lower(*args).compile()
    cost = roofline.measure(program, "v5e")
    assert not cost.notes
    m = 4 * spec.parameters  # bytes
    assert m / 2 < sum(cost.received.values()) < 2.1 * m
