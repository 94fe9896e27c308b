"""The tensors of a checkpoint that are a model's leaves, found by names."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from mora_jax._common.axes import sizes
from mora_jax._common.checks import patterns_of
from mora_jax._common.messages import matching, nearest_paths
from mora_jax._common.types import Shape
from mora_jax.io import _names
from mora_jax.io._files import AdapterFileError
from mora_jax.io._json import short
from mora_jax.io._names import Names, Pair, bijection, join_index
from mora_jax.io._tensors import TensorFile
from mora_jax.io.checkpoints._checkpoint import Checkpoint


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
        return self.file.entries[self.name].shape

    @classmethod
    def of(cls, file: TensorFile, name: str, pair: Pair, array: Shape) -> "Part | None":
        """The part for an array of a shape; None if the tensor does not fit."""
        shape, letters, n = file.entries[name].shape, pair.kernel_axes, len(array)
        if len(shape) == n > 2 and shape == (*array[:-3:-1], *array[:-2]):
            # A convolution: (out, in, *window) there, and (*window, in, out) here.
            return cls(file, name, (n - 1,), (n - 2, *range(n - 2)))
        if len(shape) < 2 and math.prod(array) == math.prod(shape):
            return cls(file, name, tuple(range(n)), ())
        splits = [letters] * (len(letters) == n > 1)
        if len(letters) == 2:  # each may be several axes here, such as heads and width
            splits = [letters[0] * k + letters[1] * (n - k) for k in range(1, n)]
        for split in splits:
            groups = tuple(sizes(range(n), split, letter) for letter in pair.axes)
            if tuple(math.prod(array[k] for k in group) for group in groups) == shape:
                return cls(file, name, *groups)
        return None

    def in_rows(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(self.rows + self.columns).reshape(self.shape)


def _on_device(device: Any, memory_kind: str | None) -> NamedSharding:
    """The sharding of an array that one device holds whole.

    It has a mesh of that device: the name of JAX's sharding of one device differs
    between the versions that are supported.
    """
    mesh = Mesh(np.array([device]), ("device",))
    return NamedSharding(mesh, PartitionSpec(), memory_kind=memory_kind)


class Leaf(NamedTuple):
    """An array, and {index in its stack: the tensor that holds its numbers there}.

    The shape begins with the stack's. A sharding of None is the default device.
    """

    shape: Shape
    dtype: np.dtype
    sharding: Sharding | None
    tensors: Mapping[Shape, Part]

    def read(self) -> jax.Array:
        """The array, while the host holds one device's part beside the last."""
        if self.sharding is None:
            whole = (slice(None),) * len(self.shape)
            return jnp.asarray(self._read(whole)).block_until_ready()
        parts, data, memory = {}, [], self.sharding.memory_kind
        places = self.sharding.addressable_devices_indices_map(self.shape)
        for device, index in places.items():
            parts.setdefault(str(index), (index or (), []))[1].append(device)
        for index, devices in parts.values():
            array = self._read(index)
            copies = [
                jax.device_put(array, _on_device(device, memory)) for device in devices
            ]
            # A transfer that is under way keeps the part that it reads.
            data += jax.block_until_ready(copies)
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, data)

    def _read(self, index: tuple[slice, ...]) -> np.ndarray:
        """A part of the array, from rows of tensors that it needs alone."""
        ends = [part.indices(n)[:2] for part, n in zip(index, self.shape, strict=True)]
        depth, part = next((len(at), part) for at, part in self.tensors.items())
        order = [*range(depth), *(depth + k for k in part.rows + part.columns)]
        stored = np.empty([ends[k][1] - ends[k][0] for k in order], self.dtype)
        for place in np.ndindex(stored.shape[:depth]) if stored.size else ():
            at = tuple(k + start for k, (start, _) in zip(place, ends, strict=False))
            self._fill(stored[*place, ...], index[depth:], self.tensors[at])
        # A view: JAX transposes the numbers when it copies them, faster than NumPy.
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
    """`array` in `dtype`, unless numbers are too large for that."""
    if array.dtype == dtype:
        return array
    largest = jnp.finfo(dtype).max
    if largest < jnp.finfo(array.dtype).max:
        # Some dtypes have NaN beyond their largest number, and others have that number.
        if ((abs(array) > largest) & np.isfinite(array)).any():
            raise AdapterFileError(f"{name!r} overflows {dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype)


class Source:
    """The tensors of a checkpoint, found by the names that PyTorch may give them.

    `taken` is {tensor: the leaf that has it}, and `missing` are the leaves without a
    tensor, with their indices. With `tied`, a tensor may stand for one it is tied to,
    unless the model's config says that none are.
    """

    def __init__(self, checkpoint: Checkpoint, names: Names, tied: bool = True) -> None:
        self.checkpoint, self.names, self.known = checkpoint, names, bijection(names)
        # A model of more than texts has another config in it, for its language model.
        configs = checkpoint.config, checkpoint.config.get("text_config")
        known = (config for config in configs if isinstance(config, dict))
        self.tied = tied and all(c.get("tie_word_embeddings", True) for c in known)
        self._by_canonical: dict[str, list[str]] = defaultdict(list)
        for name in checkpoint.place:
            self._by_canonical[_names.canonical(name)].append(name)
        self.taken: dict[str, str] = {}
        self.missing: list[str] = []

    def stack(self, leaf: str, shape: Shape, axes: str = "") -> dict[Shape, Part]:
        """{index in a leaf's stack: its tensor}; others are noted as missing."""
        # The `axes` of a kernel are as in `Bijection.layers`.
        pairs = self.known.layers(leaf, shape, axes, self.named)
        if not any(pairs.values()) and not axes and (own := self.own_name(leaf, shape)):
            return own
        stack: dict[Shape, Part] = {}
        if not pairs:
            self.missing.append(leaf)
        for index, pair in pairs.items():
            name = join_index(leaf, index)
            if pair is None:
                self.missing.append(name)
                continue
            self.take(tensor := self.named(pair.tensor), name)
            file = self.checkpoint.place[tensor]
            own = shape[len(index) :]
            if axes:  # other leaves are transposed, whatever the order
                order = self.checkpoint.axes(tensor, pair, self.names, own)
                pair = pair._replace(axes=order)
            part = Part.of(file, tensor, pair, own)
            # All layers have one order of axes, since they are one array.
            if part is None or part[2:] != next(iter(stack.values()), part)[2:]:
                told = f"the leaf {leaf!r} of shape {shape} does not fit {tensor!r}"
                turned = " transposed" * pair.transposed
                stored = f"of shape {file.entries[tensor].shape}{turned}"
                raise AdapterFileError(f"{told} {stored} in {file.path.name}")
            stack[index] = part
        return stack

    def own_name(self, leaf: str, shape: Shape) -> dict[Shape, Part]:
        """As `stack`, by a tensor of that shape whose name is the path, or {}."""
        for name in (leaf, leaf.replace("/", ".")):
            file = self.checkpoint.place.get(name)
            # A bias with axes for heads may have the name of its tensor by chance.
            if file and file.entries[name].shape == shape:
                self.take(name, leaf)
                axes = tuple(range(len(shape)))
                return {(): Part(file, name, axes[:1], axes[1:])}
        return {}

    def named(self, tensor: str) -> str:
        """The name that the files have for a tensor; "" if they lack it."""
        if tensor in self.checkpoint.place:
            return tensor
        twins = _tied_to(tensor) if self.tied else ()
        for name in (_names.canonical(tensor), *twins):
            if len(names := self._by_canonical.get(name, ())) == 1:
                return names[0]
        return ""

    def take(self, tensor: str, leaf: str) -> None:
        """Note that a leaf has the tensor, which must be floating-point."""
        # A model may have two leaves where the file has one of two tied tensors.
        if tensor in self.taken and not (self.tied and _tied_to(tensor)):
            both = f"{self.taken[tensor]!r} and {leaf!r}"
            raise AdapterFileError(f"{both} are both {tensor!r} in the base")
        self.checkpoint.place[tensor].dtype(tensor)
        self.taken[tensor] = leaf

    def check_missing(self) -> None:
        if not self.missing:
            return
        leaf, place = self.missing[0], self.checkpoint.place
        names = (pair.tensor for pair in self.known.of_leaf(leaf))
        # Kernels need a template, though a tensor may have their name.
        name = next((name for name in names if name not in place), "")
        text = f"the base has no tensor for the leaf {leaf!r}"
        if _tied_to(name) and not self.tied:
            text += ", or has it only as another one, and here no tensors are tied"
        text += f", which would be {name!r}" if name else ""
        text += nearest_paths(name or leaf, place)
        for own in {leaf, leaf.replace("/", ".")} & place.keys():
            text += f"; {own!r} has another shape, {place[own].entries[own].shape}"
        others = (name for name in self.missing if not name.endswith("/bias"))
        if unnamed := [name for name in others if not any(self.known.of_kernel(name))]:
            text += f"; {_names.templates(unnamed)}"
        raise AdapterFileError(text)

    def check_left(self, leaves: Iterable[str], skip: str | Sequence[str]) -> None:
        """Raise if a tensor lacks a leaf, unless `skip` matches it or it is idle."""
        place, patterns = self.checkpoint.place, patterns_of("skip", skip)
        settled = matching("skip", patterns, place, "tensor in the base")
        settled |= self.taken.keys()
        left = [name for name in place if not (name in settled or self._is_idle(name))]
        if left:
            others = f" and {len(left) - 1} more" if len(left) > 1 else ""
            near = nearest_paths(left[0].replace(".", "/"), leaves)
            lacks = f"like has no leaf for {short(left[0])}{others} in the base{near}"
            hint = "skip=[...] leaves out tensors whose names it matches"
            raise AdapterFileError(f"{lacks}; {hint}")

    def _is_idle(self, name: str) -> bool:
        """True for a buffer, and if a taken tensor that is tied is the same."""
        twins = (n for twin in _tied_to(name) for n in self._by_canonical.get(twin, ()))
        for twin in filter(self.taken.__contains__, twins):
            files = [(self.checkpoint.place[n], n) for n in (name, twin)]
            one, other = (file.entries[n] for file, n in files)
            pieces = (file.chunks(n) for file, n in files)
            # Piece by piece, since a head is among the largest of tensors.
            equal = (a == b for a, b in zip(*pieces, strict=True))
            if one[:2] == other[:2] and all(equal):
                return True
        return _names.BUFFERS.fullmatch(name) is not None


def _tied_to(tensor: str) -> list[str]:
    """The canonical names of the tensors that may be tied to one."""
    name = _names.canonical(tensor)
    pairs = (pair for pair in _names.TIED if name in pair)
    return [twin for pair in pairs for twin in pair if twin != name]
