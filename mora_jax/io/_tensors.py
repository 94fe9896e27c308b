"""Files from strangers, JSON and safetensors: no pickle, checked, of bounded size.

The safetensors library writes files. It reads local ones alone, accepts a key that
occurs twice, and cannot give bfloat16 to NumPy. So headers are read and checked here.
"""

import contextlib
import io
import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mora_jax._common.checks import as_jax_array, check_finite
from mora_jax._common.types import Shape
from mora_jax.io._files import AdapterFileError, Location, missing_files

MAX_BYTES = 2**26


def parse(data: bytes, name: str) -> Any:
    """Return the value that a JSON text holds, if it is all that JSON demands.

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
    """Return the value that a JSON file holds; longer files are not read whole."""
    with missing_files(path), path.open("rb") as file:
        return parse(file.read(MAX_BYTES + 1), path.name)


def dump(value: Any) -> bytes:
    """Return readable JSON text; equal values give equal bytes."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
    return text.encode()


Fields = Mapping[str, tuple[Any, ...]]
"""{key of a record: the type of its value, and how to get it, if from an object}."""


def check_record(content: Any, fields: Fields, where: str) -> dict[str, Any]:
    """Return the object `where` if it has exactly these keys and types of values.

    Values of the type `object` are checked elsewhere.
    """
    keys = content.keys() if isinstance(content, dict) else set()
    if keys != fields.keys():
        lacks, extra = sorted(fields.keys() - keys), short(sorted(keys - fields.keys()))
        raise AdapterFileError(
            f"{where} must hold {sorted(fields)}, got {short(content)}; it lacks "
            f"{lacks}, and also holds {extra}"
        )
    for key, (kind, *_) in fields.items():
        # True is an int for isinstance, but not in JSON.
        if kind is not object and type(content[key]) is not kind:
            raise AdapterFileError(
                f"{key} of {where} must be of type {kind.__name__}, "
                f"got {short(content[key])}"
            )
    return content


def plain(value: Any, name: str) -> Any:
    """Return what a user wants to keep in the types that JSON gives back.

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
    kind, advice = f"an object of type {type(value).__name__}", ""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        is_jax, number = isinstance(value, jax.Array), value.dtype.kind
        kind = "a jax.Array" if is_jax else f"a numpy.{type(value).__name__}"
        scalar = {"b": "bool", "i": "int", "u": "int"}.get(number, "float")
        advice = ": say .tolist()" if value.shape else f": say {scalar}(...)"
    raise TypeError(f"{rule}, got {kind}{advice}")


def short(value: object) -> str:
    """Return a `repr` that is cut off: a message should not repeat a megabyte."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""The dtypes of tensors that can be an M or a kernel."""

KNOWN = re.compile(r"BOOL|[UI](8|16|32|64)|B?F16|F(32|64)|C64|F4|F[68]_[A-Z0-9]+")
"""All dtypes of the format. The first number in a name is the number of bits."""

ENTRY = {"dtype": (str,), "shape": (list,), "data_offsets": (list,)}
"""The record of a tensor in a header."""

MAX_HEADER, CHUNK = 2**25, 2**24


class Entry(NamedTuple):
    """A tensor in a header: its dtype, and its place in the file in bytes."""

    dtype: str
    shape: Shape
    start: int
    stop: int

    @property
    def fits(self) -> bool:
        """True if the tensor has as many bytes as its dtype and shape say."""
        digits = re.findall(r"\d+", self.dtype) or ["8"]  # a BOOL is a byte
        bits = math.prod(self.shape) * int(digits[0])
        known = KNOWN.fullmatch(self.dtype) is not None
        return known and 8 * (self.stop - self.start) == bits


class Header:
    """A safetensors file up to its first tensor.

    Attributes:
      header: The bytes before the first tensor.
      size: The number of bytes of the file.
      metadata: {name: text} of what the file says beside its tensors.
      records: {name of a tensor: its record}, in their order in the header.
    """

    def __init__(self, path: Location, data: bytes | None = None) -> None:
        """Read the header of `path`, or of `data`, if its content is in memory."""
        self.path, self._data = path, data
        with self._open() as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            # No more is read than a header may have, whatever a damaged file says.
            self.header = first + file.read(min(length, MAX_HEADER))
            file.seek(0, io.SEEK_END)
            self.size = file.tell()
        whole = len(self.header) == 8 + length
        content = parse(self.header[8:], path.name) if whole else None
        if not isinstance(content, dict):
            raise self._damaged(f"no JSON header of at most {MAX_HEADER:,} bytes")
        self.metadata = content.pop("__metadata__", None) or {}
        if not isinstance(self.metadata, dict):
            raise self._damaged("its __metadata__ must be a JSON object")
        self.records: dict[str, Any] = content

    def _damaged(self, why: str) -> AdapterFileError:
        start = f"{self.path.name} is damaged, or not a safetensors file"
        return AdapterFileError(f"{start}: {why}")

    @contextlib.contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        if self._data is not None:
            yield io.BytesIO(self._data)
        else:
            with missing_files(self.path), self.path.open("rb") as file:
                yield file


