"""A training step on a mesh of TPUs sends what the frozen model does, and little more.

Layers are scanned and rematerialised, and their kernels split by FSDP and by tensor
parallelism.
"""

import functools

import jax
import pytest

from benchmarks import roofline, topologies
from benchmarks.chip_meshes import TOPOLOGIES, MeshLlama
from benchmarks.mesh_steps import make_step
from benchmarks.traffic import collectives

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


@pytest.mark.parametrize("operator", ["sharing", "rotation", "orthogonal"])
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


@pytest.mark.parametrize("operator", ["sharing", "rotation", "orthogonal"])
def test_a_step_needs_little_memory(operator):
    """No folded or gathered kernel is kept, and no C(x) of all rows."""
    _, _, base = compiled("frozen")
    step, _, cost = compiled(operator)
    adapters = sum(m.size * m.dtype.itemsize for m in jax.tree.leaves(step.trained))
    assert cost.temporary <= 1.03 * base.temporary + 2 * adapters


def test_mora_costs_less_than_lora():
    costs = {name: compiled(name)[2] for name in ("lora", "rotation", "sharing")}
    for operator in ("rotation", "sharing"):
        assert costs[operator].seconds <= 0.96 * costs["lora"].seconds
