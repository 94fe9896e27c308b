"""Search for the operand of a product that is a kernel of the module that runs.

qwix's own `find_param` takes an operand for a parameter if it is the same array, if
operations of one input make it of that array, or if it has the same shape. The last is
a guess: an input has a kernel's shape if it has as many rows as features. A delta of
the wrong product would go unseen. So an operand counts as a kernel here only if it is
the kernel as it stands, perhaps in another dtype; if it may be made of a kernel, that
is an error.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.core import Tracer

from mora_jax._jax.origin import inside, steps_between
from mora_jax._plan.spec import SUFFIX
from mora_jax.qwix import _private

UNCHANGED = {"convert_element_type", "copy", "optimization_barrier"} | {
    "sharding_constraint",
    "reshard",
    "stop_gradient",
}
"""JAX's primitives after which a kernel has the features it had, in the same order."""

ALIKE, ITSELF, DERIVED = range(3)
"""Relations of an operand to a kernel, by what they say about the product.

An operand that is alike has the kernel's shape; a derived one is made of the kernel.
"""


class Kernel(NamedTuple):
    """Kernel among the operands of a product.

    Attributes:
      relation: The relation of the operand to the kernel.
      at: The position of the operand.
      name: The name of the kernel in its module.
    """

    relation: int
    at: int
    name: str


def find_kernel(module: Any, operands: Sequence[Any], pattern: str) -> Kernel | None:
    """The kernel among the operands; the last one, if all else is equal.

    Args:
      module: The module that runs.
      operands: The operands of a product.
      pattern: The pattern of the rule, for messages.

    Raises:
      ValueError: An operand may be made of a kernel, or there are more than two.
    """
    kernels = [
        Kernel(relation, at, name)
        for name, parameter in _private.parameters_of(module).items()
        if not name.endswith(SUFFIX)
        for at, operand in enumerate(operands)
        if (relation := _relation(parameter, operand)) is not None
    ]
    kernel = max(kernels, default=None)
    if kernel is None or kernel.relation == ITSELF and len(operands) == 2:
        return kernel
    if len(operands) != 2:
        why = f"an einsum with {len(operands)} operands has no adapter"
    elif kernel.relation == DERIVED:
        why = "its module multiplies by what it makes of the kernel, not by itself"
    else:
        why = (
            "its module multiplies by an array of this shape that is not the kernel "
            "itself and may be what it makes of the kernel; in a function that JAX "
            "compiles for itself, as x @ kernel is, nothing tells: use jnp.dot or "
            "jnp.einsum of the kernel"
        )
    name = "/".join((*_private.path_of(module), kernel.name))
    raise ValueError(f"{name}: {why}; or leave it out of module_path={pattern!r}")


def _relation(parameter: Any, operand: Any) -> int | None:
    """The relation of an operand to a parameter, if it has any."""
    is_quantized = _private.is_quantized(parameter)
    if is_quantized != _private.is_quantized(operand):
        return None
    kernel, array = map(_private.first_array, (parameter, operand))
    steps = steps_between(kernel, array)
    if steps is not None:  # a quantized kernel can be read, and nothing else
        return ITSELF if is_quantized or steps <= UNCHANGED else DERIVED
    if array.shape != kernel.shape:
        return None
    if _equal(inside(kernel), inside(array)):
        return ITSELF
    return ALIKE if array.ndim > 1 else None


def _equal(kernel: Any, array: Any) -> bool:
    """True if both arrays are known and have the same numbers, in any dtypes."""
    if isinstance(kernel, Tracer) or isinstance(array, Tracer):
        return False
    with jax.ensure_compile_time_eval():  # a trace may run
        return bool((array == kernel.astype(array.dtype)).all())
