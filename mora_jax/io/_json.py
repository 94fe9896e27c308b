"""JSON from strangers: of bounded size, with unique keys and finite numbers."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mora_jax._common.types import FIRST
from mora_jax.io._files import AdapterFileError, Location, missing_files

MAX_BYTES = 2**26


def parse(data: bytes, name: str) -> Any:
    """The value of the JSON text called `name`, with unique keys and finite numbers."""
    if len(data) > MAX_BYTES:
        rule = f"{name} must have at most {MAX_BYTES:,} bytes"
        raise AdapterFileError(f"{rule}, got {len(data):,} or more")
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
    try:
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    except RecursionError:  # Python reads what is nested more deeply than it writes
        raise AdapterFileError("a text is nested too deeply for JSON") from None
    return f"{text}\n".encode()


REQUIRED: Any = object()  # the default of a field that no record may lack


class Field(NamedTuple):
    """A field of a record in a file: its type, and the function that gets its value.

    A record that lacks it has the default. A field `since` a later version than the
    first is not written at its default, so that earlier ones read what does without it.
    """

    kind: type
    get: Callable[[Any], Any] = lambda thing: thing
    default: Any = REQUIRED
    since: str = FIRST


Fields = Mapping[str, Field]  # by the keys of a record


def record_of(thing: Any, fields: Fields) -> dict[str, Any]:
    """An object as a record that JSON can hold."""
    found = ((key, field, field.get(thing)) for key, field in fields.items())
    return {k: v for k, field, v in found if field.since == FIRST or v != field.default}


def read_record(
    content: Any, fields: Fields, where: str, writer: object = None
) -> dict[str, Any]:
    """The object `where` with a value for each field, its own or the default."""
    # What is not known here is an error, which names the version that is the `writer`.
    if not isinstance(content, dict):
        raise AdapterFileError(f"{where} must be an object, got {short(content)}")
    if unknown := sorted(content.keys() - fields.keys()):
        by = f"mora_jax {short(writer)}, which wrote it, or " if writer else ""
        rule = f"{where} must not hold {short(unknown)}, unknown to this version"
        remedy = f"{by}a newer version is needed, or the file is damaged"
        raise AdapterFileError(f"{rule}: {remedy}")
    values = {}
    for key, field in fields.items():
        value = values[key] = content.get(key, field.default)
        if value is REQUIRED:
            raise AdapterFileError(f"{where} lacks {key!r}")
        # True is an int for isinstance, but not in JSON. None may be a default.
        if value is not field.default and type(value) is not field.kind:
            must = f"{key} of {where} must be of type {field.kind.__name__}"
            raise AdapterFileError(f"{must}, got {short(value)}")
    return values


def plain(value: Any, name: str) -> Any:
    """A value that a user wants to keep, in the types that JSON gives back."""
    # An error calls the value `name`, followed by the keys to the faulty part.
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
