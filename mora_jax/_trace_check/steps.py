"""Steps: what primitives make of the trails that pass them, and what is right."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._common.types import Shape
from mora_jax._trace_check.marks import Call
from mora_jax._trace_check.trails import Start, Trail, Value, joined, kernels
from mora_jax._trace_check.views import Axis, View, length, named, reshape
from mora_jax._trace_check.walk import OWN_DERIVATIVE

OTHER_INPUT = "multiplies it with another array than the input that its rule names"

EVALUATED = frozenset(
    "add and clamp convert_element_type div eq ge gt le lt max min mul ne not or rem "
    "rsqrt select_n sqrt sub".split()
)
"""Primitives that are computed where the check knows all numbers."""


def after(eqn: Any, values: list[Value]) -> Value:
    """The value of the outputs of an equation whose operands have `values`."""
    trails = joined(values).items()
    value = {start: _step(eqn, start, trail, values) for start, trail in trails}
    if None in value and not value[None].numbers:
        del value[None]
    return value


def _step(eqn: Any, start: Start, trail: Trail, values: list[Value]) -> Trail:
    """The `trail` from `start` after an equation whose operands have `values`."""
    at = [k for k, value in enumerate(values) if start in value]
    name, alone = eqn.primitive.name, len(at) == 1
    before, result = ([v.aval for v in side] for side in (eqn.invars, eqn.outvars))
    if numbers := _function(eqn, start, values):
        views = {values[k][start].view for k in at}
        view = views.pop() if len(views) == 1 else None
        return dataclasses.replace(trail, view=view, numbers=numbers)
    match name:
        case "add" | "add_any":
            # A bias may be added to a product, since it does not depend on the kernel.
            return trail if alone and trail.by else trail.passed("add")
        case "convert_element_type" if not _is_small(result[0].dtype):
            return trail
        case "convert_element_type":
            name += f" to {result[0].dtype}"
        case "reduce_precision" if _keeps_all(eqn.params, before[0].dtype):
            return trail
        case "stop_gradient" if isinstance(start, str) and not trail.by:
            # A kernel that is trained by its companion alone needs no gradient. But its
            # companion does, and an input must have the one that it has by the kernel.
            if not trail.is_companion:
                return trail
        case "transpose":
            order = eqn.params["permutation"]
            return trail.moved(lambda view: tuple(view[k] for k in order))
        case "reshape" | "squeeze" | "expand_dims" | "broadcast_in_dim":
            # A broadcast is a reshape too, unless it makes copies of numbers.
            if before[0].size == result[0].size or start is None:
                return trail.moved(lambda view: reshape(view, result[0].shape))
        case "slice" | "dynamic_slice" if at == [0] and trail.view and not trail.by:
            if layer := _layer(trail.view, result[0].shape):
                return dataclasses.replace(trail, view=layer)
    # All others change numbers. A factor leaves the axes where they are.
    if not (alone and (name == "mul" or (name == "div" and at == [0]))):
        return trail.passed(name if alone else f"{name} by itself")
    kept = before[at[0]].shape == result[0].shape
    view, other = trail.view if kept else None, values[1 - at[0]]
    factors = *trail.factors, _factor(trail.view, other, name == "div")
    by_input = any(isinstance(start, Call) for start in other)
    trail = dataclasses.replace(trail, factors=factors)
    return trail.passed(f"{name} by its input" if by_input else name, view)


def _is_small(dtype: Any) -> bool:
    """True for all dtypes that are not real floating-point of 16 bits at least."""
    return not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2


def _keeps_all(bits: Mapping[str, int], dtype: Any) -> bool:
    """True if a reduced precision is not below the precision of `dtype`."""
    info = jnp.finfo(dtype)
    exponent = bits["exponent_bits"] >= info.nexp
    return exponent and bits["mantissa_bits"] >= info.nmant


def _function(eqn: Any, start: Start, values: list[Value]) -> Any:
    """The function of an output, as `Trail.numbers`, by the operands'."""
    trails = [value.get(start, value.get(None)) for value in values]
    functions = [trail.numbers for trail in trails if trail and trail.numbers]
    if eqn.primitive.name not in EVALUATED or len(functions) < len(trails):
        return None

    def numbers(indices: Any) -> Any:
        arrays = np.broadcast_arrays(*(function(indices) for function in functions))
        with jax.ensure_compile_time_eval():
            return np.asarray(eqn.primitive.bind(*arrays, **eqn.params))

    return numbers


def _factor(view: View | None, value: Value, divides: bool) -> float | str:
    """The factor of an array with `view`: a number, a parameter's path, or a text."""
    if None in value and (constant := value[None].numbers):
        number = float(constant(()))
        return 1 / number if divides else number
    for path, trail in kernels(value).items():
        if divides or trail.by or trail.through - {"broadcast_in_dim"}:
            return f"{path} (changed)"
        if view is None or trail.view is None:
            return ""
        axes = zip(view, trail.view, strict=False)  # a number has none
        same = all(own in ((), axis) for axis, own in axes)
        return path if same else f"{path} (along other axes)"
    return "another array"


def _layer(view: View, shape: Shape) -> View | None:
    """The view of one layer of a stacked kernel; None for any other slice."""
    # One layer is a kernel, since it has an M of its own.
    pairs = list(zip(view, shape, strict=True))
    if all(length(a) == size or (size == 1 and _is_of_stack(a)) for a, size in pairs):
        return tuple(axis if length(axis) == size else () for axis, size in pairs)
    return None


