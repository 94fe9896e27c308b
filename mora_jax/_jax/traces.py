"""Traces in which everything runs, and the origin of arrays as tracers know it."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.experimental.xla_metadata import set_xla_metadata

from mora_jax._jax.walk import IDENTITIES

_NUMBERS = itertools.count()


def split_static(args: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays and shapes in a tree of arguments, and a function to replace them."""
    leaves, structure = jax.tree.flatten(args)
    traced = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def join(arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        pairs = zip(leaves, traced, strict=True)
        values = [next(remaining) if is_array else leaf for leaf, is_array in pairs]
        return jax.tree.unflatten(structure, values)

    return list(itertools.compress(leaves, traced)), join


def fresh_shapes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The shapes of `function(*args, **kwargs)`, by a trace in which all of it runs."""
    # JAX keeps traces of inner functions that it compiles, such as `x @ y`, and does
    # not run them again. It keeps them by context, which includes the metadata of
    # operations; so a new value of it makes new traces.
    arrays, join = split_static((args, kwargs))

    def call(arrays: list[Any]) -> Any:
        args, kwargs = join(arrays)
        return function(*args, **kwargs)

    with set_xla_metadata(mora_jax_trace=str(next(_NUMBERS))):
        return jax.eval_shape(call, arrays)


UNCHANGED = IDENTITIES | {"convert_element_type", "stop_gradient"}
"""JAX's primitives after which an array has the numbers it had, in the same order."""

# Relations of an array to another one. An array that is alike has the same shape. One
# that is itself is the other array, unchanged but perhaps in another dtype. A derived
# one is made of the other array.
ALIKE, ITSELF, DERIVED = range(3)


def relation_of(start: jax.Array, end: jax.Array) -> int | None:
    """The relation of `end` to `start`, if any is known."""
    start, end = _inside(start), _inside(end)
    steps = _steps(start, end)
    if steps is not None:
        return ITSELF if steps <= UNCHANGED else DERIVED
    if end.shape != start.shape:
        return None
    return ITSELF if _equal(start, end) else ALIKE


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


def _equal(start: Any, end: Any) -> bool:
    """True if both arrays are known and have the same numbers, in any dtypes."""
    if isinstance(start, Tracer) or isinstance(end, Tracer):
        return False
    with jax.ensure_compile_time_eval():  # a trace may run
        return bool((end == start.astype(end.dtype)).all())
