"""JSON from strangers: bounded, each key once, each number finite."""

import json
import reprlib
from pathlib import Path
from typing import Any

from mora_jax.io._errors import AdapterFileError
from mora_jax.io._files import read_bytes

MAX_BYTES = 2**26


def parse(data: bytes, name: str) -> Any:
    """The value that `data` holds.

    Raises:
      AdapterFileError: no JSON, a key that occurs twice, NaN, or too large. `name` is
        what the message calls it.
    """
    if len(data) > MAX_BYTES:
        raise AdapterFileError(
            f"{name} must be at most {MAX_BYTES:,} bytes long, got {len(data):,}"
        )
    try:
        return json.loads(
            data, object_pairs_hook=_each_once, parse_constant=_no_constant
        )
    except RecursionError:
        raise AdapterFileError(f"{name} is nested too deeply") from None
    except ValueError as error:
        raise AdapterFileError(f"{name} is no valid JSON: {error}") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {short(twice)} occurs twice")
    return mapping


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number in JSON")


def dump(value: Any) -> bytes:
    """As readable text; equal values give equal bytes."""
    return (
        json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
    ).encode()


def read(path: Path) -> Any:
    """The value of a JSON file."""
    return parse(read_bytes(path, MAX_BYTES), path.name)


def short(value: object) -> str:
    """`repr`, cut off: a message should not repeat a megabyte."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
