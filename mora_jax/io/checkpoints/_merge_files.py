"""Adapters merged into a base checkpoint, from file to file."""

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from mora_jax._layer.rounding import Rounding, add_rounded, check_rounding, share_lost
from mora_jax._plan.plan import Plan
from mora_jax._tree.adapters import trained_items
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._files import Files, entries, write_directory
from mora_jax.io._locations import Location, as_path, parts, size
from mora_jax.io._names import Names
from mora_jax.io._tensors import CHUNK, DTYPES
from mora_jax.io.checkpoints._checkpoint import INDEX, Checkpoint
from mora_jax.io.checkpoints._sites import Site, replacements, sites_of

BESIDE_A_MODEL = re.compile(
    r"(generation_|tokenizer_|(video_)?preprocessor_|processor_)?config\.json"
    r"|(tokenizer|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|(vocab|merges)\.txt|chat_template\.jinja|[\w.-]+\.model"
    r"|model[\w.-]*\.safetensors(\.index\.json)?"
)
"""Files that tools write beside a model, and never a person."""


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
    plan trains replace their tensors, rounded to their dtypes. The config,
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
      rounding: The rounding to less than 32 bits, as in `mora_jax.merge`.
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
    _check_target(target, checkpoint, force)
    sites = sites_of(checkpoint, adapters, plan, names)
    trained = replacements(checkpoint, trained_items(adapters, plan), names)
    if both := sorted(sites.keys() & trained.keys()):
        raise AdapterFileError(f"an adapter and a trained array go into {both[0]!r}")
    if sites and not any_base:  # most wrong bases are refused before a file is written
        next(iter(sites.values())).check_base(checkpoint, {})
    lost: dict[str, float] = {}

    def merged(name: str) -> Iterator[bytes]:
        """Yield the bytes of a tensor with its delta, whose loss is noted."""
        file, entry = checkpoint.place[name], checkpoint.entry(name)
        if name in sites:
            kernel = file[name]
            if not any_base:
                sites[name].check_base(checkpoint, {name: kernel})
            kernel, lost[name] = _add(kernel, sites[name], name, rounding)
            yield kernel.tobytes()
        elif name in trained:
            yield trained[name].as_tensor(entry.shape, DTYPES[entry.dtype]).tobytes()
        else:
            yield from file.chunks(name)

    def files() -> Files:
        """Yield the files in order: programs begin with a checkpoint's config."""
        last = [p for p in checkpoint.beside if p.name == "config.json" or _is_index(p)]
        for path in checkpoint.beside:
            if path not in last:
                yield path.name, _chunks(path)
        for file in checkpoint.files:
            order = sorted(file.entries, key=lambda name: file.entries[name].start)
            content = (chunk for name in order for chunk in merged(name))
            yield file.path.name, _counted(file.header, content, progress)
        for path in sorted(last, key=lambda path: not _is_index(path)):
            yield path.name, _chunks(path)

    write_directory(target, files())
    return lost


def _is_index(path: Location) -> bool:
    return path.name.endswith(INDEX)


def _check_target(target: Location, checkpoint: Checkpoint, force: bool) -> None:
    """Raise if there is anything that a merged checkpoint may not replace.

    Its tensors have the names that they will have, and copies of the base's other
    files are replaced by the same.

    Raises:
      FileExistsError: There is something else, such as an adapter.
      NotADirectoryError: There is a file.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise NotADirectoryError(f"out must be a directory, got the file {target}")
    if not force:
        raise FileExistsError(
            f"out must not exist, got {target}; force=True replaces a checkpoint there"
        )
    tensors = {file.path.name for file in checkpoint.files}
    copied = {path.name: path for path in checkpoint.beside}

    def is_known(path: Location) -> bool:
        if not path.is_file():
            return False
        if path.name in tensors or BESIDE_A_MODEL.fullmatch(path.name):
            return True
        return path.name in copied and _are_equal(path, copied[path.name])

    there = entries(target)
    others = sorted(path.name for path in there if not is_known(path))
    if others or there and not any(p.name.endswith(".safetensors") for p in there):
        raise FileExistsError(
            f"force=True replaces a directory that holds nothing but a checkpoint, got "
            f"{target} with {others[:3] or 'no *.safetensors'}"
        )


def _are_equal(path: Location, other: Location) -> bool:
    return size(path) == size(other) and path.read_bytes() == other.read_bytes()


def _add(
    kernel: np.ndarray, site: Site, name: str, rounding: Rounding
) -> tuple[np.ndarray, float]:
    """Return the merged kernel, and the share of the delta that is lost."""
    dtype = jnp.promote_types(kernel.dtype, jnp.float32)
    before, delta = kernel.astype(dtype), site.delta().astype(dtype)
    if dtype == jnp.float32:
        settings = site.axes, kernel.dtype, rounding, site.start
        merged = np.asarray(add_rounded(kernel, delta, *settings))
    else:  # JAX may lack float64, and nothing is rounded
        merged = before + delta
    after = merged.astype(dtype)
    if not np.isfinite(after).all() and np.isfinite(before).all():
        raise AdapterFileError(f"{name!r} overflows {kernel.dtype} with its delta")
    return merged, float(share_lost(after - before, delta))


def _counted(
    header: bytes, chunks: Iterator[bytes], progress: Callable[[int], object]
) -> Iterator[bytes]:
    """Yield a file's bytes, and report each piece after it was written."""
    yield header
    progress(len(header))
    for chunk in chunks:
        yield chunk
        progress(len(chunk))


def _chunks(path: Location) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
