"""Arguments of a traced function: the arrays among them, and what is static."""

import itertools
from collections.abc import Callable
from typing import Any

import jax


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
