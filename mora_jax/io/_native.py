"""Adapters as files: a directory of safetensors and JSON."""

import contextlib
import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mora_jax._adapters import Tree, adapter_items
from mora_jax._bases import check_base, kernel_digests
from mora_jax._paths import adapter_path, named_leaves, nearest_paths
from mora_jax._plan import Plan
from mora_jax._spec import AdapterSpec
from mora_jax.io._arrays import host
from mora_jax.io._content import (
    FORMAT,
    VERSION,
    decode_adapter,
    digest_of,
    parse_config,
)
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._files import (
    CONFIG,
    TEMPORARY,
    TENSORS,
    locked,
    make_directory,
    naming,
    read_bytes,
    read_if_of_size,
    sync,
    unfinished_files,
    write_file,
)
from mora_jax.io._format import describe
from mora_jax.io._json import MAX_BYTES, dump, plain, short
from mora_jax.io._paths import Location, as_path
from mora_jax.io._tensors import encode


def save(
    directory: str | os.PathLike[str],
    adapters: Any,
    plan: Plan,
    metadata: Mapping[str, Any] | None = None,
    *,
    params: Any = None,
) -> None:
    """Write adapters as files that `load` gives back bit for bit.

    `adapter_model.safetensors` holds each M once, `adapter_config.json` the plan and
    digests of both files. Whenever the process is killed, the directory holds the
    adapter that was there or the new one; other files in it are left alone.

    That holds on a local disk, where processes that save into one directory wait for
    each other, and on object stores (`gs://`, `s3://`), where only one process at a
    time may save into a directory.

    Args:
      directory: A path or a URL that `etils.epath` opens; made if it is not there.
      adapters: as `init` makes them.
      plan: the plan that they follow.
      metadata: whatever JSON can hold, for `io.read_metadata`.
      params: The base's params. The file then holds a digest of a few rows of each
        kernel that is adapted, and `load` and `merge` refuse another base. By default
        what the plan knows of the base is kept.

    Raises:
      TypeError: metadata that JSON cannot hold, or params that are no arrays.
      ValueError: adapters or params that do not fit the plan, or adapters that hold NaN
        or infinity; a plan without adapters; a URL of an unknown scheme.
      OSError: what the file system says; then the directory is as it was.
      ImportError: without `mora-jax[io]`, or without what opens such a URL.

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
    path, metadata = as_path("directory", directory), _metadata(metadata)
    arrays: dict[str, np.ndarray] = {}
    layers = []
    kernels = None if params is None else _leaves(params)
    for spec, m in adapter_items(adapters, plan):
        name = "/".join(adapter_path(spec))
        arrays[name] = host(name, m)
        digests = spec.base_digest
        if kernels is not None:
            digests = kernel_digests(spec, _kernel(spec, kernels))
        known = None if digests is None else list(digests)
        layers.append(describe(spec, m.dtype) | {"base_digest": known})
    tensors = encode(arrays, {"format": FORMAT})
    config = {
        "format": FORMAT,
        "format_version": VERSION,
        "library_version": version("mora-jax"),
        "base_parameters": plan.base_parameters,
        "traced": plan.traced,
        "layers": layers,
        "metadata": metadata,
        "tensors_bytes": len(tensors),
        "tensors_sha256": digest_of(tensors),
    }
    config = dump(config | {"sha256": digest_of(dump(config))})
    shapes = {
        s.name: jax.ShapeDtypeStruct(s.kernel_shape, jnp.float32) for s in plan.specs
    }
    decode_adapter(config, tensors, shapes)  # what is written can be read
    _replace(path, config, tensors)


def _metadata(metadata: Any) -> dict[str, Any]:
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(
            f"metadata must map names to what JSON can hold, got {short(metadata)}"
        )
    return plain(metadata or {}, "metadata")


def _leaves(params: Any) -> dict[str, Any]:
    """{path: array or shape} of a params tree."""
    return {name: leaf for name, (_, leaf) in named_leaves(params).items()}


def _kernel(spec: AdapterSpec, kernels: Mapping[str, Any]) -> Any:
    """The array of `spec` among the base's params."""
    kernel = kernels.get(spec.name)
    if kernel is None:
        raise ValueError(
            f"params lack the kernel {spec.name!r}{nearest_paths(spec.name, kernels)}"
        )
    if not isinstance(kernel, jax.Array | np.ndarray) or isinstance(kernel, Tracer):
        raise TypeError(
            f"params must hold concrete arrays, got {type(kernel).__name__} at "
            f"{spec.name!r}"
        )
    if tuple(kernel.shape) != spec.kernel_shape:
        raise ValueError(
            f"{spec.name} in params must have shape {spec.kernel_shape}, got "
            f"{tuple(kernel.shape)}"
        )
    return kernel


