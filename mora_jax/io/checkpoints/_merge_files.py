"""Adapters merged into a base checkpoint, from file to file."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mora_jax._common.types import Shape
from mora_jax._layer.delta import delta_kernel, scaled
from mora_jax._layer.rounding import Rounding, add_rounded, check_rounding, share_lost
from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree.adapters import adapter_items, trained_items
from mora_jax._tree.base_digest import (
    check_digests,
    kernel_digests,
    row_numbers,
    rows_digest,
)
from mora_jax._tree.paths import nearest_paths
from mora_jax.io._arrays import to_numpy
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._files import new_directory
from mora_jax.io._locations import Location, as_path, parts
from mora_jax.io._modules import Module, modules_of
from mora_jax.io._names import Names, join_index, pairs
from mora_jax.io._suggest import suggestion
from mora_jax.io._tensors import CHUNK, DTYPES, TensorFile
from mora_jax.io.checkpoints._checkpoint import INDEX, Checkpoint
from mora_jax.io.checkpoints._existing import check_is_checkpoint
from mora_jax.io.checkpoints._trained import Replacement, replacements


@dataclasses.dataclass(frozen=True)
class _Site:
    """A tensor of the base, and the adapter whose delta is added to it.

    Attributes:
      spec: The adapter.
      m: M, of all stacked layers if there is no module.
      module: The tensor's module; None for a tensor with the shape of the whole kernel.
      together: The tensors that are the kernel of one layer, in order.
    """

    spec: AdapterSpec
    m: np.ndarray
    module: Module | None
    together: tuple[str, ...]

    @property
    def axes(self) -> str:
        """The order of the tensor's axes, a letter each."""
        return self.module.axes if self.module else self.spec.axes

    @property
    def start(self) -> tuple[int, int]:
        """The kernel's first input and first output that the tensor has."""
        return 0, self.module.outputs.start if self.module else 0

    @property
    def shape(self) -> Shape:
        """The tensor's shape."""
        if not self.module:
            return self.spec.kernel_shape
        outputs = self.module.outputs
        widths = {"i": self.spec.in_features, "o": outputs.stop - outputs.start}
        return tuple(widths[letter] for letter in self.axes)

    def delta(self) -> np.ndarray:
        """The delta with the tensor's axes, in float32 or wider."""
        if not self.module:
            return np.asarray(delta_kernel(self.spec, self.m))
        delta = self.spec.operator.delta_weight(scaled(self.spec, self.m))
        delta = delta[:, self.module.outputs]
        # JAX's transpose has the memory order of the tensor. NumPy's would not, and it
        # adds arrays of different orders slowly.
        return np.asarray(delta.T if self.axes == "oi" else delta)

    def check_base(
        self, checkpoint: Checkpoint, read: Mapping[str, np.ndarray]
    ) -> None:
        """Raise if the adapter is known to be trained on another kernel.

        Args:
          checkpoint: The base.
          read: Tensors of the kernel that were read already.
        """
        if self.spec.base_digest is None:
            return
        tensors = [
            read[name] if name in read else checkpoint.place[name][name]
            for name in self.together
        ]
        if self.module:
            numbers = row_numbers(self.spec.in_features)
            kernels = [t.T if self.axes == "oi" else t for t in tensors]
            rows = np.concatenate([kernel[numbers] for kernel in kernels], axis=1)
            digests, layer = (rows_digest(rows),), self.module.layer
        else:
            digests, layer = kernel_digests(self.spec, tensors[0]), 0
        try:
            check_digests(self.spec, digests, layer)
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
    rounding: Rounding = "dither",
    progress: Callable[[int], object] = lambda size: None,
) -> dict[str, float]:
    """Merge adapters into a checkpoint that need not fit in memory.

    This is PEFT's `merge_and_unload` and `save_pretrained`, but without the model:
    tensors go from file to file, and memory holds one kernel and its delta. Names,
    dtypes and all tensors without an adapter stay bit for bit the same. Arrays that the
    plan trains take the place of their tensors, rounded to their dtypes. The config,
    tokenizer and templates in the base's directory are copied; pickles are not.

    A local `out` is there whole or not at all. On an object store the index and then
    config.json are written last, so a killed process leaves neither of them.

    Args:
      base: A safetensors file, or a directory of them with or without an index; a path
        or a URL that `etils.epath` opens. A kernel is found by its path, joined by "/"
        or ".". Otherwise `names` gives its name in PyTorch, `<module>.weight`.
      adapters: The adapters, as `init` makes them.
      plan: The plan that they follow.
      out: The directory to make, a path or a URL.
      names: As in `load_peft_mora`.
      force: Whether to replace a checkpoint that is in `out`. On an object store its
        files are removed before anything is written.
      any_base: Whether to merge also into other weights than those that the adapter
        was trained on.
      rounding: How to round to less than 32 bits, as in `mora_jax.merge`.
      progress: A function that is called after each piece that is written, with the
        number of its bytes.

    Returns:
      {tensor: the share of its delta that rounding lost in the mean}, as
      `diagnostics.merge_loss` has it.

    Raises:
      AdapterFileError: The base is damaged, or the adapters do not fit it; or, without
        `any_base`, the plan knows that they were trained on other weights.
      FileExistsError: `out` exists, and `force` is False; or it holds something other
        than a checkpoint, such as an adapter.
      NotADirectoryError: `out` is a file.
      ValueError: `out` is the base or holds it, or `rounding` is unknown.
    """
    check_rounding(rounding)
    source, target = as_path("base", base), as_path("out", out)
    checkpoint = Checkpoint(source)
    home = parts(source if source.is_dir() else source.parent)
    if parts(target) == home[: len(parts(target))]:
        raise ValueError(f"out must not be the base or hold it, got {target}")
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"out must be a directory, got the file {target}")
    if target.exists() and not force:
        raise FileExistsError(
            f"out must not exist, got {target}; force=True replaces a checkpoint there"
        )
    if target.exists():
        check_is_checkpoint(target, checkpoint)
    sites = _sites(checkpoint, adapters, plan, names)
    trained = replacements(checkpoint, trained_items(adapters, plan), pairs(names))
    if both := sorted(sites.keys() & trained.keys()):
        raise AdapterFileError(f"an adapter and a trained array go into {both[0]!r}")
    if sites and not any_base:  # most wrong bases are refused before a file is written
        next(iter(sites.values())).check_base(checkpoint, {})
    lost: dict[str, float] = {}
    last = [path for path in checkpoint.beside if _is_read_first(path.name)]
    with new_directory(target) as write:
        for path in checkpoint.beside:
            if path not in last:
                write(path.name, _chunks(path))
        for file in checkpoint.files:
            content = _merged(
                checkpoint, file, sites, trained, lost, any_base, rounding
            )
            write(file.path.name, _counted(content, progress))
        for path in sorted(last, key=lambda path: path.name == "config.json"):
            write(path.name, _chunks(path))
    return lost