def multiplied(eqn: Any, kernel: str, trail: Trail, other: Value, first: bool) -> Trail:
    """The trail of the array at path `kernel` after `eqn` has multiplied it.

    `other` has the trails of the other factor; the kernel is the `first` one, or not.
    """
    by, view, wrong, result = eqn.primitive.name, None, "", eqn.outvars[0].aval
    if _is_small(result.dtype):
        trail = trail.passed(f"{by} to {result.dtype}")
    calls = (start for start in other if isinstance(start, Call))
    call = next((call for call in calls if call.name == kernel), None)
    x = other[call] if call else Trail(None)
    passes = call.claim.passes - {"mul"} if call else ()  # which is of kernels alone
    changes = {s for s in x.through if s.removesuffix(" by itself") not in passes}
    if changes := changes - OWN_DERIVATIVE:
        wrong = f"{OTHER_INPUT}: it changes its input by {listed(sorted(changes))}"
    if by == "dot_general" and call and call.claim.einsum and trail.view:
        numbers = eqn.params["dimension_numbers"]
        view = x.view and _dot(numbers, trail.view, x.view, first)
    if by == "gather":
        # It must take whole rows of the unchanged kernel, which is not the indices.
        shape = eqn.invars[0].aval.shape
        rows = tuple(eqn.params["slice_sizes"]) == (1, *shape[1:]) and len(shape) == 2
        if not (first and rows and trail.view == named(range(2), shape)):
            trail = trail.passed("gather of something other than rows")
        elif call:
            wrong = _fault_of_rows(eqn, call, x.numbers)
            view = x.view and (*x.view[:-1], *named([1], shape[1:]))
    through = trail.through | (x.through & OWN_DERIVATIVE)
    settings = {"by": by, "call": call, "view": view, "wrong": wrong}
    return dataclasses.replace(trail, through=through, **settings)


def _fault_of_rows(eqn: Any, call: Call, function: Any) -> str:
    """Reason why a gather at a function of the input is not as the rule says, or ""."""
    if function is None:
        return "looks up rows by other numbers than its input"
    size, fill = eqn.invars[0].aval.shape[0], eqn.params["fill_value"]
    inside = np.array([0, 1, size // 2, size - 1])
    indices = np.concatenate([inside + n * size for n in range(-2, 3)])
    indices = indices[indices.astype(call.dtype) == indices]  # the others wrap around
    places = function(indices.astype(call.dtype))
    if eqn.params["mode"].name in ("CLIP", "PROMISE_IN_BOUNDS"):
        places = places.clip(0, size - 1)
    # A row that is filled with NaN stays so, whatever is added to it.
    seen = (places >= 0) & (places < size) | (fill is not None and fill == fill)
    rows = call.claim.rows
    fits = [rule for rule in rows if (places == rows[rule](indices, size))[seen].all()]
    if (claimed := next(iter(rows))) in fits:
        return ""
    mends = [f"; say equation={rule}" for rule in fits]
    return f"takes other rows than {claimed}" + "".join(mends[:1])


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


def fault(call: Call, trail: Trail, lead: int) -> str:
    """Reason why an output of `call` is not the product of its rule, or ""."""
    claim = call.claim
    if claim.reads:
        return _fault_of_read(trail, lead)
    steps = trail.through - claim.passes - OWN_DERIVATIVE
    if not trail.by and steps and steps <= claim.stand_ins:
        return ""
    if not trail.by:
        return "returns it without a product"
    if trail.call is not call:
        return OTHER_INPUT
    if trail.wrong:
        return trail.wrong
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
    axes = (trail.view or ())[lead:]
    if (names := claim.output_axes(len(axes))) is None:
        return ""
    if len(axes) != len(names) or axes != named(names, tuple(map(length, axes))):
        product = "{},{}->{}".format(*claim.einsum) if claim.einsum else "kernel[input]"
        return f"does not compute {product!r}, as its rule says"
    return ""


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


def doubt(call: Call, trail: Trail) -> str:
    """Reason why an output of `call` without a fault is not proven, or ""."""
    arrays = [factor for factor in trail.factors if isinstance(factor, str)]
    if "" in (call.scale, *arrays) or (arrays and isinstance(call.scale, float)):
        return "a trace compares scale= of its rule if it is a number or a parameter"
    own = listed(sorted(trail.through & OWN_DERIVATIVE))
    return own and f"{own} has a derivative of its own, which the delta bypasses"


def fault_of_companion(call: Call, array: Value, lead: int) -> str:
    """Reason why an array that arrives beside a kernel is not its companion, or ""."""
    if trail := array.get(call.companion):
        return _fault_of_read(trail, lead, call.companion)
    return f"gets another array for {call.companion}"


def _fault_of_read(trail: Trail, lead: int, name: str = "it") -> str:
    """Reason why the array that a layer reads is not the model's own, or ""."""
    if steps := {trail.by, *trail.through} - {""}:
        return f"reads {name} changed by {listed(sorted(steps))}"
    axes = [axis for axis in trail.view[lead:] if axis] if trail.view else []
    order: list[Any] = [piece.axis for axis in axes for piece in axis]
    if trail.view is None or len(order) > len(axes) or order != sorted(order):
        return f"reads {name} with other axes"
    return ""


def listed(names: Iterable[str]) -> str:
    """Names of primitives as a part of a sentence."""
    parts = (name.partition(" to ") for name in names)  # a dtype is not a primitive
    shown = [f"`{name}`{to}{dtype}" for name, to, dtype in parts]
    if len(shown) > 3:
        shown[2:] = [f"{len(shown) - 2} more primitives"]
    return " and ".join(shown)
