"""What is known of an array on the way from the kernels to the outputs."""

import dataclasses
from collections.abc import Callable, Mapping

from mora_jax._trace_check.marks import Call
from mora_jax._trace_check.views import Axis, View


@dataclasses.dataclass(frozen=True)
class Trail:
    """How an array depends on one kernel.

    Attributes:
      view: The axes of the kernel, or of its product; None if they are lost.
      ndim: How many axes the kernel has.
      by: The primitive that multiplied the kernel; "" before that.
      call: The call whose input the kernel was multiplied with; None for any other
        array.
      through: The further primitives between kernel and array that change numbers.
      unseen: A primitive among them that a trace cannot look into, or "".
      outer: The axes that surrounding scans have taken off.
    """

    view: View | None
    ndim: int
    by: str = ""
    call: Call | None = None
    through: frozenset[str] = frozenset()
    unseen: str = ""
    outer: tuple[Axis, ...] = ()

    def passed(self, name: str, view: View | None = None) -> "Trail":
        """The trail after the primitive called `name`, which changes numbers."""
        return dataclasses.replace(self, through=self.through | {name}, view=view)

    def joined(self, trail: "Trail") -> "Trail":
        """A trail that holds where either of the two does."""
        if self == trail:
            return self
        through, unseen = self.through | trail.through, self.unseen or trail.unseen
        return dataclasses.replace(self, view=None, through=through, unseen=unseen)


@dataclasses.dataclass(frozen=True)
class Value:
    """What an array depends on.

    Attributes:
      trails: {path of a kernel: how the array depends on it}.
      inputs: {call on whose input the array depends: the axes of the input here, or
        None if it was changed}.
    """

    trails: Mapping[str, Trail] = dataclasses.field(default_factory=dict)
    inputs: Mapping[Call, View | None] = dataclasses.field(default_factory=dict)

    def moved(self, function: Callable[[View], View | None]) -> "Value":
        """The value with its axes moved by `function`."""

        def move(view: View | None) -> View | None:
            return None if view is None else function(view)

        trails = {
            name: dataclasses.replace(trail, view=move(trail.view))
            for name, trail in self.trails.items()
        }
        return Value(trails, {call: move(v) for call, v in self.inputs.items()})

    def in_either(self, value: "Value") -> "Value":
        """What holds after either of two branches, or both before and after a loop."""
        trails = {}
        for name in self.trails.keys() | value.trails.keys():
            found = [v.trails[name] for v in (self, value) if name in v.trails]
            equal = len(found) == 2 and found[0] == found[1]
            trail = found[0].joined(found[-1])
            trails[name] = trail if equal else trail.passed("a branch or a loop")
        inputs = {
            call: view if self.inputs.get(call) == value.inputs.get(call) else None
            for call, view in {**self.inputs, **value.inputs}.items()
        }
        return Value(trails, inputs)


def with_changed_inputs(trails: Mapping[str, Trail], values: list[Value]) -> Value:
    """What an array depends on that is computed from `values` and is not one of them.

    Args:
      trails: How it depends on kernels.
      values: What it is computed from.
    """
    return Value(trails, dict.fromkeys(call for v in values for call in v.inputs))


def joined(values: list[Value]) -> Value:
    """All that an array depends on that is computed from several arrays."""
    trails: dict[str, Trail] = {}
    for value in values:
        for name, trail in value.trails.items():
            trails[name] = trails.get(name, trail).joined(trail)
    return with_changed_inputs(trails, values)


@dataclasses.dataclass
class Uses:
    """What a call of a model does with its arrays.

    Attributes:
      reached: The paths of the arrays that the outputs depend on.
      multiplied: The paths of the arrays that are multiplied with something.
      faults: {path of a kernel: what its layer does instead of the rule's product}.
      outside: {path of a kernel: what is done with it outside of its layer}.
      unseen: {path of a kernel: the primitive that a trace cannot look into}.
    """

    reached: set[str] = dataclasses.field(default_factory=set)
    multiplied: set[str] = dataclasses.field(default_factory=set)
    faults: dict[str, str] = dataclasses.field(default_factory=dict)
    outside: dict[str, str] = dataclasses.field(default_factory=dict)
    unseen: dict[str, str] = dataclasses.field(default_factory=dict)
