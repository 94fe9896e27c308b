"""Marks: steps that compute nothing, where calls of known layers begin and end.

A model is traced with marks and companions of its kernels, to which its layers add no
delta then. Without what is done to these alone, it must be the same program as before
(`difference`). Code that counts leaves, or asks for types of layers, makes another.
"""

import dataclasses
import enum
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal, Primitive
from jax.interpreters import ad, batching, mlir

from mora_jax._jax.walk import inside, needed, opened


@dataclasses.dataclass(frozen=True)
class Claim:
    """A product of an input with a kernel, as a trace recognises it."""

    # The letters of the axes of input, kernel and output; () for another product.
    einsum: tuple[str, ...] = ()
    primitive: str = ""  # that multiplies; "" for any
    passes: frozenset[str] = frozenset()  # linear ones for input, kernel and product
    stand_ins: frozenset[str] = frozenset()  # which do it where the kernel is small
    # Of a lookup (words of a rule, the function from indices and the number of rows to
    # the rows that are taken). The first is claimed; an error names another that fits.
    rows: tuple[tuple[str, Callable[[Any, int], Any]], ...] = ()
    reads: bool = False  # True for any use of the kernel: the mark is on what is read

    def axis_names(self, k: int, ndim: int) -> list[str | int]:
        """Names in views of the axes of an input (k = 0) or output (2); [] for any."""
        if self.einsum:  # a kernel's are numbers, since several einsums may read it
            kernel = self.einsum[1]
            return [kernel.index(c) if c in kernel else c for c in self.einsum[k]]
        if k == 0:
            return [*map(str, range(ndim))]
        return [*map(str, range(ndim - 1)), 1] if self.rows else []


@dataclasses.dataclass(eq=False, repr=False)
class MarkedCall:
    """One call of a method of a known layer; two calls are never equal."""

    name: str  # the path of the kernel
    claim: Claim  # the product that the method computes, according to the layer's rule
    method: str  # such as "Dense.__call__"
    # The rule's factor: a number, a parameter's path, "" for another array, or None.
    scale: float | str | None = None
    dtype: Any = None  # of the input, for lookups
    companion: str = ""  # the path of the array that is trained beside the kernel

    def __repr__(self) -> str:  # in a printed program
        return f"{self.method} of {self.name}"

    @functools.cached_property
    def transposed(self) -> "MarkedCall":
        """The transposed call, through which a gradient goes."""
        # Kept, and each is the other's: two calls are never equal, and a model that
        # takes a gradient of a gradient is back in the call where it began.
        claim = dataclasses.replace(self.claim, einsum=self.claim.einsum[::-1])
        call = dataclasses.replace(self, claim=claim)
        call.__dict__["transposed"] = self
        return call


mark_p = Primitive("mark")


def mark(x: Any, call: MarkedCall, *, end: bool, companion: Any = None) -> jax.Array:
    """`x`, with a mark that it is the input or (`end`) the output of `call`.

    `companion` is the array that arrives there as `call.companion`, if one does. The
    `mapped` axes of each array, in its equation, are those over which it is vmapped.
    """
    arrays = [jnp.asarray(array) for array in (x, companion) if array is not None]
    return mark_p.bind(*arrays, call=call, end=end, mapped=((),) * len(arrays))


def calls_in(program: Jaxpr) -> Iterator[MarkedCall]:
    """The calls that are marked in a program, those in programs inside first."""
    for eqn in program.eqns:
        for inner in inside(eqn):
            yield from calls_in(inner)
        if eqn.primitive is mark_p:
            yield eqn.params["call"]


def _batch_mark(args: Any, axes: Any, *, mapped: Any, **settings: Any) -> Any:
    # All axes stay where they are: a transpose would be in no program without marks.
    mapped = tuple(
        own if axis is None else (*(k + (k >= axis) for k in own), axis)
        for own, axis in zip(mapped, axes, strict=True)
    )
    return mark_p.bind(*args, mapped=mapped, **settings), axes[0]


def _differentiate_mark(args: Any, dots: Any, *, mapped: Any, **settings: Any) -> Any:
    y, tangent = mark_p.bind(*args, mapped=mapped, **settings), dots[0]
    if not isinstance(tangent, ad.Zero):
        tangent = mark_p.bind(tangent, mapped=mapped[:1], **settings)
    return y, tangent


def _transpose_mark(y: Any, x: Any, *, call: MarkedCall, end: bool, mapped: Any) -> Any:
    if isinstance(y, ad.Zero):
        return [y]
    return [mark_p.bind(y, call=call.transposed, end=not end, mapped=mapped)]


