"""Operations that made an array of another one, as its tracer knows them.

JAX has no public names for it. JAX 0.7.1 to 0.12 have all that is used here; a version
that lacked it would know of no operations.
"""

from typing import Any

from jax.core import Tracer


def steps_between(start: Any, end: Any) -> set[str] | None:
    """The names of operations of one input that make `end` of `start`, if such do."""
    start, end, steps = inside(start), inside(end), set()
    while end is not start:
        step = getattr(end, "parent", None)
        if step and len(step.in_tracers) == 1:
            steps.add(str(step.primitive))
            (end,) = step.in_tracers
        elif step or not hasattr(end, "get_const"):
            return None
        else:  # an input of a trace may stand for an array that is known around it
            end = end.get_const()
        end = inside(end)
    return steps


def inside(array: Any) -> Any:
    """The array that a tracer of a derivative or of a batch has inside."""
    while isinstance(array, Tracer) and not hasattr(array, "parent"):
        inner = getattr(array, "primal", getattr(array, "val", None))
        if not hasattr(inner, "shape"):
            break
        array = inner
    return array
