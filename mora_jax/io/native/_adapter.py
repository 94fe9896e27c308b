"""Adapters in this library's format, one safetensors file that holds all.

Its metadata hold a text, the config: the plan, what the user wants to keep, and
digests. The file `CONFIG` beside it is that text again.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mora_jax._common.checks import check_concrete
from mora_jax._plan.plan import Plan, check_plan
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree.adapters import Tree, adapter_items, nest, trained_items
from mora_jax._tree.base_digest import check_base, kernel_digests
from mora_jax._tree.paths import find_part, named_leaves
from mora_jax.io import _files
from mora_jax.io._files import CONFIG, TENSORS, AdapterFileError, Location, locked
from mora_jax.io._json import dump, plain, read_json, short
from mora_jax.io._tensors import TensorFile, encode, to_jax, to_numpy
from mora_jax.io.native import _records

FORMAT, KEY = "mora_jax adapter", "mora_jax"
"""The format, and the only key of the file's metadata, whose text is the config."""

WHERE = f"the config in {TENSORS}"
"""The name of the config in messages."""

Content = tuple[dict[str, Any], dict[str, np.ndarray]]
"""The config in a file, and {name: array} of its tensors."""


def load(
    directory: _files.PathLike, params_or_shapes: Any = None, *, any_base: bool = False
) -> tuple[Tree, Plan]:
    """Return adapters and their plan, as `save` wrote them.

    PEFT calls this `from_pretrained`. Everything is checked before anything is
    returned, and nothing is filled in.

    Args:
      directory: A path or a URL that `etils.epath` opens.
      params_or_shapes: The model's params or their shapes, which the adapters must fit.
        If `save` was given the base's params, arrays must also hold that base's
        weights, in float32 or bfloat16.
      any_base: True to accept also other weights than those that the adapter was
        trained on.

    Returns:
      (adapters, plan). Only the plan says which operators the M's belong to.

    Raises:
      io.AdapterFileError: Something is missing, unknown, damaged, of a wrong shape, not
        finite or of a newer format; this platform computes an operator differently; or
        the params are of another base, without `any_base`. Messages name the layer.
      TypeError, ValueError: `directory` is neither a path nor a URL of a known scheme.
      ImportError: `mora-jax[io]` or the package that opens such a URL is missing.

    Example::

      >>> import tempfile, jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> plan = mora_jax.plan(params)
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     mora_jax.save(directory, mora_jax.init(plan), plan)
      ...     adapters, same = mora_jax.load(directory, params)
      >>> float(adapters["fc"]["kernel_mora"].sum())
      0.0
    """
    path, kernels = _files.as_path("directory", directory), None
    if params_or_shapes is not None:
        leaves = named_leaves(params_or_shapes)
        kernels = {name: leaf for name, (_, leaf) in leaves.items()}
    adapters, plan = _restored(*_settled(path), kernels)
    if kernels is not None and not any_base:
        try:
            check_base(plan.specs, kernels)
        except ValueError as error:
            raise AdapterFileError(f"{TENSORS} in {path}: {error}") from None
    return adapters, plan


def read_metadata(directory: _files.PathLike) -> dict[str, Any]:
    """Return the metadata that `save` was given.

    Args:
      directory: As in `load`.

    Raises:
      io.AdapterFileError: The file is missing, damaged or of a newer format.

    Example::

      >>> import tempfile, jax.numpy as jnp, mora_jax
      >>> plan = mora_jax.plan({"fc": {"kernel": jnp.ones((8, 8))}})
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     mora_jax.save(directory, mora_jax.init(plan), plan, metadata={"step": 3})
      ...     mora_jax.io.read_metadata(directory)
      {'step': 3}
    """
    return _settled(_files.as_path("directory", directory))[0]["metadata"]


def _settled(directory: Location) -> Content:
    """Return the content of an adapter's file, when nobody is writing it."""
    # Another process may be saving. A local file is read whole all the same, but a
    # store may give parts of two files, and the copy of the config may be of the next
    # adapter. So an error counts only if the file is the same as at the last try.
    lock, before = contextlib.nullcontext(), None
    while True:
        with lock:
            data = _files.read_bytes(directory / TENSORS)
            try:
                content, copy = _parse(data), directory / CONFIG
                if copy.exists() and dump(read_json(copy)) != dump(content[0]):
                    # Someone has edited it, or has replaced one of the two files.
                    raise AdapterFileError(
                        f"{CONFIG} in {directory} is edited, damaged or of another "
                        f"adapter: unlike {TENSORS}, which alone is read; delete it, "
                        "and the next save writes it"
                    )
                return content
            except AdapterFileError:
                if data == before:
                    raise
        before, lock = data, locked(directory)


# --- Content of the file ---


def _parse(data: bytes) -> Content:
    """Return the content of a file, whose format, version and digests are checked."""
    file, hint = TensorFile(Path(TENSORS), data), "io.load_peft reads PEFT's"
    texts = file.metadata
    if texts.keys() != {KEY} or not isinstance(texts[KEY], str):
        raise AdapterFileError(
            f"{TENSORS} is not of mora_jax: its metadata must hold {KEY!r} alone, got "
            f"{short(sorted(texts))}; {hint}"
        )
    more = {"metadata": (dict,), "tensors_sha256": (str,), "sha256": (str,)}
    content = _records.parse_plan(texts[KEY], FORMAT, more, WHERE, hint)
    if content["sha256"] != _signature(content):
        raise AdapterFileError(f"{WHERE} is damaged or edited: its SHA-256 differs")
    arrays = file.arrays()
    if content["tensors_sha256"] != _digest(arrays):
        raise AdapterFileError(f"{TENSORS} is damaged: the SHA-256 of tensors differs")
    return content, arrays


