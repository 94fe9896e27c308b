"""Traces of calls with static arguments, and traces in which everything runs."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata

_NUMBERS = itertools.count()


def split_static(args: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Take the arrays and shapes, which are traced, out of a tree of arguments.

    Returns:
      The arrays, and a function that gives `args` with other arrays instead.
    """
    leaves, structure = jax.tree.flatten(args)
    traced = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
    pairs = list(zip(leaves, traced, strict=True))

    def join(arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        values = [next(remaining) if is_array else leaf for leaf, is_array in pairs]
        return jax.tree.unflatten(structure, values)

    return [leaf for leaf, is_array in pairs if is_array], join


def fresh_shapes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The shapes of `function(*args, **kwargs)`, by a trace in which all of it runs.

    JAX keeps traces of inner functions that it compiles, such as `x @ y`, and does not
    run them again. It keeps them by context, which includes the metadata of operations;
    so a new value of it makes new traces.
    """
    arrays, join = split_static((args, kwargs))

    def call(arrays: list[Any]) -> Any:
        args, kwargs = join(arrays)
        return function(*args, **kwargs)

    with set_xla_metadata(mora_jax_trace=str(next(_NUMBERS))):
        return jax.eval_shape(call, arrays)
