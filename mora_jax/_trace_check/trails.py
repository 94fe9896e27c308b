"""Trails: how arrays depend on kernels and on inputs of layers, which marks show."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mora_jax._trace_check.views import View
from mora_jax.products import Product


@dataclasses.dataclass(eq=False, repr=False)
class Call:
    """One call of a method of a known layer; two calls are never equal.

    Attributes:
      name: The path of the kernel.
      product: The product that the method computes, according to the layer's rule.
      scaled: True if the rule says that the layer scales its kernel.
      method: The method, such as "Dense.__call__".
    """

    name: str
    product: Product
    scaled: bool
    method: str

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


mark_p = Primitive("mora_mark")


def mark(x: Any, call: Call, *, end: bool) -> jax.Array:
    """`x`, with a mark that it is the input or (`end`) the output of `call`."""
    return mark_p.bind(jnp.asarray(x), call=call, end=end, lead=0)


def _batch_mark(args: Any, axes: Any, *, lead: int, **settings: Any) -> Any:
    (x,), (axis,) = args, axes
    return mark_p.bind(jnp.moveaxis(x, axis, 0), lead=lead + 1, **settings), 0


def _transpose_mark(y: Any, x: Any, *, call: Call, end: bool, lead: int) -> Any:
    if isinstance(y, ad.Zero):
        return [y]
    return [mark_p.bind(y, call=call.transposed, end=not end, lead=lead)]


mark_p.def_impl(lambda x, **_: x)
mark_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(mark_p, _transpose_mark)
batching.primitive_batchers[mark_p] = _batch_mark
mlir.register_lowering(mark_p, lambda context, x, **_: [x])


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
      unseen: A primitive among them that a trace cannot look into, or "".
    """

    view: View | None
    by: str = ""
    call: Call | None = None
    through: frozenset[str] = frozenset()
    unseen: str = ""

    def moved(self, move: Callable[[View], View | None]) -> "Trail":
        """The trail with its axes moved."""
        view = None if self.view is None else move(self.view)
        return dataclasses.replace(self, view=view)

    def passed(self, name: str, view: View | None = None) -> "Trail":
        """The trail after the primitive called `name`, which changes numbers."""
        return dataclasses.replace(self, through=self.through | {name}, view=view)


Start = str | Call | int
"""The path of a kernel; a call, which stands for its input; or a number of `rows`."""

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
            through = trail.through | other.through
            unseen = trail.unseen or other.unseen
            trails[start] = Trail(None, other.by, other.call, through, unseen)
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
      unseen: {path of a kernel: the primitive that a trace cannot look into}.
    """

    reached: set[str] = dataclasses.field(default_factory=set)
    multiplied: set[str] = dataclasses.field(default_factory=set)
    faults: dict[str, str] = dataclasses.field(default_factory=dict)
    outside: dict[str, str] = dataclasses.field(default_factory=dict)
    unseen: dict[str, str] = dataclasses.field(default_factory=dict)
