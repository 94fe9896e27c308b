"""One array of a model, made from the tensors of a checkpoint."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from mora_jax._common.types import Shape
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._names import Tensor
from mora_jax.io._tensors import TensorFile


class Part(NamedTuple):
    """A tensor, and the axes of an array that are its rows and its columns.

    A weight (heads * width, in) that is a kernel (in, heads, width) has rows (1, 2) and
    columns (0,). A vector lacks columns.
    """

    file: TensorFile
    name: str
    rows: Shape
    columns: Shape

    @property
    def shape(self) -> Shape:
        """The tensor's shape."""
        return self.file.entries[self.name].shape

    @property
    def dtype(self) -> np.dtype:
        """The tensor's dtype, which is floating-point."""
        return self.file.dtype(self.name, "dequantise it first")

    @classmethod
    def of(cls, file: TensorFile, tensor: Tensor, array: Shape) -> "Part | None":
        """Return the part for an array of a shape; None if the tensor does not fit."""
        name, shape = tensor.name, file.entries[tensor.name].shape
        order = tensor.order or tuple(range(len(array)))
        if len(order) != len(array):
            return None
        if len(shape) < 2:
            fits = math.prod(array) == math.prod(shape)
            return cls(file, name, order, ()) if fits else None
        for k in range(1, len(order) if tensor.axes != "o" else 1):
            axes = order[:k], order[k:]
            axes = axes[::-1] if tensor.axes == "oi" else axes
            if tuple(math.prod(array[k] for k in group) for group in axes) == shape:
                return cls(file, name, *axes)
        return None

    def transposed(self, array: np.ndarray) -> np.ndarray:
        """Return an array with the axes of rows before the axes of columns."""
        return array.transpose(self.rows + self.columns)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array, and {index in its stack: the tensor that holds its numbers there}.

    The shape begins with the stack's. A sharding of None is the default device.
    """

    shape: Shape
    dtype: np.dtype
    sharding: Sharding | None
    tensors: Mapping[Shape, Part]

    def read(self) -> jax.Array:
        """Return the array.

        Memory of the host holds one device's part, beside the last. A transfer keeps
        the part that it reads, so each is awaited.
        """
        if self.sharding is None:
            whole = (slice(None),) * len(self.shape)
            return jnp.asarray(self._read(whole)).block_until_ready()
        parts, shards, memory = {}, [], self.sharding.memory_kind
        places = self.sharding.addressable_devices_indices_map(self.shape)
        for device, index in places.items():
            parts.setdefault(str(index), (index or (), []))[1].append(device)
        for index, devices in parts.values():
            array = self._read(index)
            where = (SingleDeviceSharding(d, memory_kind=memory) for d in devices)
            copies = [jax.device_put(array, sharding) for sharding in where]
            shards += jax.block_until_ready(copies)
        return jax.make_array_from_single_device_arrays(
            self.shape, self.sharding, shards
        )

    def _read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Return a part of the array, from rows of tensors that it needs alone.

        It is a view of numbers in the order of the tensors. JAX transposes it, faster
        than NumPy would.
        """
        ends = [part.indices(n)[:2] for part, n in zip(index, self.shape, strict=True)]
        depth, part = next((len(at), part) for at, part in self.tensors.items())
        order = [*range(depth), *(depth + k for k in part.rows + part.columns)]
        stored = np.empty([ends[k][1] - ends[k][0] for k in order], self.dtype)
        for place in np.ndindex(stored.shape[:depth]) if stored.size else ():
            at = tuple(k + start for k, (start, _) in zip(place, ends, strict=False))
            self._fill(stored[*place, ...], index[depth:], self.tensors[at])
        return stored.transpose(np.argsort(order))

    def _fill(self, stored: np.ndarray, box: tuple[slice, ...], part: Part) -> None:
        """Write the box of a tensor into `stored`, which is that box of one layer."""
        inner = self.shape[len(self.shape) - stored.ndim :]
        sizes, columns = ([inner[k] for k in axes] for axes in part[2:])
        chosen, cut = (tuple(box[k] for k in axes) for axes in part[2:])
        numbers = np.arange(math.prod(sizes)).reshape(sizes)[chosen].ravel()
        rows = stored.reshape(len(numbers), *stored.shape[len(sizes) :])
        first = int(numbers[0])
        for piece in part.file.rows(part.name, first, int(numbers[-1]) + 1):
            start, stop = np.searchsorted(numbers, (first, first + len(piece)))
            values = piece[numbers[start:stop] - first].reshape(-1, *columns)[:, *cut]
            rows[start:stop] = converted(values, self.dtype, part.name)
            first += len(piece)


def converted(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Return `array` in `dtype`, unless numbers are too large for that."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(dtype)
        saturates = np.isfinite(np.array(np.inf, np.float32).astype(dtype))
    largest = jnp.finfo(dtype).max
    if largest < jnp.finfo(array.dtype).max:
        # Some dtypes have NaN beyond their largest number, and others have that number.
        lost = ~(abs(array) <= largest) if saturates else ~np.isfinite(result)
        if (lost & np.isfinite(array)).any():
            raise AdapterFileError(f"{name!r} overflows {dtype}")
    return result