mark_p.def_impl(lambda x, *_, **__: x)
mark_p.def_abstract_eval(lambda x, *_, **__: x)
ad.primitive_jvps[mark_p] = _differentiate_mark
ad.primitive_transposes[mark_p] = _transpose_mark
batching.primitive_batchers[mark_p] = _batch_mark
mlir.register_lowering(mark_p, lambda context, x, *_, **__: [x])


class Settings(NamedTuple):
    """The parameters of a primitive, as two traces are compared by them."""

    structure: Any  # of a tree
    leaves: tuple[Hashable, ...]  # numbers and texts; None for other objects

    def __repr__(self) -> str:
        params = jax.tree.unflatten(self.structure, self.leaves)
        known = {name: value for name, value in params.items() if value is not None}
        return " ".join(f"{name}={value}" for name, value in known.items())


class Step(NamedTuple):
    """A step of a program, as two programs are compared by it."""

    primitive: str
    arrays: str  # shapes and dtypes of operands and outputs; numbers themselves
    settings: Settings  # such as the axes of a sum

    def __str__(self) -> str:
        return " ".join(filter(None, map(str, self)))


def difference(base: Jaxpr, other: Jaxpr, added: Sequence[bool]) -> str:
    """The first step in which two programs differ, or "".

    `added` says which of the other program's first inputs the base lacks.
    """
    before, _ = _steps(*needed(base, []))
    after, _ = _steps(*needed(other, added))
    for pair in itertools.zip_longest(after, before, fillvalue="the end"):
        if pair[0] != pair[1]:
            return " instead of ".join(map(str, pair))
    return ""


def _steps(program: Jaxpr, added: Sequence[bool]) -> tuple[list[Step], list[bool]]:
    """The steps that depend on nothing `added`, and which outputs depend on it."""
    steps: list[Step] = []
    new = set(itertools.compress(program.invars, added))
    marked: dict[Any, Literal] = {}  # numbers, by the variables that marks make of them
    for eqn in program.eqns:
        operands = [
            v if isinstance(v, Literal) else marked.get(v, v) for v in eqn.invars
        ]
        flags = [not isinstance(v, Literal) and v in new for v in eqn.invars]
        results = [any(flags)] * len(eqn.outvars)
        programs = inside(eqn)
        if eqn.primitive is mark_p:
            results = flags[:1]
            if isinstance(operands[0], Literal):
                marked[eqn.outvars[0]] = operands[0]
        elif programs:
            inner_steps, results = _steps_inside(eqn, programs, flags)
            if inner_steps:
                steps += [_step_around(eqn, operands), *inner_steps]
        elif not any(flags):
            arrays = " ".join(map(_shown, [*operands, *eqn.outvars]))
            steps.append(Step(eqn.primitive.name, arrays, _settings(eqn.params)))
        new |= set(itertools.compress(eqn.outvars, results))
    last = [not isinstance(v, Literal) and v in new for v in program.outvars]
    return steps, last


def _steps_inside(
    eqn: Any, programs: Sequence[Jaxpr], flags: list[bool]
) -> tuple[list[Step], list[bool]]:
    """The same of the programs inside of a step whose operands have `flags`."""
    steps: list[Step] = []
    results = [False] * len(eqn.outvars)
    for inner in programs:
        inner_steps, last = _steps(inner, _operands(eqn, inner, flags))
        steps += inner_steps
        if len(last) == len(results):
            results = [a or b for a, b in zip(results, last, strict=True)]
    return steps, results


def _step_around(eqn: Any, operands: Sequence[Any]) -> Step:
    """A step with programs inside, without what is counted or named in it.

    A companion is one more operand of a loop or a call. Numbers among the operands,
    such as the index of a branch, and the length of a scan stay the same beside it.
    """
    numbers = [_shown(atom) for atom in operands if isinstance(atom, Literal)]
    own = {k: v for k, v in eqn.params.items() if k in ("length", "reverse")}
    return Step(eqn.primitive.name, " ".join(numbers), _settings(own))


def _settings(params: Mapping[str, Any]) -> Settings:
    """The numbers, texts and dtypes among the parameters of a primitive.

    Other objects are left out, since each trace may make them again.
    """
    leaves, structure = jax.tree.flatten(dict(params))
    known = [x if isinstance(x, bool | int | str) else _other(x) for x in leaves]
    return Settings(structure, tuple(known))


def _other(leaf: Any) -> Hashable:
    """A leaf of parameters other than whole numbers and texts, as it is compared."""
    if isinstance(leaf, float | complex | np.dtype | enum.Enum):
        return str(leaf)  # NaN is not equal to itself
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        fields = dataclasses.fields(leaf)
        return _settings({field.name: getattr(leaf, field.name) for field in fields})
    return None


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
