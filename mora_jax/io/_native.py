"""Adapters as files: a directory of safetensors and JSON."""

import hashlib
import os
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax.io._arrays import device, host
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._files import (
    CONFIG,
    TEMPORARY,
    TENSORS,
    locked,
    read_bytes,
    remove_unfinished,
    sync,
    write_file,
)
from mora_jax.io._format import describe, layer_path, restore
from mora_jax.io._json import MAX_BYTES, dump, parse, short
from mora_jax.io._tensors import decode, encode
from mora_jax.paths import adapter_path, named_leaves
from mora_jax.planning import Plan
from mora_jax.spec import SUFFIX
from mora_jax.tree import Tree, adapter_items, nest

FORMAT, VERSION = "mora_jax adapter", 1
KEYS = frozenset(
    {
        "format",
        "format_version",
        "library_version",
        "base_parameters",
        "traced",
        "layers",
        "metadata",
        "tensors_bytes",
        "tensors_sha256",
        "sha256",
    }
)


def save(
    directory: str | os.PathLike[str],
    adapters: Any,
    plan: Plan,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write adapters as files that `load` gives back bit for bit.

    `adapter_model.safetensors` holds each M once, `adapter_config.json` the plan and
    digests of both files. Whenever the process is killed, the directory holds the
    adapter that was there or the new one; other files in it are left alone.

    Args:
      directory: made if it is not there.
      adapters: as `init` makes them.
      plan: the plan that they follow.
      metadata: whatever JSON can hold, for `io.read_metadata`.

    Raises:
      TypeError: metadata that JSON cannot hold.
      ValueError: adapters that do not fit the plan, or that hold NaN or infinity; a
        plan without adapters.
      OSError: what the file system says; then the directory is as it was.
      ImportError: without `mora-jax[io]`.

    Example::

      >>> import tempfile
      >>> from mora_jax import init, load, plan, save
      >>> layers = plan({"fc": {"kernel": jnp.ones((8, 8))}})
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     save(directory, init(layers), layers, metadata={"task": "none"})
      ...     adapters, same = load(directory)
      >>> adapters["fc"]["kernel_mora"].shape, same == layers
      ((8, 8), True)
    """
    arrays: dict[str, np.ndarray] = {}
    layers = []
    for spec, m in adapter_items(adapters, plan):
        name = "/".join(adapter_path(spec))
        arrays[name] = host(name, m)
        layers.append(describe(spec, m.dtype))
    tensors = encode(arrays, {"format": FORMAT})
    config = {
        "format": FORMAT,
        "format_version": VERSION,
        "library_version": version("mora-jax"),
        "base_parameters": plan.base_parameters,
        "traced": plan.traced,
        "layers": layers,
        "metadata": dict(metadata or {}),
        "tensors_bytes": len(tensors),
        "tensors_sha256": _digest(tensors),
    }
    config = dump(config | {"sha256": _digest(dump(config))})
    shapes = {
        s.name: jax.ShapeDtypeStruct(s.kernel_shape, jnp.float32) for s in plan.specs
    }
    _decode(config, tensors, shapes)  # what is written can be read
    _replace(Path(directory), config, tensors)


def load(
    directory: str | os.PathLike[str], params_or_shapes: Any = None
) -> tuple[Tree, Plan]:
    """Adapters and their plan, as `save` wrote them.

    Everything is checked before anything is returned, and nothing is filled in.

    Args:
      directory: where they are.
      params_or_shapes: the model's params or their shapes, which then must have each
        kernel in the shape that the adapter was made for.

    Returns:
      (adapters, plan). The plan alone says which operator made what.

    Raises:
      io.AdapterFileError: anything that is missing, too much, damaged, misshapen, not
        finite, of a newer format, of an operator that is not known, or one that this
        platform computes otherwise. The message names the layer.
      ImportError: without `mora-jax[io]`.

    Example::

      >>> import tempfile
      >>> from mora_jax import init, load, plan, save
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> layers = plan(params)
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     save(directory, init(layers), layers)
      ...     adapters, same = load(directory, params)
      >>> float(adapters["fc"]["kernel_mora"].sum())
      0.0
      >>> load("nowhere")
      Traceback (most recent call last):
      mora_jax.io.AdapterFileError: there is no adapter_config.json in nowhere
    """
    leaves = None
    if params_or_shapes is not None:
        leaves = {n: leaf for n, (_, leaf) in named_leaves(params_or_shapes).items()}
    config, tensors = _files(Path(directory))
    return _decode(config, tensors, leaves)


def read_metadata(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save` was given as metadata.

    Raises:
      io.AdapterFileError: as `load`, for the same files.

    Example::

      >>> import tempfile
      >>> from mora_jax import init, io, plan, save
      >>> layers = plan({"fc": {"kernel": jnp.ones((8, 8))}})
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     save(directory, init(layers), layers, metadata={"task": "none"})
      ...     io.read_metadata(directory)
      {'task': 'none'}
    """
    return _config(read_bytes(Path(directory) / CONFIG, MAX_BYTES))["metadata"]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _replace(directory: Path, config: bytes, tensors: bytes) -> None:
    """Both files at once: the config decides, and names its tensors by their digest.

    A directory cannot be renamed over another, and may hold files of the user's. So the
    tensors wait under a name of their own until the config is there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory):
        waiting = directory / _waiting(_digest(tensors))
        write_file(waiting, [tensors])
        write_file(directory / CONFIG, [config])  # from here on it is the new one
        os.replace(waiting, directory / TENSORS)
        remove_unfinished(directory)
        sync(directory)


def _waiting(digest: str) -> str:
    """Where tensors are whose config has not been written, or has just been."""
    return f"{TEMPORARY}{digest}.safetensors"


def _files(directory: Path) -> tuple[bytes, bytes]:
    """Config and tensors that belong together."""
    for _ in range(3):  # another process may be replacing them just now
        config = read_bytes(directory / CONFIG, MAX_BYTES)
        content = _config(config)
        digest, size = content["tensors_sha256"], content["tensors_bytes"]
        for name in (TENSORS, _waiting(digest)):
            path = directory / name
            if path.is_file() and path.stat().st_size == size:
                tensors = read_bytes(path)
                if _digest(tensors) == digest:
                    return config, tensors
    if not (directory / TENSORS).exists():
        raise AdapterFileError(f"there is no {TENSORS} in {directory}")
    raise AdapterFileError(
        f"{TENSORS} is damaged, or not of this {CONFIG}: its size or SHA-256 differs "
        f"from what that says"
    )


def _config(data: bytes) -> dict[str, Any]:
    """The parsed config: of our format and version, undamaged, of the right types."""
    content = parse(data, CONFIG)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise AdapterFileError(
            f"{CONFIG} is not of mora_jax: its format must be {FORMAT!r}; "
            "io.load_peft_mora reads the reference's"
        )
    written = content.get("format_version")
    if type(written) is not int or written < 1:
        raise AdapterFileError(
            f"format_version in {CONFIG} must be a positive integer, "
            f"got {short(written)}"
        )
    if written > VERSION:
        raise AdapterFileError(
            f"{CONFIG} is of format version {written}, and this mora_jax reads up to "
            f"{VERSION}: a newer one is needed"
        )
    if content.keys() != KEYS:
        raise AdapterFileError(
            f"{CONFIG} must hold {sorted(KEYS)}; "
            f"it lacks {sorted(KEYS - content.keys())}, "
            f"and has beside them {short(sorted(content.keys() - KEYS))}"
        )
    rest = {key: value for key, value in content.items() if key != "sha256"}
    if content["sha256"] != _digest(dump(rest)):
        raise AdapterFileError(f"{CONFIG} is damaged or edited: its SHA-256 differs")
    kinds = {
        "library_version": str,
        "base_parameters": int,
        "traced": bool,
        "layers": list,
        "metadata": dict,
        "tensors_bytes": int,
        "tensors_sha256": str,
    }
    for key, kind in kinds.items():
        if type(content[key]) is not kind:
            raise AdapterFileError(
                f"{key} in {CONFIG} must be of type {kind.__name__}, "
                f"got {short(content[key])}"
            )
    if not re.fullmatch("[0-9a-f]{64}", content["tensors_sha256"]):
        raise AdapterFileError(f"tensors_sha256 in {CONFIG} must be 64 hex digits")
    return content


def _decode(
    config: bytes, tensors: bytes, base: Mapping[str, Any] | None
) -> tuple[Tree, Plan]:
    content, arrays = _config(config), decode(tensors, TENSORS)
    if not content["layers"]:
        raise AdapterFileError(f"{CONFIG} must have an adapter, got none")
    specs, adapters = [], {}
    for number, layer in enumerate(content["layers"]):
        path = layer_path(layer, f"layers[{number}] in {CONFIG}")
        name = "/".join(path)
        m = arrays.pop(f"{name}{SUFFIX}", None)
        if m is None:
            raise AdapterFileError(f"{TENSORS} lacks {name}{SUFFIX}")
        if not np.isfinite(m).all():
            raise AdapterFileError(f"{name}{SUFFIX} in {TENSORS} holds NaN or infinity")
        try:
            spec = restore(layer, m, base)
        except (TypeError, ValueError, OverflowError) as error:
            raise AdapterFileError(f"{name} in {CONFIG}: {error}") from error
        specs.append(spec)
        adapters[adapter_path(spec)] = device(name, m)
    if len(specs) > len(adapters):
        raise AdapterFileError(f"{CONFIG} has a layer twice")
    if arrays:
        raise AdapterFileError(
            f"{TENSORS} holds {short(sorted(arrays))}, of which {CONFIG} knows nothing"
        )
    plan = Plan(tuple(specs), content["base_parameters"], content["traced"])
    return nest(adapters), plan
