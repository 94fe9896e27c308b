"""Rows: the axis of each array that has the rows of a batch, whole and in order.

A row of the call's inputs may have an adapter of its own (`serving.select`). A layer
takes it for what is at the row's index of one axis of its input. So that axis must have
the rows as the inputs have them, which `row_faults` reads from the program.

The view of a trail from `ROWS` has a stride for each axis, or 0. At index i of an axis
of stride s is row i // s, modulo their number, as where heads are joined to the batch.
Primitives that are not known to keep the rows lose them. A sum over all rows is of no
row, and may be given to all of them, as may an array that depends on none.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from jax.extend.core import Jaxpr

from mora_jax._common.types import Shape
from mora_jax._trace_check.steps import listed
from mora_jax._trace_check.trails import Call, Trail, Uses, Value, changed, needed
from mora_jax._trace_check.walk import PRODUCTS, Values, Walk, shapes

ROWS, NUMBERS = 0, 1
"""Starts of trails: the call's inputs, and the numbers of the rows along an axis."""

SETTINGS = frozenset(
    "accuracy exponent_bits input_dtype mantissa_bits new_dtype out_dtype "
    "rounding_method sharding weak_type y".split()
)
"""Parameters of primitives that treat all numbers of an array alike."""

ALONG_AXES = frozenset(
    "concatenate cumlogsumexp cummax cummin cumprod cumsum dynamic_slice "
    "dynamic_update_slice fft pad reduce_window_max reduce_window_min "
    "reduce_window_sum rev select_and_scatter_add slice sort split tile top_k".split()
)
"""Primitives that work along some axes, and keep the others."""

VIEWS = frozenset(
    "broadcast_in_dim convert_element_type reshape squeeze transpose".split()
)

Move = Callable[[Any], Any]
"""A function from the view of an operand to the view of an output."""


def row_faults(
    jaxpr: Jaxpr, rows: int, is_batched: Sequence[bool | None], adapted: Collection[str]
) -> dict[str, str]:
    """{path of a kernel in `adapted`: the fault of its layer, if rows have adapters}.

    `jaxpr` is one call of a model, with marks. `is_batched` says of each of its inputs:
    True if the first axis has the rows, should it have the length `rows`; None if any
    axis of that length may, as in a cache; False for parameters.
    """
    program, kinds = needed(jaxpr, is_batched)
    inputs: Values = []
    for shape, kind in zip(shapes(program.invars), kinds, strict=True):
        # A vector in a cache may have a number for each layer.
        last = {True: 1, None: len(shape) * (len(shape) > 1), False: 0}[kind]
        view: Any = tuple(int(n == rows and k < last) for k, n in enumerate(shape))
        inputs.append({ROWS: Trail(view)} if any(view) else {})
    walk = _RowWalk(rows, adapted)
    if rows > 1:  # a single row is in any order
        walk.run(program, inputs)
    return walk.uses.faults


def _moved(name: str, move: Move, trail: Trail) -> Trail:
    """The trail after the primitive `name`, which moves axes and may lose the rows."""
    moved = trail.moved(move)
    return moved if moved.view is None or any(moved.view) else trail.passed(name)


