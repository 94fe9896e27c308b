"""Trails: how arrays depend on kernels and on inputs of layers, which marks show."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Primitive
from jax.interpreters import ad, batching, mlir, partial_eval

from mora_jax._trace_check.views import View
from mora_jax.products import Product

T = TypeVar("T")


@dataclasses.dataclass(eq=False, repr=False)
class Call:
    """One call of a method of a known layer; two calls are never equal.

    Attributes:
      name: The path of the kernel.
      product: The product that the method computes, according to the layer's rule.
      method: The method, such as "Dense.__call__".
      scale: The factor of the kernel by the rule: a number, the path of a parameter, ""
        for another array, or None.
      dtype: The dtype of the input, for lookups.
    """

    name: str
    product: Product
    method: str
    scale: float | str | None = None
    dtype: Any = None

    def __repr__(self) -> str:  # in a printed program
        return f"{self.method} of {self.name}"

    @functools.cached_property
    def transposed(self) -> "Call":
        """The transposed call, through which a gradient goes."""
        # Kept, and each is the other's: two calls are never equal, and a model that
        # takes a gradient of a gradient is back in the call where it began.
        call = dataclasses.replace(self, product=self.product.transposed)
        call.__dict__["transposed"] = self
        return call


def opened(jaxpr: Any) -> Any:
    """A program, which may be closed."""
    # JAX 0.12 no longer tells closed programs and others apart.
    return getattr(jaxpr, "jaxpr", jaxpr)


def inside(eqn: Any) -> list[Jaxpr]:
    """The programs inside a step of a program."""
    values: list[Any] = []
    for value in eqn.params.values():
        values += value if isinstance(value, tuple | list) else [value]
    return [p for p in map(opened, values) if isinstance(p, Jaxpr)]


def needed(program: Jaxpr, told: Sequence[T]) -> tuple[Jaxpr, list[T]]:
    """A program without what no output needs; what is told of its first inputs."""
    program, used = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    return program, list(itertools.compress(told, used))


mark_p = Primitive("mora_mark")


def mark(x: Any, call: Call, *, end: bool, m: Any = None) -> jax.Array:
    """`x`, with a mark that it is the input or (`end`) the output of `call`.

    `m` is the M that arrives at the call, if the model has its adapters.
    """
    operands = [jnp.asarray(x)] + ([] if m is None else [jnp.asarray(m)])
    return mark_p.bind(*operands, call=call, end=end, leads=(0,) * len(operands))


def _batch_mark(args: Any, axes: Any, *, leads: Any, **settings: Any) -> Any:
    mapped = [axis is not None for axis in axes]
    args = [
        jnp.moveaxis(x, axis, 0) if one else x
        for x, axis, one in zip(args, axes, mapped, strict=True)
    ]
    leads = tuple(lead + one for lead, one in zip(leads, mapped, strict=True))
    return mark_p.bind(*args, leads=leads, **settings), 0 if mapped[0] else None


def _differentiate_mark(args: Any, dots: Any, *, leads: Any, **settings: Any) -> Any:
    y, tangent = mark_p.bind(*args, leads=leads, **settings), dots[0]
    if not isinstance(tangent, ad.Zero):
        tangent = mark_p.bind(tangent, leads=leads[:1], **settings)
    return y, tangent


def _transpose_mark(y: Any, x: Any, *, call: Call, end: bool, leads: Any) -> Any:
    if isinstance(y, ad.Zero):
        return [y]
    return [mark_p.bind(y, call=call.transposed, end=not end, leads=leads)]


mark_p.def_impl(lambda x, *_, **__: x)
mark_p.def_abstract_eval(lambda x, *_, **__: x)
ad.primitive_jvps[mark_p] = _differentiate_mark
ad.primitive_transposes[mark_p] = _transpose_mark
batching.primitive_batchers[mark_p] = _batch_mark
mlir.register_lowering(mark_p, lambda context, x, *_, **__: [x])


@dataclasses.dataclass(frozen=True)
class Trail:
    """Way from one kernel, or from the input of one call, to an array.

    Attributes:
      view: The axes of the kernel (numbers, negative for stack axes), of the input or
        of their product (the kernel's, or letters of the einsum); None if they are
        lost.
      by: The primitive that multiplied the kernel; "" before that.
      call: The call whose input the kernel was multiplied with; None for any other
        array.
      through: The further primitives on the way that change numbers.
      factors: The factors among them, as in `Call.scale`, or what else they are.
      numbers: The function from the call's indices to these numbers, or to a constant;
        None if it is not known.
      wrong: A fault of the input that multiplies the kernel, or "".
      unseen: The reason why a trace cannot look into a primitive on the way, or "".
    """

    view: View | None
    by: str = ""
    call: Call | None = None
    through: frozenset[str] = frozenset()
    factors: tuple[float | str, ...] = ()
    numbers: Callable[[Any], Any] | None = None
    wrong: str = ""
    unseen: str = ""

    def moved(self, move: Callable[[View], View | None]) -> "Trail":
        """The trail with its axes moved."""
        view = None if self.view is None else move(self.view)
        return dataclasses.replace(self, view=view)

    def passed(self, name: str, view: View | None = None) -> "Trail":
        """The trail after the primitive called `name`, which changes numbers."""
        through = self.through | {name}
        return dataclasses.replace(self, through=through, view=view, numbers=None)


Start = str | Call | int | None
"""The path of an array; a call, for its input; None for constants; one of `rows`."""

Value = Mapping[Start, Trail]
"""All that an array depends on."""


def changed(value: Value, change: Callable[[Trail], Trail]) -> Value:
    """The value with each of its trails changed."""
    return {start: change(trail) for start, trail in value.items()}


def joined(values: Iterable[Value]) -> Value:
    """All that an array depends on that is computed from several arrays."""
    trails: dict[Start, Trail] = {}
    for start, trail in (pair for value in values for pair in value.items()):
        if (other := trails.setdefault(start, trail)) != trail:
            other = dataclasses.replace(other, view=None, numbers=None)
            through = trail.through | other.through
            unseen = trail.unseen or other.unseen
            trails[start] = dataclasses.replace(other, through=through, unseen=unseen)
    return trails


def in_either(left: Value, right: Value) -> Value:
    """A value that holds after either of two branches, or in every round of a loop."""
    return {
        start: trail
        if left.get(start) == right.get(start)
        else trail.passed("a branch or a loop")
        for start, trail in joined([left, right]).items()
    }


def kernels(value: Value) -> dict[str, Trail]:
    """The trails of a value that begin at kernels."""
    return {start: t for start, t in value.items() if isinstance(start, str)}


@dataclasses.dataclass
class Uses:
    """Uses of a model's arrays in one call.

    Attributes:
      reached: The paths of the arrays that the outputs depend on.
      multiplied: The paths of the arrays that are multiplied with something.
      faults: {path of a kernel: the fault of its layer, by the rule's product}.
      outside: {path of a kernel: the primitives outside of its layer that use it}.
      unseen: {path of a kernel: the reason why its use is not proven}.
      called: The paths of the kernels whose layers were called.
    """

    reached: set[str] = dataclasses.field(default_factory=set)
    multiplied: set[str] = dataclasses.field(default_factory=set)
    faults: dict[str, str] = dataclasses.field(default_factory=dict)
    outside: dict[str, str] = dataclasses.field(default_factory=dict)
    unseen: dict[str, str] = dataclasses.field(default_factory=dict)
    called: set[str] = dataclasses.field(default_factory=set)
