"""Writing adapters in this library's format."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from mora_jax._plan.plan import Plan, check_plan
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree.adapters import adapter_items, trained_items
from mora_jax._tree.base_digest import kernel_digests
from mora_jax._tree.paths import find_kernel, named_leaves
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._files import CONFIG, TENSORS, replace_files
from mora_jax.io._json import dump, plain, short
from mora_jax.io._locations import Location, as_path
from mora_jax.io._tensors import encode, to_numpy
from mora_jax.io.native import _load
from mora_jax.io.native._records import describe_plan, shapes_of


def save(
    directory: str | os.PathLike[str],
    adapters: Any,
    plan: Plan,
    metadata: Mapping[str, Any] | None = None,
    *,
    params: Any = None,
) -> None:
    """Write adapters as files that `load` gives back bit for bit.

    PEFT calls this `save_pretrained`. `adapter_model.safetensors` holds everything, and
    `adapter_config.json` is a copy of all but the arrays, for people to read. Whenever
    the process is killed, the directory holds the old adapter or the new one. Other
    files in it are left alone. On a local disk, processes that save into one directory
    wait for each other; into an object store only one at a time may save.

    Args:
      directory: A path or a URL that `etils.epath` opens; made if it does not exist.
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
    """Do the same as `save`; with `force`, replace adapters of other formats, too."""
    path = as_path("directory", directory)
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(
            f"metadata must map names to what JSON can hold, got {short(metadata)}"
        )
    kept = plain(metadata or {}, "metadata")
    if params is not None:
        plan = _with_digests(check_plan(plan), params)
    tensors, config = _encode(adapters, plan, kept)
    # Nothing is written that cannot be read.
    _load.decode(tensors, _load.parse_config(tensors), shapes_of(plan))
    if not force:
        _refuse_foreign_adapter(path)
    replace_files(path, tensors, config)


def _encode(adapters: Any, plan: Plan, metadata: dict[str, Any]) -> tuple[bytes, bytes]:
    """Return the content of the file, and its config.

    `metadata` are the values that the user wants to keep, as JSON holds them.
    """
    arrays: dict[str, np.ndarray] = {}
    dtypes = {}
    for spec, m in adapter_items(adapters, plan):
        name = f"{spec.name}{SUFFIX}"
        arrays[name] = to_numpy(name, m)
        dtypes[spec.name] = m.dtype
        if spec.operator.given:
            fields = spec.operator.arrays
            arrays |= {f"{name}/{f}": getattr(spec.operator, f) for f in fields}
    for array, copy in trained_items(adapters, plan):
        arrays[array.name] = to_numpy(array.name, copy)
    content = describe_plan(plan, _load.FORMAT, dtypes)
    content |= {"metadata": metadata, "tensors_sha256": _load.digest_of(arrays)}
    content["sha256"] = _load.signature(content)
    config = dump(content)
    return encode(arrays, {_load.KEY: config.decode()}), config


def _with_digests(plan: Plan, params: Any) -> Plan:
    """Return the plan with digests of the base's kernels."""
    leaves, specs = named_leaves(params), []
    for spec in plan.specs:
        _, kernel = leaves.get(spec.name, ((), None))
        if kernel is not None and tuple(kernel.shape) != spec.kernel_shape:
            raise ValueError(
                f"{spec.name} in params must have shape {spec.kernel_shape}, got "
                f"{tuple(kernel.shape)}"
            )
        _, kernel = find_kernel(leaves, spec)
        if not isinstance(kernel, jax.Array | np.ndarray) or isinstance(kernel, Tracer):
            raise TypeError(
                f"params must hold concrete arrays, got {type(kernel).__name__} at "
                f"{spec.name!r}"
            )
        digests = kernel_digests(spec, kernel)
        specs.append(dataclasses.replace(spec, base_digest=digests))
    return dataclasses.replace(plan, specs=tuple(specs))


def _refuse_foreign_adapter(directory: Location) -> None:
    """Raise if a directory holds an adapter that this library did not write.

    Each of the two files says whose it is. If the config is damaged, the tensors do.
    """
    present = [name for name in (CONFIG, TENSORS) if (directory / name).is_file()]
    for name in present:
        with contextlib.suppress(AdapterFileError):
            if _load.is_ours(directory, name):
                return
            break
    if present:
        raise FileExistsError(
            f"directory must not hold an adapter of another format, got {directory}, "
            f"whose {present[0]} is not mora_jax's; save to another one, or delete that"
        )
