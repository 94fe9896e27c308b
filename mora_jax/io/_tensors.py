"""Safetensors: named arrays in a file, without pickle.

The safetensors library checks and writes. It accepts a key that occurs twice, and gives
numpy no bfloat16; so the header is read once more here.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mora_jax._types import Shape
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._json import parse, short
from mora_jax.io._paths import Location, is_local, size

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""Of tensors that can be an M or a kernel."""

MAX_HEADER = 2**25
CHUNK = 2**24


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor is.

    Attributes:
      dtype: its name in the format, as "BF16".
      shape: of the tensor.
      start: its first byte, counted from the beginning of the file.
      stop: the byte after its last.
    """

    dtype: str
    shape: Shape
    start: int
    stop: int


class TensorFile:
    """A safetensors file of which the header alone is in memory.

    Attributes:
      path: of the file.
      entries: {name: where it is}, in the order of the header.
      metadata: text that was stored beside the tensors.
      header: the file's first bytes, up to the first tensor.
      size: How many bytes the file has.
    """

    def __init__(self, path: Location) -> None:
        """Read the header of `path`.

        Raises:
          AdapterFileError: no safetensors file.
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
        """One tensor, read now.

        Raises:
          AdapterFileError: it is not a floating-point one.
        """
        entry = self.entries[name]
        dtype = _dtype(entry.dtype, name, self.path.name)
        data = b"".join(self.chunks(name))
        return np.frombuffer(data, dtype).reshape(entry.shape)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor, piece by piece."""
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
    """The bytes before the first tensor, and the number of all bytes of a file."""
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
        raise AdapterFileError(f"{path.parent} is no directory") from None
    except IsADirectoryError:
        raise AdapterFileError(f"{path} is a directory, not a file") from None


def _validate(path: Location, header: bytes, size: int) -> None:
    """Raise unless `path` is a safetensors file.

    The library reads local files alone. It looks at the header and the size, so for
    others it gets a local file of these, whose tensors are a hole.
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
                f"{path.name} is no safetensors file: {error}"
            ) from error


def _too_long(name: str, size: int) -> str:
    return f"{name} must have a header of at most {MAX_HEADER:,} bytes, got {size:,}"


def decode(data: bytes, name: str) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file that is in memory; `name` is for messages.

    Raises:
      AdapterFileError: no safetensors file, or other than floating-point tensors.
    """
    safetensors = library()
    size = int.from_bytes(data[:8], "little")
    if size > MAX_HEADER:
        raise AdapterFileError(_too_long(name, size))
    try:
        found = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise AdapterFileError(f"{name} is no safetensors file: {error}") from error
    parse(data[8 : 8 + size], name)  # each key once
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
    """The safetensors package, or advice how to get it."""
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "files of adapters need safetensors: pip install mora-jax[io]"
        ) from error
    return safetensors
