"""Paths that differ in nothing but numbers, such as the layers of a model."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def starred(path: str) -> str:
    """Return `path` with "*" instead of numbers."""
    return re.sub(r"\d+", "*", path)


def shown(paths: Sequence[str]) -> str:
    """Return paths that are alike as one text: "l1/kernel" or "l*/kernel (3)"."""
    return paths[0] if len(paths) == 1 else f"{starred(paths[0])} ({len(paths)})"


def alike(items: Iterable[T], kind: Callable[[T], tuple[Any, ...]]) -> list[list[T]]:
    """Return the items in lists of one kind each.

    `kind` is a function of an item to its path and to what else must be equal.
    """
    kinds: dict[tuple[Any, ...], list[T]] = {}
    for item in items:
        path, *others = kind(item)
        kinds.setdefault((starred(path), *others), []).append(item)
    return list(kinds.values())
