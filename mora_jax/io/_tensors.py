"""Safetensors: named arrays in a file, without pickle.

The safetensors library checks and writes files. But it accepts a key that occurs twice,
and it cannot give bfloat16 to NumPy. So the header is read again here.
"""

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mora_jax._common.types import Shape
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._files import missing_files
from mora_jax.io._json import parse, short
from mora_jax.io._locations import Location, is_local, size

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""The dtypes of tensors that can be an M or a kernel."""

MAX_HEADER = 2**25
CHUNK = 2**24


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in a header.

    Attributes:
      dtype: The name of its dtype in the format, such as "BF16".
      shape: Its shape.
      start: The position of its first byte in the file.
      stop: The position after its last byte.
    """

    dtype: str
    shape: Shape
    start: int
    stop: int


class TensorFile:
    """A safetensors file whose header alone is in memory.

    Attributes:
      path: The path of the file.
      entries: {name of a tensor: its entry}, in the order of the header.
      header: The file's first bytes, up to the first tensor.
      size: The number of bytes of the file.
    """

    def __init__(self, path: Location) -> None:
        """Read the header of `path`.

        Raises:
          AdapterFileError: `path` is not a safetensors file.
        """
        self.path = path
        self.header, self.size = read_header(path), size(path)
        _validate(path, self.header, self.size)
        content = parse(self.header[8:], path.name)
        content.pop("__metadata__", None)
        start = len(self.header)
        self.entries = {
            name: Entry(
                entry["dtype"],
                tuple(entry["shape"]),
                *(start + offset for offset in entry["data_offsets"]),
            )
            for name, entry in content.items()
        }

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a tensor, which is read now.

        Raises:
          AdapterFileError: The tensor is not floating-point.
        """
        entry = self.entries[name]
        dtype = _dtype(entry.dtype, name, self.path.name)
        data = b"".join(self.chunks(name))
        return np.frombuffer(data, dtype).reshape(entry.shape)

    def rows(self, name: str, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield rows of a tensor, in pieces of about `CHUNK` bytes.

        Raises:
          AdapterFileError: The tensor is not floating-point.
        """
        entry = self.entries[name]
        dtype = _dtype(entry.dtype, name, self.path.name)
        row = dtype.itemsize * math.prod(entry.shape[1:])
        piece = max(1, CHUNK // max(1, row)) * row
        first, last = (entry.start + number * row for number in (start, stop))
        if not row:
            yield np.empty((stop - start, *entry.shape[1:]), dtype)
            return
        for data in self._pieces(first, last, piece):
            yield np.frombuffer(data, dtype).reshape(-1, *entry.shape[1:])

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a tensor in pieces."""
        entry = self.entries[name]
        return self._pieces(entry.start, entry.stop, CHUNK)

    def _pieces(self, start: int, stop: int, length: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop`, `length` at a time."""
        with self.path.open("rb") as file:
            file.seek(start)
            for position in range(start, stop, length):
                wanted = min(length, stop - position)
                data = file.read(wanted)
                if len(data) < wanted:
                    raise AdapterFileError(f"{self.path.name} was cut off while read")
                yield data


# --- Headers ---


def read_header(path: Location) -> bytes:
    """Return the bytes of a safetensors file before its first tensor.

    Raises:
      AdapterFileError: There is no such file, or its header would be too long.
    """
    with missing_files(path), path.open("rb") as file:
        length = file.read(8)
        return length + file.read(_header_size(length, path.name))


def metadata_of(data: bytes, name: str) -> dict[str, Any]:
    """Return the texts that a safetensors file has beside its tensors.

    Args:
      data: The file's content, or its header alone.
      name: The name of the file in messages.

    Raises:
      AdapterFileError: The header is not valid.
    """
    header = parse(data[8 : 8 + _header_size(data, name)], name)
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise AdapterFileError(f"{name} is not a safetensors file")
    return metadata


def _header_size(data: bytes, name: str) -> int:
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise AdapterFileError(
            f"{name} must have a header of at most {MAX_HEADER:,} bytes, got {length:,}"
        )
    return length


def _validate(path: Location, header: bytes, size: int) -> None:
    """Raise unless `path` is a safetensors file.

    The library reads only local files, and looks only at their header and size. So for
    a remote file it gets a local file with the same header and size, whose tensors are
    a hole.
    """
    safetensors = library()
    with contextlib.ExitStack() as stack:
        local = path
        if not is_local(path):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            local = Path(folder) / "header.safetensors"
            with local.open("wb") as file:
                file.write(header)
                file.truncate(size)
        try:
            with safetensors.safe_open(local, framework="numpy"):
                pass
        except safetensors.SafetensorError as error:
            raise AdapterFileError(
                f"{path.name} is not a safetensors file: {error}"
            ) from error


# --- Whole files in memory ---


def decode(data: bytes, name: str) -> dict[str, np.ndarray]:
    """Return the arrays of a safetensors file that is in memory.

    Args:
      data: The content of the file.
      name: The name of the file in messages.

    Raises:
      AdapterFileError: The data is not a safetensors file, or a tensor is not
        floating-point.
    """
    safetensors = library()
    length = _header_size(data, name)
    try:
        tensors = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise AdapterFileError(f"{name} is not a safetensors file: {error}") from error
    parse(data[8 : 8 + length], name)  # raises if a key occurs twice
    return {
        key: np.frombuffer(tensor["data"], _dtype(tensor["dtype"], key, name)).reshape(
            tensor["shape"]
        )
        for key, tensor in tensors
    }


def _dtype(dtype: str, key: str, name: str) -> np.dtype:
    if dtype not in DTYPES:
        raise AdapterFileError(
            f"{short(key)} in {name} must be one of {list(DTYPES)}, got {dtype}"
        )
    return DTYPES[dtype]


def encode(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Return the content of a safetensors file."""
    library()
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return save(arrays, dict(metadata))


def library() -> Any:
    """Return the safetensors package.

    Raises:
      ImportError: The package is missing. The message says how to install it.
    """
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "files of adapters need safetensors: pip install mora-jax[io]"
        ) from error
    return safetensors
