"""What JAX has no public names for, in this file alone: how an array was made.

JAX 0.7.1 to 0.12 have all of it. A version that lacked one would make operands
"perhaps made" of a kernel, or unknown, and not wrong.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax.core.tracers import current_trace as current_trace
from jax.core import Tracer


class Step(NamedTuple):
    """An operation.

    Attributes:
      primitive: Its name.
      inputs: What it was given.
    """

    primitive: str
    inputs: Sequence[Any]


def step_of(array: Any) -> Step | None:
    """The operation that made an array; None for an input, and what is known."""
    made_by = getattr(array, "parent", None)
    return made_by and Step(str(made_by.primitive), made_by.in_tracers)


def constant_of(array: Any) -> Any:
    """What an input of a trace stands for, if a trace around knows it."""
    if not isinstance(array, Tracer):
        return array
    return array.get_const() if hasattr(array, "get_const") else None


def inside(array: Any) -> Any:
    """What a tracer of a derivative or of a batch has inside."""
    while isinstance(array, Tracer) and not hasattr(array, "parent"):
        inner = getattr(array, "primal", getattr(array, "val", None))
        if inner is None or not hasattr(inner, "shape"):
            break
        array = inner
    return array


def are_of_one_trace(one: jax.Array, other: jax.Array) -> bool:
    """Whether two tracers are of one trace."""
    return getattr(one, "_trace", None) is getattr(other, "_trace", None)
