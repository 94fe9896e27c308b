"""Relation of an array to another one, as tracers know what made them.

JAX lacks public names for it. JAX 0.7.1 to 0.12 have all that is used here; a version
that lacked it would know of no operations.
"""

from typing import Any

import jax
from jax.core import Tracer

UNCHANGED = {"convert_element_type", "copy", "optimization_barrier"} | {
    "sharding_constraint",
    "reshard",
    "stop_gradient",
}
"""JAX's primitives after which an array has the numbers it had, in the same order."""

ALIKE, ITSELF, DERIVED = range(3)
"""Relations of an array to another one.

An array that is alike has the same shape. One that is itself is the other array,
unchanged but perhaps in another dtype. A derived one is made of the other array.
"""


def relation_of(start: jax.Array, end: jax.Array) -> int | None:
    """The relation of `end` to `start`, if any is known."""
    start, end = _inside(start), _inside(end)
    steps = _steps(start, end)
    if steps is not None:
        return ITSELF if steps <= UNCHANGED else DERIVED
    if end.shape != start.shape:
        return None
    return ITSELF if _equal(start, end) else ALIKE


def _steps(start: Any, end: Any) -> set[str] | None:
    """The names of operations of one input that make `end` of `start`, if such do."""
    steps = set()
    while end is not start:
        step = getattr(end, "parent", None)
        if step and len(step.in_tracers) == 1:
            steps.add(str(step.primitive))
            (end,) = step.in_tracers
        elif step or not hasattr(end, "get_const"):
            return None
        else:  # an input of a trace may stand for an array that is known around it
            end = end.get_const()
        end = _inside(end)
    return steps


def _inside(array: Any) -> Any:
    """The array that a tracer of a derivative or of a batch has inside."""
    while isinstance(array, Tracer) and not hasattr(array, "parent"):
        inner = getattr(array, "primal", getattr(array, "val", None))
        if not hasattr(inner, "shape"):
            break
        array = inner
    return array


def _equal(start: Any, end: Any) -> bool:
    """True if both arrays are known and have the same numbers, in any dtypes."""
    if isinstance(start, Tracer) or isinstance(end, Tracer):
        return False
    with jax.ensure_compile_time_eval():  # a trace may run
        return bool((end == start.astype(end.dtype)).all())
