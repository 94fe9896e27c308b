"""JSON from strangers: of bounded size, with unique keys and finite numbers."""

import json
import math
from collections.abc import Mapping
from typing import Any

from mora_jax.io._files import AdapterFileError, Location, missing_files

MAX_BYTES = 2**26


def parse(data: bytes, name: str) -> Any:
    """The value that a JSON text holds, if it is all that JSON demands.

    So keys occur once, and numbers are finite. Messages call the text `name`.
    """
    if len(data) > MAX_BYTES:
        raise AdapterFileError(
            f"{name} must have at most {MAX_BYTES:,} bytes, got {len(data):,} or more"
        )
    try:
        hooks: dict[str, Any] = {"parse_float": _finite, "parse_constant": _finite}
        return json.loads(data, object_pairs_hook=_unique, **hooks)
    except RecursionError:
        raise AdapterFileError(f"{name} is nested too deeply") from None
    except ValueError as error:
        raise AdapterFileError(f"{name} is not valid JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:  # Python would take the last, and other readers the first
            raise ValueError(f"the key {short(key)} occurs twice")
        mapping[key] = value
    return mapping


def _finite(text: str) -> float:
    # Python takes NaN, Infinity and 1e999, which `dump` and other readers refuse.
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


def read_json(path: Location) -> Any:
    """The value that a JSON file holds; longer files are not read whole."""
    with missing_files(path), path.open("rb") as file:
        return parse(file.read(MAX_BYTES + 1), path.name)


def dump(value: Any) -> bytes:
    """Readable JSON text; equal values give equal bytes."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    return f"{text}\n".encode()


Fields = Mapping[str, tuple[Any, ...]]
"""{key of a record: the type of its value, and how to get it, if from an object}."""


def check_record(content: Any, fields: Fields, where: str) -> dict[str, Any]:
    """Return the object `where` if it has exactly these keys and types of values."""
    keys = content.keys() if isinstance(content, dict) else set()
    if keys != fields.keys():
        lacks, extra = sorted(fields.keys() - keys), short(sorted(keys - fields.keys()))
        odd = f"it lacks {lacks}, and also holds {extra}"
        raise AdapterFileError(f"{where} must hold {sorted(fields)}: {odd}")
    for key, (kind, *_) in fields.items():
        # True is an int for isinstance, but not in JSON.
        if kind is not object and type(content[key]) is not kind:
            raise AdapterFileError(
                f"{key} of {where} must be of type {kind.__name__}, "
                f"got {short(content[key])}"
            )
    return content


def plain(value: Any, name: str) -> Any:
    """A value that a user wants to keep, in the types that JSON gives back.

    An error calls the value `name`, followed by the keys that lead to the faulty part.
    """
    rule = f"{name} must be something that JSON can hold"
    try:
        if isinstance(value, Mapping):
            if odd := [key for key in value if not isinstance(key, str)]:
                raise TypeError(f"{rule}: its keys must be texts, got {odd[0]!r}")
            return {key: plain(part, f"{name}[{key!r}]") for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part, f"{name}[{k}]") for k, part in enumerate(value)]
    except RecursionError:
        raise ValueError(f"{name.partition('[')[0]} is nested too deeply") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{rule}, got {value!r}")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    # NumPy's arrays and numbers, and JAX's, give Python's.
    advice = ": say .tolist()" * hasattr(value, "tolist")
    raise TypeError(f"{rule}, got an object of type {type(value).__name__}{advice}")


def short(value: object) -> str:
    """A `repr` that is cut off: a message should not repeat a megabyte."""
    text = repr(value)
    return text if len(text) < 300 else f"{text[:300]}..."