class _RowWalk(Walk):
    """A walk that follows so many `rows`."""

    def __init__(self, rows: int, adapted: Collection[str]) -> None:
        super().__init__(Uses())
        self.rows, self.adapted = rows, adapted
        # {an array of indices: the values of its columns, if several were joined}
        self.columns: dict[Any, Values] = {}

    in_one_round = staticmethod(partial(_moved, "scan", lambda view: view[1:]))
    of_all_rounds = staticmethod(partial(_moved, "scan", lambda view: (0, *view)))

    @staticmethod
    def in_either(left: Value, right: Value) -> Value:
        return left if left == right else _joined("a branch or a loop", [left, right])

    def step(self, eqn: Any, values: Values) -> Values:
        name, outs = eqn.primitive.name, shapes(eqn.outvars)
        if name == "iota" and outs[0][axis := eqn.params["dimension"]] == self.rows:
            return [{NUMBERS: Trail(_at({axis: 0}, len(outs[0]), (1,)))}]
        if name == "concatenate" and eqn.params["dimension"] == len(outs[0]) - 1:
            if outs[0][-1] == len(values):
                self.columns[eqn.outvars[0]] = values
        is_control = name in self.handlers and name not in PRODUCTS
        is_array = outs and None not in outs  # and not a token
        if is_control or not is_array or (moves := self._moves(eqn, values)) is None:
            results = super().step(eqn, values)
        else:
            results = [self._value(eqn, values, moves, shape) for shape in outs]
        # What has fewer numbers than there are rows does not hold them.
        few = [math.prod(shape or ()) < self.rows for shape in outs]
        return [{} if is_few else v for v, is_few in zip(results, few, strict=True)]

    def _moves(self, eqn: Any, values: Values) -> Sequence[Move] | None:
        """For each operand what becomes of its view; None if that is not known."""
        before, (after, *_) = shapes(eqn.invars), shapes(eqn.outvars)
        if eqn.primitive.name == "reshape":
            return [partial(_reshaped, before[0], after, self.rows)]
        if eqn.primitive.name.startswith(("gather", "scatter")):
            columns = self.columns.get(eqn.invars[1], values[1:2])
            places = _indexed(eqn.params["dimension_numbers"], before, after, columns)
        else:
            places = _places(eqn, before, after)
        return places and [partial(_at, axes, len(after)) for axes in places]

    def _value(self, eqn: Any, values: Values, moves: Any, shape: Shape) -> Value:
        """The value of an output of `shape`, with the views of operands moved."""
        name, moved = eqn.primitive.name, []
        sums = "axes" in eqn.params or name == "dot_general"
        for atom, value, move in zip(eqn.invars, values, moves, strict=True):
            kept = changed(value, partial(_moved, name, move))
            if sums and ROWS in value and (view := value[ROWS].view):
                # A sum, unless a matrix may have brought them in another order.
                sizes = {n for n, s in zip(atom.aval.shape, view, strict=True) if s}
                is_sum = not {self.rows, *sizes} & {*shape} and not kept[ROWS].view
                kept = {} if is_sum else kept
            moved.append(kept)
        result = _joined(name, moved)
        for trail in (value[ROWS] for value in moved if ROWS in value):
            if trail.call and not result[ROWS].view:
                self._refuse(trail.call, "on no axis, though one has their number")
        # `jnp` adds the length of an axis to indices, which may be negative.
        first, *others = moved[name == "select_n" :]
        trail, added = first.get(NUMBERS), getattr(eqn.invars[-1], "val", 1)
        if not trail or not trail.view:
            return result
        wraps = name == "add" and not np.any(added % self.rows)
        same = name == "select_n" and all(value == first for value in others)
        return result | ({NUMBERS: trail} if name in VIEWS or wraps or same else {})

    def _mark(self, eqn: Any, values: Values) -> Values:
        call, (lead, *_) = eqn.params["call"], eqn.params["leads"]
        value, x = values[0], eqn.invars[0].aval
        inner = np.broadcast_to(0, x.shape[lead:])  # any array of this shape
        axes = None if eqn.params["end"] else call.product.batch_axes(inner)
        axis = lead + axes[0] if axes else 0
        # Of an axis of another length the layer itself says so.
        if axes is None or x.shape[axis] != self.rows or call.name not in self.adapted:
            return [value]
        own = Trail(_at({axis: 0}, x.ndim, (1,)))
        # An input without rows has them from here on, by its layer's adapters.
        trail = value.get(ROWS, dataclasses.replace(own, call=call))
        if trail.unseen or not trail.view:
            why = trail.unseen or f"by {listed(sorted(trail.through))}"
            self._refuse(call, f"mixed or in another order, {why}")
        elif not trail.view[axis]:
            at = next(k for k, stride in enumerate(trail.view) if stride)
            self._refuse(call, f"on axis {at} of its input, and not on axis {axis}")
        else:
            return [{ROWS: dataclasses.replace(own, call=trail.call)}]
        return [value]

    def _refuse(self, call: Call, why: str) -> None:
        fault = f"{call.method} gets rows of the batch {why}"
        self.uses.faults.setdefault(call.name, fault)


def _joined(name: str, values: Sequence[Value]) -> dict[Any, Trail]:
    """The rows of what `name` computes from several arrays of one shape."""
    trails = [value[ROWS] for value in values if ROWS in value]
    trails.sort(key=lambda trail: trail.call is not None)
    for trail in trails:
        if trail.view is None or trail.unseen:
            return {ROWS: trail}
    views: Any = zip(*(trail.view or () for trail in trails), strict=True)
    view: Any = tuple(s[0] if len({*s}) == 1 else 0 for s in views)
    return {ROWS: _moved(name, lambda _: view, trails[0])} if trails else {}