def _is_read_first(name: str) -> bool:
    """Whether programs that read a checkpoint begin with the file of that name."""
    return name == "config.json" or name.endswith(INDEX)


def _sites(
    checkpoint: Checkpoint, adapters: Any, plan: Plan, names: Names
) -> dict[str, _Site]:
    """{tensor: its site}, all of them checked."""
    known, sites, missing = pairs(names), {}, {}
    for spec, m in adapter_items(adapters, plan):
        m = to_numpy(spec.name, m)
        m = m.astype(jnp.promote_types(m.dtype, jnp.float32))
        joined = [separator.join(spec.path) for separator in "/."]
        if found := [name for name in joined if name in checkpoint.place]:
            sites[found[0]] = _Site(spec, m, None, (found[0],))
            continue
        modules, unnamed = modules_of(spec, known)
        missing |= dict.fromkeys(unnamed, joined[0])
        for module in modules:
            name = f"{module.name}.weight"
            if name not in checkpoint.place:
                missing[join_index(spec.name, module.index)] = name
            elif name in sites:
                raise AdapterFileError(f"two adapters go into {name!r}")
            layer = [m.name for m in modules if m.layer == module.layer]
            together = tuple(f"{other}.weight" for other in layer)
            sites[name] = _Site(spec, m[module.index], module, together)
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
    checkpoint: Checkpoint,
    file: TensorFile,
    sites: Mapping[str, _Site],
    trained: Mapping[str, Replacement],
    lost: dict[str, float],
    any_base: bool,
    rounding: Rounding,
) -> Iterator[bytes]:
    """The file's bytes with deltas added, whose losses are put into `lost`."""
    yield file.header
    for name in sorted(file.entries, key=lambda name: file.entries[name].start):
        if name in sites:
            kernel = file[name]
            if not any_base:
                sites[name].check_base(checkpoint, {name: kernel})
            merged, lost[name] = _add(kernel, sites[name], name, rounding)
            yield merged.tobytes()
        elif name in trained:
            entry = file.entries[name]
            new = trained[name].as_tensor(entry.shape, DTYPES[entry.dtype])
            yield new.tobytes()
        else:
            yield from file.chunks(name)


def _add(
    kernel: np.ndarray, site: _Site, name: str, rounding: Rounding
) -> tuple[np.ndarray, float]:
    """The merged kernel, as `merge` has it, and the share of the delta that is lost."""
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    before, delta = kernel.astype(wide), site.delta().astype(wide)
    if wide == jnp.float32:
        settings = site.axes, kernel.dtype, rounding, site.start
        merged = np.asarray(add_rounded(kernel, delta, *settings))
    else:  # JAX may have no float64, and nothing is rounded
        merged = before + delta
    after = merged.astype(wide)
    if not np.isfinite(after).all() and np.isfinite(before).all():
        raise AdapterFileError(f"{name!r} overflows {kernel.dtype} with its delta")
    return merged, share_lost(after - before, delta)


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
