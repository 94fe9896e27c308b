"""One array of a model, made from the tensors of a checkpoint."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from mora_jax._common.types import Shape
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._names import Tensor
from mora_jax.io._tensors import TensorFile

Part = tuple[tuple[int, int], ...]
"""The start and the stop of a part of an array, along each axis."""

BLOCK = 64
"""The number of rows that are transposed at once: as many as caches hold. All rows of a
piece at once would take ten times as long."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array, and the tensors that hold its numbers.

    Attributes:
      name: Its path in the model.
      shape: Its shape, which begins with its stack's.
      dtype: Its dtype, to which the tensors are converted.
      sharding: Its place; None for the default device.
      tensors: {index in the stack: the file and the tensor that hold it}.
    """

    name: str
    shape: Shape
    dtype: np.dtype
    sharding: Sharding | None
    tensors: Mapping[Shape, tuple[TensorFile, Tensor]]

    @property
    def depth(self) -> int:
        """The number of axes of the stack."""
        return len(next(iter(self.tensors)))

    @property
    def inner(self) -> Shape:
        """The shape of the array in its stack."""
        return self.shape[self.depth :]

    def check(self) -> None:
        """Raise unless all tensors have the shape that the array has in its stack."""
        for file, tensor in self.tensors.values():
            shape = file.entries[tensor.name].shape
            if axis_groups(self.inner, shape, tensor) is None:
                transposed = ", transposed," if tensor.axes == "oi" else ""
                raise AdapterFileError(
                    f"{self.name!r} in like has shape {self.shape}, which "
                    f"{tensor.name!r} of shape {shape}{transposed} does not fit"
                )

    def read(self) -> jax.Array:
        """Return the array.

        Memory of the host holds one device's part, beside the last. A transfer keeps
        the part that it reads, so each is awaited.
        """
        if self.sharding is None:
            whole = tuple((0, size) for size in self.shape)
            return jnp.asarray(_read(self, whole)).block_until_ready()
        devices: dict[Part, list[Any]] = defaultdict(list)
        places = self.sharding.addressable_devices_indices_map(self.shape)
        for device, index in places.items():
            ends = zip(index or (), self.shape, strict=True)
            devices[tuple(a.indices(size)[:2] for a, size in ends)].append(device)
        memory, shards = self.sharding.memory_kind, []
        for part, holders in devices.items():
            array = _read(self, part)
            where = (SingleDeviceSharding(d, memory_kind=memory) for d in holders)
            copies = [jax.device_put(array, sharding) for sharding in where]
            shards += jax.block_until_ready(copies)
        return jax.make_array_from_single_device_arrays(
            self.shape, self.sharding, shards
        )


def axis_groups(inner: Shape, shape: Shape, tensor: Tensor) -> tuple[Shape, ...] | None:
    """Return the axes of an array that are each axis of a tensor, in the array's order.

    A weight (heads * width, in) is a kernel (in, heads, width).

    Args:
      inner: The shape of the array, without its stack.
      shape: The shape of the tensor.
      tensor: The tensor's name and the order of its axes.

    Returns:
      The sizes of the axes for each axis; None if the array does not fit the tensor.
    """
    if tensor.order and len(tensor.order) != len(inner):
        return None
    inner = _ordered(inner, tensor.order)
    if len(shape) == 1:
        return (inner,) if math.prod(inner) == shape[0] and inner else None
    if len(shape) != 2 or tensor.axes == "o":
        return None
    sizes = shape[::-1] if tensor.axes == "oi" else shape
    for k in range(1, len(inner)):
        groups = inner[:k], inner[k:]
        if tuple(map(math.prod, groups)) == sizes:
            return groups
    return None


def _read(leaf: Leaf, part: Part) -> np.ndarray:
    """Return a part of the array, from rows of tensors that it needs and no others."""
    array = np.empty([stop - start for start, stop in part], leaf.dtype)
    stack = part[: leaf.depth]
    for position in np.ndindex(array.shape[: leaf.depth]):
        index = tuple(p + start for p, (start, _) in zip(position, stack, strict=True))
        _fill(leaf, array[position], part[leaf.depth :], *leaf.tensors[index])
    return array


def _fill(
    leaf: Leaf, array: np.ndarray, part: Part, file: TensorFile, tensor: Tensor
) -> None:
    """Write a part of a tensor into `array`, which has the layout of the leaf."""
    groups = axis_groups(leaf.inner, file.entries[tensor.name].shape, tensor)
    assert groups is not None
    if tensor.order:
        array, part = array.transpose(tensor.order), _ordered(part, tensor.order)
    wanted = [_positions(groups[0], part[: len(groups[0])])]
    if len(groups) == 1:  # the vector is a column
        wanted.append(np.arange(1))
    else:
        wanted.append(_positions(groups[1], part[len(groups[0]) :]))
    rows = whole = array.reshape([len(positions) for positions in wanted])
    if tensor.axes == "oi" and len(groups) == 2:
        rows, wanted = rows.T, wanted[::-1]
    if not rows.size:
        return
    first, columns = int(wanted[0][0]), _as_slice(wanted[1])
    for piece in file.rows(tensor.name, first, int(wanted[0][-1]) + 1):
        piece = piece.reshape(len(piece), -1)
        here = slice(*np.searchsorted(wanted[0], (first, first + len(piece))))
        chosen = piece[_as_slice(wanted[0][here] - first)][:, columns]
        for k in range(0, len(chosen), BLOCK):
            block = slice(k, k + BLOCK)
            rows[here][block] = _converted(chosen[block], leaf.dtype, tensor.name)
        first += len(piece)
    if tensor.order:  # no two axes can be a view of these
        array[...] = whole.reshape(array.shape)


def _ordered(axes: tuple[Any, ...], order: tuple[int, ...]) -> tuple[Any, ...]:
    """Return the values for each axis in another order of the axes."""
    return tuple(axes[k] for k in order) if order else axes


def _positions(axes: Shape, part: Part) -> np.ndarray:
    """Return the positions of a part of some axes, when they are one axis."""
    every = np.arange(math.prod(axes)).reshape(axes)
    return every[tuple(slice(*ends) for ends in part)].ravel()


def _as_slice(positions: np.ndarray) -> slice | np.ndarray:
    """Return positions without gaps as a slice, which copies nothing."""
    if len(positions) and positions[-1] - positions[0] == len(positions) - 1:
        return slice(int(positions[0]), int(positions[-1]) + 1)
    return positions


def _converted(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(dtype)
        saturates = np.isfinite(np.array(np.inf, np.float32).astype(dtype))
    largest = jnp.finfo(dtype).max
    if largest < jnp.finfo(array.dtype).max:
        # Some dtypes have NaN beyond their largest number, and others have that number.
        lost = ~(abs(array) <= largest) if saturates else ~np.isfinite(converted)
        if (lost & np.isfinite(array)).any():
            raise AdapterFileError(f"{name!r} overflows {dtype}")
    return converted
