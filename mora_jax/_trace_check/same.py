"""Comparison of the programs of a model without and with companions of its kernels.

While a model is traced with marks, its layers add no delta. So the two programs must be
the same, apart from marks and from what is done to the companions alone. Code that
counts its own leaves, or that asks for the type of its layers, makes another one.
"""

import itertools
import operator
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Jaxpr, Literal

from mora_jax._jax.walk import inside, needed, opened
from mora_jax._trace_check.marks import mark_p


def difference(base: Jaxpr, other: Jaxpr, added: Sequence[bool]) -> str:
    """The first step in which two programs differ, or "".

    `added` says which of the other program's first inputs the base lacks.
    """
    steps = _steps(*needed(base, [])), _steps(*needed(other, added))
    for before, after in itertools.zip_longest(*steps):
        if before != after:
            told = (" ".join(map(str, step or ["the end"])) for step in (after, before))
            return " instead of ".join(told)
    return ""


def _steps(program: Jaxpr, added: Sequence[bool]) -> Generator[Any, None, list[bool]]:
    """Yield the steps that depend on nothing `added`; return which outputs do."""
    new = set(itertools.compress(program.invars, added))
    for eqn in program.eqns:
        flags = [not isinstance(v, Literal) and v in new for v in eqn.invars]
        results = [any(flags)] * len(eqn.outvars)
        if eqn.primitive is mark_p:
            results = flags[:1]
        elif programs := inside(eqn):
            results = [False] * len(eqn.outvars)
            for inner in programs:
                last = yield from _steps(inner, _operands(eqn, inner, flags))
                if len(last) == len(results):
                    results = list(map(operator.or_, results, last))
        elif not any(flags):
            yield (eqn.primitive.name, *map(_shown, eqn.invars + eqn.outvars))
        new |= set(itertools.compress(eqn.outvars, results))
    return [not isinstance(v, Literal) and v in new for v in program.outvars]


def _operands(eqn: Any, inner: Jaxpr, flags: list[bool]) -> list[bool]:
    """The flags of the operands of `eqn` that go to one program inside it."""
    number = len(inner.invars)
    if opened(eqn.params.get("cond_jaxpr")) is inner:  # the body's go between
        first = eqn.params["cond_nconsts"]
        return flags[:first] + flags[len(flags) - number + first :]
    return ([False] * number + flags)[len(flags) :]  # a `cond` has its index first


def _shown(atom: Any) -> str:
    """A number, or the shape and dtype of an array."""
    if isinstance(atom, Literal) and np.ndim(atom.val) == 0:
        return str(np.asarray(atom.val))  # JAX 0.8 has a type of its own
    return getattr(atom.aval, "str_short", lambda: str(atom.aval))()
