"""JSON from strangers: of bounded size, with unique keys and finite numbers."""

import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mora_jax.io._errors import AdapterFileError
from mora_jax.io._files import read_bytes
from mora_jax.io._locations import Location

MAX_BYTES = 2**26


def parse(data: bytes, name: str) -> Any:
    """Return the value that `data` holds.

    Args:
      data: The text, in UTF-8.
      name: The name of the text in messages.

    Raises:
      AdapterFileError: The data is too long or is not JSON, a key occurs twice, or a
        number is not finite.
    """
    if len(data) > MAX_BYTES:
        raise AdapterFileError(
            f"{name} must be at most {MAX_BYTES:,} bytes long, got {len(data):,}"
        )
    try:
        return json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise AdapterFileError(f"{name} is nested too deeply") from None
    except ValueError as error:
        raise AdapterFileError(f"{name} is not valid JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {short(twice)} occurs twice")
    return mapping


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number in JSON")


def read_json(path: Location) -> Any:
    """Return the value that a JSON file holds."""
    return parse(read_bytes(path, MAX_BYTES), path.name)


def dump(value: Any) -> bytes:
    """Return readable JSON text; equal values give equal bytes."""
    return (
        json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
    ).encode()


def check_record(content: Any, kinds: Mapping[str, type], where: str) -> dict[str, Any]:
    """Return `content` if it is an object with exactly the expected keys.

    Args:
      content: A parsed value.
      kinds: {key: type of its value}; `object` for values that are checked elsewhere.
      where: The name of the value in messages.

    Raises:
      AdapterFileError: It is something else. Nothing is filled in or passed over.
    """
    if not isinstance(content, dict):
        raise AdapterFileError(
            f"{where} must hold {sorted(kinds)}, got {short(content)}"
        )
    if content.keys() != kinds.keys():
        raise AdapterFileError(
            f"{where} must hold {sorted(kinds)}; "
            f"it lacks {sorted(kinds.keys() - content.keys())}, "
            f"and also holds {short(sorted(content.keys() - kinds.keys()))}"
        )
    for key, kind in kinds.items():
        # True is an int to isinstance, and not in JSON.
        if kind is not object and type(content[key]) is not kind:
            raise AdapterFileError(
                f"{key} of {where} must be of type {kind.__name__}, "
                f"got {short(content[key])}"
            )
    return content


def plain(value: Any, name: str) -> Any:
    """Return `value` in the types that JSON gives back; all others are refused.

    Args:
      value: A value that a user wants to keep.
      name: The name of the value in messages, such as "metadata". The keys that lead to
        the faulty part follow it.

    Raises:
      TypeError: JSON cannot hold a part of the value, or a key is not a text.
      ValueError: A number is not finite, or the value holds itself.
    """
    try:
        return _plain(value, name)
    except RecursionError:
        raise ValueError(
            f"{name} must be something that JSON can hold, and is nested too deeply"
        ) from None


def _plain(value: Any, name: str) -> Any:
    rule = f"{name} must be something that JSON can hold"
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{rule}, got {value!r}")
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{rule}: its keys must be texts, got {key!r}")
        return {key: _plain(part, f"{name}[{key!r}]") for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, f"{name}[{k}]") for k, part in enumerate(value)]
    raise TypeError(f"{rule}, got {_described(value)}")


def _described(value: Any) -> str:
    """Return the type of a value, with advice if it is an array, for a message."""
    kind = type(value).__name__
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        return f"an object of type {kind}"
    if value.shape:
        advice = ".tolist()"
    else:
        scalars = {"b": "bool", "i": "int", "u": "int"}
        advice = f"{scalars.get(value.dtype.kind, 'float')}(...)"
    name = "jax.Array" if isinstance(value, jax.Array) else f"numpy.{kind}"
    return f"a {name}: say {advice}"


def short(value: object) -> str:
    """Return a `repr` that is cut off: a message should not repeat a megabyte."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
