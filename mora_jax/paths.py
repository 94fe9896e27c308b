"""Where things are in a tree: slash-joined paths."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

import jax
from flax.core.meta import AxisMetadata

from mora_jax.spec import SUFFIX, AdapterSpec

Path = tuple[str, ...]


def named_leaves(params: Any) -> dict[str, tuple[Path, Any]]:
    """{slash-joined path: (path, leaf)} of a tree of arrays or shapes, unboxed."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_boxed)
    leaves: dict[str, tuple[Path, Any]] = {}
    for keys, leaf in flat:
        path = tuple(key_name(key) for key in keys)
        name = "/".join(path)
        leaf = leaf.unbox() if is_boxed(leaf) else leaf
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"params must hold arrays only, got {type(leaf).__name__} at {name!r}"
            )
        if name in leaves:
            raise ValueError(f"params has two leaves of the path {name!r}")
        leaves[name] = path, leaf
    if not leaves:
        raise ValueError("params holds no array")
    return leaves


def key_name(key: Any) -> str:
    """What a pytree key is called in a path."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def is_boxed(leaf: Any) -> bool:
    """Whether `leaf` is an array in one of Flax's boxes for metadata."""
    return isinstance(leaf, AxisMetadata)


def suggestion(pattern: str, names: Iterable[str]) -> str:
    """What a pattern that matches nothing may have meant, as the end of a message."""
    names = list(names)
    group = f"(?:{pattern})" if "|" in pattern else pattern
    wider = rf"(.*/)?{group}/kernel", rf"(.*/)?{group}(/.*)?", rf".*{group}.*"
    for candidate in wider:
        try:
            matched = [name for name in names if re.fullmatch(candidate, name)]
        except re.error:  # the pattern has flags, which must come first
            break
        if matched:
            more = f" and {len(matched) - 1} more" if len(matched) > 1 else ""
            return (
                f"; patterns match whole paths: {candidate!r} would match "
                f"{matched[0]!r}{more}"
            )
    return nearest(pattern, names)


def nearest(name: str, names: Iterable[str]) -> str:
    """The names most like `name`, as the end of a message."""
    words = re.sub(r"\\?[.*+?()|\[\]^$\\]+", " ", name).strip(" /")
    depth = words.count("/") + 1
    # Runs of as many words as the name has: layers of the same kind are one candidate,
    # and a wrong word counts for more than a long way to it.
    runs: dict[str, str] = {}
    for known in names:
        parts = known.split("/")
        for end in range(len(parts), min(depth, len(parts)) - 1, -1):
            runs.setdefault("/".join(parts[max(0, end - depth) : end]), known)
    close = difflib.get_close_matches(words, runs, n=3, cutoff=0.0)
    shown = ", ".join(map(repr, dict.fromkeys(runs[run] for run in close)))
    return f"; the nearest are {shown}" if close else ""


def adapter_path(spec: AdapterSpec) -> Path:
    """Where M lives, in the adapters and in a combined tree."""
    return (*spec.path[:-1], spec.path[-1] + SUFFIX)
