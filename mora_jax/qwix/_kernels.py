"""Search for the operand of a product that is a kernel of the module that runs.

qwix's own `find_param` takes an operand for a parameter if it is the same array, if
operations of one input make it of that array, or if it has the same shape. The last is
a guess: an input has a kernel's shape if it has as many rows as features. A delta of
the wrong product would go unseen. So an operand counts as a kernel here only if it is
the unchanged kernel, perhaps in another dtype; one that may be made of a kernel is an
error.
"""

from collections.abc import Sequence
from typing import Any

from mora_jax._jax.traces import ALIKE, DERIVED, ITSELF, relation_of
from mora_jax.qwix import _private


def find_kernel(
    module: Any, operands: Sequence[Any], pattern: str
) -> tuple[str, int] | None:
    """The name of the kernel that is an operand, and the position of the operand.

    Args:
      module: The module that runs.
      operands: The operands of a product. The last one counts, if all else is equal.
      pattern: The pattern of the rule, for messages.

    Raises:
      ValueError: An operand may be made of a kernel, or there are more than two.
    """
    found = [
        (relation, at, name)
        for name, parameter in _private.parameters_of(module).items()
        for at, operand in enumerate(operands)
        if (relation := _relation(parameter, operand)) is not None
    ]
    if not found:
        return None
    relation, at, name = max(found)
    if len(operands) != 2:
        why = f"an einsum with {len(operands)} operands has no adapter"
    elif relation == ITSELF:
        return name, at
    elif relation == DERIVED:
        why = "its module multiplies by what it makes of the kernel, not by itself"
    else:
        why = (
            "its module multiplies by an array of this shape that is not the kernel "
            "itself and may be what it makes of the kernel; in a function that JAX "
            "compiles for itself, as x @ kernel is, nothing tells: use jnp.dot or "
            "jnp.einsum of the kernel"
        )
    place = "/".join((*_private.path_of_call(), name))
    raise ValueError(f"{place}: {why}; or leave it out of module_path={pattern!r}")


def _relation(parameter: Any, operand: Any) -> int | None:
    """The relation of an operand to a parameter, if it has any."""
    is_quantized = _private.is_quantized(parameter)
    if is_quantized != _private.is_quantized(operand):
        return None
    found = relation_of(*map(_private.first_array, (parameter, operand)))
    if found == ALIKE and operand.ndim == 1:
        return None  # as are biases
    # A module can read a quantized kernel, and make nothing else of it.
    return min(found, ITSELF) if found and is_quantized else found