def _restored(
    config: dict[str, Any], arrays: dict[str, np.ndarray], base: _records.Base
) -> tuple[Tree, Plan]:
    """Return the adapters that a file holds, and their plan."""
    if not config["layers"]:
        raise AdapterFileError(f"{WHERE} must have an adapter, got none")
    plan, leaves = _records.restore_plan(config, WHERE, base, arrays)
    if arrays:
        raise AdapterFileError(
            f"{TENSORS} holds {short(sorted(arrays))}; its config knows nothing of it"
        )
    return nest({path: to_jax("/".join(path), a) for path, a in leaves.items()}), plan


def is_ours(directory: Location, name: str) -> bool:
    """Return True if the file `CONFIG` or `TENSORS` says that it is of this format."""
    if name == TENSORS:
        return KEY in TensorFile(directory / name).metadata
    content = read_json(directory / name)
    return isinstance(content, dict) and content.get("format") == FORMAT


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of the bytes of all arrays in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _signature(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a config without itself."""
    signed = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(dump(signed)).hexdigest()


def save(
    directory: _files.PathLike,
    adapters: Any,
    plan: Plan,
    metadata: Mapping[str, Any] | None = None,
    *,
    params: Any = None,
) -> None:
    """Write adapters as files that `load` gives back bit for bit.

    PEFT calls this `save_pretrained`. `adapter_model.safetensors` holds everything, and
    `adapter_config.json` is a copy of all but the arrays, for people to read. Whenever
    the process is killed, the directory holds the old adapter or the new one. Into an
    object store only one process at a time may save.

    Args:
      directory: As in `load`; made if it does not exist.
      adapters: The adapters, as `init` makes them.
      plan: The plan that they follow.
      metadata: Values that JSON can hold, for `io.read_metadata`.
      params: The base's params. The file then holds digests of them, and `load` and
        `merge` refuse another base. By default it keeps the digests in the plan.

    Raises:
      TypeError: JSON cannot hold the metadata, or params are not arrays.
      ValueError: Adapters or params do not fit the plan, adapters hold NaN or infinity,
        the plan lacks adapters, or the scheme of a URL is not known.
      FileExistsError: The directory holds an adapter of another format, such as PEFT's.
      OSError: The file system refuses. The directory is as it was.
      ImportError: As in `load`.

    Example::

      >>> import tempfile, jax.numpy as jnp, mora_jax
      >>> plan = mora_jax.plan({"fc": {"kernel": jnp.ones((8, 8))}})
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     mora_jax.save(directory, mora_jax.init(plan), plan, metadata={"step": 3})
      ...     adapters, same = mora_jax.load(directory)
      >>> adapters["fc"]["kernel_mora"].shape, same == plan
      ((8, 8), True)
    """
    path = _files.as_path("directory", directory)
    _refuse_foreign_adapter(path)
    replace_adapter(path, adapters, plan, metadata, params)


def replace_adapter(
    directory: Location, adapters: Any, plan: Plan, metadata: Any, params: Any = None
) -> None:
    """Do the same as `save`, also where the adapter of another format is."""
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must map names to JSON, got {short(metadata)}")
    kept = plain(metadata or {}, "metadata")
    if params is not None:
        plan = _with_digests(check_plan(plan), params)
    tensors, config = _encode(adapters, plan, kept)
    # Nothing is written that cannot be read.
    _restored(*_parse(tensors), _records.shapes_of(plan))
    _files.replace_files(directory, tensors, config)


def _encode(adapters: Any, plan: Plan, metadata: dict[str, Any]) -> tuple[bytes, bytes]:
    """Return the content of the file, and its config with the user's `metadata`."""
    arrays: dict[str, np.ndarray] = {}
    items = adapter_items(adapters, plan)
    content = _records.record_of(plan, _records.PLAN)
    for (spec, m), layer in zip(items, content["layers"], strict=True):
        name = f"{spec.name}{SUFFIX}"
        arrays[name] = to_numpy(name, m)
        layer["dtype"] = arrays[name].dtype.name
        if spec.operator.given:
            fields = spec.operator.arrays
            arrays |= {f"{name}/{f}": getattr(spec.operator, f) for f in fields}
    for array, copy in trained_items(adapters, plan):
        arrays[array.name] = to_numpy(array.name, copy)
    content |= {"format": FORMAT, "metadata": metadata}
    content["tensors_sha256"] = _digest(arrays)
    content["sha256"] = _signature(content)
    config = dump(content)
    return encode(arrays, {KEY: config.decode()}), config


def _with_digests(plan: Plan, params: Any) -> Plan:
    """Return the plan with digests of the base's kernels."""
    leaves, specs = named_leaves(params), []
    for spec in plan.specs:
        _, kernel = find_part(leaves, spec)
        check_concrete(kernel, f"{spec.name} in params", spec.kernel_shape)
        digests = kernel_digests(spec, kernel)
        specs.append(dataclasses.replace(spec, base_digest=digests))
    return dataclasses.replace(plan, specs=tuple(specs))


def _refuse_foreign_adapter(directory: Location) -> None:
    """Raise if a directory holds an adapter that this library did not write."""
    present = [name for name in _files.ADAPTER if (directory / name).is_file()]
    for name in present:
        # A file so damaged that it says nothing leaves that to the other.
        with contextlib.suppress(AdapterFileError):
            if is_ours(directory, name):
                return
            break
    if present:
        raise FileExistsError(
            f"directory must not hold an adapter of another format, got {directory}, "
            f"whose {present[0]} is not mora_jax's; save to another one, or delete that"
        )
