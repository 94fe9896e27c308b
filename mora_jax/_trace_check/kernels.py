"""Kernels: what a call of a model makes of them, and if it is right."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Jaxpr, Literal

from mora_jax._jax.primitives import OWN_DERIVATIVE
from mora_jax._jax.walk import inside, is_unseen, needed, shapes, walk
from mora_jax._trace_check import trails
from mora_jax._trace_check.marks import MarkedCall, calls_in, mark_p
from mora_jax._trace_check.trails import Start, Trail, Value, changed, listed, of_arrays
from mora_jax._trace_check.views import View, length, named

PRODUCTS = {"dot_general", "conv_general_dilated", "gather", "ragged_dot_general"}
"""Primitives by which layers multiply an input with a kernel."""

PASSED = frozenset("concatenate div dynamic_slice gather mul reduce_sum slice".split())
"""Primitives that a kernel may pass before it multiplies."""


@dataclasses.dataclass
class Uses:
    """Uses of a model's arrays in one call, by their paths."""

    # The arrays that the outputs depend on, those that are multiplied with something,
    # and the kernels whose layers were called.
    reached: set[str] = dataclasses.field(default_factory=set)
    multiplied: set[str] = dataclasses.field(default_factory=set)
    called: set[str] = dataclasses.field(default_factory=set)
    # Of a kernel the fault of its layer, by the rule's product; the primitives outside
    # of its layer that use it; and the reason why its use is not proven.
    faults: dict[str, str] = dataclasses.field(default_factory=dict)
    outside: dict[str, str] = dataclasses.field(default_factory=dict)
    unseen: dict[str, str] = dataclasses.field(default_factory=dict)


def follow(
    program: Jaxpr, names: list[str], axes: Mapping[str, Sequence[int]], uses: Uses
) -> None:
    """Add to `uses` those in the program of one call of a model, with marks.

    `names` are the paths of its first inputs, the arrays of the model, and `axes` has
    the numbers of the axes of kernels, companions and parameters that scale kernels:
    the positions of their letters in the einsum of the layer, which sees one of a
    stack. Numbers of stack axes are negative.
    """
    program, paths = needed(program, names)
    companions = {call.companion for call in calls_in(program)}
    uses.reached.update(paths)
    values: list[Value] = [{} for _ in program.invars]
    for k, (name, shape) in enumerate(zip(paths, shapes(program.invars), strict=False)):
        if len(shape) > 1 or name in axes:
            view = named(axes.get(name, range(len(shape))), shape)
            values[k] = {name: Trail(view, is_companion=name in companions)}
    for value in walk(Kernels(uses), program, values):
        for name, trail in of_arrays(value).items():
            if trail.unseen:
                uses.unseen.setdefault(name, trail.unseen)
            else:
                by = filter(None, [trail.by, *sorted(trail.through)])
                uses.outside.setdefault(name, listed(by))


