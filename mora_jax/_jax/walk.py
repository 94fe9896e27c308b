"""Walk through a program by an abstract interpretation, over any domain.

A walk goes through a program in order and keeps a value for each array. A `Domain` says
what values are and what primitives make of them. The walk knows the rest: the programs
inside of primitives, and how often they run.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from jax.extend.core import Jaxpr, Literal
from jax.interpreters import partial_eval

T = TypeVar("T")

IDENTITIES = frozenset(  # primitives that leave numbers as they are
    "copy copy_p device_put layout_constraint mesh_cast optimization_barrier "
    "pbroadcast pvary reshard sharding_constraint".split()
)

OWN_DERIVATIVE = frozenset({"custom_jvp_call", "custom_vjp_call"})
"""Primitives whose derivatives are not what their programs have."""


class Domain(Protocol[T]):
    """The values of a walk, compared by ==, and the functions between them."""

    nothing: T  # of an array that nothing is known of
    constant: Callable[[Literal], T]  # of a number in the program
    step: Callable[[Any, list[T]], list[T]]  # the outputs of an equation
    # A value that holds after either of two branches, and in every round. It may change
    # a value a few times at most, or no walk through a loop would end.
    join: Callable[[T, T], T]
    sliced: Callable[[T], T]  # a round's part of an array along which a scan runs
    stacked: Callable[[T], T]  # the array that a scan makes of one in each round
    trial: Callable[[], Any]  # the same for a walk whose values alone are kept
    # The outputs of an equation whose program has a derivative of its own.
    bypassed: Callable[[Any, list[T]], list[T]]


def walk(domain: Domain[T], program: Jaxpr, inputs: Sequence[T]) -> list[T]:
    """The values of the outputs of `program`."""
    known: dict[Any, T] = dict(zip(program.invars, inputs, strict=True))

    def read(atom: Any) -> T:
        if isinstance(atom, Literal):
            return domain.constant(atom)
        return known.get(atom, domain.nothing)

    for eqn in program.eqns:
        values = [read(atom) for atom in eqn.invars]
        known |= zip(eqn.outvars, _outputs(domain, eqn, values), strict=True)
    return [read(atom) for atom in program.outvars]


def _outputs(domain: Domain[T], eqn: Any, values: list[T]) -> list[T]:
    name = eqn.primitive.name
    if name in IDENTITIES:
        return values
    if name in _CONTROL:
        return _CONTROL[name](domain, eqn, values)
    if inner := _called(eqn):
        outputs = walk(domain, inner, values)
        return domain.bypassed(eqn, outputs) if name in OWN_DERIVATIVE else outputs
    return domain.step(eqn, values)


def _scan(domain: Domain[T], eqn: Any, values: list[T]) -> list[T]:
    body = opened(eqn.params["jaxpr"])
    # JAX has had several names for these numbers, so shapes must tell: what is stacked
    # has one more axis outside of the body.
    carry, unstacked = (
        sum(len(a) == len(b) for a, b in zip(*map(shapes, pair), strict=True))
        for pair in ((body.outvars, eqn.outvars), (body.invars, eqn.invars))
    )
    start = unstacked - carry
    layers = [domain.sliced(value) for value in values[unstacked:]]
    state = values[start:unstacked]
    state, results = _loop(domain, body, values[:start], state, layers)
    return [*state, *(domain.stacked(value) for value in results[carry:])]


def _while(domain: Domain[T], eqn: Any, values: list[T]) -> list[T]:
    start = eqn.params["cond_nconsts"]
    stop = start + eqn.params["body_nconsts"]
    body = opened(eqn.params["body_jaxpr"])
    return _loop(domain, body, values[start:stop], values[stop:], [])[0]


def _loop(
    domain: Domain[T], body: Jaxpr, fixed: list[T], state: list[T], layers: list[T]
) -> tuple[list[T], list[T]]:
    """A state that holds before and after every round, and a round's outputs."""
    while True:  # until nothing more is lost
        # The state may not hold in every round.
        results = walk(domain.trial(), body, [*fixed, *state, *layers])
        weaker = list(map(domain.join, state, results))
        if weaker == state:
            return state, walk(domain, body, [*fixed, *state, *layers])
        state = weaker


def _cond(domain: Domain[T], eqn: Any, values: list[T]) -> list[T]:
    programs = map(opened, eqn.params["branches"])
    branches = [walk(domain, program, values[1:]) for program in programs]
    return [functools.reduce(domain.join, each) for each in zip(*branches, strict=True)]


_CONTROL = {"scan": _scan, "while": _while, "cond": _cond}


def opened(program: Any) -> Any:
    """A program, which may be closed."""
    # JAX 0.12 no longer tells closed programs and others apart.
    return getattr(program, "jaxpr", program)


def inside(eqn: Any) -> list[Jaxpr]:
    """The programs inside a step of a program."""
    programs = [
        getattr(part, "jaxpr", part)  # as in `opened`
        for value in eqn.params.values()
        for part in (value if isinstance(value, tuple | list) else (value,))
    ]
    return [program for program in programs if isinstance(program, Jaxpr)]


def _called(eqn: Any) -> Jaxpr | None:
    """The program that a step calls with its operands, if it does."""
    if len(programs := inside(eqn)) != 1:
        return None
    (inner,) = programs
    pairs = (inner.invars, eqn.invars), (inner.outvars, eqn.outvars)
    return inner if all(shapes(a) == shapes(b) for a, b in pairs) else None


def is_opaque(eqn: Any) -> bool:
    """True if nothing is known of what a step does with whole arrays."""
    # Such as a kernel of Pallas, a callback, or a program for each device of a mesh.
    return eqn.primitive.name.endswith(("_call", "_callback")) or bool(inside(eqn))


def needed(program: Jaxpr, told: Sequence[Any]) -> tuple[Jaxpr, list[Any]]:
    """A program without what no output needs; what is told of its first inputs."""
    program, used = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    return program, list(itertools.compress(told, used))


def shapes(atoms: Sequence[Any]) -> list[Any]:
    """The shapes of arrays; None for others, such as tokens."""
    return [getattr(atom.aval, "shape", None) for atom in atoms]
