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
from mora_jax.io._json import parse, short
from mora_jax.io._paths import Location, is_local, size

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
    """What the header says of a tensor.

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
    """A safetensors file of which only the header is in memory.

    Attributes:
      path: The path of the file.
      entries: {name of a tensor: its entry}, in the order of the header.
      metadata: The texts that were stored with the tensors.
      header: The file's first bytes, up to the first tensor.
      size: The number of bytes of the file.
    """

    def __init__(self, path: Location) -> None:
        """Read the header of `path`.

        Raises:
          AdapterFileError: `path` is not a safetensors file.
        """
        self.path = path
        self.header, self.size = _header(path)
        _validate(path, self.header, self.size)
        content = parse(self.header[8:], path.name)
        self.metadata: dict[str, str] = content.pop("__metadata__", None) or {}
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
        """A tensor, which is read now.

        Raises:
          AdapterFileError: The tensor is not floating-point.
        """
        entry = self.entries[name]
        dtype = _dtype(entry.dtype, name, self.path.name)
        data = b"".join(self.chunks(name))
        return np.frombuffer(data, dtype).reshape(entry.shape)

    def rows(self, name: str, start: int, stop: int) -> Iterator[np.ndarray]:
        """Rows of a tensor, in pieces of about `CHUNK` bytes.

        Raises:
          AdapterFileError: The tensor is not floating-point.
        """
        entry = self.entries[name]
        dtype = _dtype(entry.dtype, name, self.path.name)
        size = dtype.itemsize * math.prod(entry.shape[1:])
        with self.path.open("rb") as file:
            file.seek(entry.start + start * size)
            while start < stop:
                count = min(max(1, CHUNK // max(1, size)), stop - start)
                data = file.read(count * size)
                if len(data) < count * size:
                    raise AdapterFileError(f"{self.path.name} was cut off while read")
                yield np.frombuffer(data, dtype).reshape(count, *entry.shape[1:])
                start += count

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor in pieces."""
        entry = self.entries[name]
        with self.path.open("rb") as file:
            file.seek(entry.start)
            left = entry.stop - entry.start
            while left:
                chunk = file.read(min(left, CHUNK))
                if not chunk:
                    raise AdapterFileError(f"{self.path.name} was cut off while read")
                left -= len(chunk)
                yield chunk


def _header(path: Location) -> tuple[bytes, int]:
    """The bytes before the first tensor, and the number of bytes of the file."""
    library()
    try:
        with path.open("rb") as file:
            length = file.read(8)
            number = int.from_bytes(length, "little")
            if number > MAX_HEADER:
                raise AdapterFileError(_too_long(path.name, number))
            return length + file.read(number), size(path)
    except FileNotFoundError:
        raise AdapterFileError(f"there is no {path.name} in {path.parent}") from None
    except NotADirectoryError:
        raise AdapterFileError(f"{path.parent} is not a directory") from None
    except IsADirectoryError:
        raise AdapterFileError(f"{path} is a directory, not a file") from None


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


def _too_long(name: str, size: int) -> str:
    return f"{name} must have a header of at most {MAX_HEADER:,} bytes, got {size:,}"


def decode(data: bytes, name: str) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file that is in memory.

    Args:
      data: The content of the file.
      name: The name of the file in messages.

    Raises:
      AdapterFileError: The data is not a safetensors file, or a tensor is not
        floating-point.
    """
    safetensors = library()
    size = int.from_bytes(data[:8], "little")
    if size > MAX_HEADER:
        raise AdapterFileError(_too_long(name, size))
    try:
        found = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise AdapterFileError(f"{name} is not a safetensors file: {error}") from error
    parse(data[8 : 8 + size], name)  # raises if a key occurs twice
    return {
        key: np.frombuffer(tensor["data"], _dtype(tensor["dtype"], key, name)).reshape(
            tensor["shape"]
        )
        for key, tensor in found
    }


def _dtype(dtype: str, key: str, name: str) -> np.dtype:
    if dtype not in DTYPES:
        raise AdapterFileError(
            f"{short(key)} in {name} must be one of {list(DTYPES)}, got {dtype}"
        )
    return DTYPES[dtype]


def encode(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file."""
    library()
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return save(arrays, dict(metadata))


def library() -> Any:
    """The safetensors package.

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