@dataclasses.dataclass
class Kernels:
    """The `Domain` of trails. It adds to `uses` what it finds."""

    uses: Uses
    # What the conditions depend on under which this part of the program runs.
    condition: Value = dataclasses.field(default_factory=dict)
    nothing: Value = dataclasses.field(default_factory=dict)

    def trial(self) -> "Kernels":
        return Kernels(Uses(), condition=self.condition)

    def under(self, condition: Value) -> "Kernels":
        return Kernels(self.uses, condition=trails.joined([self.condition, condition]))

    def chosen(self, eqn: Any, by: Value, outputs: list[Value]) -> list[Value]:
        what = "a loop" if eqn.primitive.name == "while" else "a branch"
        by = {start: trail for start, trail in by.items() if start is not None}
        by = changed(by, lambda trail: trail.passed(f"the condition of {what}"))
        return [trails.joined([output, by]) for output in outputs]

    def constant(self, literal: Literal) -> Value:
        number = np.asarray(literal.val, literal.aval.dtype)  # type: ignore[attr-defined]
        return {None: Trail(None, numbers=lambda _: number)}

    def step(self, eqn: Any, values: list[Value]) -> list[Value]:
        if eqn.primitive is mark_p:
            ends = eqn.params["end"]
            return [self._end(eqn, *values) if ends else _begin(eqn, *values)]
        if eqn.effects and is_unseen(eqn):
            self._keep_for_later(eqn, values)
        if eqn.primitive.name in PRODUCTS:
            return [self._product(eqn, values)]
        return [trails.after(eqn, values)] * len(eqn.outvars)

    def _keep_for_later(self, eqn: Any, values: list[Value]) -> None:
        """Note that the host or a mutable array may keep what `eqn` was given.

        Another step may read it there, and depends on it by none of its operands.
        """
        for name, trail in of_arrays(trails.joined([*values, self.condition])).items():
            hidden = trail.hidden(eqn.primitive.name)
            self.uses.unseen.setdefault(name, hidden.unseen)

    def join(self, left: Value, right: Value) -> Value:
        both = trails.joined([left, right]).items()
        same = {start for start, _ in both if left.get(start) == right.get(start)}
        return {s: t if s in same else t.passed("a branch or a loop") for s, t in both}

    def sliced(self, value: Value) -> Value:
        return changed(value, lambda trail: trail.moved(lambda view: view[1:]))

    def stacked(self, value: Value) -> Value:
        # Of a product that a scan stacks, it is not known which rows it is of.
        return changed(value, lambda t: (t.hidden if t.by else t.passed)("scan"))

    def bypassed(self, eqn: Any, outputs: list[Value]) -> list[Value]:
        name, (inner,) = eqn.primitive.name, inside(eqn)
        why = f"its layer is inside a `{name}`, whose derivative the delta may not have"
        for call in calls_in(inner):
            self.uses.unseen.setdefault(call.name, why)

        def passed(start: Start, trail: Trail) -> Trail:
            # A companion has its gradient by the input and the output of its layer.
            is_delta = trail.by or isinstance(start, MarkedCall)
            return trail.passed(name, trail.view) if is_delta else trail

        return [{s: passed(s, t) for s, t in value.items()} for value in outputs]

    def _product(self, eqn: Any, values: list[Value]) -> Value:
        name, result = eqn.primitive.name, dict(trails.after(eqn, values))
        left, right, *sizes = values  # of the groups of `ragged_dot_general`
        for first, value, other in ((True, left, right), (False, right, left)):
            for kernel, trail in of_arrays(value).items():
                if not trail.by and trail.through <= PASSED and name != "gather":
                    self.uses.multiplied.add(kernel)
                elsewhere = any(kernel in operand for operand in [other, *sizes])
                if not trail.by and not elsewhere:
                    result[kernel] = trails.multiplied(eqn, kernel, trail, other, first)
        return result

    def _end(self, eqn: Any, output: Value, *arrived: Value) -> Value:
        """The value of a call's output, in which the trails of its kernel end."""
        call, (axes, *mapped) = eqn.params["call"], eqn.params["mapped"]
        self.uses.called.add(call.name)
        for array, own_axes in zip(arrived, mapped, strict=True):
            wrong = f"gets another array for {call.companion}"
            if trail := array.get(call.companion):
                wrong = _fault_of_read(trail, own_axes, call.companion)
            if wrong:
                self.uses.faults.setdefault(call.name, f"{call.method} {wrong}")
        if trail := output.get(call.name):
            if wrong := "" if trail.unseen else _fault(call, trail, axes):
                self.uses.faults.setdefault(call.name, f"{call.method} {wrong}")
            elif why := trail.unseen or _doubt(call, trail):
                self.uses.unseen.setdefault(call.name, why)
        if isinstance(call.scale, str) and call.scale in output:
            # If it is a kernel of another rule as well, it is read outside of that.
            self.uses.outside.setdefault(call.scale, "`mul`")
        ended = call, call.scale, call.name
        return {start: t for start, t in output.items() if start not in ended}


