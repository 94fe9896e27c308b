"""Walk through a program by an abstract interpretation, over any domain.

A walk goes through a program in order and keeps a value for each array. A `Domain` says
what values are and what primitives make of them. The walk knows the rest: the programs
inside of primitives, how often they run, and which array decides that.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from jax.extend.core import Jaxpr, Literal
from jax.interpreters import partial_eval

from mora_jax._jax.primitives import Kind, kind_of

T = TypeVar("T")
CALLS = Kind.CALL, Kind.OWN_DERIVATIVE


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
    # The same for a walk through a program that runs only if an array says so.
    under: Callable[[T], Any]
    # The outputs of a branch or a loop: its programs' outputs, and what depends on the
    # array that chooses the branch or ends the loop.
    chosen: Callable[[Any, T, list[T]], list[T]]


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
    kind = kind_of(eqn.primitive.name)
    if kind is Kind.IDENTITY:
        return values
    if kind is Kind.CONTROL:
        return _CONTROL[eqn.primitive.name](domain, eqn, values)
    if kind in CALLS and (inner := called(eqn)):
        outputs = walk(domain, inner, values)
        if kind is Kind.OWN_DERIVATIVE:
            return domain.bypassed(eqn, outputs)
        return outputs
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
    fixed = values[:start]
    state = _invariant(domain, body, fixed, values[start:unstacked], layers)
    results = walk(domain, body, [*fixed, *state, *layers])
    return [*state, *(domain.stacked(value) for value in results[carry:])]


def _while(domain: Domain[T], eqn: Any, values: list[T]) -> list[T]:
    start = eqn.params["cond_nconsts"]
    stop = start + eqn.params["body_nconsts"]
    body = opened(eqn.params["body_jaxpr"])
    fixed = values[start:stop]
    state = _invariant(domain, body, fixed, values[stop:], [])
    # The condition is evaluated before every round. It says which of the states that
    # rounds leave is the output, and how often the body runs.
    condition = opened(eqn.params["cond_jaxpr"])
    seen = [*values[:start], *state]
    (goes_on,) = walk(domain.trial(), condition, seen)
    inside_loop = domain.under(goes_on)
    walk(inside_loop, condition, seen)
    walk(inside_loop, body, [*fixed, *state])
    return domain.chosen(eqn, goes_on, state)


def _invariant(
    domain: Domain[T], body: Jaxpr, fixed: list[T], state: list[T], layers: list[T]
) -> list[T]:
    """A state that holds before and after every round."""
    while True:  # until nothing more is lost
        # The state may not hold in every round.
        results = walk(domain.trial(), body, [*fixed, *state, *layers])
        weaker = list(map(domain.join, state, results))
        if weaker == state:
            return state
        state = weaker


def _cond(domain: Domain[T], eqn: Any, values: list[T]) -> list[T]:
    index, *operands = values
    programs = map(opened, eqn.params["branches"])
    inside_branch = domain.under(index)
    branches = [walk(inside_branch, program, operands) for program in programs]
    outputs = [
        functools.reduce(domain.join, each) for each in zip(*branches, strict=True)
    ]
    return domain.chosen(eqn, index, outputs)


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


def primitive_names(program: Jaxpr) -> list[str]:
    """The names of a program's primitives in order, with those inside of its steps."""
    names = []
    for eqn in program.eqns:
        names.append(eqn.primitive.name)
        for inner in inside(eqn):
            names += primitive_names(inner)
    return names


def called(eqn: Any) -> Jaxpr | None:
    """The program that a step of `CALLS` runs with its operands and nothing else.

    None if it has other programs, or gives them something else.
    """
    programs = inside(eqn)
    if len(programs) != 1:
        return None
    (inner,) = programs
    # A `shard_map` over several devices gives each of them a part of an operand.
    same_operands = shapes(inner.invars) == shapes(eqn.invars)
    same_outputs = shapes(inner.outvars) == shapes(eqn.outvars)
    return inner if same_operands and same_outputs else None


def is_unseen(eqn: Any) -> bool:
    """True if nothing is known of what a step does with whole arrays."""
    kind = kind_of(eqn.primitive.name)
    if kind in CALLS:
        return called(eqn) is None
    return kind is Kind.UNSEEN


def needed(program: Jaxpr, told: Sequence[Any]) -> tuple[Jaxpr, list[Any]]:
    """A program without what no output needs; what is told of its first inputs."""
    program, used = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    return program, list(itertools.compress(told, used))


def shapes(atoms: Sequence[Any]) -> list[Any]:
    """The shapes of arrays; None for others, such as tokens."""
    return [getattr(atom.aval, "shape", None) for atom in atoms]
