"""Messages: warnings at the caller's line, and the paths and words that are meant."""

import difflib
import re
import sys
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

from mora_jax._common.checks import remedy

T = TypeVar("T")


class MoRAWarning(UserWarning):
    """A warning of what is allowed but most likely not meant: the class of all ours.

    Example::

      >>> import mora_jax, warnings
      >>> with warnings.catch_warnings():
      ...     warnings.simplefilter("ignore", mora_jax.MoRAWarning)
      ...     config = mora_jax.MoRAConfig(alpha=16.0)
      >>> config.alpha
      16.0
    """


class LeftOutWarning(MoRAWarning):
    """A warning of arrays that multiply inputs and get no adapter, perhaps by mistake.

    The default targets are the dense layers of known classes. `print(plan)` lists what
    they leave out. An array that `exclude` names is left out without a warning.
    """


def warn(message: str, category: type[MoRAWarning] = MoRAWarning) -> None:
    """Warn at the line that called this library."""
    # From this function outwards. An `__init__` that `dataclasses` wrote is in no file
    # of ours, but has the globals of its module.
    stack = traceback.walk_stack(sys._getframe())
    modules = [frame.f_globals.get("__name__", "") for frame, _ in stack]
    ours = [k for k, name in enumerate(modules) if f"{name}.".startswith("mora_jax.")]
    warnings.warn(message, category, stacklevel=ours[-1] + 2)


def shown(pattern: str, count: int) -> str:
    """Return a pattern of `alike` and the number of its paths, as "l*/kernel (3)"."""
    return pattern if count == 1 else f"{pattern} ({count})"


def alike(
    items: Iterable[T], kind: Callable[[T], tuple[Any, ...]]
) -> list[tuple[str, list[T]]]:
    """Return the items in lists of one kind each, with the pattern of their paths.

    `kind(item)` is its path, where numbers may differ ("*"), and what else is equal.
    """
    kinds: dict[tuple[Any, ...], list[T]] = defaultdict(list)
    for item in items:
        path, *others = kind(item)
        kinds[re.sub(r"\d+", "*", path), *others].append(item)
    return [
        (starred if len(group) > 1 else kind(group[0])[0], group)
        for (starred, *_), group in kinds.items()
    ]


def patterns(paths: Iterable[str]) -> str:
    """Paths in a message, as "l*/kernel (3), head/kernel"."""
    kinds = alike(paths, lambda path: (path,))
    return ", ".join(shown(pattern, len(kind)) for pattern, kind in kinds)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known word that is most like `word`, as the end of a message, if any is."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def lacking(name: str, names: Iterable[str]) -> str:
    """A reason why a model lacks the path `name`, as the end of a message."""
    parts = [path for path in names if path.startswith(f"{name}/")]
    if parts:
        return f"; they have parts of it, such as {parts[0]!r}: {remedy()}"
    if f"params/{name}" in names:
        return "; pass variables['params'], not all variables"
    return nearest_paths(name, names)


def matching(
    field: str,
    patterns: Iterable[str],
    names: Collection[str],
    what: str = "path",
    known: Collection[str] = (),
) -> set[str]:
    """Return the names that the patterns of a setting match; each must match one."""
    selected: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if re.fullmatch(pattern, name)}
        if not matched:
            # Without any names, similar ones among `known` are the best advice.
            near = nearest_paths(pattern, names or known)
            rule = f"matches no {what}{near}; patterns match whole paths"
            raise ValueError(f"{field}: {pattern!r} {rule}")
        selected |= matched
    return selected


def nearest_paths(name: str, names: Iterable[str]) -> str:
    """Paths that are most like `name`, as the end of a message."""
    words = re.sub(r"\\?[.*+?()|\[\]^$\\]+", " ", name).strip(" /")
    depth = words.count("/") + 1
    # Paths are compared by runs of as many words as the name has. So layers of the same
    # kind are one candidate, and a wrong word counts for more than a long path to it.
    runs: dict[str, str] = {}
    for path in names:
        parts = path.split("/")
        for end in range(len(parts), min(depth, len(parts)) - 1, -1):
            runs.setdefault("/".join(parts[max(0, end - depth) : end]), path)
    close = difflib.get_close_matches(words, runs, n=3, cutoff=0.0)
    shown = ", ".join(map(repr, dict.fromkeys(runs[run] for run in close)))
    return f"; the nearest are {shown}" if close else ""
