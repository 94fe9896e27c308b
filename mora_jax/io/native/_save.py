"""Adapters as a directory of two files, in safetensors and JSON."""

import contextlib
import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree.adapters import Tree, adapter_items, trained_items
from mora_jax._tree.base_digest import check_base, kernel_digests
from mora_jax._tree.paths import adapter_path, named_leaves, nearest_paths
from mora_jax.io._arrays import to_numpy
from mora_jax.io._content import (
    FORMAT,
    VERSION,
    VERSION_WITHOUT_TRAINED,
    decode_adapter,
    digest_of,
    parse_config,
)
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._existing import refuse_foreign_adapter
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
from mora_jax.io._trained import describe_trained


def save(
    directory: str | os.PathLike[str],
    adapters: Any,
    plan: Plan,
    metadata: Mapping[str, Any] | None = None,
    *,
    params: Any = None,
) -> None:
    """Write adapters as files that `load` gives back bit for bit.

    PEFT calls this `save_pretrained`. `adapter_model.safetensors` holds each M once,
    and each array that trains itself;
    `adapter_config.json` the plan and digests of both files. Whenever the process is
    killed, the directory holds the old adapter or the new adapter. Other files in it
    are left alone, and an adapter of another format is not replaced.

    On a local disk, processes that save into one directory wait for each other. On an
    object store (`gs://`, `s3://`) only one process at a time may save into it.

    Args:
      directory: A path or a URL that `etils.epath` opens; made if it does not exist.
      adapters: The adapters, as `init` makes them.
      plan: The plan that they follow.
      metadata: Values that JSON can hold, for `io.read_metadata`.
      params: The base's params. The file then holds a digest of a few rows of each
        adapted kernel, and `load` and `merge` refuse another base. By default the file
        keeps the digests that the plan has.

    Raises:
      TypeError: JSON cannot hold the metadata, or params are not arrays.
      ValueError: Adapters or params do not fit the plan, adapters hold NaN or infinity,
        the plan has no adapters, or the scheme of a URL is not known.
      FileExistsError: The directory holds an adapter of another format, such as PEFT's.
      OSError: The file system refuses. The directory is as it was.
      ImportError: `mora-jax[io]` or the package that opens such a URL is missing.

    Example::

      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> import mora_jax
      >>> plan = mora_jax.plan({"fc": {"kernel": jnp.ones((8, 8))}})
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     mora_jax.save(directory, mora_jax.init(plan), plan, metadata={"step": 3})
      ...     adapters, same = mora_jax.load(directory)
      >>> adapters["fc"]["kernel_mora"].shape, same == plan
      ((8, 8), True)
    """
    replace_adapter(directory, adapters, plan, metadata, params=params)


def replace_adapter(
    directory: str | os.PathLike[str],
    adapters: Any,
    plan: Plan,
    metadata: Mapping[str, Any] | None = None,
    *,
    params: Any = None,
    force: bool = False,
) -> None:
    """The same as `save`, and with `force` it replaces adapters of other formats."""
    path, metadata = as_path("directory", directory), _metadata(metadata)
    config, tensors = _encoded(adapters, plan, metadata, params)
    if not force:
        refuse_foreign_adapter(path)
    _replace(path, config, tensors)


def _encoded(
    adapters: Any, plan: Plan, metadata: dict[str, Any], params: Any
) -> tuple[bytes, bytes]:
    """The content of the config and of the tensors, checked."""
    arrays: dict[str, np.ndarray] = {}
    layers = []
    kernels = None if params is None else _leaves(params)
    for spec, m in adapter_items(adapters, plan):
        name = "/".join(adapter_path(spec))
        arrays[name] = to_numpy(name, m)
        if spec.operator.given:
            fields = spec.operator.arrays
            arrays |= {f"{name}/{f}": getattr(spec.operator, f) for f in fields}
        digests = spec.base_digest
        if kernels is not None:
            digests = kernel_digests(spec, _kernel(spec, kernels))
        known = None if digests is None else list(digests)
        layers.append(describe(spec, m.dtype) | {"base_digest": known})
    for one, copy in trained_items(adapters, plan):
        arrays[one.name] = to_numpy(one.name, copy)
    trained = [describe_trained(one) for one in plan.trained]
    tensors = encode(arrays, {"format": FORMAT})
    config = {
        "format": FORMAT,
        "format_version": VERSION if trained else VERSION_WITHOUT_TRAINED,
        "library_version": version("mora-jax"),
        "base_parameters": plan.base_parameters,
        "traced": plan.traced,
        "layers": layers,
        "metadata": metadata,
        "tensors_bytes": len(tensors),
        "tensors_sha256": digest_of(tensors),
        **({"trained": trained} if trained else {}),
    }
    config = dump(config | {"sha256": digest_of(dump(config))})
    shapes = {
        s.name: jax.ShapeDtypeStruct(s.kernel_shape, jnp.float32) for s in plan.specs
    }
    shapes |= {s.name: jax.ShapeDtypeStruct(s.shape, s.dtype) for s in plan.trained}
    decode_adapter(config, tensors, shapes)  # nothing is written that cannot be read
    return config, tensors


