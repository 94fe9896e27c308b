"""Verdicts: is a kernel's product the one that the rule of its layer describes?"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from mora_jax._trace_check.marks import Call
from mora_jax._trace_check.trails import Trail, Value
from mora_jax._trace_check.views import Piece, View, length, named


def multiplied(
    eqn: Any, kernel: str, trail: Trail, operand: Value, kernel_first: bool
) -> Trail:
    """The trail of a kernel after its product.

    Args:
      eqn: The equation of the program that multiplies.
      kernel: The path of the kernel.
      trail: The trail of the kernel before its product.
      operand: The trails of the array that it is multiplied with.
      kernel_first: True if the kernel is the first of the two.
    """
    by, view = eqn.primitive.name, None
    calls = (start for start in operand if isinstance(start, Call))
    call = next((call for call in calls if call.name == kernel), None)
    if by == "dot_general" and call is not None and trail.view is not None:
        if (labels := call.product.einsum_labels) is not None:
            w = _lettered(trail.view, trail.ndim, labels[1])
            x = operand[call]
            if x.unchanged and x.view is not None:
                numbers = eqn.params["dimension_numbers"]
                view = _dot(numbers, w, x.view, kernel_first)
            else:
                call = None
    if by == "gather":
        # It must take whole rows of the unchanged kernel, which is not the indices.
        shape = eqn.invars[0].aval.shape
        rows = tuple(eqn.params["slice_sizes"]) == (1, *shape[1:]) and len(shape) == 2
        if not (kernel_first and rows and trail.view == named(range(2), shape)):
            trail = trail.passed("gather of something other than rows")
    return dataclasses.replace(trail, by=by, call=call, view=view)


def _lettered(view: View, ndim: int, letters: str) -> View:
    """The view of a kernel, with its last axes named by the letters of an einsum."""
    stacked = ndim - len(letters)
    names = [*(("stack", k) for k in range(stacked)), *letters]
    return tuple(
        tuple(dataclasses.replace(piece, axis=names[piece.axis]) for piece in axis)  # type: ignore[call-overload]
        for axis in view
    )


def _dot(dimension_numbers: Any, w: View, x: View, kernel_first: bool) -> View | None:
    """The view of the product of kernel `w` and `x`, if they sum over the same axes."""
    contracted, batch = dimension_numbers
    views = (w, x) if kernel_first else (x, w)
    for left, right in zip(*contracted, strict=True):
        if views[0][left] != views[1][right]:
            return None
    shared = []
    for pair in zip(*batch, strict=True):
        by_w, by_x = (views[k][axis] for k, axis in enumerate(pair))
        by_w, by_x = (by_w, by_x) if kernel_first else (by_x, by_w)
        # Under vmap, each of many inputs has its layer of a stack.
        lifted = [piece.axis[0] for piece in by_w if isinstance(piece.axis, tuple)]
        if by_w != by_x and not lifted:
            return None
        shared.append(by_x)
    free = [
        axis
        for view, summed, stacked in zip(views, contracted, batch, strict=True)
        for k, axis in enumerate(view)
        if k not in summed and k not in stacked
    ]
    return (*shared, *free)


def fault(call: Call, trail: Trail, lead: int) -> str:
    """Reason why an output of `call` is not the product of its rule, or ""."""
    product = call.product
    if product.reads_kernel:
        return _fault_of_read(trail, lead)
    steps = trail.through - product.passes
    if not trail.by and steps and steps <= product.stand_ins:
        return ""
    if not trail.by:
        return "returns it without a product"
    if trail.call is not call:
        return "multiplies it with another array than the input that its rule names"
    if call.scaled and not steps & {"mul", "div"}:
        return "does not scale it, though its rule says so"
    if call.scaled:
        steps -= {"mul", "div"}
    if steps:
        return f"changes it, or its product, by {listed(sorted(steps))}"
    if product.primitive and trail.by != product.primitive:
        return f"multiplies it by `{trail.by}` and not by `{product.primitive}`"
    if (labels := product.einsum_labels) is not None:
        inputs, kernel, outputs = labels
        axes = trail.view[lead:] if trail.view is not None else ()
        whole = [
            axis in ((), (Piece(letter, length(axis)),))
            for letter, axis in zip(outputs, axes, strict=False)
        ]
        if len(axes) != len(outputs) or not all(whole):
            equation = f"{inputs},{kernel}->{outputs}"
            return f"does not compute {equation!r}, as its rule says"
    return ""


def _fault_of_read(trail: Trail, lead: int) -> str:
    """Reason why the array that a layer reads is not the kernel itself, or ""."""
    if steps := {trail.by, *trail.through} - {""}:
        return f"reads it changed by {listed(sorted(steps))}"
    axes = [axis for axis in trail.view[lead:] if axis] if trail.view else []
    order = [piece.axis for axis in axes for piece in axis]
    if trail.view is None or len(order) > len(axes) or order != sorted(order):  # type: ignore[type-var]
        return "reads it with other axes"
    return ""


def listed(names: Iterable[str]) -> str:
    """Names of primitives as a part of a sentence."""
    shown = [f"`{name}`" for name in names]
    if len(shown) > 3:
        shown[2:] = [f"{len(shown) - 2} more primitives"]
    *most, last = shown or [""]
    return f"{', '.join(most)} and {last}" if most else last
