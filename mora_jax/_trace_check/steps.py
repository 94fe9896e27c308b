"""Steps: what primitives make of the trails that pass them, and what is right."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from mora_jax._trace_check.trails import Call, Trail, Value, joined
from mora_jax._trace_check.views import Axis, Piece, View, length, named, reshape

IDENTITIES = frozenset(
    "copy copy_p device_put layout_constraint mesh_cast optimization_barrier "
    "pbroadcast pvary reduce_precision reshard sharding_constraint "
    "stop_gradient".split()
)
"""Primitives that leave numbers as they are, apart from rounding."""

PRODUCTS = frozenset(
    "dot_general conv_general_dilated gather ragged_dot_general".split()
)
"""Primitives by which layers multiply an input with a kernel."""

PREPARING = frozenset(
    "concatenate div dynamic_slice gather mul reduce_sum slice".split()
)
"""Primitives that a kernel may pass before it multiplies."""

OPAQUE = frozenset("pure_callback io_callback shard_map custom_partitioning".split())
"""Primitives whose inside says nothing about whole arrays, as do all `*_call`."""

Step = Callable[[Any, Trail, list[int]], Trail]
"""(equation of a program, trail, numbers of its operands that have the trail)."""


def after(eqn: Any, values: list[Value]) -> Value:
    """The value of the outputs of an equation whose operands have `values`."""
    step = STEPS.get(eqn.primitive.name, _changed)
    return {
        start: step(eqn, trail, [k for k, v in enumerate(values) if start in v])
        for start, trail in joined(values).items()
    }


def _changed(eqn: Any, trail: Trail, at: list[int]) -> Trail:
    """The step of every primitive that is not in `STEPS`: it changes numbers."""
    name, alone = eqn.primitive.name, len(at) == 1
    # A factor leaves the axes where they are.
    factor = alone and (name == "mul" or (name == "div" and at == [0]))
    kept = factor and eqn.invars[at[0]].aval.shape == eqn.outvars[0].aval.shape
    step = name if alone else f"{name} by itself"
    return trail.passed(step, trail.view if kept else None)


def _converted(eqn: Any, trail: Trail, at: list[int]) -> Trail:
    floating = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
    return trail if floating else _changed(eqn, trail, at)


def _reshaped(eqn: Any, trail: Trail, at: list[int]) -> Trail:
    """A broadcast is a reshape too, unless it makes copies of numbers."""
    before, result = eqn.invars[0].aval, eqn.outvars[0].aval
    if before.size != result.size:
        return _changed(eqn, trail, at)
    return trail.moved(lambda view: reshape(view, result.shape))


def _transposed(eqn: Any, trail: Trail, at: list[int]) -> Trail:
    order = eqn.params["permutation"]
    return trail.moved(lambda view: tuple(view[k] for k in order))


def _sliced(eqn: Any, trail: Trail, at: list[int]) -> Trail:
    """One layer of a stacked kernel is a kernel, since it has an M of its own."""
    if at != [0] or trail.by or trail.view is None:
        return _changed(eqn, trail, at)
    axes = []
    for axis, size in zip(trail.view, eqn.outvars[0].aval.shape, strict=True):
        of_stack = all(isinstance(p.axis, int) and p.axis < 0 for p in axis)
        if length(axis) != size and not (of_stack and size == 1):
            return _changed(eqn, trail, at)
        axes.append(axis if length(axis) == size else ())
    return dataclasses.replace(trail, view=tuple(axes))


def _added(eqn: Any, trail: Trail, at: list[int]) -> Trail:
    """A bias may be added to a product, since it does not depend on the kernel."""
    return trail if len(at) == 1 and trail.by else trail.passed("add")


STEPS: Mapping[str, Step] = {
    "convert_element_type": _converted,
    "reshape": _reshaped,
    "squeeze": _reshaped,
    "expand_dims": _reshaped,
    "broadcast_in_dim": _reshaped,
    "transpose": _transposed,
    "slice": _sliced,
    "dynamic_slice": _sliced,
    "add": _added,
    "add_any": _added,
}


def multiplied(
    eqn: Any, kernel: str, trail: Trail, operand: Value, kernel_first: bool
) -> Trail:
    """The trail of the array at path `kernel` after `eqn` has multiplied it.

    `operand` has the trails of the other factor, the second one if `kernel_first`.
    """
    by, view = eqn.primitive.name, None
    calls = (start for start in operand if isinstance(start, Call))
    call = next((call for call in calls if call.name == kernel), None)
    labels = call.product.einsum_labels if call is not None else None
    if by == "dot_general" and labels is not None and trail.view is not None:
        assert call is not None
        x = operand[call]
        if x.unchanged and x.view is not None:
            w = tuple(_lettered(axis, labels[1]) for axis in trail.view)
            view = _dot(eqn.params["dimension_numbers"], w, x.view, kernel_first)
        else:
            call = None
    if by == "gather":
        # It must take whole rows of the unchanged kernel, which is not the indices.
        shape = eqn.invars[0].aval.shape
        rows = tuple(eqn.params["slice_sizes"]) == (1, *shape[1:]) and len(shape) == 2
        if not (kernel_first and rows and trail.view == named(range(2), shape)):
            trail = trail.passed("gather of something other than rows")
    return dataclasses.replace(trail, by=by, call=call, view=view)


def _lettered(axis: Axis, letters: str) -> Axis:
    """A kernel's axis by the letters of an einsum; stack axes keep their numbers."""
    names: Any = [piece.axis for piece in axis]
    return tuple(
        dataclasses.replace(piece, axis=name if name < 0 else letters[name])
        for piece, name in zip(axis, names, strict=True)
    )


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
    return any(isinstance(piece.axis, int) for piece in axis)


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
