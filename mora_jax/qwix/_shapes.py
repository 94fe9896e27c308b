"""What a call gives, without computing it."""

import itertools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata

tracing_anew: ContextVar[bool] = ContextVar("tracing_anew", default=False)
"""Whether `shapes_of` runs."""

_NUMBERS = itertools.count()


def shapes_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The shapes of `function(*args, **kwargs)`.

    Only arrays and shapes among the arguments are traced. Everything else is static,
    as it is for `mora_jax.linen.plan`.

    Everything inside is traced anew. Otherwise JAX would take what it keeps of inner
    functions that it compiles, such as `x @ y`, and qwix would not see their products.
    What is kept belongs to a context, of which the metadata of operations is a part.
    """
    inputs, structure = jax.tree.flatten((args, kwargs))
    traced = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in inputs]

    def call(arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        values = [
            next(remaining) if is_array else leaf
            for leaf, is_array in zip(inputs, traced, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(structure, values)
        return function(*args, **kwargs)

    arrays = [leaf for leaf, is_array in zip(inputs, traced, strict=True) if is_array]
    token = tracing_anew.set(True)
    try:
        with set_xla_metadata(mora_jax_trace=str(next(_NUMBERS))):
            return jax.eval_shape(call, arrays)
    finally:
        tracing_anew.reset(token)
