"""Safetensors: named arrays in a file, without pickle.

The safetensors library writes files. It reads local ones alone, accepts a key that
occurs twice, and cannot give bfloat16 to NumPy. So headers are read and checked here.
"""

import contextlib
import io
import math
import re
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._common.checks import check_concrete, check_finite
from mora_jax._common.types import Shape
from mora_jax.io._files import AdapterFileError, Location, missing_files
from mora_jax.io._json import Field, parse, read_record, short

_KINDS: dict[str, Any] = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": jnp.bfloat16}
DTYPES = {name: np.dtype(kind) for name, kind in _KINDS.items()}  # of M's and kernels
EIGHT_BITS = {"F8_E4M3": np.dtype(jnp.float8_e4m3fn)}  # of directions alone
KNOWN = re.compile(r"BOOL|[UI](8|16|32|64)|B?F(16)|F(4|32|64)|C(64)|F([68])_[A-Z0-9]+")
"""All dtypes of the format. A group has the number of bits; a BOOL is a byte."""

Arrays = Mapping[str, np.ndarray]  # by their names in a file
ENTRY = {"dtype": Field(str), "shape": Field(list), "data_offsets": Field(list)}
MAX_HEADER, CHUNK = 2**25, 2**24


class Entry(NamedTuple):
    """A tensor in a header: its dtype, and its place in the file in bytes."""

    dtype: str
    shape: Shape
    start: int
    stop: int


class TensorFile:
    """A safetensors file whose header alone is in memory, and checked.

    Attributes:
      header: The bytes before the first tensor.
      size: The number of bytes of the file.
      metadata: {name: text} of what the file says beside its tensors.
      entries: {name of a tensor: its entry}, in their order in the header.
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
        end = len(self.header)
        content = parse(self.header[8:], path.name) if end == 8 + length else None
        if not isinstance(content, dict):
            raise self._damaged(f"no JSON header of at most {MAX_HEADER:,} bytes")
        self.metadata = content.pop("__metadata__", None) or {}
        if not isinstance(self.metadata, dict):
            raise self._damaged("its __metadata__ must be a JSON object")
        self.entries: dict[str, Entry] = {}
        for name, record in content.items():
            read_record(record, ENTRY, f"{short(name)} of {path.name}")
            shape, ends = record["shape"], record["data_offsets"]
            counts = all(type(n) is int and n >= 0 for n in shape + ends)
            if not counts or len(ends) != 2:
                raise self._damaged(f"{short(name)} must have integers for its place")
            start, stop = (len(self.header) + end for end in ends)
            self.entries[name] = Entry(record["dtype"], tuple(shape), start, stop)
        # Tensors lie one after the other, so that no byte is of two or of none.
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1][2:]):
            found, bits = KNOWN.fullmatch(entry.dtype), 8 * (entry.stop - entry.start)
            size = found and int(next(filter(None, found.groups()), 8))
            if entry.start != end or not size or bits != size * math.prod(entry.shape):
                raise self._damaged(f"{short(name)} begins or ends elsewhere")
            end = entry.stop
        if end != self.size:
            raise self._damaged(f"it must have {end:,} bytes, got {self.size:,}")

    def _damaged(self, why: str) -> AdapterFileError:
        name = f"{self.path.name} is damaged, or not a safetensors file"
        return AdapterFileError(f"{name}: {why}")

    @contextlib.contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        if self._data is not None:
            yield io.BytesIO(self._data)
        else:
            with missing_files(self.path), self.path.open("rb") as file:
                yield file

    def __getitem__(self, name: str) -> np.ndarray:
        """A floating-point tensor, which is read now."""
        return self._read(name, DTYPES)

    def arrays(self) -> dict[str, np.ndarray]:
        """All tensors, which may have eight bits as well."""
        return {name: self._read(name, DTYPES | EIGHT_BITS) for name in self.entries}

    def _read(self, name: str, dtypes: Mapping[str, np.dtype]) -> np.ndarray:
        data = b"".join(self.chunks(name))
        array = np.frombuffer(data, self.dtype(name, dtypes))
        return array.reshape(self.entries[name].shape)

    def rows(self, name: str, start: int, stop: int) -> Iterator[np.ndarray]:
        """Rows of a floating-point tensor, in pieces of about `CHUNK` bytes."""
        entry, dtype = self.entries[name], self.dtype(name)
        row = dtype.itemsize * math.prod(entry.shape[1:])
        step = max(1, CHUNK // max(1, row)) * row  # rows are not cut, and may be empty
        first, last = entry.start + start * row, entry.start + stop * row
        for data in self._pieces(first, last, step):
            yield np.frombuffer(data, dtype).reshape(-1, *entry.shape[1:])

    def chunks(self, name: str) -> Iterator[bytes]:
        return self._pieces(*self.entries[name][2:], CHUNK)

    def _pieces(self, start: int, stop: int, step: int) -> Iterator[bytes]:
        with self._open() as file:
            file.seek(start)
            for place in range(start, stop, step or 1):
                data = file.read(min(step, stop - place))
                if len(data) < min(step, stop - place):
                    raise AdapterFileError(f"{self.path.name} was cut off while read")
                yield data

    def dtype(self, name: str, dtypes: Mapping[str, np.dtype] = DTYPES) -> np.dtype:
        """The dtype of a tensor, which must be one of `dtypes`."""
        dtype = self.entries[name].dtype
        if dtype not in dtypes:
            rule = f"{short(name)} in {self.path.name} must be one of {list(dtypes)}"
            raise AdapterFileError(f"{rule}, got {dtype}: dequantise it first")
        return dtypes[dtype]


def encode(tensors: Arrays, metadata: Mapping[str, str]) -> bytes:
    try:
        from safetensors.numpy import save
    except ImportError as error:
        remedy = "pip install 'mora-jax[io]'"
        raise ImportError(f"files of adapters need safetensors: {remedy}") from error
    # The library writes the memory of an array, whatever the order of its axes there.
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return save(arrays, dict(metadata))


def to_numpy(name: str, array: Any) -> np.ndarray:
    """A trained array of finite numbers, which messages call `name`."""
    check_concrete(array, name, np.shape(array))
    array = np.asarray(array)
    check_finite(array, name)
    return array


def to_jax(name: str, array: np.ndarray) -> jax.Array:
    """An array from a file as a JAX array of the same dtype."""
    converted = jnp.asarray(array)
    if converted.dtype != array.dtype:
        # JAX makes float32 of float64 unless it is told otherwise.
        raise AdapterFileError(f"{name} is {array.dtype}: set jax_enable_x64 for it")
    return converted
