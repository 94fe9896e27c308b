"""What is known of an array on the way from the kernels to the outputs."""

import dataclasses
from collections.abc import Callable, Mapping

from mora_jax._proof.marks import Call
from mora_jax._proof.views import Axis, View


@dataclasses.dataclass(frozen=True)
class Trail:
    """How an array depends on one kernel.

    Attributes:
      view: where the axes of the kernel, or of its product, are; None if that is lost.
      ndim: how many axes the kernel has.
      by: the primitive that multiplied the kernel; "" before that.
      call: the call whose input it was multiplied with, if it was one.
      through: other primitives on the way that change numbers.
      unseen: a primitive on the way that nobody can look into, or "".
      outer: axes that scans around have taken off.
    """

    view: View | None
    ndim: int
    by: str = ""
    call: Call | None = None
    through: frozenset[str] = frozenset()
    unseen: str = ""
    outer: tuple[Axis, ...] = ()

    def passed(self, name: str, view: View | None = None) -> "Trail":
        """The trail after the primitive called `name`."""
        return dataclasses.replace(self, through=self.through | {name}, view=view)

    def joined(self, other: "Trail") -> "Trail":
        """A trail that holds where either of two does."""
        if self == other:
            return self
        through, unseen = self.through | other.through, self.unseen or other.unseen
        return dataclasses.replace(self, view=None, through=through, unseen=unseen)


@dataclasses.dataclass(frozen=True)
class Value:
    """What an array depends on.

    Attributes:
      trails: {path of a kernel: how}.
      inputs: {call: its input's axes here, or None if it was changed}.
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

    def or_else(self, other: "Value") -> "Value":
        """What holds after either of two branches, or before and after a loop."""
        trails = {}
        for name in self.trails.keys() | other.trails.keys():
            ways = [v.trails[name] for v in (self, other) if name in v.trails]
            both = len(ways) == 2 and ways[0] == ways[1]
            trail = ways[0].joined(ways[-1])
            trails[name] = trail if both else trail.passed("a branch or a loop")
        inputs = {
            call: view if self.inputs.get(call) == other.inputs.get(call) else None
            for call, view in {**self.inputs, **other.inputs}.items()
        }
        return Value(trails, inputs)


def with_changed_inputs(trails: Mapping[str, Trail], values: list[Value]) -> Value:
    """What an array depends on that is computed from `values` and is none of them."""
    return Value(trails, dict.fromkeys(call for v in values for call in v.inputs))


def joined(values: list[Value]) -> Value:
    """All that an array computed from several depends on."""
    trails: dict[str, Trail] = {}
    for value in values:
        for name, trail in value.trails.items():
            trails[name] = trails.get(name, trail).joined(trail)
    return with_changed_inputs(trails, values)


@dataclasses.dataclass
class Uses:
    """What a call of a model does with its arrays.

    Attributes:
      run: paths of the arrays that the outputs depend on.
      multiplied: paths of those that are multiplied with something.
      faults: {path: what else than the rule's product a layer does with its kernel}.
      outside: {path: what is done with a kernel outside of its layer}.
      unseen: {path: the primitive that cannot be looked into}.
    """

    run: set[str] = dataclasses.field(default_factory=set)
    multiplied: set[str] = dataclasses.field(default_factory=set)
    faults: dict[str, str] = dataclasses.field(default_factory=dict)
    outside: dict[str, str] = dataclasses.field(default_factory=dict)
    unseen: dict[str, str] = dataclasses.field(default_factory=dict)