def _begin(eqn: Any, x: Value) -> Value:
    """The value of a call's input, where the trail of the input begins."""
    (shape,), (mapped,) = shapes(eqn.outvars), eqn.params["mapped"]
    call = eqn.params["call"]
    axes: list[Any] = call.claim.axis_names(0, len(shape) - len(mapped))
    for k in sorted(mapped):
        axes.insert(k, ("vmap", k))
    numbers = (lambda indices: indices) if call.claim.rows else None
    return {**x, call: Trail(named(axes, shape), numbers=numbers)}


def _fault(call: MarkedCall, trail: Trail, mapped: tuple[int, ...]) -> str:
    """Reason why an output of `call` is not the product of its rule, or ""."""
    claim = call.claim
    if claim.reads:
        return _fault_of_read(trail, mapped)
    steps = trail.through - claim.passes - OWN_DERIVATIVE
    if not trail.by:
        stands_in = steps and steps <= claim.stand_ins
        return "" if stands_in else "returns it without a product"
    if trail.call is not call:
        return trails.OTHER_INPUT
    if trail.wrong:
        return trail.wrong
    if any("complex" in step for step in steps):
        return "computes with it in complex numbers"
    if call.scale is not None and not steps & {"mul", "div"}:
        return "does not scale it, though its rule says so"
    if call.scale is not None:
        steps -= {"mul", "div"}
        if wrong := _fault_of_scale(call.scale, trail.factors):
            return wrong
    if steps:
        return f"changes it, or its product, by {listed(sorted(steps))}"
    if claim.primitive and trail.by != claim.primitive:
        return f"multiplies it by `{trail.by}` and not by `{claim.primitive}`"
    axes = _unmapped(trail.view, mapped)
    names, lengths = claim.axis_names(2, len(axes)), tuple(map(length, axes))
    if not names or (len(axes) == len(names) and axes == named(names, lengths)):
        return ""
    product = "{},{}->{}".format(*claim.einsum) if claim.einsum else "kernel[input]"
    return f"does not compute {product!r}, as its rule says"


def _fault_of_scale(scale: float | str, factors: tuple[float | str, ...]) -> str:
    """Reason why `factors` are not the scale of a rule, or ""."""
    arrays = [factor for factor in factors if isinstance(factor, str)]
    number = math.prod(factor for factor in factors if not isinstance(factor, str))
    if isinstance(scale, str):
        wrong = scale and "" not in arrays and (arrays != [scale] or number != 1)
    else:  # either may have been rounded to bfloat16
        wrong = not arrays and abs(number - scale) > 2**-8 * abs(scale)
    shown = " and ".join(map(str, factors))
    return f"scales it by {shown} and not by {scale}, as its rule says" if wrong else ""


def _doubt(call: MarkedCall, trail: Trail) -> str:
    """Reason why an output of `call` without a fault is not proven, or ""."""
    arrays = [factor for factor in trail.factors if isinstance(factor, str)]
    if "" in (call.scale, *arrays) or (arrays and isinstance(call.scale, float)):
        return "a trace compares scale= of its rule if it is a number or a parameter"
    own = listed(sorted(trail.through & OWN_DERIVATIVE))
    return own and f"{own} has a derivative of its own, which the delta bypasses"


def _unmapped(view: View | None, mapped: tuple[int, ...]) -> View:
    """The axes of a view as a layer sees them, which sees no axes of vmap."""
    return tuple([axis for k, axis in enumerate(view or ()) if k not in mapped])


def _fault_of_read(trail: Trail, mapped: tuple[int, ...], name: str = "it") -> str:
    """Reason why the array that a layer reads is not the model's own, or ""."""
    if steps := {trail.by, *trail.through} - {""}:
        return f"reads {name} changed by {listed(sorted(steps))}"
    axes = [axis for axis in _unmapped(trail.view, mapped) if axis]
    order: list[Any] = [piece.axis for axis in axes for piece in axis]
    if trail.view is None or len(order) > len(axes) or order != sorted(order):
        return f"reads {name} with other axes"
    return ""
