"""A base checkpoint with adapters merged into it, file to file."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mora_jax._adapters import adapter_items
from mora_jax._bases import check_digests, kernel_digests, row_numbers, rows_digest
from mora_jax._compute.delta import delta_kernel, scaled
from mora_jax._paths import nearest_paths
from mora_jax._plan import Plan
from mora_jax._spec import AdapterSpec
from mora_jax._types import Shape
from mora_jax.io._arrays import host
from mora_jax.io._base import INDEX, Checkpoint
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._files import new_directory
from mora_jax.io._names import Names, join_index, pairs, to_module
from mora_jax.io._paths import Location, as_path, parts
from mora_jax.io._suggest import suggestion
from mora_jax.io._tensors import CHUNK, DTYPES, TensorFile


@dataclasses.dataclass(frozen=True)
class _Site:
    """An update and the layout of the tensor that it goes into."""

    spec: AdapterSpec
    m: np.ndarray
    layout: str
    """ "oi" or "io"; "" for a tensor of the kernel's own shape."""
    place: int = 0
    """Which of the kernel's stacked layers the tensor is, counted in their order."""

    @property
    def shape(self) -> Shape:
        """Of the tensor."""
        widths = {"i": self.spec.in_features, "o": self.spec.out_features}
        return tuple(widths[letter] for letter in self.layout) or self.spec.kernel_shape

    def update(self) -> np.ndarray:
        """The update in the tensor's layout, in float32 or wider."""
        if not self.layout:
            return np.asarray(delta_kernel(self.spec, self.m))
        delta = self.spec.operator.delta_weight(scaled(self.spec, self.m))
        # In the tensor's own order: numpy is slow to add arrays of two orders.
        return np.asarray(delta.T if self.layout == "oi" else delta)

    def check_base(self, kernel: np.ndarray) -> None:
        """Raise if `kernel` is known not to be what the adapter was trained on."""
        if self.spec.base_digest is None:
            return
        if self.layout:
            rows = kernel.T if self.layout == "oi" else kernel
            digests = (rows_digest(rows[row_numbers(self.spec.in_features)]),)
        else:
            digests = kernel_digests(self.spec, kernel)
        try:
            check_digests(self.spec, digests, self.place)
        except ValueError as error:
            raise AdapterFileError(str(error)) from None


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapters: Any,
    plan: Plan,
    out: str | os.PathLike[str],
    names: Names = None,
    *,
    force: bool = False,
    any_base: bool = False,
    progress: Callable[[int], object] = lambda size: None,
) -> dict[str, float]:
    """Merge adapters into a checkpoint that need not fit in memory.

    Tensor by tensor from file to file: memory holds one kernel and its update. All
    names, dtypes and other tensors stay bit for bit; what else a directory has beside
    its weights, config and tokenizer, is copied, pickles are not. A local `out` is
    there whole or not at all. On an object store the index and then config.json are
    written last, so what a killed process leaves has neither.

    Args:
      base: a safetensors file, or a directory of them, with an index or without; a
        path or a URL that `etils.epath` opens. Kernels are found by their own paths,
        joined by "/" or ".", or else by `names` as PyTorch's `<module>.weight`.
      adapters: as `init` makes them.
      plan: the plan that they follow.
      out: the directory to make, a path or a URL.
      names: as in `load_peft_mora`.
      force: replace `out` if it is there. On an object store the files that it holds
        are removed before anything is written.
      any_base: Merge into other weights than those that the adapter was trained on,
        too.
      progress: called with the number of bytes after each piece that is written.

    Returns:
      {tensor: the share of its update that rounding lost}, as
      `diagnostics.merge_loss`.

    Raises:
      AdapterFileError: a base that is damaged, or that adapters do not fit; without
        `any_base` also one of other weights, where the plan knows them.
      FileExistsError: `out` is there, and not `force`.
      NotADirectoryError: `out` is a file.
      ValueError: `out` is the base.
    """
    source, target = as_path("base", base), as_path("out", out)
    checkpoint = Checkpoint(source)
    home = parts(source if source.is_dir() else source.parent)
    if parts(target) == home[: len(parts(target))]:
        raise ValueError(f"out must not be the base or hold it, got {target}")
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"out must be a directory, got the file {target}")
    if target.exists() and not force:
        raise FileExistsError(
            f"out must not exist, got {target}; force=True replaces it"
        )
    sites = _sites(checkpoint, adapters, plan, names)
    if sites and not any_base:  # most other bases are seen with nothing written yet
        name, site = next(iter(sites.items()))
        site.check_base(checkpoint.place[name][name])
    lost: dict[str, float] = {}
    last = [path for path in checkpoint.beside if _is_read_first(path.name)]
    with new_directory(target) as write:
        for path in checkpoint.beside:
            if path not in last:
                write(path.name, _chunks(path))
        for file in checkpoint.files:
            content = _merged(file, sites, lost, any_base)
            write(file.path.name, _counted(content, progress))
        for path in sorted(last, key=lambda path: path.name == "config.json"):
            write(path.name, _chunks(path))
    return lost


