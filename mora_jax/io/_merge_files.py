"""Adapters merged into a base checkpoint, from file to file."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mora_jax._common.types import Path
from mora_jax._layer.adapter import Adapter
from mora_jax._layer.equation import delta_kernel
from mora_jax._layer.rounding import Rounding, add_rounded, check_rounding, share_lost
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree.base_digest import check_digests, kernel_digests
from mora_jax._tree.paths import adapters_in
from mora_jax.io import _files
from mora_jax.io._files import AdapterFileError, PathLike, as_path
from mora_jax.io._names import Names, join_index, stack_first
from mora_jax.io._tensors import TensorFile, to_numpy
from mora_jax.io.checkpoints._checkpoint import INDEX, Checkpoint
from mora_jax.io.checkpoints._matching import Source, converted


class Layer(NamedTuple):
    """A layer of an adapted kernel, and the tensors of the base that it is."""

    # Each tensor has as many of the outputs, and the spec the axes of all of them.
    kernel: str
    number: int
    spec: AdapterSpec
    m: np.ndarray
    tensors: list[str]

    def add(
        self, name: str, tensor: np.ndarray, rounding: Rounding
    ) -> tuple[np.ndarray, float]:
        """A merged tensor, and the share of its delta that is lost."""
        part, dtype = self.tensors.index(name), jnp.promote_types(tensor.dtype, "f4")
        # JAX's transpose has the memory order of the tensor. NumPy's would not, and it
        # adds arrays of different orders slowly.
        delta = np.asarray(delta_kernel(self.spec, self.m))
        parts = np.split(delta, len(self.tensors), self.spec.axes.index("o"))
        before, delta = tensor.astype(dtype), parts[part].astype(dtype)
        if dtype == jnp.float32:
            # The dither is the one that `merge` gives the whole kernel.
            start = 0, part * self.spec.out_features // len(self.tensors)
            settings = self.spec.axes, tensor.dtype, rounding, start
            merged = np.asarray(add_rounded(tensor, delta, *settings))
        else:  # JAX may lack float64, and nothing is rounded
            merged = before + delta
        after = merged.astype(dtype)
        if not np.isfinite(after).all() and np.isfinite(before).all():
            raise AdapterFileError(f"{name!r} overflows {tensor.dtype} with its delta")
        return merged, float(share_lost(after - before, delta))

    def check_base(self, read: Callable[[str], np.ndarray]) -> None:
        """Raise if the adapter is known to be trained on another kernel."""
        if self.spec.base_digest is None:
            return
        axis = self.spec.axes.index("o")
        kernel = np.concatenate([read(name) for name in self.tensors], axis)
        try:
            digests = kernel_digests(self.spec, kernel)
            check_digests(self.kernel, self.spec, digests, self.number)
        except ValueError as error:
            raise AdapterFileError(str(error)) from None


def _layers(source: Source, path: Path, adapter: Adapter) -> Iterator[Layer]:
    """The layers of a kernel. Tensors that the base lacks are noted as missing."""
    kernel, spec = "/".join(path), adapter.spec
    m = to_numpy(kernel, adapter.m)
    m = m.astype(jnp.promote_types(m.dtype, jnp.float32))
    if own := source.own_name(kernel, spec.kernel_shape):
        yield Layer(kernel, 0, spec, m, [own[()].name])
        return
    shape, axes = stack_first(spec.kernel_shape, spec.axes)
    depth, parts = axes.count("s"), source.stack(kernel, shape, axes)
    layers = itertools.groupby(parts.items(), lambda item: item[0][:depth])
    for number, (index, group) in enumerate(layers):
        found = [part for _, part in group]
        if len(found[0].shape) != 2:
            rule = f"{found[0].name!r} must have two axes, got {found[0].shape}"
            raise AdapterFileError(f"{rule}; mora_jax.merge merges it in memory")
        inner = axes[len(next(iter(parts))) :]
        letters = "".join(inner[group[0]] for group in found[0][2:])
        sizes = {"i": spec.in_features, "o": spec.out_features}
        own_shape = tuple(sizes[letter] for letter in letters)
        # One layer at a time: the delta of a whole stack may not fit in memory.
        changes = {"kernel_shape": own_shape, "axes": letters, "layout": None}
        one = dataclasses.replace(spec, operator=spec.operator.at(index), **changes)
        yield Layer(kernel, number, one, m[index], [part.name for part in found])


def _changes(
    source: Source, adapters: Any
) -> tuple[dict[str, Layer], dict[str, tuple[str, np.ndarray]]]:
    """{tensor: its layer}, and {tensor: name and numbers of the array replacing it}."""
    sites, trained, found = {}, {}, adapters_in(adapters)
    for path, adapter in found.kernels.items():
        for layer in _layers(source, path, adapter):
            sites |= dict.fromkeys(layer.tensors, layer)
    in_front = all(a.spec.stacked_in_front for a in found.kernels.values())
    for path, adapter in found.trained.items():
        name, shape = "/".join(path), adapter.spec.shape
        numbers = to_numpy(name, adapter.m)
        stack = source.own_name(name, shape) or source.stack(name, shape)
        if not in_front and () not in stack:  # its own place is not known
            rule = "the stack of an array that is trained must be in front"
            raise ValueError(f"{name}: {rule}, as those of kernels; or merge in memory")
        for index, part in stack.items():
            trained[part.name] = join_index(name, index), part.in_rows(numbers[index])
    source.check_missing()
    return sites, trained


def merge_checkpoint(
    base: PathLike,
    adapters: Any,
    out: PathLike,
    names: Names = None,
    *,
    force: bool = False,
    any_base: bool = False,
    rounding: Rounding = "dither",
    progress: Callable[[int], object] = lambda size: None,
) -> dict[str, float]:
    """Merge adapters into a checkpoint that need not fit in memory.

    Tensors go from file to file, and memory holds one kernel and its delta. Names,
    dtypes and tensors without an adapter stay bit for bit the same. Trained
    arrays replace their tensors, rounded to nearest. Config, tokenizer and templates
    are copied, pickles are not. A local `out` is there whole or not at all.

    Args:
      base: As the path in `load_base`. A kernel is found by its path, joined by "/" or
        ".", or as `<module>.weight` by `names`.
      adapters: The adapters, as `init` makes them.
      out: The directory to make, a path or a URL.
      names: As in `load_peft`.
      force: True to replace a checkpoint that is in `out`; an object store's is removed
        before anything is written.
      any_base: As in `mora_jax.merge`.
      rounding: As in `mora_jax.merge`.
      progress: A function of the number of bytes, called after each piece is written.

    Returns:
      {tensor: the share of its delta that rounding lost in the mean}, as
      `diagnostics.merge_loss` has it.

    Raises:
      AdapterFileError: The base is damaged, the adapters do not fit it, or they were
        trained on other weights and `any_base` is False.
      FileExistsError, NotADirectoryError: `out` holds files, and `force` is False; or
        one of another name than the base's; or it is a file.
      ValueError: `out` is the base or holds it, or `rounding` is unknown.
    """
    check_rounding(rounding)
    source, target = as_path("base", base), as_path("out", out)
    checkpoint = Checkpoint(source)
    if _files.holds(target, source if source.is_dir() else source.parent):
        raise ValueError(f"out must not be the base or hold it, got {target}")
    written = [file.path for file in checkpoint.files] + checkpoint.beside
    _files.check_free("out", target, [path.name for path in written], force)
    sites, trained = _changes(Source(checkpoint, names, tied=False), adapters)

    @functools.lru_cache(maxsize=1)  # a kernel is compared and then merged
    def read(name: str) -> np.ndarray:
        return checkpoint.place[name][name]

    if sites and not any_base:  # most wrong bases are refused before a file is written
        next(iter(sites.values())).check_base(read)
    lost: dict[str, float] = {}

    def merged(name: str) -> Iterator[bytes]:
        """The bytes of a tensor with its delta, whose loss is noted."""
        file = checkpoint.place[name]
        if name in sites:
            if not any_base:
                sites[name].check_base(read)
            kernel, lost[name] = sites[name].add(name, read(name), rounding)
            yield kernel.tobytes()
        elif name in trained:
            array, numbers = trained[name]
            yield converted(numbers, file.dtype(name), array).tobytes()
        else:
            yield from file.chunks(name)

    def content(file: TensorFile) -> Iterator[bytes]:
        order = sorted(file.entries, key=lambda name: file.entries[name].start)
        for chunk in itertools.chain([file.header], *map(merged, order)):
            yield chunk
            progress(len(chunk))

    stored = ((file.path.name, content(file)) for file in checkpoint.files)
    # Programs begin with the config and the index: without them nothing is read.
    beside = sorted(checkpoint.beside, key=lambda path: path.name.endswith(INDEX))
    beside.sort(key=lambda path: path.name == "config.json")
    copied = ((path.name, [path.read_bytes()]) for path in beside)
    _files.write_directory(target, itertools.chain(stored, copied))
    return lost
