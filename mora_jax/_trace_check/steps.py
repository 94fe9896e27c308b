"""Steps: what single primitives make of the trails that pass them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from mora_jax._trace_check.trails import Trail, Value, joined
from mora_jax._trace_check.views import length, reshape

IDENTITIES = frozenset(
    "copy copy_p device_put layout_constraint mesh_cast optimization_barrier "
    "pbroadcast pvary reduce_precision reshard sharding_constraint "
    "stop_gradient".split()
)
"""Primitives that leave numbers as they are, apart from rounding."""

PRODUCTS = frozenset(
    "dot_general conv_general_dilated gather ragged_dot_general".split()
)
"""Primitives by which layers multiply an input with a kernel."""

PREPARING = frozenset(
    "concatenate div dynamic_slice gather mul reduce_sum slice".split()
)
"""Primitives that a kernel may pass before it multiplies."""

OPAQUE = frozenset("pure_callback io_callback shard_map custom_partitioning".split())
"""Primitives whose inside says nothing about whole arrays, as do all `*_call`."""

Step = Callable[[Any, Trail, list[int]], Trail]
"""(equation of a program, trail, numbers of its operands that have the trail)."""


def after(eqn: Any, values: list[Value]) -> Value:
    """The value of the outputs of an equation whose operands have `values`."""
    step = STEPS.get(eqn.primitive.name, _changed)
    return {
        start: step(eqn, trail, [k for k, v in enumerate(values) if start in v])
        for start, trail in joined(values).items()
    }


def _changed(eqn: Any, trail: Trail, at: list[int]) -> Trail:
    """The step of every primitive that is not in `STEPS`: it changes numbers."""
    name, alone = eqn.primitive.name, len(at) == 1
    # A factor leaves the axes where they are.
    factor = alone and (name == "mul" or (name == "div" and at == [0]))
    kept = factor and eqn.invars[at[0]].aval.shape == eqn.outvars[0].aval.shape
    step = name if alone else f"{name} by itself"
    return trail.passed(step, trail.view if kept else None)


def _converted(eqn: Any, trail: Trail, at: list[int]) -> Trail:
    floating = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
    return trail if floating else _changed(eqn, trail, at)


def _reshaped(eqn: Any, trail: Trail, at: list[int]) -> Trail:
    """A broadcast is a reshape too, unless it makes copies of numbers."""
    before, result = eqn.invars[0].aval, eqn.outvars[0].aval
    if before.size != result.size:
        return _changed(eqn, trail, at)
    return trail.moved(lambda view: reshape(view, result.shape))


def _transposed(eqn: Any, trail: Trail, at: list[int]) -> Trail:
    order = eqn.params["permutation"]
    return trail.moved(lambda view: tuple(view[k] for k in order))


def _sliced(eqn: Any, trail: Trail, at: list[int]) -> Trail:
    """One layer of a stacked kernel is a kernel, since it has an M of its own."""
    if at != [0] or trail.by or trail.view is None:
        return _changed(eqn, trail, at)
    axes = []
    for axis, size in zip(trail.view, eqn.outvars[0].aval.shape, strict=True):
        of_stack = all(isinstance(p.axis, int) and p.axis < 0 for p in axis)
        if length(axis) != size and not (of_stack and size == 1):
            return _changed(eqn, trail, at)
        axes.append(axis if length(axis) == size else ())
    return dataclasses.replace(trail, view=tuple(axes))


def _added(eqn: Any, trail: Trail, at: list[int]) -> Trail:
    """A bias may be added to a product, since it does not depend on the kernel."""
    return trail if len(at) == 1 and trail.by else trail.passed("add")


STEPS: Mapping[str, Step] = {
    "convert_element_type": _converted,
    "reshape": _reshaped,
    "squeeze": _reshaped,
    "expand_dims": _reshaped,
    "broadcast_in_dim": _reshaped,
    "transpose": _transposed,
    "slice": _sliced,
    "dynamic_slice": _sliced,
    "add": _added,
    "add_any": _added,
}
