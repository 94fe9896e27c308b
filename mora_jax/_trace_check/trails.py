"""Trails: the ways of a program from kernels and inputs of layers to an array."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mora_jax._trace_check.marks import Call
from mora_jax._trace_check.views import View


@dataclasses.dataclass(frozen=True)
class Trail:
    """Way from one array of a model, or from the input of one call, to an array.

    Attributes:
      view: The axes of the kernel (numbers, negative for stack axes), of the input or
        of their product (the kernel's, or letters of the einsum); None if they are
        lost.
      by: The primitive that multiplied the kernel; "" before that.
      call: The call whose input the kernel was multiplied with; None for any other
        array.
      through: The further primitives on the way that change numbers.
      factors: The factors among them, as in `Call.scale`, or what else they are.
      numbers: The function from the call's indices to these numbers, or to a constant;
        None if it is not known.
      wrong: A fault of the input that multiplies the kernel, or "".
      unseen: The reason why a trace cannot look into a primitive on the way, or "".
      is_companion: True if it begins at an array that is trained beside a kernel.
    """

    view: View | None
    by: str = ""
    call: Call | None = None
    through: frozenset[str] = frozenset()
    factors: tuple[float | str, ...] = ()
    numbers: Callable[[Any], Any] | None = None
    wrong: str = ""
    unseen: str = ""
    is_companion: bool = False

    def moved(self, move: Callable[[View], View | None]) -> "Trail":
        """The trail with its axes moved."""
        view = None if self.view is None else move(self.view)
        return dataclasses.replace(self, view=view)

    def passed(self, name: str, view: View | None = None) -> "Trail":
        """The trail after the primitive called `name`, which changes numbers."""
        through = self.through | {name}
        return dataclasses.replace(self, through=through, view=view, numbers=None)

    def hidden(self, why: str) -> "Trail":
        """The trail after a primitive that a trace cannot look into."""
        return dataclasses.replace(self, unseen=why, numbers=None)


Start = str | Call | None
"""The path of an array; a call, for its input; None for constants."""

Value = Mapping[Start, Trail]
"""All that an array depends on."""


def changed(value: Value, change: Callable[[Trail], Trail]) -> Value:
    """The value with each of its trails changed."""
    return {start: change(trail) for start, trail in value.items()}


def joined(values: Iterable[Value]) -> Value:
    """All that an array depends on that is computed from several arrays."""
    trails: dict[Start, Trail] = {}
    for start, trail in (pair for value in values for pair in value.items()):
        if (other := trails.setdefault(start, trail)) != trail:
            other = dataclasses.replace(other, view=None, numbers=None)
            through = trail.through | other.through
            unseen = trail.unseen or other.unseen
            trails[start] = dataclasses.replace(other, through=through, unseen=unseen)
    return trails


def kernels(value: Value) -> dict[str, Trail]:
    """The trails of a value that begin at arrays of the model."""
    return {start: t for start, t in value.items() if isinstance(start, str)}
