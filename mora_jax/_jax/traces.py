"""Arguments of a traced function: the arrays among them, and what is static."""

import itertools
from collections.abc import Callable
from typing import Any

import jax


def split_static(args: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """JAX's arrays and shapes among arguments, and a function that replaces them."""
    # NumPy's stay what they are: code may compute with their numbers.
    leaves, structure = jax.tree.flatten(args)
    traced = [isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) for leaf in leaves]

    def join(arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        pairs = zip(leaves, traced, strict=True)
        values = [next(remaining) if is_array else leaf for leaf, is_array in pairs]
        return jax.tree.unflatten(structure, values)

    return list(itertools.compress(leaves, traced)), join
