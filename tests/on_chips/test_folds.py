"""A layer on a TPU takes the TPU's way, also in a program that was exported here."""

import re

import jax
import numpy as np
import pytest
from helpers import close
from jax import export

from benchmarks.chips import hlo, roofline, topologies
from benchmarks.chips.programs import Layer

LAYER = Layer(1024, 512, 8192)
"""With so many rows a TPU folds rotation, and a CPU does not in bfloat16."""
PLACE = topologies.on_first(topologies.devices("v5e"))
FROZEN = next(iter(LAYER.methods([])))
BOTH = LAYER.mora("rotation", "auto", FROZEN.args[1:])


def forward(m, w, x, g):
    """The output alone."""
    return BOTH.run(m, w, x, g)[0]


FUNCTIONS = {"forward": forward, "both passes": BOTH.run}


def on_tpu(function, args=BOTH.args):
    """The program for a TPU."""
    args = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=PLACE), args
    )
    return jax.jit(function).lower(*args).compile()


def exported(function, *platforms):
    return export.export(jax.jit(function), platforms=platforms)(*BOTH.args)


def count(program, name):
    """How many operations of this name an exported program has."""
    return len(re.findall(rf"stablehlo\.{name}\b", program.mlir_module()))


def updates_in_loops(text):
    """The arrays that loops of a compiled program update slice by slice."""
    program = hlo.Program(text)
    found = set()
    for step in program.steps():
        if step.in_loop and step.times > 1:
            inner = [i for _, i in program.inner(step.instruction)]
            for each in inner or [step.instruction]:
                if each.opcode == hlo.UPDATE:
                    found.add((each.arrays[0].dtype, each.arrays[0].shape))
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_exported_program_takes_the_way_of_the_chip(name):
    """On the TPU and the GPU one product has all rows in each pass: x times the sum of
    kernel and delta. The CPU's way has more, and no loop that writes into a kernel.
    """
    function, passes = FUNCTIONS[name], 1 + (name != "forward")
    tpu, cuda, cpu = (exported(function, p) for p in ("tpu", "cuda", "cpu"))
    of_m = passes - 1  # the gradient of M, in a loop on the TPU
    assert count(tpu, "dot_general") == count(cuda, "dot_general") == passes + of_m
    assert count(cpu, "dot_general") == 2 * passes + of_m
    assert count(tpu, "while") == count(tpu, "dynamic_update_slice") == passes + of_m
    assert count(cuda, "while") == count(cpu, "while") == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_program_for_two_chips_is_that_of_each(name):
    """Written to a file and read again, it compiles to what a TPU has without that."""
    both = exported(FUNCTIONS[name], "tpu", "cuda")
    read = export.deserialize(both.serialize())
    assert read.platforms == ("tpu", "cuda")
    found, expected = on_tpu(read.call), on_tpu(FUNCTIONS[name])
    if name == "forward":  # in both passes XLA may keep other arrays on the chip
        costs = [roofline.measure(p, "v5e") for p in (found, expected)]
        assert costs[0].seconds == pytest.approx(costs[1].seconds, rel=0.02)
    updates = updates_in_loops(found.as_text())
    assert updates == updates_in_loops(expected.as_text())
    assert ("bf16", (LAYER.ins, LAYER.outs)) in updates


def test_a_program_for_this_cpu_as_well_gives_the_same_numbers():
    rng = np.random.default_rng(0)
    args = [rng.standard_normal(s.shape).astype(s.dtype) / 8 for s in BOTH.args]
    read = export.deserialize(exported(BOTH.run, "cpu", "tpu", "cuda").serialize())
    close(jax.jit(read.call)(*args), jax.jit(BOTH.run)(*args), 1e-2)


@pytest.mark.parametrize("size", [(1024, 512), (512, 1024), (1024, 1024)], ids=str)
@pytest.mark.parametrize("operator", ["rotation", "decoupling"])
def test_folds_are_made_in_place(operator, size):
    """Copies of M are added to a copy of the kernel; no delta of its size is made.

    A layer of sharing folds the other way, so the test would see it.
    """
    layer = Layer(*size, 8192)
    kernel = 2 * layer.ins * layer.outs  # bytes
    base = next(iter(layer.methods([])))
    memory = roofline.temporary_bytes(on_tpu(base.run, base.args))

    def deltas(operator):
        method = layer.mora(operator, "fold", base.args[1:])
        program = on_tpu(method.run, method.args)
        text, used = program.as_text(), roofline.temporary_bytes(program)
        arrays = {a for a in hlo.written(text) if a.dtype == "f32"}
        sizes = {int(a.bytes) for a in arrays}
        return {s for s in sizes if s >= 2 * kernel}, used, updates_in_loops(text)

    whole, used, updated = deltas(operator)
    assert not whole and ("bf16", size) in updated
    assert used < memory + kernel / 2
    whole, _, updated = deltas("sharing")
    assert whole and ("bf16", size) not in updated
