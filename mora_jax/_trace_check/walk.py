"""Walk through the program of a model's call, from its kernels to its outputs."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import Jaxpr, Literal

from mora_jax._plan.spec import SUFFIX
from mora_jax._trace_check import steps, trails
from mora_jax._trace_check.trails import Call, Trail, Uses, Value, changed, opened
from mora_jax._trace_check.views import named

IDENTITIES = frozenset(
    "copy copy_p device_put layout_constraint mesh_cast optimization_barrier "
    "pbroadcast pvary reshard sharding_constraint".split()
)
"""Primitives that leave numbers as they are."""

PRODUCTS = frozenset(
    "dot_general conv_general_dilated gather ragged_dot_general".split()
)
"""Primitives by which layers multiply an input with a kernel."""

PASSED = frozenset("concatenate div dynamic_slice gather mul reduce_sum slice".split())
"""Primitives that a kernel may pass before it multiplies."""

OPAQUE = frozenset("pure_callback io_callback shard_map custom_partitioning".split())
"""Primitives whose inside says nothing about whole arrays, as do all `*_call`."""

Values = list[Value]


def follow(jaxpr: Jaxpr, names: list[str], axes: dict[str, range], uses: Uses) -> None:
    """Add to `uses` those in the program of one call of a model, with marks.

    `names` are the paths of its first inputs, the arrays of the model, and `axes` has
    the axes of kernels, M's and parameters that scale kernels, as layers see them.
    """
    jaxpr, paths = trails.needed(jaxpr, names)
    uses.reached.update(paths)
    values: Values = [{} for _ in jaxpr.invars]
    for k, (name, var) in enumerate(zip(paths, jaxpr.invars, strict=False)):
        shape: Any = var.aval.shape  # type: ignore[attr-defined]
        if len(shape) > 1 or name in axes:
            # Stack axes have negative numbers, so that the others are the positions
            # of the letters in the einsum of the layer, which sees one of the stack.
            own = axes.get(name, range(len(shape)))
            numbers = [*range(len(own) - len(shape), 0), *own][: len(shape)]
            values[k] = {name: Trail(named(numbers, shape))}
    for value in Walk(uses).run(jaxpr, values):
        for name, trail in trails.kernels(value).items():
            if trail.unseen:
                uses.unseen.setdefault(name, trail.unseen)
            else:
                by = filter(None, [trail.by, *sorted(trail.through)])
                uses.outside.setdefault(name, steps.listed(by))


class Walk:
    """A walk through a program and the programs inside it."""

    in_either = staticmethod(trails.in_either)

    def __init__(self, uses: Uses) -> None:
        self.uses = uses
        self.handlers = {
            "mora_mark": self._mark,
            "scan": self._scan,
            "while": self._while,
            "cond": self._cond,
            **dict.fromkeys(PRODUCTS, self._product),
            **dict.fromkeys(IDENTITIES, lambda eqn, values: values),
        }

    def run(self, jaxpr: Jaxpr, inputs: Sequence[Value]) -> Values:
        """The values of the outputs of `jaxpr`."""
        known: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Value:
            if isinstance(atom, Literal):
                number = np.asarray(atom.val, atom.aval.dtype)  # type: ignore[attr-defined]
                return {None: Trail(None, numbers=lambda _: number)}
            return known.get(atom, {})

        for eqn in jaxpr.eqns:
            values = [read(atom) for atom in eqn.invars]
            if any(values) or eqn.primitive.name in ("mora_mark", "iota"):
                known |= zip(eqn.outvars, self.step(eqn, values), strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def step(self, eqn: Any, values: Values) -> Values:
        """The values of the outputs of an equation whose operands have `values`."""
        name = eqn.primitive.name
        if handler := self.handlers.get(name):
            return handler(eqn, values)
        if len(programs := trails.inside(eqn)) == 1:
            (inner,) = programs
            pairs = (inner.invars, eqn.invars), (inner.outvars, eqn.outvars)
            if all(shapes(inner) == shapes(outer) for inner, outer in pairs):
                if name in steps.OWN_DERIVATIVE:
                    return self._with_own_derivative(name, inner, values)
                return self.run(inner, values)
        if name in OPAQUE or name.endswith("_call") or programs:
            why = f"a trace cannot look into `{name}`"
            hide = functools.partial(dataclasses.replace, unseen=why, numbers=None)
            return [changed(trails.joined(values), hide)] * len(eqn.outvars)
        return [steps.after(eqn, values)] * len(eqn.outvars)

    def _with_own_derivative(self, name: str, inner: Jaxpr, values: Values) -> Values:
        called, self.uses.called = self.uses.called, set()
        results = self.run(inner, values)
        why = f"its layer is inside a `{name}`, whose derivative may be another for M"
        for kernel in self.uses.called:
            self.uses.unseen.setdefault(kernel, why)
        self.uses.called |= called
        return [_bypassed(value, name) for value in results]

    def _product(self, eqn: Any, values: Values) -> Values:
        name, result = eqn.primitive.name, dict(steps.after(eqn, values))
        left, right, *_ = values
        for is_first, value, operand in ((True, left, right), (False, right, left)):
            for kernel, trail in trails.kernels(value).items():
                if not trail.by and trail.through <= PASSED and name != "gather":
                    self.uses.multiplied.add(kernel)
                if not trail.by and kernel not in operand:
                    others = kernel, trail, operand, is_first
                    result[kernel] = steps.multiplied(eqn, *others)
        return [result]

    def _mark(self, eqn: Any, values: Values) -> Values:
        call, (lead, *leads) = eqn.params["call"], eqn.params["leads"]
        value, product = dict(values[0]), call.product
        if not eqn.params["end"]:
            shape, labels = eqn.outvars[0].aval.shape, product.einsum_labels
            rows = map(str, range(len(shape) - lead))
            names = steps.axis_names(labels, 0) if labels else rows
            lifted = [("vmap", k) for k in range(lead)]
            numbers = (lambda indices: indices) if product.takes_indices else None
            trail = Trail(named([*lifted, *names], shape), numbers=numbers)
            return [{**value, call: trail}]
        self.uses.called.add(call.name)
        value.pop(call, None)
        value.pop(call.scale, None)
        for lead_of_m, own in zip(leads, values[1:], strict=True):
            arriving = own.get(call.name + SUFFIX)
            wrong = "gets another array for its M"
            if arriving is not None:
                wrong = steps.fault_of_read(arriving, lead_of_m)
                wrong = wrong.replace("it", "its M", 1)
            if wrong:
                self.uses.faults.setdefault(call.name, f"{call.method} {wrong}")
        if trail := value.pop(call.name, None):
            if wrong := "" if trail.unseen else steps.fault(call, trail, lead):
                self.uses.faults.setdefault(call.name, f"{call.method} {wrong}")
            elif why := trail.unseen or steps.doubt(call, trail):
                self.uses.unseen.setdefault(call.name, why)
        return [value]

    def _scan(self, eqn: Any, values: Values) -> Values:
        body = opened(eqn.params["jaxpr"])
        # JAX has had several names for these numbers, so shapes must tell: what is
        # stacked has one more axis outside of the body.
        carry, unstacked = (
            sum(len(a) == len(b) for a, b in zip(*map(shapes, pair), strict=True))
            for pair in ((body.outvars, eqn.outvars), (body.invars, eqn.invars))
        )
        start = unstacked - carry
        fixed, state = values[:start], values[start:unstacked]
        layers = [changed(value, self.in_one_round) for value in values[unstacked:]]
        state, results = self._loop(body, fixed, state, layers)
        stacked = [changed(value, self.of_all_rounds) for value in results[carry:]]
        return [*state, *stacked]

    @staticmethod
    def in_one_round(trail: Trail) -> Trail:
        return trail.moved(lambda view: view[1:])

    @staticmethod
    def of_all_rounds(trail: Trail) -> Trail:
        # Of a product that a scan stacks, it is not known which rows it is of.
        hidden = dataclasses.replace(trail, unseen="a trace cannot look into `scan`")
        return hidden if trail.by else trail.passed("scan")

    def _while(self, eqn: Any, values: Values) -> Values:
        start = eqn.params["cond_nconsts"]
        stop = start + eqn.params["body_nconsts"]
        body = opened(eqn.params["body_jaxpr"])
        return self._loop(body, values[start:stop], values[stop:], [])[0]

    def _loop(
        self, body: Jaxpr, fixed: Values, state: Values, layers: Values
    ) -> tuple[Values, Values]:
        """A state that holds before and after every round, and a round's outputs."""
        while True:  # until nothing more is lost: a trail loses its view only once
            # These uses are dropped, since the state may not hold in every round.
            uses, self.uses = self.uses, Uses()
            results = self.run(body, [*fixed, *state, *layers])
            self.uses = uses
            weaker = list(map(self.in_either, state, results))
            if weaker == state:
                return state, self.run(body, [*fixed, *state, *layers])
            state = weaker

    def _cond(self, eqn: Any, values: Values) -> Values:
        branches = [self.run(opened(b), values[1:]) for b in eqn.params["branches"]]
        outputs = zip(*branches, strict=True)
        return [functools.reduce(self.in_either, values) for values in outputs]


def _bypassed(value: Value, name: str) -> Value:
    # M's gradient does not go through the kernel, but through the input and the output.
    starts = (start for start, t in value.items() if t.by or isinstance(start, Call))
    return {**value, **{s: value[s].passed(name, value[s].view) for s in starts}}


def shapes(atoms: Sequence[Any]) -> list[Any]:
    return [getattr(atom.aval, "shape", None) for atom in atoms]
