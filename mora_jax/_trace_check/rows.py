"""Rows: the axis of each array that has the rows of a batch, whole and in order.

A row of the call's inputs may have a companion of a kernel for itself. A layer takes it
for what is at the row's index of one axis of its input. So that axis must have the rows
as the inputs have them, which `row_faults` reads from the program.

Primitives that are not known to keep the rows lose them. A sum over all rows is of no
row, and may be given to all of them, as may an array that depends on none.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Jaxpr

from mora_jax._common.types import Shape
from mora_jax._jax.walk import Domain, is_opaque, needed, shapes, walk
from mora_jax._trace_check.marks import MarkedCall, mark_p
from mora_jax._trace_check.trails import cannot_see, listed

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

Strides = tuple[int, ...]
"""A stride for each axis, or 0; () for an array without rows. At index i of an axis of
stride s is row i // s, modulo their number, as where heads are joined to the batch."""

Move = Callable[[Strides], Strides]


class Rows(NamedTuple):
    """The rows in an array: the axes that have them.

    Attributes:
      strides: A stride for each axis that has them.
      lost: The reason why no axis has them, though the array depends on them, or "".
      call: The call whose companions the rows have first; None for the model's inputs.
      numbers: The axes along which the array numbers the rows.
      columns: For each column of an array of indices, the `numbers` of it.
    """

    strides: Strides = ()
    lost: str = ""
    call: MarkedCall | None = None
    numbers: Strides = ()
    columns: tuple[Strides, ...] = ()

    def moved(self, name: str, move: Move) -> "Rows":
        """The rows after the primitive `name`, which moves axes and may lose them."""
        strides, numbers = (old and move(old) for old in (self.strides, self.numbers))
        if self.strides and not any(strides):
            return Rows((), f"by {listed([name])}", self.call)
        return Rows(strides, self.lost, self.call, numbers if any(numbers) else ())


NOTHING = Rows()


def row_faults(
    program: Jaxpr, rows: int, batched: Sequence[bool | None], kernels: Collection[str]
) -> dict[str, str]:
    """{path of a kernel in `kernels`: the fault of its layer, if rows differ in it}.

    `program` is one call of a model, with marks. `batched` says of each of its
    inputs: True if the first axis has the rows, should it have the length `rows`; None
    if any axis of that length may, as in a cache; False for parameters.
    """
    program, kinds = needed(program, batched)
    inputs = []
    for shape, kind in zip(shapes(program.invars), kinds, strict=True):
        # A vector in a cache may have a number for each layer.
        last = {True: 1, None: len(shape) * (len(shape) > 1), False: 0}[kind]
        strides = tuple(int(n == rows and k < last) for k, n in enumerate(shape))
        inputs.append(Rows(strides) if any(strides) else NOTHING)
    domain = RowsOfCall(rows, kernels)
    if rows > 1:  # a single row is in any order
        walk(domain, program, inputs)
    return domain.faults


