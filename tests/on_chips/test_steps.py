"""A training step compiles for a TPU, alone and on a mesh, and stays small there."""

import functools
import math

import jax
import numpy as np
import pytest
import scanned

from benchmarks.chips import topologies
from benchmarks.chips.hlo import written
from benchmarks.chips.roofline import temporary_bytes
from mora_jax.operators import OPERATORS

DEVICES = topologies.devices("v5e:2x2")
CASES = [
    (operator, execution, count)
    for operator in OPERATORS
    for execution in ("activation", "fold")
    for count in (1, 4)
]
"""Operators, ways and numbers of devices."""
COPIES = {"signed_sharing": 5}
"""How many arrays of (rows, hidden features) an operator may need for a moment, besides
what the frozen model needs. The one that is named multiplies by signs, and writes the
result; all others may need 4."""


@functools.cache
def compiled(operator, execution, count):
    step = scanned.adapted(operator, execution, DEVICES[:count])
    return step, step.run.lower(*step.args).compile()


@functools.cache
def frozen(count):
    args = scanned.arrays(DEVICES[:count])
    return jax.jit(scanned.frozen_step).lower(*args).compile()


def wide_arrays(program, count):
    """Arrays in float32 of all rows of a device and at least 128 features."""
    rows = scanned.ROWS // (2 if count == 4 else 1)
    return {
        array
        for array in written(program.as_text())
        if array.dtype == "f32" and math.prod(array.shape) >= 128 * rows
    }


@pytest.mark.parametrize(("operator", "execution", "count"), CASES)
def test_a_step_is_small(operator, execution, count):
    """No activations in float32, little memory; and the next step is the same program.

    What a step returns has the shardings of what it takes, and is traced once.
    """
    step, program = compiled(operator, execution, count)
    base = frozen(count)
    assert wide_arrays(program, count) <= wide_arrays(base, count)
    hidden = 2 * scanned.ROWS * scanned.HIDDEN // count  # bytes
    assert (
        temporary_bytes(program)
        <= temporary_bytes(base) + COPIES.get(operator, 4) * hidden
    )
    places = jax.tree.leaves(step.places)
    returned = jax.tree.leaves(program.output_shardings[0])
    for place, one in zip(returned, places, strict=True):
        assert place.is_equivalent_to(one, 3)
    step.run.lower(*step.args)
    assert len(step.traces) == 1


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_second_step_does_not_compile_again(operator):
    """It takes what the first one returned. On this CPU, with programs for any chip."""
    step = scanned.adapted(operator, "auto", jax.devices()[:1], rows=64)
    adapters, params, x = jax.tree.map(
        lambda s: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding), step.args
    )
    for _ in range(3):
        adapters, _, _ = step.run(adapters, params, x)
    assert len(step.traces) == step.run._cache_size() == 1