def _metadata(metadata: Any) -> dict[str, Any]:
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(
            f"metadata must map names to what JSON can hold, got {short(metadata)}"
        )
    return plain(metadata or {}, "metadata")


def _leaves(params: Any) -> dict[str, Any]:
    """The leaves of a params tree as {path: array or shape}."""
    return {name: leaf for name, (_, leaf) in named_leaves(params).items()}


def _kernel(spec: AdapterSpec, kernels: Mapping[str, Any]) -> Any:
    """The kernel of `spec` among the base's params."""
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

    PEFT calls this `from_pretrained`. Everything is checked before anything is
    returned, and nothing is filled in. While other processes save into the directory,
    the adapters are the old ones or those of one of these processes.

    Args:
      directory: A path or a URL that `etils.epath` opens.
      params_or_shapes: The model's params or their shapes. Each kernel must then have
        the shape that its adapter was made for. If `save` was given the base's params,
        arrays must also hold that base's weights, in float32 or bfloat16; kernels with
        parts on other processes are not compared.
      any_base: Whether to accept also other weights than those that the adapter was
        trained on.

    Returns:
      (adapters, plan). Only the plan says which operators the M's belong to.

    Raises:
      io.AdapterFileError: Something is missing, unknown, damaged, of a wrong shape, not
        finite or of a newer format, or this platform computes an operator differently;
        or, without `any_base`, the params are those of another base. The message names
        the layer.
      TypeError, ValueError: `directory` is neither a path nor a URL of a known scheme.
      ImportError: `mora-jax[io]` or the package that opens such a URL is missing.

    Example::

      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> import mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> plan = mora_jax.plan(params)
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     mora_jax.save(directory, mora_jax.init(plan), plan)
      ...     adapters, same = mora_jax.load(directory, params)
      >>> float(adapters["fc"]["kernel_mora"].sum())
      0.0
      >>> mora_jax.load("nowhere")
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
    """The metadata that `save` was given.

    Args:
      directory: A path or a URL that `etils.epath` opens.

    Raises:
      io.AdapterFileError: The config is missing, damaged or of a newer format.

    Example::

      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> import mora_jax
      >>> plan = mora_jax.plan({"fc": {"kernel": jnp.ones((8, 8))}})
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     mora_jax.save(directory, mora_jax.init(plan), plan, metadata={"step": 3})
      ...     mora_jax.io.read_metadata(directory)
      {'step': 3}
    """
    path = as_path("directory", directory) / CONFIG
    return parse_config(read_bytes(path, MAX_BYTES))["metadata"]


def _replace(directory: Location, config: bytes, tensors: bytes) -> None:
    """Replace both files at once.

    The directory itself is not replaced, since it may hold files of the user. So the
    config decides which adapter it holds: it names its tensors by their digest, and
    they wait under a name with that digest until the config is written.
    """
    make_directory(directory)
    with naming(directory), locked(directory):
        # Listed before anything is written: clients of object stores keep a listing
        # until they write, and this listing will soon be out of date.
        left = unfinished_files(directory)
        waiting = directory / _waiting(digest_of(tensors))
        write_file(waiting, [tensors])
        write_file(directory / CONFIG, [config])  # from here on the adapter is new
        waiting.replace(directory / TENSORS)
        for path in left:
            if path.name != waiting.name:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        sync(directory)


def _waiting(digest: str) -> str:
    """The name of tensors whose config is about to be written or was just written."""
    return f"{TEMPORARY}{digest}.safetensors"


def _files(directory: Location) -> tuple[bytes, bytes]:
    """A config and the tensors that belong to it."""
    seen = None
    while (config := read_bytes(directory / CONFIG, MAX_BYTES)) != seen:
        if tensors := _tensors(directory, config):
            return config, tensors
        seen = config  # another process may be replacing both at this moment
    with locked(directory):  # the config may have been replaced twice and be as before
        config = read_bytes(directory / CONFIG, MAX_BYTES)
        if tensors := _tensors(directory, config):
            return config, tensors
    if not (directory / TENSORS).exists():
        raise AdapterFileError(f"there is no {TENSORS} in {directory}")
    raise AdapterFileError(
        f"{TENSORS} in {directory} is damaged, or not of this {CONFIG}: its size or "
        "SHA-256 differs from the config's"
    )


def _tensors(directory: Location, config: bytes) -> bytes | None:
    """The tensors that a config names; None if they are not found.

    A writer may rename them after their final name was tried and before their waiting
    name is tried. So the final name is tried again.
    """
    content = parse_config(config)
    digest, size = content["tensors_sha256"], content["tensors_bytes"]
    for name in (TENSORS, _waiting(digest), TENSORS):
        tensors = read_if_of_size(directory / name, size)
        if tensors is not None and digest_of(tensors) == digest:
            return tensors
    return None