def _at(places: Mapping[int, int | None], ndim: int, view: Any) -> Any:
    axes = [places.get(k) for k in range(ndim)]
    return tuple(0 if axis is None else view[axis] for axis in axes)


def _reshaped(before: Shape, after: Shape, rows: int, view: Any) -> Any:
    strides = [0] * len(after)
    for axis, stride in enumerate(view):
        step = stride * math.prod(before[axis + 1 :])  # from a row to the next one
        for k, n in enumerate(after):
            inner = math.prod(after[k + 1 :]) or 1
            if step and step % inner == 0 and inner * n % (step * rows) == 0:
                strides[k] = step // inner
    return tuple(strides)


def _places(eqn: Any, operands: list[Shape], out: Shape) -> list[Any] | None:
    """For each operand {axis of an output: the axis of it with the same indices}."""
    name, p = eqn.primitive.name, eqn.params
    alike = [{k: k for k in range(len(shape or ()))} for shape in operands]
    if name in ALONG_AXES:
        worked = _worked_axes(p, operands, out)
        return [{k: k for k in axes if k not in worked} for axes in alike]
    if p.keys() <= SETTINGS and len(eqn.outvars) == 1:
        # An axis of length 1 may be there for another length, but not for the rows.
        return alike if {*map(len, alike)} <= {0, len(out)} else None
    if "axes" in p or name in ("squeeze", "unstack"):
        gone = np.ravel(p.get("axes", p.get("dimensions", p.get("axis"))))
        return [dict(enumerate(k for k in axes if k not in gone)) for axes in alike]
    match name:
        case "transpose":
            return [dict(enumerate(p["permutation"]))]
        case "stack":
            return [{k + (k >= p["axis"]): k for k in axes} for axes in alike]
        case "broadcast_in_dim":
            pairs = enumerate(p["broadcast_dimensions"])
            return [{k: at for at, k in pairs if operands[0][at] == out[k]}]
        case "dot_general":
            summed, batch = p["dimension_numbers"]
            both = zip(alike, summed, batch, strict=True)
            left, right = ([k for k in x if k not in (*s, *b)] for x, s, b in both)
            right = [*batch[1], *[None] * len(left), *right]
            return [dict(enumerate([*batch[0], *left])), dict(enumerate(right))]
        case "conv_general_dilated" if p["batch_group_count"] == 1:
            x, _, y = p["dimension_numbers"]
            return [{y[0]: x[0]}, {}]
    return None


def _worked_axes(p: Any, operands: list[Shape], out: Shape) -> set[int]:
    """The axes along which a primitive of `ALONG_AXES` does something."""
    axes = set(range(len(out) - len(p.get("fft_lengths", ())), len(out)))
    for key in ("axis", "dimension", "dimensions"):
        axes |= {*np.ravel(p.get(key, ())).tolist()}
    nothing = {"padding_config": (0, 0, 0), "window_dimensions": 1, "padding": (0, 0)}
    for key, setting in nothing.items():
        axes |= {k for k, value in enumerate(p.get(key, ())) if value != setting}
    return axes | {k for x in operands for k, n in enumerate(x) if n != out[k]}


def _indexed(numbers: Any, operands: list[Shape], out: Shape, columns: Values) -> Any:
    """`_places` for a gather or a scatter."""
    # Both have the same five fields: a part that a scatter takes, a gather returns.
    inner, dropped, starts, batched, along = numbers
    whole, _, part = [*operands, out][:3]
    # {axis of the operand: the axis of the indices that runs along it}
    pairs = dict(zip(batched, along, strict=True))
    windows = (k for k in range(len(whole)) if k not in (*dropped, *pairs))
    same = dict(zip(inner, windows, strict=True))
    same = {at: k for at, k in same.items() if part[at] == whole[k]}
    for start, column in zip(starts, columns, strict=False):
        trail = column.get(NUMBERS)
        if trail and trail.view and 1 in trail.view[:-1]:
            pairs[start] = trail.view.index(1)
    outer = [k for k in range(len(part)) if k not in inner]
    same |= {outer[at]: k for k, at in pairs.items()}
    if len(operands) == 2:  # a gather
        return [same, {at: k for k, at in enumerate(outer)}]
    return [{k: k for k in same.values()}, pairs, {k: at for at, k in same.items()}]
