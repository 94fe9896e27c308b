"""Products that qwix sees as a model runs, and the kernels in them."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import qwix
from jax.core import Tracer

from mora_jax._jax.primitives import IDENTITIES
from mora_jax.products import Contraction, Product
from mora_jax.products.contraction import dot_general_equation
from mora_jax.qwix import _private


def arguments_of(op: str, args: Any, settings: Any) -> tuple[dict[str, Any], list[Any]]:
    """{name: argument} of a call of one of qwix's operations, and its operands."""
    # By the signatures of qwix: while a model runs, it replaces the code of JAX's.
    signature = inspect.signature(getattr(qwix.PtqProvider, op))
    given = signature.bind(None, *args, **settings).arguments
    names = ["operands"] if op == "einsum" else ["lhs", "rhs"]
    operands = [given.pop(name) for name in ("self", *names)][1:]
    return given, list(*operands) if op == "einsum" else operands


def product_of(
    op: str, operands: Sequence[Any], kernel_at: int, given: Mapping[str, Any]
) -> Product:
    """The product of two operands; the one at `kernel_at` is the kernel."""
    lhs, rhs = (operand.ndim for operand in operands)
    if op == "einsum":
        einsum = given["einsum_str"].replace(" ", "")
    else:
        einsum = dot_general_equation(lhs, rhs, given["dimension_numbers"])
    # A product has the kernel last, whichever operand of the call it is.
    terms, arrow, outputs = einsum.partition("->")
    x, kernel = terms.split(",")[:: 1 if kernel_at else -1]
    return Contraction.parse(f"{x},{kernel}{arrow}{outputs}", lhs if kernel_at else rhs)


UNCHANGED = IDENTITIES | {"convert_element_type", "stop_gradient"}
"""JAX's primitives after which an array has the numbers it had, in the same order."""

ALIKE, ITSELF, DERIVED = range(3)
"""An operand's relation to a parameter: of its shape, itself (cast), or made of it."""


def find_kernel(
    module: Any, operands: Sequence[Any], pattern: str
) -> tuple[str, int] | None:
    """The name of the kernel that is an operand, and the position of the operand."""
    # qwix's own `find_param` guesses: an operand is a parameter if operations of one
    # input make it of that, or by its shape, which an input of as many rows as features
    # has too. The delta of a wrong product would go unseen. So here only the unchanged
    # kernel counts, perhaps in another dtype; what may be made of it is an error.
    found = [
        (relation, at, name)
        for name, parameter in _private.parameters_of(module).items()
        for at, operand in enumerate(operands)
        if (relation := _relation_of(parameter, operand)) is not None
    ]
    if not found:
        return None
    relation, at, name = max(found)  # the last operand, if all else is equal
    if len(operands) != 2:
        why = f"an einsum with {len(operands)} operands has no adapter"
    elif relation == ITSELF:
        return name, at
    elif relation == DERIVED:
        why = "its module multiplies by what it makes of the kernel, not by itself"
    else:
        array = "an array of this shape that is not the kernel itself and may be"
        told = "in a function that JAX compiles, as x @ kernel is, nothing tells"
        why = f"its module multiplies by {array} what it makes of the kernel; {told}"
        why += ": use jnp.dot or jnp.einsum of the kernel"
    place = "/".join((*_private.path_of_call(), name))
    raise ValueError(f"{place}: {why}; or leave it out of module_path={pattern!r}")


def _relation_of(parameter: Any, operand: Any) -> int | None:
    """The relation of an operand to a parameter, if any is known."""
    is_quantized = _private.is_quantized(parameter)
    if is_quantized != _private.is_quantized(operand):
        return None
    # Of quantized ones these are the integers.
    start, end = (_inside(jax.tree.leaves(a)[0]) for a in (parameter, operand))
    if (steps := _steps(start, end)) is not None:
        # Of a quantized kernel a module can make nothing: it reads it.
        return ITSELF if is_quantized or steps <= UNCHANGED else DERIVED
    if end.shape != start.shape or end.ndim == 1:  # as are biases
        return None
    if isinstance(start, Tracer) or isinstance(end, Tracer):
        return ALIKE
    with jax.ensure_compile_time_eval():  # a trace may run
        return ITSELF if (end == start.astype(end.dtype)).all() else ALIKE


def _steps(start: Any, end: Any) -> set[str] | None:
    """The names of operations of one input that make `end` of `start`, if such do."""
    steps = set()
    while end is not start:
        step = getattr(end, "parent", None)
        if step and len(step.in_tracers) == 1:
            steps.add(str(step.primitive))
            (end,) = step.in_tracers
        elif step or not hasattr(end, "get_const"):
            return None
        else:  # an input of a trace may stand for an array that is known around it
            end = end.get_const()
        end = _inside(end)
    return steps


def _inside(array: Any) -> Any:
    """The array that a tracer of a derivative or of a batch has inside."""
    while isinstance(array, Tracer) and not hasattr(array, "parent"):
        inner = getattr(array, "primal", getattr(array, "val", None))
        if not hasattr(inner, "shape"):
            break
        array = inner
    return array