class RowsOfCall(Domain[Rows]):
    """The domain of so many `rows`, which may have companions of the `kernels`."""

    nothing = NOTHING

    def __init__(self, rows: int, kernels: Collection[str]) -> None:
        self.rows, self.kernels = rows, kernels
        self.faults: dict[str, str] = {}

    def join(self, left: Rows, right: Rows) -> Rows:
        return left if left == right else _joined("a branch or a loop", [left, right])

    def sliced(self, value: Rows) -> Rows:
        return value.moved("scan", lambda strides: strides[1:])

    def stacked(self, value: Rows) -> Rows:
        return value.moved("scan", lambda strides: (0, *strides))

    def step(self, eqn: Any, values: list[Rows]) -> list[Rows]:
        outs, p = shapes(eqn.outvars), eqn.params
        if eqn.primitive is mark_p:
            return [self._mark(eqn, values[0])]
        if eqn.primitive.name == "iota" and outs[0][p["dimension"]] == self.rows:
            return [Rows(numbers=_at({p["dimension"]: 0}, len(outs[0]), (1,)))]
        if all(value == NOTHING for value in values):
            return [NOTHING] * len(outs)
        is_array = outs and None not in outs  # and no token
        moves = self._moves(eqn, values) if is_array else None
        lost = _lost(eqn, values)
        results = [self._value(eqn, values, moves, n) if moves else lost for n in outs]
        # What has fewer numbers than there are rows does not hold them.
        pairs = zip(results, outs, strict=True)
        return [v if math.prod(n or ()) >= self.rows else NOTHING for v, n in pairs]

    def _moves(self, eqn: Any, values: list[Rows]) -> Sequence[Move] | None:
        """For each operand what becomes of its strides; None if that is not known."""
        before, (after, *_) = shapes(eqn.invars), shapes(eqn.outvars)
        if eqn.primitive.name == "reshape":
            return [partial(_reshaped, before[0], after, self.rows)]
        if eqn.primitive.name.startswith(("gather", "scatter")):
            columns = values[1].columns or (values[1].numbers,)
            places = _indexed(eqn.params["dimension_numbers"], before, after, columns)
        else:
            places = _places(eqn, before, after)
        return places and [partial(_at, axes, len(after)) for axes in places]

    def _value(self, eqn: Any, values: list[Rows], moves: Any, shape: Shape) -> Rows:
        """The value of an output of `shape`, with the strides of operands moved."""
        name, moved = eqn.primitive.name, []
        sums = "axes" in eqn.params or name == "dot_general"
        for atom, value, move in zip(eqn.invars, values, moves, strict=True):
            kept = value.moved(name, move)
            if sums and value.strides and not kept.strides:
                # A sum, unless a matrix may have brought them in another order.
                both = zip(atom.aval.shape, value.strides, strict=True)
                sizes = {self.rows, *(n for n, stride in both if stride)}
                kept = kept if sizes & {*shape} else NOTHING
            moved.append(kept)
        result = _joined(name, moved)
        for value in moved:
            if value.call and not result.strides:
                self._refuse(value.call, "on no axis, though one has their number")
        if name == "concatenate" and eqn.params["dimension"] == len(shape) - 1:
            if shape[-1] == len(values):
                columns = tuple(value.numbers for value in values)
                result = result._replace(columns=columns)
        # `jnp` adds the length of an axis to indices, which may be negative.
        first, *others = moved[name == "select_n" :]
        added = getattr(eqn.invars[-1], "val", 1)
        wraps = name == "add" and not np.any(added % self.rows)
        same = name == "select_n" and all(value == first for value in others)
        if first.numbers and (name in VIEWS or wraps or same):
            result = result._replace(numbers=first.numbers)
        return result

    def _mark(self, eqn: Any, value: Rows) -> Rows:
        call, (lead, *_) = eqn.params["call"], eqn.params["leads"]
        if eqn.params["end"] or call.batch is None or call.name not in self.kernels:
            return value
        axis, shape = lead + call.batch[0], eqn.invars[0].aval.shape
        if shape[axis] != self.rows:  # the layer itself says so
            return value
        if value.lost:
            self._refuse(call, f"mixed or in another order, {value.lost}")
            return value
        if value.strides and not value.strides[axis]:
            at = next(k for k, stride in enumerate(value.strides) if stride)
            self._refuse(call, f"on axis {at} of its input, and not on axis {axis}")
            return value
        # An input without rows has them from here on, by its layer's companions.
        own = _at({axis: 0}, len(shape), (1,))
        return Rows(own, call=value.call if value.strides else call)

    def _refuse(self, call: MarkedCall, why: str) -> None:
        fault = f"{call.method} gets rows of the batch {why}"
        self.faults.setdefault(call.name, fault)


def _joined(name: str, values: Sequence[Rows]) -> Rows:
    """The rows of what `name` computes from several arrays of one shape."""
    found = [value for value in values if value.strides or value.lost]
    found.sort(key=lambda value: value.call is not None)
    for value in found:
        if value.lost:
            return Rows((), value.lost, value.call)
    views = zip(*(value.strides for value in found), strict=True)
    strides = tuple(s[0] if len({*s}) == 1 else 0 for s in views)
    return found[0].moved(name, lambda _: strides) if found else NOTHING


def _lost(eqn: Any, values: Sequence[Rows]) -> Rows:
    """The rows after a primitive that is not known to keep them."""
    name = eqn.primitive.name
    why = cannot_see(name) if is_opaque(eqn) else f"by {listed([name])}"
    found = [value for value in values if value.strides or value.lost]
    return _joined(name, [Rows((), v.lost or why, v.call) for v in found])


def _at(places: Mapping[int, int | None], ndim: int, strides: Strides) -> Strides:
    """The strides of `ndim` axes, by the place of each among those before."""
    axes = [places.get(k) for k in range(ndim)]
    return tuple(0 if axis is None else strides[axis] for axis in axes)


def _reshaped(before: Shape, after: Shape, rows: int, strides: Strides) -> Strides:
    moved = [0] * len(after)
    for axis, stride in enumerate(strides):
        step = stride * math.prod(before[axis + 1 :])  # from a row to the next one
        for k, n in enumerate(after):
            inner = math.prod(after[k + 1 :]) or 1
            if step and step % inner == 0 and inner * n % (step * rows) == 0:
                moved[k] = step // inner
    return tuple(moved)


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


def _indexed(numbers: Any, operands: list[Shape], out: Shape, columns: Any) -> Any:
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
        if 1 in column[:-1]:
            pairs[start] = column.index(1)
    outer = [k for k in range(len(part)) if k not in inner]
    same |= {outer[at]: k for k, at in pairs.items()}
    if len(operands) == 2:  # a gather
        return [same, {at: k for k, at in enumerate(outer)}]
    return [{k: k for k in same.values()}, pairs, {k: at for at, k in same.items()}]
