"""A base checkpoint with adapters merged into it, file to file."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._types import Shape
from mora_jax.execution import kernel_update
from mora_jax.io._arrays import host
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._files import new_directory, write_file
from mora_jax.io._json import read, short
from mora_jax.io._names import Names, join_index, pairs, to_kernel, to_module
from mora_jax.io._tensors import CHUNK, DTYPES, TensorFile
from mora_jax.paths import nearest
from mora_jax.planning import Plan
from mora_jax.spec import AdapterSpec
from mora_jax.tree import Tree, adapter_items, nest

BESIDE = (".json", ".txt", ".model", ".jinja", ".md")
"""What else of a base is copied: configs, tokenizers, templates; never pickles."""


class Checkpoint:
    """A base in safetensors, one file or several, of which headers are in memory.

    Attributes:
      files: those with tensors.
      beside: other files to copy.
      place: {tensor: its file}.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the headers of a file, or of all files that a directory's index names.

        Raises:
          AdapterFileError: no safetensors, files that the index names and that are
            missing, or a tensor in two files.
        """
        path = Path(path)
        self.files = [TensorFile(file) for file in _tensor_files(path)]
        self.beside: list[Path] = []
        if path.is_dir():
            others = sorted(path.iterdir())
            self.beside = [p for p in others if p.suffix in BESIDE and p.is_file()]
        self.place: dict[str, TensorFile] = {}
        for file in self.files:
            for name in file.entries:
                if name in self.place:
                    raise AdapterFileError(
                        f"{short(name)} is in {self.place[name].path.name} and in "
                        f"{file.path.name}"
                    )
                self.place[name] = file

    @property
    def size(self) -> int:
        """Bytes of all files with tensors."""
        return sum(file.path.stat().st_size for file in self.files)

    def shapes(self, names: Names = None) -> Tree:
        """The kernels, (in, out), that `names` have a path for, as a params tree."""
        known, found = pairs(names), {}
        for name, file in self.place.items():
            entry = file.entries[name]
            kernel = to_kernel(name.removesuffix(".weight"), known)
            if name.endswith(".weight") and kernel and len(entry.shape) == 2:
                if entry.dtype in DTYPES and "[" not in kernel[0]:
                    path, layout = kernel
                    shape = entry.shape if layout == "io" else entry.shape[::-1]
                    dtype = DTYPES[entry.dtype]
                    found[tuple(path.split("/"))] = jax.ShapeDtypeStruct(shape, dtype)
        return nest(found)


def _tensor_files(path: Path) -> Sequence[Path]:
    if not path.is_dir():
        return [path]
    indices = sorted(path.glob("*.safetensors.index.json"))
    if not indices:
        found = sorted(path.glob("*.safetensors"))
        if not found:
            raise AdapterFileError(f"there is no *.safetensors in {path}")
        return found
    index = read(indices[0])
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise AdapterFileError(f"{indices[0].name} must have a weight_map")
    files = sorted({str(name) for name in names.values()})
    for name in files:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise AdapterFileError(
                f"{indices[0].name} must name files beside it, got {short(name)}"
            )
    return [path / name for name in files]


@dataclasses.dataclass(frozen=True)
class _Site:
    """An update and the layout of the tensor that it goes into."""

    spec: AdapterSpec
    m: np.ndarray
    layout: str
    """ "oi" or "io"; "" for a tensor of the kernel's own shape."""

    @property
    def shape(self) -> Shape:
        """Of the tensor."""
        widths = {"i": self.spec.in_features, "o": self.spec.out_features}
        return tuple(widths[letter] for letter in self.layout) or self.spec.kernel_shape

    def update(self) -> np.ndarray:
        """The update in the tensor's layout, in float32 or wider."""
        if not self.layout:
            return np.asarray(kernel_update(self.spec, self.m))
        delta = self.spec.operator.delta_weight(self.m)
        # In the tensor's own order: numpy is slow to add arrays of two orders.
        ordered = np.asarray(delta.T if self.layout == "oi" else delta)
        return self.spec.alpha * ordered


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapters: Any,
    plan: Plan,
    out: str | os.PathLike[str],
    names: Names = None,
    *,
    force: bool = False,
    progress: Callable[[int], object] = lambda size: None,
) -> dict[str, float]:
    """Merge adapters into a checkpoint that need not fit in memory.

    Tensor by tensor from file to file: memory holds one kernel and its update. All
    names, dtypes and other tensors stay bit for bit; what else a directory has beside
    its weights, config and tokenizer, is copied, pickles are not. `out` is there whole
    or not at all.

    Args:
      base: a safetensors file, or a directory of them, with an index or without.
        Kernels are found by their own paths, joined by "/" or ".", or else by `names`
        as PyTorch's `<module>.weight`.
      adapters: as `init` makes them.
      plan: the plan that they follow.
      out: the directory to make.
      names: as in `load_peft_mora`.
      force: replace `out` if it is there.
      progress: called with the number of bytes after each piece that is written.

    Returns:
      {tensor: the share of its update that rounding lost}, as
      `diagnostics.merge_loss`.

    Raises:
      AdapterFileError: a base that is damaged, or that adapters do not fit.
      FileExistsError: `out` is there, and not `force`.
      ValueError: `out` is the base.
    """
    out, base = Path(out), Path(base)
    checkpoint = Checkpoint(base)
    home = base if base.is_dir() else base.parent
    if out.resolve() in (home.resolve(), *home.resolve().parents):
        raise ValueError(f"out must not be the base or hold it, got {out}")
    if out.exists() and not force:
        raise FileExistsError(f"out must not exist, unless force is set, got {out}")
    sites = _sites(checkpoint, adapters, plan, names)
    lost: dict[str, float] = {}
    with new_directory(out) as unfinished:
        for path in checkpoint.beside:
            write_file(unfinished / path.name, _chunks(path))
        for file in checkpoint.files:
            content = _merged(file, sites, lost)
            write_file(unfinished / file.path.name, _counted(content, progress))
    return lost


def _sites(
    checkpoint: Checkpoint, adapters: Any, plan: Plan, names: Names
) -> dict[str, _Site]:
    """{tensor: what goes into it}, all of it checked."""
    known, sites = pairs(names), {}
    for spec, m in adapter_items(adapters, plan):
        m = host(spec.name, m)
        m = m.astype(jnp.promote_types(m.dtype, jnp.float32))
        own = [sep.join(spec.path) for sep in "/."]
        if found := [name for name in own if name in checkpoint.place]:
            sites[found[0]] = _Site(spec, m, "")
            continue
        for index in np.ndindex(spec.shape[:-2]):
            kernel = join_index(spec.name, index)
            module = to_module(kernel, known)
            name = f"{module[0]}.weight" if module else own[0]
            if module is None or name not in checkpoint.place:
                raise AdapterFileError(
                    f"the base has no tensor for the kernel {kernel!r}"
                    + nearest(name, checkpoint.place)
                )
            if name in sites:
                raise AdapterFileError(f"two adapters go into {name!r}")
            sites[name] = _Site(spec, m[index], module[1])
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
    file: TensorFile, sites: Mapping[str, _Site], lost: dict[str, float]
) -> Iterator[bytes]:
    """The file's bytes, with updates. Losses are noted in `lost`."""
    yield file.header
    for name in sorted(file.entries, key=lambda name: file.entries[name].start):
        if name in sites:
            merged, lost[name] = _add(file[name], sites[name].update(), name)
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


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
