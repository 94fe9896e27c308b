"""Rows: the axis of each array that has the rows of a batch, whole and in order.

A row of the call's inputs may have an adapter of its own (`serving.select`). A layer
takes it for what is at the row's index of one axis of its input. So that axis must have
the rows as the inputs have them, which `row_faults` reads from the program.

The view of a trail from `ROWS` has a stride for each axis, or 0. At index i of an axis
of stride s is row i // s, modulo their number, as where heads are joined to the batch.
Primitives that are not known to keep the rows lose them. A sum over all rows is of no
row, and may be given to all of them, as may an array that depends on none.
"""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr
from jax.interpreters import partial_eval

from mora_jax._common.types import Shape
from mora_jax._trace_check.steps import listed
from mora_jax._trace_check.trails import Trail, Uses, Value, changed
from mora_jax._trace_check.walk import PRODUCTS, Values, Walk, shapes

ROWS, NUMBERS = 0, 1
"""Starts of trails: the call's inputs, and the numbers of the rows along an axis."""

SETTINGS = frozenset(
    "accuracy exponent_bits mantissa_bits new_dtype out_dtype rounding_method sharding "
    "input_dtype weak_type y".split()
)
"""Parameters of primitives that treat all numbers of an array alike."""

ALONG_AXES = frozenset(
    "concatenate cumlogsumexp cummax cummin cumprod cumsum dynamic_slice "
    "dynamic_update_slice fft pad reduce_window_max reduce_window_min "
    "reduce_window_sum rev select_and_scatter_add slice sort split tile top_k".split()
)
"""Primitives that work along some axes, and keep the others."""

VIEWS = frozenset("broadcast_in_dim convert_element_type squeeze transpose".split())

Places = dict[int, int | None]
"""{axis of an output: the axis of an operand with the same indices, or None}."""


def row_faults(
    jaxpr: Jaxpr, rows: int, is_batched: Sequence[bool | None], adapted: Collection[str]
) -> dict[str, str]:
    """{path of a kernel in `adapted`: the fault of its layer, if rows have adapters}.

    `jaxpr` is one call of a model, with marks. `is_batched` says of each of its inputs:
    True if the first axis has the rows, should it have the length `rows`; None if any
    axis of that length may, as in a cache; False for parameters.
    """
    program, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    kinds = [kind for kind, use in zip(is_batched, used, strict=True) if use]
    inputs: Values = []
    for shape, kind in zip(shapes(program.invars), kinds, strict=True):
        whole = shape if len(shape) > 1 else ()  # a vector may be of layers
        counted = {True: shape[:1], None: whole, False: ()}[kind]
        view: Any = [int(n == rows) for n in counted] + [0] * (
            len(shape) - len(counted)
        )
        inputs.append({ROWS: Trail(tuple(view))} if any(view) else {})
    walk = _RowWalk(rows, adapted)
    if rows > 1:  # a single row has no order
        walk.run(program, inputs)
    return walk.uses.faults


def _moved(name: str, move: Callable[[Any], Any], trail: Trail) -> Trail:
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
        name, outs, rows = eqn.primitive.name, shapes(eqn.outvars), self.rows
        if name == "iota" and outs[0][axis := eqn.params["dimension"]] == rows:
            return [{NUMBERS: Trail(_only(axis, outs[0]))}]
        if name == "reshape":
            move = partial(_reshaped, eqn.invars[0].aval.shape, outs[0], rows)
            return [changed(values[0], partial(_moved, name, move))]
        if name == "concatenate" and eqn.params["dimension"] == len(outs[0]) - 1:
            if outs[0][-1] == len(values):
                self.columns[eqn.outvars[0]] = values
        is_control = name in self.handlers and name not in PRODUCTS
        if is_control or (places := self._places(eqn, values)) is None:
            return super().step(eqn, values)
        return [self._value(eqn, values, places, shape) for shape in outs]

    def _value(
        self, eqn: Any, values: Values, places: list[Places], shape: Shape
    ) -> Value:
        """The value of an output whose axes are at `places` of the operands."""
        if math.prod(shape) < self.rows:  # too few numbers to be the rows
            return {}
        name, moved = eqn.primitive.name, []
        sums = (
            "axes" in eqn.params or name == "dot_general"
        ) and self.rows not in shape
        for value, axes in zip(values, places, strict=True):
            at = [axes.get(k) for k in range(len(shape))]

            def move(view: Any, at: Any = at) -> Any:
                return tuple(0 if k is None else view[k] for k in at)

            kept = changed(value, partial(_moved, name, move))
            is_sum = sums and any(value[k].view and not t.view for k, t in kept.items())
            moved.append({} if is_sum else kept)
        # `jnp` adds the length of an axis to negative indices.
        cases = moved[name == "select_n" :]
        wraps = name == "add" and getattr(eqn.invars[1], "val", 1) % self.rows == 0
        same = name == "select_n" and all(v == cases[0] for v in cases)
        trail = cases[0].get(NUMBERS) if name in VIEWS or wraps or same else None
        return _joined(name, moved) | ({NUMBERS: trail} if trail and trail.view else {})

    def _places(self, eqn: Any, values: Values) -> list[Places] | None:
        """For each operand its axes that an output has; None if that is not known."""
        name, p, (out, *more) = eqn.primitive.name, eqn.params, shapes(eqn.outvars)
        operands = shapes(eqn.invars)
        alike = [{k: k for k in range(len(shape or ()))} for shape in operands]
        if name in ALONG_AXES:
            worked = _worked_axes(p, operands, out)
            return [{k: k for k in axes if k not in worked} for axes in alike]
        if p.keys() <= SETTINGS and not more:
            fit = (
                n in (1, m) for x in operands if x for n, m in zip(x, out, strict=True)
            )
            return alike if {*map(len, alike)} <= {0, len(out)} and all(fit) else None
        if "axes" in p or name in ("squeeze", "unstack"):
            gone = np.ravel(p.get("axes", p.get("dimensions", p.get("axis"))))
            return [dict(enumerate(k for k in alike[0] if k not in gone))]
        if name == "gather" or name.startswith("scatter"):
            columns = self.columns.get(eqn.invars[1], values[1:2])
            return _indexed(p["dimension_numbers"], operands, out, columns)
        match name:
            case "transpose":
                return [dict(enumerate(p["permutation"]))]
            case "stack":
                return [{k + (k >= p["axis"]): k for k in axes} for axes in alike]
            case "broadcast_in_dim":
                axes = enumerate(
                    zip(p["broadcast_dimensions"], operands[0], strict=True)
                )
                return [{k: at for at, (k, n) in axes if n == out[k]}]
            case "dot_general":
                summed, batch = p["dimension_numbers"]
                both = zip(alike, summed, batch, strict=True)
                left, right = ([k for k in x if k not in (*s, *b)] for x, s, b in both)
                right = [*batch[1], *[None] * len(left), *right]
                return [dict(enumerate([*batch[0], *left])), dict(enumerate(right))]
            case "conv_general_dilated" if p["batch_group_count"] == 1:
                return [
                    {p["dimension_numbers"][2][0]: p["dimension_numbers"][0][0]},
                    {},
                ]
        return None

    def _mark(self, eqn: Any, values: Values) -> Values:
        call, lead, x = eqn.params["call"], eqn.params["lead"], eqn.invars[0].aval
        inner = jax.ShapeDtypeStruct(x.shape[lead:], x.dtype)
        axes = None if eqn.params["end"] else call.product.batch_axes(inner)
        axis = lead + axes[0] if axes else 0
        # Of an axis of another length the layer itself says so.
        if axes is None or x.shape[axis] != self.rows or call.name not in self.adapted:
            return values
        own = Trail(_only(axis, x.shape))
        trail = values[0].get(ROWS, own)
        if trail.view and not trail.unseen:
            if trail.view[axis]:
                return [{ROWS: own}]
            why = f"on axis {trail.view.index(1)} of its input and not on axis {axis}"
        else:
            by = listed(sorted({*trail.through, trail.unseen} - {""}))
            why = f"in another order, or mixed, by {by}"
        self.uses.faults.setdefault(call.name, f"{call.method} gets the rows {why}")
        return values


