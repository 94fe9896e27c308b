"""Which operand of a product is a kernel of the module that runs."""

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
from jax.core import Tracer

from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax.qwix import _private
from mora_jax.qwix._tracers import (
    are_of_one_trace,
    constant_of,
    current_trace,
    inside,
    step_of,
)

UNCHANGED = {"convert_element_type", "copy", "optimization_barrier"} | {
    "sharding_constraint",
    "reshard",
    "stop_gradient",
}
"""JAX's primitives after which a kernel has the features it had, in the same order."""

Link = Literal["perhaps made of it", "unknown", "equal", "itself", "made of it"]
LINKS: tuple[Link, ...] = Link.__args__  # type: ignore[attr-defined]
"""How an operand is linked to a kernel, by what it says about the product.

It may be made of the kernel, if it only has its shape; nothing may be known of it in a
function that JAX compiles for itself; it may have the kernel's numbers; be the kernel
as it stands, perhaps in another dtype; or be computed of it.
"""


@dataclasses.dataclass
class Run:
    """What a provider sees in one call of a model.

    Attributes:
      model: The class of the model. qwix makes a class for each model.
      specs: {(path of a kernel, its shape): its adapter}, of all calls of the model.
      first: Whether qwix calls the model to see what it multiplies.
      root: A reference to the scope of all modules that run, for a Linen model. What
        it holds may call methods of the model one after the other, which is one call.
      given: The model, its inputs and its inputs by name, to repeat a first call.
      level: The trace of JAX in which the model is called.
      used: The rules that have adapted a kernel, by identity.
      seen: The paths of arrays that a rule asks to adapt.
      asked: The paths of kernels whose M the call has.
      replaced: {path of a kernel: a reference to its array before this call quantized
        it}.
      outputs: {identity: output} of the products that were adapted.
      doubtful: The paths of kernels that an operand may be made of.
    """

    model: type
    specs: dict[tuple[str, tuple[int, ...]], AdapterSpec]
    first: bool
    root: Any = None
    given: Any = None
    level: Any = dataclasses.field(default_factory=current_trace)
    used: set[int] = dataclasses.field(default_factory=set)
    seen: set[str] = dataclasses.field(default_factory=set)
    asked: set[str] = dataclasses.field(default_factory=set)
    replaced: dict[str, Callable[[], Any]] = dataclasses.field(default_factory=dict)
    outputs: dict[int, Any] = dataclasses.field(default_factory=dict)
    doubtful: set[str] = dataclasses.field(default_factory=set)

    def note_output(self, y: jax.Array) -> None:
        """Note what a product with a kernel gives, which is no kernel any more."""
        if isinstance(y := inside(y), Tracer):  # the walk is through tracers alone
            self.outputs[id(y)] = y

    def note_replaced(self, place: str, kernel: jax.Array) -> None:
        """Note a kernel that this call has quantized, and keep it no longer for it."""
        self.replaced[place] = weakref.ref(kernel)

    def before(self, place: str) -> jax.Array | None:
        """A kernel that this call has quantized, as it was, if it is still used."""
        found = self.replaced.get(place)
        return found() if found else None

    def end(self) -> None:
        """Forget what belongs to a call of one method, and all arrays."""
        self.given = None
        self.doubtful, self.replaced, self.outputs = set(), {}, {}

    def is_of(self, model: Any) -> bool:
        """Whether the model is a part of what this call is a part of."""
        if self.root is None or type(model) is not self.model:
            return False
        return self.root() is model.scope.root


def root_of(model: Any) -> Any:
    """A reference to what lives as long as one `init` or `apply` of a Linen model."""
    if not isinstance(model, nn.Module) or model.scope is None:
        return None
    return weakref.ref(model.scope.root)


class Kernel(NamedTuple):
    """A kernel among the operands of a product.

    Attributes:
      rank: The place of the link in `LINKS`.
      at: The position of the operand.
      name: The name of the kernel in its module.
    """

    rank: int
    at: int
    name: str

    @property
    def link(self) -> Link:
        """How the operand is linked to the kernel."""
        return LINKS[self.rank]


def find_kernel(module: Any, operands: Sequence[Any], run: Run) -> Kernel | None:
    """The kernel among the operands; the last one, if all else is equal."""
    found = [
        Kernel(LINKS.index(link), at, name)
        for at, operand in enumerate(operands)
        for name, link in _links(module, operand, run)
    ]
    return max(found, default=None)


def _links(module: Any, operand: Any, run: Run) -> Iterator[tuple[str, Link]]:
    """The kernels of the module that an operand is linked to, by name."""
    is_quantized = _private.is_quantized(operand)
    array, path = _private.first_array(operand), _private.path_of(module)
    for name, parameter in _private.parameters_of(module).items():
        if name.endswith(SUFFIX):
            continue
        kernel = _private.first_array(parameter)
        if _private.is_quantized(parameter) and not is_quantized:
            kernel = run.before("/".join((*path, name)))
        elif is_quantized and not _private.is_quantized(parameter):
            continue
        if kernel is None:
            continue
        link = _link(kernel, array, run)
        if is_quantized:  # it is an operand as it stands alone
            alike = "equal" if array.shape == kernel.shape else None
            link = "itself" if link in ("itself", "made of it") else alike
        if link is not None:
            yield name, link


def _link(kernel: Any, array: Any, run: Run) -> Link | None:
    """How an array is linked to a kernel, if it is."""
    if array is kernel:
        return "itself"
    kernel, array = inside(kernel), inside(array)
    if isinstance(array, Tracer):
        return _traced_link(kernel, array, run)
    if isinstance(kernel, Tracer) or array.shape != kernel.shape:
        return None
    if _equal(kernel, array):
        return "equal"
    return "perhaps made of it" if array.ndim > 1 else None


def _traced_link(kernel: Any, array: Any, run: Run) -> Link | None:
    """By the operations that lead from the one to the other.

    Operations with several inputs are followed only if the array has the kernel's
    shape: masks and sums keep it, and few activations have it.
    """
    has_shape = array.shape == kernel.shape
    steps, done, waiting, inputs = set(), set(), [array], []
    while waiting:
        node = inside(waiting.pop())
        step = step_of(node)
        const = None if step else constant_of(node)
        if node is kernel or const is kernel or _equal(kernel, const):
            return "itself" if steps <= UNCHANGED else "made of it"
        if id(node) in done or id(node) in run.outputs:
            continue
        done.add(id(node))
        if step is not None:
            if has_shape or len(step.inputs) == 1:
                steps.add(step.primitive)
                waiting += step.inputs
        elif isinstance(const, Tracer):
            waiting.append(const)  # of the trace around
        elif const is None:
            inputs.append(node)
    if run.level == current_trace():
        return None  # all that leads here was seen
    hidden = (
        x.shape == kernel.shape and not are_of_one_trace(x, kernel) for x in inputs
    )
    return "unknown" if any(hidden) else None


def _equal(kernel: Any, array: Any) -> bool:
    """Whether both are known, and have the same numbers."""
    if isinstance(kernel, Tracer) or isinstance(array, Tracer):
        return False
    if getattr(array, "shape", None) != kernel.shape:
        return False
    with jax.ensure_compile_time_eval():  # a trace may run
        return bool((array == kernel.astype(array.dtype)).all())