def load(
    directory: str | os.PathLike[str],
    params_or_shapes: Any = None,
    *,
    any_base: bool = False,
) -> tuple[Tree, Plan]:
    """Adapters and their plan, as `save` wrote them.

    Everything is checked before anything is returned, and nothing is filled in. While
    other processes save into the directory, the adapters are those of one of them.

    Args:
      directory: A path or a URL that `etils.epath` opens.
      params_or_shapes: the model's params or their shapes, which then must have each
        kernel in the shape that the adapter was made for. Where `save` was given the
        base's params, arrays must also hold that base's weights, in float32 or
        bfloat16; parts of them on other processes are not looked at.
      any_base: Take other weights than those that the adapter was trained on, too.

    Returns:
      (adapters, plan). The plan alone says which operator made what.

    Raises:
      io.AdapterFileError: anything that is missing, too much, damaged, misshapen, not
        finite, of a newer format, of an operator that is not known, or one that this
        platform computes otherwise; weights of another base, without `any_base`. The
        message names the layer.
      TypeError, ValueError: `directory` is neither a path nor a URL of a known scheme.
      ImportError: without `mora-jax[io]`, or without what opens such a URL.

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
    path = as_path("directory", directory)
    kernels = None if params_or_shapes is None else _leaves(params_or_shapes)
    adapters, plan = decode_adapter(*_files(path), kernels)
    if kernels is not None and not any_base:
        try:
            check_base(plan.specs, kernels)
        except ValueError as error:
            raise AdapterFileError(f"{CONFIG} in {path}: {error}") from None
    return adapters, plan


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
    path = as_path("directory", directory) / CONFIG
    return parse_config(read_bytes(path, MAX_BYTES))["metadata"]


def _replace(directory: Location, config: bytes, tensors: bytes) -> None:
    """Both files at once: the config decides, and names its tensors by their digest.

    A directory cannot be renamed over another, and may hold files of the user's. So the
    tensors wait under a name of their own until the config is there.
    """
    make_directory(directory)
    with naming(directory), locked(directory):
        # Before anything is written: clients of object stores remember what they listed
        # until they write.
        left = unfinished_files(directory)
        waiting = directory / _waiting(digest_of(tensors))
        write_file(waiting, [tensors])
        write_file(directory / CONFIG, [config])  # from here on it is the new one
        waiting.replace(directory / TENSORS)
        for path in left:
            if path.name != waiting.name:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        sync(directory)


def _waiting(digest: str) -> str:
    """Where tensors are whose config has not been written, or has just been."""
    return f"{TEMPORARY}{digest}.safetensors"


def _files(directory: Location) -> tuple[bytes, bytes]:
    """Config and tensors that belong together."""
    seen = None
    while (config := read_bytes(directory / CONFIG, MAX_BYTES)) != seen:
        if tensors := _tensors(directory, config):
            return config, tensors
        seen = config  # another process may be replacing both just now
    with locked(directory):  # it may have been replaced twice, by an equal one at last
        config = read_bytes(directory / CONFIG, MAX_BYTES)
        if tensors := _tensors(directory, config):
            return config, tensors
    if not (directory / TENSORS).exists():
        raise AdapterFileError(f"there is no {TENSORS} in {directory}")
    raise AdapterFileError(
        f"{TENSORS} in {directory} is damaged, or not of this {CONFIG}: its size or "
        "SHA-256 differs from what that says"
    )


def _tensors(directory: Location, config: bytes) -> bytes | None:
    """The tensors that a config names, if they are there.

    A writer may move them from their waiting place between two looks, so the place
    where they go is looked at once more.
    """
    content = parse_config(config)
    digest, size = content["tensors_sha256"], content["tensors_bytes"]
    for name in (TENSORS, _waiting(digest), TENSORS):
        tensors = read_if_of_size(directory / name, size)
        if tensors is not None and digest_of(tensors) == digest:
            return tensors
    return None
