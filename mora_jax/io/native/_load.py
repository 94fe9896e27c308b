"""Reading adapters in this library's format."""

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

from mora_jax._plan.plan import Plan
from mora_jax._tree.adapters import Tree
from mora_jax._tree.base_digest import check_base
from mora_jax._tree.paths import named_leaves
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._files import TENSORS, locked, read_bytes
from mora_jax.io._locations import Location, as_path
from mora_jax.io._tensors import read_header
from mora_jax.io.native._file import check_copy, decode, parse_config

T = TypeVar("T")


def load(
    directory: str | os.PathLike[str],
    params_or_shapes: Any = None,
    *,
    any_base: bool = False,
) -> tuple[Tree, Plan]:
    """Return adapters and their plan, as `save` wrote them.

    PEFT calls this `from_pretrained`. Everything is checked before anything is
    returned, and nothing is filled in. `adapter_config.json` may be missing; if it is
    there, it must say what the tensors' file says. While other processes save into the
    directory, the adapters are the old ones or the new ones of one process.

    Args:
      directory: A path or a URL that `etils.epath` opens.
      params_or_shapes: The model's params or their shapes. Each kernel must then have
        the shape that its adapter was made for. If `save` was given the base's params,
        arrays must also hold that base's weights, in float32 or bfloat16; kernels with
        parts on other processes are not compared.
      any_base: True to accept also other weights than those that the adapter was
        trained on.

    Returns:
      (adapters, plan). Only the plan says which operators the M's belong to.

    Raises:
      io.AdapterFileError: Something is missing, unknown, damaged, of a wrong shape, not
        finite or of a newer format, or this platform computes an operator differently;
        or, without `any_base`, the params are of another base. The message names
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
    """
    path, kernels = as_path("directory", directory), None
    if params_or_shapes is not None:
        leaves = named_leaves(params_or_shapes)
        kernels = {name: leaf for name, (_, leaf) in leaves.items()}
    use = functools.partial(decode, base=kernels)
    adapters, plan = _settled(path, read_bytes, use)
    if kernels is not None and not any_base:
        try:
            check_base(plan.specs, kernels)
        except ValueError as error:
            raise AdapterFileError(f"{TENSORS} in {path}: {error}") from None
    return adapters, plan


def read_metadata(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the metadata that `save` was given.

    Args:
      directory: A path or a URL that `etils.epath` opens.

    Raises:
      io.AdapterFileError: The file is missing, damaged or of a newer format.

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
    path = as_path("directory", directory)
    return _settled(path, read_header, lambda _, config: config["metadata"])


def _settled(
    directory: Location,
    read: Callable[[Location], bytes],
    use: Callable[[bytes, dict[str, Any]], T],
) -> T:
    """Return what `use` makes of the bytes that `read` gives, and of the config.

    Another process may be saving. A local file is read whole all the same, but a store
    may give parts of two files, and the copy of the config may be of the next adapter.
    So what is wrong counts only if the file is the same as at the last try.
    """
    lock, before = contextlib.nullcontext(), None
    while True:
        with lock:
            data = read(directory / TENSORS)
            try:
                config = parse_config(data)
                check_copy(directory, config)
                return use(data, config)
            except AdapterFileError:
                if data == before:
                    raise
        before, lock = data, locked(directory)
