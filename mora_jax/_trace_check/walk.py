"""Walk through the program of a model's call, from its kernels to its outputs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal
from jax.interpreters import partial_eval

from mora_jax._trace_check.marks import Call, mark_p
from mora_jax._trace_check.trails import (
    Trail,
    Uses,
    Value,
    changed,
    in_either,
    joined,
    kernels,
)
from mora_jax._trace_check.verdict import fault, listed, multiplied
from mora_jax._trace_check.views import View, length, named, reshape

IDENTITIES = frozenset(
    "convert_element_type copy copy_p device_put layout_constraint mesh_cast "
    "optimization_barrier pbroadcast pvary reduce_precision reshard "
    "sharding_constraint stop_gradient".split()
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


def follow(jaxpr: Jaxpr, names: Sequence[str], stacked: Mapping[str, int]) -> Uses:
    """Follow the arrays of a model through the program of one call, with marks.

    `names` are the paths of its first inputs, the arrays of the model, and `stacked`
    says how many of a kernel's leading axes are stack axes.
    """
    jaxpr, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    paths = [name for name, use in zip(names, used, strict=False) if use]
    uses = Uses(reached=set(paths))
    values: list[Value] = [{} for _ in jaxpr.invars]
    for k, (name, var) in enumerate(zip(paths, jaxpr.invars, strict=False)):
        shape: Any = var.aval.shape  # type: ignore[attr-defined]
        if len(shape) > 1:
            first = -stacked.get(name, 0)
            values[k] = {name: Trail(named(range(first, first + len(shape)), shape))}
    for value in _Walk(uses).run(jaxpr, values):
        for name, trail in kernels(value).items():
            if trail.unseen:
                uses.unseen.setdefault(name, trail.unseen)
            else:
                steps = [trail.by, *sorted(trail.through)]
                uses.outside.setdefault(name, listed(step for step in steps if step))
    return uses


class _Walk:
    """A walk through a program and the programs inside it."""

    def __init__(self, uses: Uses, depth: int = 0) -> None:
        self.uses, self.depth = uses, depth
        self.handlers: Mapping[str, Callable[[Any, list[Value]], list[Value]]] = {
            "mora_mark": self._mark,
            "reshape": self._reshape,
            "squeeze": self._reshape,
            "expand_dims": self._reshape,
            "broadcast_in_dim": self._reshape,
            "transpose": self._transpose,
            "slice": self._slice,
            "dynamic_slice": self._slice,
            "add": self._add,
            "add_any": self._add,
            "scan": self._scan,
            "while": self._while,
            "cond": self._cond,
            **dict.fromkeys(IDENTITIES, self._identity),
            **dict.fromkeys(PRODUCTS, self._product),
        }

    def run(self, jaxpr: Jaxpr, inputs: Sequence[Value]) -> list[Value]:
        """The values of the outputs of `jaxpr`."""
        known = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Value:
            return {} if isinstance(atom, Literal) else known.get(atom, {})

        for eqn in jaxpr.eqns:
            values = [read(atom) for atom in eqn.invars]
            if eqn.primitive is mark_p or any(values):
                known |= zip(eqn.outvars, self._step(eqn, values), strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _step(self, eqn: Any, values: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        if handler := self.handlers.get(name):
            return handler(eqn, values)
        opened = [_open(value) for value in eqn.params.values()]
        programs = [value for value in opened if isinstance(value, Jaxpr)]
        if len(programs) == 1:
            (inner,) = programs
            pairs = (inner.invars, eqn.invars), (inner.outvars, eqn.outvars)
            if all(_shapes(inside) == _shapes(outside) for inside, outside in pairs):
                return self.run(inner, values)
        if name in OPAQUE or name.endswith("_call") or programs:
            hide = functools.partial(dataclasses.replace, unseen=name)
            return [changed(joined(values), hide)] * len(eqn.outvars)
        return self._change(eqn, values)

    def _change(self, eqn: Any, values: list[Value]) -> list[Value]:
        """The handler of every primitive that has none: it changes numbers."""
        name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
        result = {}
        for start, trail in joined(values).items():
            at = [k for k, value in enumerate(values) if start in value]
            step = name if len(at) == 1 else f"{name} by itself"
            # A factor leaves the axes where they are.
            factor = name == "mul" or (name == "div" and at == [0])
            kept = factor and len(at) == 1 and eqn.invars[at[0]].aval.shape == shape
            result[start] = trail.passed(step, trail.view if kept else None)
        return [result] * len(eqn.outvars)

    def _identity(self, eqn: Any, values: list[Value]) -> list[Value]:
        results = []
        for var, value in zip(eqn.outvars, values, strict=False):
            if kernels(value) and not jnp.issubdtype(var.aval.dtype, jnp.floating):
                value, *_ = self._change(eqn, [value])
            results.append(value)
        return results

    def _reshape(self, eqn: Any, values: list[Value]) -> list[Value]:
        """A broadcast is a reshape too, unless it makes copies of numbers."""
        (before, *_), (after,) = eqn.invars, eqn.outvars
        if before.aval.size != after.aval.size:
            return self._change(eqn, values)
        move = functools.partial(reshape, shape=after.aval.shape)
        return [changed(values[0], lambda trail: trail.moved(move))]

    def _transpose(self, eqn: Any, values: list[Value]) -> list[Value]:
        def move(view: View) -> View:
            return tuple(view[k] for k in eqn.params["permutation"])

        return [changed(values[0], lambda trail: trail.moved(move))]

    def _slice(self, eqn: Any, values: list[Value]) -> list[Value]:
        """One layer of a stacked kernel is a kernel, since it has an M of its own."""
        shape, (value, *indices) = eqn.outvars[0].aval.shape, values
        (result,) = self._change(eqn, values)
        layers = {}
        for name, trail in () if kernels(joined(indices)) else kernels(value).items():
            if (layer := _layer_of_stack(trail, shape)) is not None:
                layers[name] = dataclasses.replace(trail, view=layer)
        return [{**result, **layers}]

    def _add(self, eqn: Any, values: list[Value]) -> list[Value]:
        """A bias may be added to a product, since it does not depend on the kernel."""
        result = {}
        for start, trail in joined(values).items():
            alone = sum(start in value for value in values) == 1
            result[start] = trail if alone and trail.by else trail.passed("add")
        return [result]

    def _product(self, eqn: Any, values: list[Value]) -> list[Value]:
        (changed,) = self._change(eqn, values)
        name, result = eqn.primitive.name, dict(changed)
        left, right, *_ = values
        for is_first, value, operand in ((True, left, right), (False, right, left)):
            for kernel, trail in kernels(value).items():
                if not trail.by and trail.through <= PREPARING and name != "gather":
                    self.uses.multiplied.add(kernel)
                if not trail.by and kernel not in operand:
                    result[kernel] = multiplied(eqn, kernel, trail, operand, is_first)
        return [result]

    def _mark(self, eqn: Any, values: list[Value]) -> list[Value]:
        call, lead, (value,) = eqn.params["call"], eqn.params["lead"], values
        if eqn.params["end"]:
            remaining = dict(value)
            remaining.pop(call, None)
            if trail := remaining.pop(call.name, None):
                self._check(call, trail, lead)
            return [remaining]
        shape, labels = eqn.outvars[0].aval.shape, call.product.einsum_labels
        letters = labels[0] if labels else range(len(shape) - lead)
        view = named([*(("vmap", k) for k in range(lead)), *letters], shape)
        return [{**value, call: Trail(view)}]

    def _check(self, call: Call, trail: Trail, lead: int) -> None:
        """Record what is wrong with the output of `call`, if anything is."""
        if trail.unseen:
            self.uses.unseen.setdefault(call.name, trail.unseen)
        elif wrong := fault(call, trail, lead):
            self.uses.faults.setdefault(call.name, f"{call.method} {wrong}")

    def _scan(self, eqn: Any, values: list[Value]) -> list[Value]:
        body = _open(eqn.params["jaxpr"])
        # JAX has had several names for these numbers, so shapes must tell: what is
        # stacked has one more axis outside of the body.
        carry, unstacked = (
            sum(len(a) == len(b) for a, b in zip(*shapes, strict=True))
            for shapes in (
                (_shapes(body.outvars), _shapes(eqn.outvars)),
                (_shapes(body.invars), _shapes(eqn.invars)),
            )
        )
        consts = unstacked - carry
        layers = [changed(value, Trail.in_one_round) for value in values[unstacked:]]
        loop = body, values[:consts], values[consts:unstacked], layers
        state, results = self._loop(*loop, self.depth + 1)

        def stacked(trail: Trail) -> Trail:
            return trail.after_all_rounds(self.depth)

        return [*state, *(changed(value, stacked) for value in results[carry:])]

    def _while(self, eqn: Any, values: list[Value]) -> list[Value]:
        start = eqn.params["cond_nconsts"]
        stop = start + eqn.params["body_nconsts"]
        body = _open(eqn.params["body_jaxpr"])
        return self._loop(body, values[start:stop], values[stop:], [], self.depth)[0]

    def _loop(
        self,
        body: Jaxpr,
        fixed: list[Value],
        state: list[Value],
        layers: list[Value],
        depth: int,
    ) -> tuple[list[Value], list[Value]]:
        """A state that holds before and after every round, and a round's outputs."""
        while True:  # until nothing more is lost: a trail loses its view only once
            # These uses are dropped, since the state may not hold in every round.
            walk = _Walk(Uses(), depth)
            results = walk.run(body, [*fixed, *state, *layers])
            pairs = zip(state, results, strict=False)
            weaker = [in_either(before, after) for before, after in pairs]
            if weaker == state:
                walk.uses = self.uses
                return state, walk.run(body, [*fixed, *state, *layers])
            state = weaker

    def _cond(self, eqn: Any, values: list[Value]) -> list[Value]:
        branches = [self.run(_open(b), values[1:]) for b in eqn.params["branches"]]
        return [
            functools.reduce(in_either, outputs)
            for outputs in zip(*branches, strict=True)
        ]


def _layer_of_stack(trail: Trail, shape: Any) -> View | None:
    """The view of a slice that takes one layer of a stack and all else whole."""
    if trail.by or trail.view is None:
        return None
    axes = []
    for axis, size in zip(trail.view, shape, strict=True):
        names: Any = [piece.axis for piece in axis]
        whole = length(axis) == size
        if not whole and (size > 1 or any(name >= 0 for name in names)):
            return None
        axes.append(axis if whole else ())
    return tuple(axes)


def _open(jaxpr: Any) -> Any:
    """The program inside of a closed one, which JAX 0.12 no longer tells apart."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _shapes(atoms: Sequence[Any]) -> list[Any]:
    return [getattr(atom.aval, "shape", None) for atom in atoms]