def _joined(name: str, values: Sequence[Value]) -> dict[Any, Trail]:
    """The rows of what `name` computes from several arrays of one shape."""
    trails = [value[ROWS] for value in values if ROWS in value]
    for trail in trails:
        if trail.view is None or trail.unseen:
            return {ROWS: trail}
    views: Any = zip(*(trail.view or () for trail in trails), strict=True)
    view: Any = tuple(s[0] if len({*s}) == 1 else 0 for s in views)
    return {ROWS: _moved(name, lambda _: view, trails[0])} if trails else {}


def _only(axis: int, shape: Shape) -> Any:
    return tuple(int(k == axis) for k in range(len(shape)))


def _reshaped(before: Shape, after: Shape, rows: int, view: Any) -> Any:
    strides = [0] * len(after)
    for axis, stride in enumerate(view):
        step = stride * math.prod(before[axis + 1 :])  # from a row to the next one
        for k, n in enumerate(after):
            inner = math.prod(after[k + 1 :])
            if step and step % inner == 0 and inner * n % (step * rows) == 0:
                strides[k] = step // inner
    return tuple(strides)


def _worked_axes(p: Any, operands: list[Shape], out: Shape) -> set[int]:
    """The axes along which a primitive of `ALONG_AXES` does something."""
    axes = set(range(len(out) - len(p.get("fft_lengths", ())), len(out)))
    for key in ("axis", "dimension", "dimensions"):
        axes |= {*np.ravel(p.get(key, ())).tolist()}
    nothing = {"padding_config": (0, 0, 0), "window_dimensions": 1, "padding": (0, 0)}
    for key, setting in nothing.items():
        axes |= {k for k, value in enumerate(p.get(key, ())) if value != setting}
    return axes | {k for x in operands for k, n in enumerate(x) if n != out[k]}


def _indexed(
    numbers: Any, operands: list[Shape], out: Shape, columns: Values
) -> list[Places]:
    """The places of the operands of a gather, or of a scatter."""
    if gathers := hasattr(numbers, "offset_dims"):
        inner, dropped = numbers.offset_dims, numbers.collapsed_slice_dims
        starts, along = numbers.start_index_map, numbers.start_indices_batching_dims
    else:
        inner, dropped = numbers.update_window_dims, numbers.inserted_window_dims
        starts = numbers.scatter_dims_to_operand_dims
        along = numbers.scatter_indices_batching_dims
    whole, part = operands[0], out if gathers else operands[2]
    # {axis of the operand: the axis of the indices that runs along it}
    pairs = dict(zip(numbers.operand_batching_dims, along, strict=True))
    gone = (*dropped, *pairs)
    for start, column in zip(starts, columns, strict=False):
        trail = column.get(NUMBERS)
        if trail and trail.view and 1 in trail.view[:-1]:
            pairs[start] = trail.view.index(1)
    outer = [k for k in range(len(part)) if k not in inner]
    windows = zip(inner, (k for k in range(len(whole)) if k not in gone), strict=True)
    same = {at: k for at, k in windows if part[at] == whole[k]}
    same |= {outer[at]: k for k, at in pairs.items()}
    if gathers:
        return [same, {at: k for k, at in enumerate(outer)}]
    return [{k: k for k in same.values()}, pairs, {k: at for at, k in same.items()}]
