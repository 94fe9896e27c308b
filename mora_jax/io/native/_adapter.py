"""Adapters in this library's format, one safetensors file that holds all.

Its metadata hold a text, the config: what arrays mean, what the user keeps, digests.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from mora_jax._common.checks import check_concrete
from mora_jax._common.types import Shape
from mora_jax._tree import base_digest, paths
from mora_jax.io import _files
from mora_jax.io._files import CONFIG, TENSORS, AdapterFileError, Location, together
from mora_jax.io._json import Field, dump, plain, short
from mora_jax.io._tensors import Arrays, TensorFile, encode, to_jax, to_numpy
from mora_jax.io.native import _records
from mora_jax.io.native._directions import narrowed
from mora_jax.io.native._records import Record
from mora_jax.sharding import adapter_shardings

FORMAT, KEY = "mora_jax adapter", "mora_jax"  # KEY is the only one of the metadata
WHERE = f"the config in {TENSORS}"  # in messages
MORE = {"metadata": Field(dict), "tensors_sha256": Field(str)}  # beside the adapters


def load(
    directory: _files.PathLike, params_or_shapes: Any = None, *, any_base: bool = False
) -> paths.Tree:
    """Adapters as `save` wrote them.

    PEFT calls this `from_pretrained`. Everything is checked before anything is
    returned. A setting that the file lacks, of another version, has its default.
    Processes that share params must call this together, and get their parts of M's.

    Args:
      directory: A path or a URL that `etils.epath` opens.
      params_or_shapes: The model's params or their shapes, which the adapters must fit.
        If `save` was given the base's params, arrays must also hold that base's
        weights, in float32 or bfloat16.
      any_base: True to accept other weights than the adapters were trained on, too.

    Raises:
      io.AdapterFileError: Something is missing, unknown, damaged, of a wrong shape, not
        finite or of a newer format; this platform computes an operator differently; or
        the params are of another base, without `any_base`. Messages name the layer.
      TypeError, ValueError: `directory` is neither a path nor a URL of a known scheme.
      ImportError: `mora-jax[io]` or the package that opens such a URL is missing.
      RuntimeError: Another process failed, as in `save`.

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
    shared = any(base_digest.shared_place(leaf) for _, leaf in leaves.values())
    try:
        with together("load", shared) as alike:
            config, arrays = _content(path)
            found = _restored(config, arrays, (a.shape for _, a in leaves.values()))
            for place, spec in found.specs.items() if leaves else ():
                paths.find_array(leaves, place, spec)
            alike["the file"] = config["sha256"]
        with together("load", shared):
            if not any_base:
                base_digest.check_base(found.specs, leaves)
    except AdapterFileError:
        raise
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"{TENSORS} in {path}: {error}") from None
    tree, put = found.tree(), jax.make_array_from_callback
    if not shared:
        return tree
    where = adapter_shardings(tree, params_or_shapes)
    return jax.tree.map(lambda m, to: put(m.shape, to, m.__getitem__), tree, where)


def read_metadata(directory: _files.PathLike) -> dict[str, Any]:
    """The metadata that `save` was given; see its example.

    Args:
      directory: As in `load`.

    Raises:
      io.AdapterFileError: The file is missing, damaged or of a newer format.
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
    old adapter or the new one. Into an object store only one program at a time may
    save. All processes of a program must call this together: process 0 writes.

    Args:
      directory: As in `load`; made if it does not exist.
      adapters: The adapters, as `init` makes them.
      metadata: Values that JSON can hold, for `io.read_metadata`.
      params: The base's params. The file then holds digests of them, and `load` and
        `merge` refuse another base. By default it keeps the digests of the adapters,
        which a compiled training step does not carry: give params to know the base.

    Raises:
      TypeError: JSON cannot hold the metadata, or params are not arrays.
      ValueError: Params do not fit the adapters, these hold NaN or infinity, or the
        scheme of a URL is not known.
      FileExistsError: The directory holds an adapter of another format, such as PEFT's.
      OSError: The file system refuses. The directory is as it was.
      ImportError: As in `load`.
      RuntimeError: Another process failed or ended, has other adapters or params, or
        did not call this within five minutes. The directory may hold the new adapter.

    Example::

      >>> import tempfile, jax.numpy as jnp, mora_jax
      >>> adapters = mora_jax.init(mora_jax.plan({"fc": {"kernel": jnp.ones((8, 8))}}))
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     mora_jax.save(directory, adapters, metadata={"step": 3})
      ...     mora_jax.io.read_metadata(directory)
      {'step': 3}
    """
    chief, kernels = jax.process_index() == 0, {}
    with together("save") as alike:
        target, foreign = _files.as_path("directory", directory), ""
        if chief:  # the others need not see the directory
            foreign = CONFIG * (target / CONFIG).exists()
            with contextlib.suppress(AdapterFileError):  # there is none, or is damaged
                if not foreign and KEY not in TensorFile(target / TENSORS).metadata:
                    foreign = TENSORS
        if foreign:
            rule = "directory must not hold an adapter of another format"
            got = f"got {target}, whose {foreign} is not mora_jax's"
            raise FileExistsError(f"{rule}, {got}; save to another one, or delete that")
        if metadata is not None and not isinstance(metadata, Mapping):
            raise TypeError(f"metadata must map names to JSON, got {short(metadata)}")
        kept, found = plain(metadata or {}, "metadata"), paths.adapters_in(adapters)
        leaves = {} if params is None else paths.named_leaves(params)
        for path, spec in found.kernels.specs.items() if leaves else ():
            kernels[path] = kernel = paths.find_array(leaves, path, spec)[1]
            check_concrete(kernel, f"{'/'.join(path)} in params", spec.kernel_shape)
        used = [*kernels.values(), *(adapter.m for adapter in found.values())]
        alike["metadata"] = dump(kept)
        alike["the paths of adapters"] = [*found]
        alike["where arrays are"] = [*map(base_digest.shared_place, used)]
    with together("save") as alike:
        # What all compute together comes before the checks, at which one may stop.
        for path, kernel in kernels.items():
            rows = base_digest.kernel_digests(found[path].spec, kernel)
            alike[f"the kernel {'/'.join(path)}"] = rows
            spec = dataclasses.replace(found[path].spec, base_digest=rows)
            found[path] = found[path].replace(spec=spec)
        found |= {p: a.replace(m=base_digest.gathered(a.m)) for p, a in found.items()}
        arrays: dict[str, np.ndarray] = {}
        for path, adapter in found.items():
            name = "/".join(paths.place_of(path, adapter.spec))
            arrays[name] = to_numpy(name, adapter.m)
        given = _records.given_arrays(a.operator for a in found.kernels.values())
        arrays |= {name: narrowed(array) for name, array in given.items()}
        digest = _digest(arrays)
        alike["the M's"] = digest
        more = {"format": FORMAT, "metadata": kept, "tensors_sha256": digest}
        text = _records.text_of(paths.Found(sorted(found.items())), more)
        alike["the meaning of the M's"] = text
    with together("save"):
        if chief:
            data = encode(arrays, {KEY: text})
            # Nothing is written that cannot be read.
            shapes = (a.spec.kernel_shape for a in found.values() if a.of_kernel)
            _restored(*_content(target, data), shapes)
            _files.replace_file(target / TENSORS, data)
