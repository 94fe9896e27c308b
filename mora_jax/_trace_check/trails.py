"""Trails: the ways of a program to an array, and what primitives make of them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._jax.primitives import OWN_DERIVATIVE
from mora_jax._jax.walk import is_unseen
from mora_jax._trace_check.marks import MarkedCall
from mora_jax._trace_check.views import Axis, View, length, named, reshape

OTHER_INPUT = "multiplies it with another array than the input that its rule names"

EVALUATED = frozenset(  # primitives that are computed where the check knows all numbers
    "add and clamp convert_element_type div eq ge gt le lt max min mul ne not or rem "
    "rsqrt select_n sqrt sub".split()
)


class Trail(NamedTuple):
    """Way from one array of a model, or from the input of one call, to an array."""

    # The axes of the kernel (numbers, negative for stack axes), of the input or of
    # their product (the kernel's, or letters of the einsum); None if lost.
    view: View | None
    by: str = ""  # the primitive that multiplied the kernel; "" before that
    call: MarkedCall | None = None  # whose input multiplied it; None for another array
    through: frozenset[str] = frozenset()  # further primitives that change numbers
    # The factors among them, as in `MarkedCall.scale`, or what else they are.
    factors: tuple[float | str, ...] = ()
    # From the call's indices to these numbers, or to a constant; None if not known.
    numbers: Callable[[Any], Any] | None = None
    wrong: str = ""  # a fault of the input that multiplies the kernel
    unseen: str = ""  # the reason why a trace cannot look into a primitive on the way
    is_companion: bool = False  # True for an array that is trained beside a kernel

    def moved(self, move: Callable[[View], View | None]) -> "Trail":
        return self._replace(view=None if self.view is None else move(self.view))

    def passed(self, name: str, view: View | None = None) -> "Trail":
        """The trail after the primitive called `name`, which changes numbers."""
        return self._replace(through=self.through | {name}, view=view, numbers=None)

    def hidden(self, name: str) -> "Trail":
        """The trail after the primitive called `name`, which may do anything."""
        return self._replace(unseen=f"a trace cannot look into `{name}`", numbers=None)


Start = str | MarkedCall | None  # an array's path; a call, for its input; constants
Value = Mapping[Start, Trail]  # all that an array depends on


def changed(value: Value, change: Callable[[Trail], Trail]) -> Value:
    """The value with each of its trails changed."""
    return {start: change(trail) for start, trail in value.items()}


def joined(values: Iterable[Value]) -> Value:
    """All that an array depends on that is computed from several arrays."""
    trails: dict[Start, Trail] = {}
    for start, trail in [pair for value in values for pair in value.items()]:
        if (other := trails.setdefault(start, trail)) != trail:
            other = other._replace(view=None, numbers=None)
            through = trail.through | other.through
            unseen = trail.unseen or other.unseen
            trails[start] = other._replace(through=through, unseen=unseen)
    return trails


def of_arrays(value: Value) -> dict[str, Trail]:
    """The trails of a value that begin at arrays of the model."""
    return {start: t for start, t in value.items() if isinstance(start, str)}


def after(eqn: Any, values: list[Value]) -> Value:
    """The value of the outputs of an equation whose operands have `values`."""
    value = joined(values)
    if is_unseen(eqn):
        return changed(value, lambda trail: trail.hidden(eqn.primitive.name))
    value = {start: _step(eqn, start, t, values) for start, t in value.items()}
    return {start: t for start, t in value.items() if start is not None or t.numbers}


def _step(eqn: Any, start: Start, trail: Trail, values: list[Value]) -> Trail:
    """The `trail` from `start` after an equation whose operands have `values`."""
    at = [k for k, value in enumerate(values) if start in value]
    name, alone = eqn.primitive.name, len(at) == 1
    before, result = [v.aval for v in eqn.invars], [v.aval for v in eqn.outvars]
    if numbers := _function(eqn, start, values):
        views = {values[k][start].view for k in at}
        view = views.pop() if len(views) == 1 else None
        return trail._replace(view=view, numbers=numbers)
    match name:
        case "add" | "add_any":
            # A bias may be added to a product, since it does not depend on the kernel.
            return trail if alone and trail.by else trail.passed("add")
        case "convert_element_type" if not _is_small(result[0].dtype):
            return trail
        case "convert_element_type":
            name += f" to {result[0].dtype}"
        case "reduce_precision":
            own, info = eqn.params, jnp.finfo(before[0].dtype)
            if own["exponent_bits"] >= info.nexp and own["mantissa_bits"] >= info.nmant:
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
            # One layer of a stack is a kernel, since it has a companion of its own.
            pairs = list(zip(trail.view, result[0].shape, strict=True))
            if all(length(a) == n or (n == 1 and _is_of_stack(a)) for a, n in pairs):
                view = tuple(axis if length(axis) == n else () for axis, n in pairs)
                return trail._replace(view=view)
    # All others change numbers. A factor leaves the axes where they are.
    if not (alone and (name == "mul" or (name == "div" and at == [0]))):
        return trail.passed(name if alone else f"{name} by itself")
    kept = before[at[0]].shape == result[0].shape
    view, other = trail.view if kept else None, values[1 - at[0]]
    factors = *trail.factors, _factor(trail.view, other, name == "div")
    name += " by its input" * any(isinstance(start, MarkedCall) for start in other)
    return trail._replace(factors=factors).passed(name, view)


def _is_small(dtype: Any) -> bool:
    """True for all dtypes that are not real floating-point of 16 bits at least."""
    return not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2


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
        if np.iscomplexobj(number := constant(())):
            return "complex numbers"
        if divides and not number:
            return "an infinite number"
        return 1 / float(number) if divides else float(number)
    for path, trail in of_arrays(value).items():
        if divides or trail.by or trail.through - {"broadcast_in_dim"}:
            return f"{path} (changed)"
        if view is None or trail.view is None:
            return ""
        axes = zip(view, trail.view, strict=False)  # a number has none
        same = all(own in ((), axis) for axis, own in axes)
        return path if same else f"{path} (along other axes)"
    return "another array"


def multiplied(eqn: Any, kernel: str, trail: Trail, other: Value, first: bool) -> Trail:
    """The trail of the array at path `kernel` after `eqn` has multiplied it.

    `other` has the trails of the other factor; the kernel is the `first` one, or not.
    """
    by, view, wrong, result = eqn.primitive.name, None, "", eqn.outvars[0].aval
    if _is_small(result.dtype):
        trail = trail.passed(f"{by} to {result.dtype}")
    calls = (start for start in other if isinstance(start, MarkedCall))
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
    return trail._replace(by=by, call=call, view=view, wrong=wrong, through=through)


def _fault_of_rows(eqn: Any, call: MarkedCall, function: Any) -> str:
    """Reason why a gather at a function of the input is not as the rule says, or ""."""
    if function is None:
        return "looks up rows by other numbers than its input"
    size, fill = eqn.invars[0].aval.shape[0], eqn.params["fill_value"]
    indices = _indices(size, call.dtype)
    places = function(indices.astype(call.dtype))
    if eqn.params["mode"].name in ("CLIP", "PROMISE_IN_BOUNDS"):
        places = places.clip(0, size - 1)
    # A row that is filled with NaN stays so, whatever is added to it.
    seen = (places >= 0) & (places < size) | (fill is not None and fill == fill)
    known = call.claim.rows
    fits = [rule for rule, rows in known if (places == rows(indices, size))[seen].all()]
    if (claimed := known[0][0]) in fits:
        return ""
    mend = f"; say equation={fits[0]}" if fits else ""
    return f"takes other rows than {claimed}{mend}"


def _indices(size: int, dtype: Any) -> np.ndarray:
    """Indices of a table of `size` rows by which two lookups are compared.

    These are all rows, up to 65536 places beyond either end of the table, and the least
    and the largest number of a signed `dtype`.
    """
    beyond = min(2 * size, 2**16)
    near = np.arange(-beyond, size + beyond)
    places = 0, 1, size // 2, size - 1
    far = np.add.outer(size * np.arange(-2, 3), places).ravel()
    limits: list[int] = []
    dtype = jax.dtypes.canonicalize_dtype(dtype)  # JAX makes int32 of NumPy's int64
    if jnp.issubdtype(dtype, jnp.signedinteger):
        limits = [jnp.iinfo(dtype).min, jnp.iinfo(dtype).max]
    indices = np.concatenate([near, far, np.asarray(limits, near.dtype)])
    return indices[indices.astype(dtype) == indices]  # the others wrap around


def _dot(numbers: Any, w: View, x: View, kernel_first: bool) -> View | None:
    """The view of the product of kernel `w` and `x`, if they sum over the same axes."""
    views = (w, x) if kernel_first else (x, w)
    contracted, batch = [
        [(views[0][k], views[1][n]) for k, n in zip(*axes, strict=True)]
        for axes in numbers
    ]
    # Under vmap, each of many inputs has its layer of a stack.
    lifted = [pair for pair in batch if _is_of_stack(pair[not kernel_first])]
    if any(a != b and (a, b) not in lifted for a, b in (*contracted, *batch)):
        return None
    sides = zip(views, *numbers, strict=True)
    taken = [(view, {*summed, *shared}) for view, summed, shared in sides]
    free = [a for view, gone in taken for k, a in enumerate(view) if k not in gone]
    return (*(pair[kernel_first] for pair in batch), *free)


def _is_of_stack(axis: Axis) -> bool:
    """True if the axis is of one or more stack axes, whose names are negative."""
    return bool(axis) and all(isinstance(p.axis, int) and p.axis < 0 for p in axis)


def listed(names: Iterable[str]) -> str:
    """Names of primitives as a part of a sentence."""
    parts = (name.partition(" to ") for name in names)  # a dtype is not a primitive
    shown = [f"`{name}`{to}{dtype}" for name, to, dtype in parts]
    if len(shown) > 3:
        shown[2:] = [f"{len(shown) - 2} more primitives"]
    return " and ".join(shown)