class TensorFile(Header):
    """A safetensors file whose header alone is in memory, and checked.

    It has `entries` as well: {name of a tensor: its entry}, in the same order.
    """

    def __init__(self, path: Location, data: bytes | None = None) -> None:
        super().__init__(path, data)
        self.entries: dict[str, Entry] = {}
        for name, record in self.records.items():
            check_record(record, ENTRY, f"{short(name)} of {path.name}")
            shape, ends = record["shape"], record["data_offsets"]
            counts = all(type(n) is int and n >= 0 for n in shape + ends)
            if not counts or len(ends) != 2:
                raise self._damaged(f"{short(name)} must have integers for its place")
            start, stop = (len(self.header) + end for end in ends)
            self.entries[name] = Entry(record["dtype"], tuple(shape), start, stop)
        end = len(self.header)
        # Tensors lie one after the other, so that no byte is of two or of none.
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1][2:]):
            if entry.start != end or not entry.fits:
                raise self._damaged(f"{short(name)} begins or ends elsewhere")
            end = entry.stop
        if end != self.size:
            raise self._damaged(f"it must have {end:,} bytes, got {self.size:,}")

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a floating-point tensor, which is read now."""
        data = b"".join(self.chunks(name))
        return np.frombuffer(data, self.dtype(name)).reshape(self.entries[name].shape)

    def rows(self, name: str, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield rows of a floating-point tensor, in pieces of about `CHUNK` bytes."""
        entry, dtype = self.entries[name], self.dtype(name)
        row = dtype.itemsize * math.prod(entry.shape[1:])
        step = max(1, CHUNK // max(1, row)) * row  # rows are not cut, and may be empty
        first, last = entry.start + start * row, entry.start + stop * row
        for data in self._pieces(first, last, step):
            yield np.frombuffer(data, dtype).reshape(-1, *entry.shape[1:])

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a tensor in pieces."""
        return self._pieces(*self.entries[name][2:], CHUNK)

    def _pieces(self, start: int, stop: int, step: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop`, `step` at a time."""
        with self._open() as file:
            file.seek(start)
            for place in range(start, stop, step or 1):
                data = file.read(min(step, stop - place))
                if len(data) < min(step, stop - place):
                    raise AdapterFileError(f"{self.path.name} was cut off while read")
                yield data

    def dtype(self, name: str, advice: str = "") -> np.dtype:
        """Return the dtype of a floating-point tensor; `advice` ends the error else."""
        dtype = self.entries[name].dtype
        if dtype not in DTYPES:
            raise AdapterFileError(
                f"{short(name)} in {self.path.name} must be one of {list(DTYPES)}, got "
                f"{dtype}{': ' * bool(advice)}{advice}"
            )
        return DTYPES[dtype]


def decode(data: bytes, name: str) -> dict[str, np.ndarray]:
    """Return the arrays, all floating-point, of a file in memory, called `name`."""
    file = TensorFile(Path(name), data)
    return {key: file[key] for key in file.entries}


def encode(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Return the content of a safetensors file."""
    try:
        from safetensors.numpy import save
    except ImportError as error:
        raise ImportError(
            "files of adapters need safetensors: pip install mora-jax[io]"
        ) from error
    # The library writes the memory of an array, whatever the order of its axes there.
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return save(arrays, dict(metadata))


def to_numpy(name: str, array: Any) -> np.ndarray:
    """Return a trained array of finite numbers, which messages call `name`."""
    if isinstance(array, Tracer):
        raise TypeError(f"{name} must be a concrete array, got a tracer of jit")
    as_jax_array(name, array)
    array = np.asarray(array)
    check_finite(array, name)
    return array


def to_jax(name: str, array: np.ndarray) -> jax.Array:
    """Return an array from a file as a JAX array of the same dtype."""
    converted = jnp.asarray(array)
    if converted.dtype != array.dtype:
        # JAX makes float32 of float64 unless it is told otherwise.
        raise AdapterFileError(
            f"{name} is {array.dtype}: set jax_enable_x64 to load it as it is"
        )
    return converted