def _is_read_first(name: str) -> bool:
    """Whether readers of a checkpoint begin with the file of that name."""
    return name == "config.json" or name.endswith(INDEX)


def _sites(
    checkpoint: Checkpoint, adapters: Any, plan: Plan, names: Names
) -> dict[str, _Site]:
    """{tensor: what goes into it}, all of it checked."""
    known, sites, missing = pairs(names), {}, {}
    for spec, m in adapter_items(adapters, plan):
        m = host(spec.name, m)
        m = m.astype(jnp.promote_types(m.dtype, jnp.float32))
        own = [sep.join(spec.path) for sep in "/."]
        if found := [name for name in own if name in checkpoint.place]:
            sites[found[0]] = _Site(spec, m, "")
            continue
        for place, index in enumerate(np.ndindex(spec.shape[:-2])):
            kernel = join_index(spec.name, index)
            module = to_module(kernel, known)
            name = f"{module[0]}.weight" if module else own[0]
            if module is None or name not in checkpoint.place:
                missing[kernel] = name
                continue
            if name in sites:
                raise AdapterFileError(f"two adapters go into {name!r}")
            sites[name] = _Site(spec, m[index], module[1], place)
    if missing:
        kernel, name = next(iter(missing.items()))
        modules = [
            name.removesuffix(".weight")
            for name in checkpoint.place
            if name.endswith(".weight")
        ]
        raise AdapterFileError(
            f"the base has no tensor for the kernel {kernel!r}"
            f"{nearest_paths(name, checkpoint.place)}; {suggestion(missing, modules)}"
        )
    for name, site in sites.items():
        entry = checkpoint.place[name].entries[name]
        if entry.shape != site.shape:
            raise AdapterFileError(
                f"{name!r} in the base must have shape {site.shape}, got {entry.shape}"
            )
        if entry.dtype not in DTYPES:
            raise AdapterFileError(
                f"{name!r} in the base must be one of {list(DTYPES)}, got "
                f"{entry.dtype}: dequantise it first"
            )
    return sites


def _merged(
    file: TensorFile,
    sites: Mapping[str, _Site],
    lost: dict[str, float],
    any_base: bool,
) -> Iterator[bytes]:
    """The file's bytes, with updates. Losses are noted in `lost`."""
    yield file.header
    for name in sorted(file.entries, key=lambda name: file.entries[name].start):
        if name in sites:
            kernel = file[name]
            if not any_base:
                sites[name].check_base(kernel)
            merged, lost[name] = _add(kernel, sites[name].update(), name)
            yield merged.tobytes()
        else:
            yield from file.chunks(name)


def _add(kernel: np.ndarray, update: np.ndarray, name: str) -> tuple[np.ndarray, float]:
    """As `merge`: in float32, or float64 where the kernel is, rounded once."""
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    before, update = kernel.astype(wide), update.astype(wide)
    with np.errstate(over="ignore"):
        merged = (before + update).astype(kernel.dtype)
    after = merged.astype(wide)
    if not np.isfinite(after).all() and np.isfinite(before).all():
        raise AdapterFileError(f"{name!r} overflows {kernel.dtype} with its update")
    norm = np.linalg.norm(update)
    lost = np.linalg.norm(after - before - update) / norm if norm else 0.0
    return merged, float(lost)


def _counted(
    chunks: Iterator[bytes], progress: Callable[[int], object]
) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        progress(len(chunk))


def _chunks(path: Location) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
