"""Adapters in this library's format, one safetensors file that holds all.

Its metadata hold a text, the config: what the arrays mean, what the user wants to keep,
and digests.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from mora_jax._common.checks import check_concrete
from mora_jax._common.types import Path, Shape
from mora_jax._tree import paths
from mora_jax._tree.base_digest import check_base, is_shared, kernel_digests
from mora_jax.io import _files
from mora_jax.io._files import CONFIG, TENSORS, AdapterFileError, Location
from mora_jax.io._hosts import together
from mora_jax.io._json import Field, plain, short
from mora_jax.io._tensors import TensorFile, encode, to_jax, to_numpy
from mora_jax.io.native import _records
from mora_jax.io.native._records import Arrays, Record
from mora_jax.operators import Damped
from mora_jax.sharding import adapter_shardings

FORMAT, KEY, WHERE = "mora_jax adapter", "mora_jax", f"the config in {TENSORS}"
"""The format, the only key of the metadata, and the config's name in messages."""

MORE = {"metadata": Field(dict), "tensors_sha256": Field(str)}
"""What a file holds beside the record of its adapters."""


def load(
    directory: _files.PathLike, params_or_shapes: Any = None, *, any_base: bool = False
) -> paths.Tree:
    """Adapters as `save` wrote them.

    PEFT calls this `from_pretrained`. Everything is checked before anything is
    returned. A setting that the file lacks, of another version, has its default.

    Args:
      directory: A path or a URL that `etils.epath` opens.
      params_or_shapes: The model's params or their shapes, which the adapters must fit.
        If `save` was given the base's params, arrays must also hold that base's
        weights, in float32 or bfloat16.
      any_base: True to accept also other weights than those that the adapter was
        trained on.

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
      ...     mora_jax.save(directory, mora_jax.init(plan))
      ...     mora_jax.load(directory, params)
      {'fc': {'kernel_mora': Adapter(block_diagonal, float32[1, 8, 8])}}
    """
    path = _files.as_path("directory", directory)
    leaves = {} if params_or_shapes is None else paths.named_leaves(params_or_shapes)
    shared = any(is_shared(leaf) for _, leaf in leaves.values())
    try:
        with together("load", shared) as alike:
            config, arrays = _content(path)
            shapes = (leaf.shape for _, leaf in leaves.values())
            found = _restored(config, arrays, shapes)
            for place, spec in found.specs.items() if leaves else ():
                alike.append(_place(*paths.find_array(leaves, place, spec)))
            alike.append(config["sha256"])
        with together("load", shared):
            if not any_base:
                check_base(found.specs, leaves)
    except AdapterFileError:
        raise
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"{TENSORS} in {path}: {error}") from None
    tree = found.tree()
    return _on_mesh(tree, adapter_shardings(tree, params_or_shapes)) if shared else tree


def _place(path: Path, array: Any) -> tuple[object, ...]:
    """What processes that share an array must agree on."""
    return path, array.shape, array.dtype, array.sharding if is_shared(array) else None


def read_metadata(directory: _files.PathLike) -> dict[str, Any]:
    """The metadata that `save` was given.

    Args:
      directory: As in `load`.

    Raises:
      io.AdapterFileError: The file is missing, damaged or of a newer format.

    Example::

      >>> import tempfile, jax.numpy as jnp, mora_jax
      >>> plan = mora_jax.plan({"fc": {"kernel": jnp.ones((8, 8))}})
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     mora_jax.save(directory, mora_jax.init(plan), metadata={"step": 3})
      ...     mora_jax.io.read_metadata(directory)
      {'step': 3}
    """
    return _content(_files.as_path("directory", directory))[0]["metadata"]


def _content(directory: Location, data: bytes | None = None) -> tuple[Record, Arrays]:
    """The config and the arrays of a file, or of `data`, with its digests checked."""
    # Read at once, since another process may replace the file. An open one stays whole.
    path, hint = directory / TENSORS, "io.load_peft reads PEFT's"
    file = TensorFile(path, _files.read_bytes(path) if data is None else data)
    texts = file.metadata
    if texts.keys() != {KEY} or not isinstance(texts[KEY], str):
        rule = f"{TENSORS} is not of mora_jax: its metadata must hold {KEY!r} alone"
        raise AdapterFileError(f"{rule}, got {short(sorted(texts))}; {hint}")
    config = _records.parse_record(texts[KEY], FORMAT, MORE, WHERE, hint)
    arrays = file.arrays()
    if config["tensors_sha256"] != _digest(arrays):
        raise AdapterFileError(f"{TENSORS} is damaged: the SHA-256 of tensors differs")
    return config, arrays


def _restored(config: Record, arrays: Arrays, shapes: Iterable[Shape]) -> paths.Found:
    """The adapters that a file holds, by the paths of the base's arrays."""
    if not config["layers"]:
        raise AdapterFileError(f"{WHERE} must have an adapter, got none")
    found = _records.restore(config, WHERE, shapes, arrays)
    for path, adapter in found.items():
        found[path] = adapter.replace(m=to_jax("/".join(path), adapter.m))
    return found


