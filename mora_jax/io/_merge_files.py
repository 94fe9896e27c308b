"""Adapters merged into a base checkpoint, from file to file."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

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
from mora_jax.io._names import Names, join_index
from mora_jax.io._tensors import TensorFile, to_numpy
from mora_jax.io.checkpoints._checkpoint import INDEX, Checkpoint
from mora_jax.io.checkpoints._matching import Source, converted


@dataclasses.dataclass(frozen=True)
class Site:
    """Tensors of the base that are a kernel together, and the adapter of that."""

    # The tensors have as many outputs each. The kernel `name` is number `layer` in the
    # stack that the adapter was made for.
    name: str
    spec: AdapterSpec
    m: np.ndarray
    tensors: tuple[str, ...]
    layer: int = 0

    def add(
        self, name: str, tensor: np.ndarray, rounding: Rounding
    ) -> tuple[np.ndarray, float]:
        """A merged tensor, and the share of its delta that is lost."""
        part = self.tensors.index(name)
        dtype = jnp.promote_types(tensor.dtype, jnp.float32)
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
            check_digests(self.name, self.spec, digests, self.layer)
        except ValueError as error:
            raise AdapterFileError(str(error)) from None


def sites_of(source: Source, adapters: Any) -> dict[str, Site]:
    """{tensor: its site} for all tensors that adapters change, checked."""
    sites = {}
    for path, adapter in adapters_in(adapters).kernels.items():
        kernel = "/".join(path)
        m = to_numpy(kernel, adapter.m)
        m = m.astype(jnp.promote_types(m.dtype, jnp.float32))
        for site in _sites(source, path, adapter.spec, m):
            shape, axis = list(site.spec.kernel_shape), site.spec.axes.index("o")
            shape[axis] //= len(site.tensors)
            wanted = tuple(shape)
            for name in filter(None, site.tensors):
                source.take(name, kernel)
                if (found := source.checkpoint.entry(name).shape) != wanted:
                    raise AdapterFileError(
                        f"{name!r} in the base must have shape {wanted}, got {found}"
                    )
                sites[name] = site
    return sites


def _sites(
    source: Source, path: Path, spec: AdapterSpec, m: np.ndarray
) -> Iterator[Site]:
    """The sites of a kernel. What the base lacks is "", and noted as missing."""
    kernel = "/".join(path)
    if own := source.own_name(path):
        yield Site(kernel, spec, m, (own,))
        return
    known = source.known.modules(kernel, spec.kernel_shape, spec.axes)
    layers = itertools.groupby(known, lambda module: module.index)
    for layer, (index, group) in enumerate(layers):
        modules = list(group)
        tensors = tuple(source.named(f"{module.name}.weight") for module in modules)
        pairs = zip(modules, tensors, strict=True)
        source.missing += [module.place for module, tensor in pairs if not tensor]
        sizes = {"i": spec.in_features, "o": spec.out_features}
        axes = modules[0].axes
        shape = tuple(sizes[letter] for letter in axes)
        # One layer at a time: the delta of a whole stack may not fit in memory.
        alone = {"kernel_shape": shape, "axes": axes, "layout": None}
        one = dataclasses.replace(spec, **alone)
        yield Site(kernel, one, m[index], tensors, layer)


def replacements(
    source: Source, trained: dict[Path, Adapter]
) -> dict[str, tuple[str, np.ndarray]]:
    """{tensor: name and numbers of the trained array for it}."""
    replaced = {}
    for path, adapter in trained.items():
        name, shape = "/".join(path), adapter.spec.shape
        numbers, own = to_numpy(name, adapter.m), source.own_name(path)
        # A bias with axes for heads may have the name of its tensor by chance.
        if own and source.checkpoint.entry(own).shape == shape:
            source.take(own, name)
            replaced[own] = name, numbers
            continue
        for index, part in source.stack(name, shape).items():
            layer = part.in_rows(numbers[index])
            replaced[part.name] = join_index(name, index), layer
    return replaced


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
    dtypes and tensors without an adapter stay bit for bit the same. Arrays that are
    trained themselves replace their tensors, rounded to nearest. The config, tokenizer
    and templates beside the base are copied; pickles are not. A local `out` is there
    whole or not at all.

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
    written = [file.path.name for file in checkpoint.files]
    written += [path.name for path in checkpoint.beside]
    _files.check_free("out", target, written, force)
    tensors = Source(checkpoint, names, tied=False)
    sites = sites_of(tensors, adapters)
    trained = replacements(tensors, adapters_in(adapters).trained)
    tensors.check_missing()

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
