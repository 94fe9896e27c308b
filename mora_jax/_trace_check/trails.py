"""Trails: how arrays depend on kernels, and on the inputs of layers."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from mora_jax._trace_check.marks import Call
from mora_jax._trace_check.views import View


@dataclasses.dataclass(frozen=True)
class Trail:
    """Way from one kernel, or from the input of one call, to an array.

    Attributes:
      view: The axes of the kernel (numbers, negative for stack axes), of the input or
        of their product (letters of the einsum); None if they are lost.
      by: The primitive that multiplied the kernel; "" before that.
      call: The call whose input the kernel was multiplied with; None for any other
        array.
      through: The further primitives on the way that change numbers.
      unseen: A primitive among them that a trace cannot look into, or "".
    """

    view: View | None
    by: str = ""
    call: Call | None = None
    through: frozenset[str] = frozenset()
    unseen: str = ""

    @property
    def unchanged(self) -> bool:
        """True if the array is the start of the trail, with its axes in some order."""
        return self.view is not None and not (self.by or self.through or self.unseen)

    def moved(self, move: Callable[[View], View | None]) -> "Trail":
        """The trail with its axes moved."""
        view = None if self.view is None else move(self.view)
        return dataclasses.replace(self, view=view)

    def passed(self, name: str, view: View | None = None) -> "Trail":
        """The trail after the primitive called `name`, which changes numbers."""
        return dataclasses.replace(self, through=self.through | {name}, view=view)

    def joined(self, trail: "Trail") -> "Trail":
        """A trail that holds where either of the two does."""
        if self == trail:
            return self
        through, unseen = self.through | trail.through, self.unseen or trail.unseen
        return dataclasses.replace(self, view=None, through=through, unseen=unseen)


Start = str | Call
"""The path of a kernel; or a call, which stands for its input."""

Value = Mapping[Start, Trail]
"""All that an array depends on."""


def changed(value: Value, change: Callable[[Trail], Trail]) -> Value:
    """The value with each of its trails changed."""
    return {start: change(trail) for start, trail in value.items()}


def joined(values: Iterable[Value]) -> Value:
    """All that an array depends on that is computed from several arrays."""
    trails: dict[Start, Trail] = {}
    for value in values:
        for start, trail in value.items():
            trails[start] = trails.get(start, trail).joined(trail)
    return trails


def in_either(left: Value, right: Value) -> Value:
    """A value that holds after either of two branches, or in every round of a loop."""
    return {
        start: trail
        if left.get(start) == right.get(start)
        else trail.passed("a branch or a loop")
        for start, trail in joined([left, right]).items()
    }


def kernels(value: Value) -> dict[str, Trail]:
    """The trails of a value that begin at kernels."""
    return {start: t for start, t in value.items() if isinstance(start, str)}


@dataclasses.dataclass
class Uses:
    """Uses of a model's arrays in one call.

    Attributes:
      reached: The paths of the arrays that the outputs depend on.
      multiplied: The paths of the arrays that are multiplied with something.
      faults: {path of a kernel: the fault of its layer, by the rule's product}.
      outside: {path of a kernel: the primitives outside of its layer that use it}.
      unseen: {path of a kernel: the primitive that a trace cannot look into}.
    """

    reached: set[str] = dataclasses.field(default_factory=set)
    multiplied: set[str] = dataclasses.field(default_factory=set)
    faults: dict[str, str] = dataclasses.field(default_factory=dict)
    outside: dict[str, str] = dataclasses.field(default_factory=dict)
    unseen: dict[str, str] = dataclasses.field(default_factory=dict)