def _digest(arrays: Arrays) -> str:
    """The SHA-256 of all arrays in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def save(
    directory: _files.PathLike,
    adapters: Any,
    metadata: Mapping[str, Any] | None = None,
    *,
    params: Any = None,
) -> None:
    """Write adapters as a file that `load` gives back bit for bit.

    PEFT calls this `save_pretrained`. `adapter_model.safetensors` holds everything;
    `mora-jax inspect` shows it. Whenever the process is killed, the directory holds the
    old adapter or the new one. Into an object store only one process at a time may
    save.

    Args:
      directory: As in `load`; made if it does not exist.
      adapters: The adapters, as `init` makes them.
      metadata: Values that JSON can hold, for `io.read_metadata`.
      params: The base's params. The file then holds digests of them, and `load` and
        `merge` refuse another base. By default it keeps the digests of the adapters.

    Raises:
      TypeError: JSON cannot hold the metadata, or params are not arrays.
      ValueError: Params do not fit the adapters, these hold NaN or infinity, or the
        scheme of a URL is not known.
      FileExistsError: The directory holds an adapter of another format, such as PEFT's.
      OSError: The file system refuses. The directory is as it was.
      ImportError: As in `load`.

    Example::

      >>> import tempfile, jax.numpy as jnp, mora_jax
      >>> plan = mora_jax.plan({"fc": {"kernel": jnp.ones((8, 8))}})
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     mora_jax.save(directory, mora_jax.init(plan), metadata={"step": 3})
      ...     adapters = mora_jax.load(directory)
      >>> adapters["fc"]["kernel_mora"].spec == plan["fc/kernel"]
      True
    """
    with together("save") as alike:
        if chief := jax.process_index() == 0:  # the others need not see the directory
            _refuse_foreign(target := _files.as_path("directory", directory))
        if metadata is not None and not isinstance(metadata, Mapping):
            raise TypeError(f"metadata must map names to JSON, got {short(metadata)}")
        kept, found = plain(metadata or {}, "metadata"), paths.adapters_in(adapters)
        for place, adapter in found.placed.items():
            check_concrete(adapter.m, "/".join(place), np.shape(adapter.m))
            alike.append(_place(place, adapter.m))
        leaves = {} if params is None else paths.named_leaves(params)
        kernels: dict[Path, Any] = {}
        for path, adapter in found.kernels.items() if leaves else ():
            _, kernel = paths.find_array(leaves, path, spec := adapter.spec)
            check_concrete(kernel, f"{'/'.join(path)} in params", spec.kernel_shape)
            kernels[path] = kernel
            alike.append(_place(path, kernel))
    with together("save") as alike:
        # What the processes compute together comes before checks, which end it on one.
        for path, kernel in kernels.items():
            spec = found[path].spec
            spec = dataclasses.replace(spec, base_digest=kernel_digests(spec, kernel))
            found[path] = found[path].replace(spec=spec)
            alike.append(spec.base_digest)
        for path, adapter in found.items():
            if is_shared(adapter.m):
                m = multihost_utils.process_allgather(adapter.m, tiled=True)
                found[path] = adapter.replace(m=m)
        arrays = _arrays_of(found)
    with together("save"):
        if chief:
            more = {"format": FORMAT, "metadata": kept}
            more["tensors_sha256"] = _digest(arrays)
            text = _records.text_of(dict(sorted(found.items())), more)
            data = encode(arrays, {KEY: text})
            # Nothing is written that cannot be read.
            shapes = (a.spec.kernel_shape for a in found.values() if a.of_kernel)
            _restored(*_content(target, data), shapes)
            _files.replace_file(target / TENSORS, data)


def _arrays_of(found: paths.Found) -> dict[str, np.ndarray]:
    """The arrays of a file, with those that operators were given."""
    arrays: dict[str, np.ndarray] = {}
    for path, adapter in found.items():
        name = "/".join(paths.place_of(path, adapter.spec))
        arrays[name] = to_numpy(name, adapter.m)
        op = getattr(adapter.spec, "operator", None)
        if isinstance(op, Damped):
            arrays[_records.directions_name(op.digest)] = np.asarray(op.directions)
            op = op.inner
        if op is not None and op.given:
            arrays |= {f"{name}/{key}": getattr(op, key) for key in op.arrays}
    return arrays


def _refuse_foreign(target: Location) -> None:
    """Raise if a directory holds an adapter of another format."""
    foreign = CONFIG * (target / CONFIG).exists()
    with contextlib.suppress(AdapterFileError):  # there is none, or it is damaged
        if not foreign and KEY not in TensorFile(target / TENSORS).metadata:
            foreign = TENSORS
    if foreign:
        rule = "directory must not hold an adapter of another format"
        got = f"got {target}, whose {foreign} is not mora_jax's"
        raise FileExistsError(f"{rule}, {got}; save to another one, or delete that")


def _on_mesh(tree: paths.Tree, shardings: paths.Tree) -> paths.Tree:
    """Adapters on a mesh of several processes, each of which has its parts."""

    def put(m: jax.Array, sharding: NamedSharding) -> jax.Array:
        read = np.asarray(m).__getitem__
        return jax.make_array_from_callback(m.shape, sharding, read)

    return jax.tree.map(put, tree, shardings)
