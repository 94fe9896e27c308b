"""Arguments of a traced call, of which some are static."""

from collections.abc import Callable
from typing import Any

import jax


def split_static(args: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Split arguments into those that are traced, arrays and shapes, and the others.

    Args:
      args: Any pytree.

    Returns:
      The arrays, and a function that gives `args` with other arrays instead.
    """
    leaves, structure = jax.tree.flatten(args)
    traced = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def join(arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        pairs = zip(leaves, traced, strict=True)
        values = [next(remaining) if is_array else leaf for leaf, is_array in pairs]
        return jax.tree.unflatten(structure, values)

    pairs = zip(leaves, traced, strict=True)
    return [leaf for leaf, is_array in pairs if is_array], join
