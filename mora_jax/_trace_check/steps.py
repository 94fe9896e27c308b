"""Steps: what primitives make of the trails that pass them, and what is right."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from mora_jax._common.types import Shape
from mora_jax._trace_check.trails import Call, Trail, Value, joined
from mora_jax._trace_check.views import Axis, View, length, named, reshape


def after(eqn: Any, values: list[Value]) -> Value:
    """The value of the outputs of an equation whose operands have `values`."""
    return {
        start: _step(eqn, trail, [k for k, v in enumerate(values) if start in v])
        for start, trail in joined(values).items()
    }


def _step(eqn: Any, trail: Trail, at: list[int]) -> Trail:
    """The trail of the outputs of an equation whose operands at `at` have `trail`."""
    name, alone = eqn.primitive.name, len(at) == 1
    before, result = ([v.aval for v in side] for side in (eqn.invars, eqn.outvars))
    match name:
        case "add" | "add_any":
            # A bias may be added to a product, since it does not depend on the kernel.
            return trail if alone and trail.by else trail.passed("add")
        case "convert_element_type" if jnp.issubdtype(result[0].dtype, jnp.floating):
            return trail
        case "transpose":
            order = eqn.params["permutation"]
            return trail.moved(lambda view: tuple(view[k] for k in order))
        case "reshape" | "squeeze" | "expand_dims" | "broadcast_in_dim":
            # A broadcast is a reshape too, unless it makes copies of numbers.
            if before[0].size == result[0].size:
                return trail.moved(lambda view: reshape(view, result[0].shape))
        case "slice" | "dynamic_slice" if at == [0] and trail.view and not trail.by:
            if layer := _layer(trail.view, result[0].shape):
                return dataclasses.replace(trail, view=layer)
    # All others change numbers. A factor leaves the axes where they are.
    factor = alone and (name == "mul" or (name == "div" and at == [0]))
    kept = factor and before[at[0]].shape == result[0].shape
    step = name if alone else f"{name} by itself"
    return trail.passed(step, trail.view if kept else None)


def _layer(view: View, shape: Shape) -> View | None:
    """The view of one layer of a stacked kernel; None for any other slice."""
    # One layer is a kernel, since it has an M of its own.
    pairs = list(zip(view, shape, strict=True))
    if all(length(a) == size or (size == 1 and _is_of_stack(a)) for a, size in pairs):
        return tuple(axis if length(axis) == size else () for axis, size in pairs)
    return None


def multiplied(
    eqn: Any, kernel: str, trail: Trail, operand: Value, kernel_first: bool
) -> Trail:
    """The trail of the array at path `kernel` after `eqn` has multiplied it.

    `operand` has the trails of the other factor, the second one if `kernel_first`.
    """
    by, view = eqn.primitive.name, None
    calls = (start for start in operand if isinstance(start, Call))
    call = next((call for call in calls if call.name == kernel), None)
    if by == "dot_general" and call and call.product.einsum_labels and trail.view:
        x = operand[call].view
        if x is None or operand[call] != Trail(x):  # the input was changed
            call = None
        else:
            view = _dot(eqn.params["dimension_numbers"], trail.view, x, kernel_first)
    if by == "gather":
        # It must take whole rows of the unchanged kernel, which is not the indices.
        shape = eqn.invars[0].aval.shape
        rows = tuple(eqn.params["slice_sizes"]) == (1, *shape[1:]) and len(shape) == 2
        if not (kernel_first and rows and trail.view == named(range(2), shape)):
            trail = trail.passed("gather of something other than rows")
    return dataclasses.replace(trail, by=by, call=call, view=view)


def _dot(numbers: Any, w: View, x: View, kernel_first: bool) -> View | None:
    """The view of the product of kernel `w` and `x`, if they sum over the same axes."""
    views = (w, x) if kernel_first else (x, w)
    contracted, batch = (
        [(views[0][k], views[1][n]) for k, n in zip(*axes, strict=True)]
        for axes in numbers
    )
    # Under vmap, each of many inputs has its layer of a stack.
    lifted = [pair for pair in batch if _is_of_stack(pair[not kernel_first])]
    if any(a != b and (a, b) not in lifted for a, b in (*contracted, *batch)):
        return None
    free = [
        axis
        for view, *taken in zip(views, *numbers, strict=True)
        for k, axis in enumerate(view)
        if not any(k in axes for axes in taken)
    ]
    return (*(pair[kernel_first] for pair in batch), *free)


def _is_of_stack(axis: Axis) -> bool:
    """True if the axis is of one or more stack axes, whose names are negative."""
    return bool(axis) and all(isinstance(p.axis, int) and p.axis < 0 for p in axis)


def axis_names(labels: tuple[str, str, str], k: int) -> list[str | int]:
    """The names of the axes of the k-th array of an einsum, in a view."""
    # A kernel's axes are numbered, since it may be read by several einsums.
    kernel = labels[1]
    return [kernel.index(c) if c in kernel else c for c in labels[k]]


def fault(call: Call, trail: Trail, lead: int) -> str:
    """Reason why an output of `call` is not the product of its rule, or ""."""
    product = call.product
    if product.reads_kernel:
        return fault_of_read(trail, lead)
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
        axes, names = (trail.view or ())[lead:], axis_names(labels, 2)
        sizes = tuple(map(length, axes))
        if len(axes) != len(names) or axes != named(names, sizes):
            inputs, kernel, outputs = labels
            equation = f"{inputs},{kernel}->{outputs}"
            return f"does not compute {equation!r}, as its rule says"
    return ""


def fault_of_read(trail: Trail, lead: int) -> str:
    """Reason why the array that a layer reads is not the kernel itself, or ""."""
    if steps := {trail.by, *trail.through} - {""}:
        return f"reads it changed by {listed(sorted(steps))}"
    axes = [axis for axis in trail.view[lead:] if axis] if trail.view else []
    order: list[Any] = [piece.axis for axis in axes for piece in axis]
    if trail.view is None or len(order) > len(axes) or order != sorted(order):
        return "reads it with other axes"
    return ""


def listed(names: Iterable[str]) -> str:
    """Names of primitives as a part of a sentence."""
    shown = [f"`{name}`" for name in names]
    if len(shown) > 3:
        shown[2:] = [f"{len(shown) - 2} more primitives"]
    return " and ".join(shown)
