"""The record of a plan: what both of this library's formats hold of it as JSON."""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._common.suggestions import lacking
from mora_jax._common.types import Path
from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import SUFFIX
from mora_jax._plan.trained_arrays import TrainedArray
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._json import check_record, dump, short
from mora_jax.io.native import _layers
from mora_jax.io.native._layers import Base, describe, restore

VERSION = 1
"""The version of both formats. A reader refuses every other version."""

KINDS = {
    "format": str,
    "format_version": int,
    "library_version": str,
    "base_parameters": int,
    "traced": bool,
    "layers": list,
    "trained": list,
}
TRAINED_KINDS = {"path": list, "shape": list, "dtype": str, "base_dtype": str}

Arrays = dict[str, np.ndarray]
"""{name: array} of the tensors in a file, from which each reader takes its own."""

T = TypeVar("T")


def describe_plan(plan: Plan, name: str, dtypes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a plan in the format `name`.

    Args:
      plan: The plan.
      name: The name of the format.
      dtypes: {path of a kernel: dtype of its trained array}.
    """
    return {
        "format": name,
        "format_version": VERSION,
        "library_version": version("mora-jax"),
        "base_parameters": plan.base_parameters,
        "traced": plan.traced,
        "layers": [describe(spec, dtypes[spec.name]) for spec in plan.specs],
        "trained": [_describe_trained(array) for array in plan.trained],
    }


def check_plan_record(
    content: Any, name: str, kinds: Mapping[str, type], where: str, hint: str
) -> dict[str, Any]:
    """Return a parsed record if it is of the format `name`, in the version read here.

    Args:
      content: The record.
      name: The name of the format.
      kinds: The types of its keys.
      where: The name of the record in messages.
      hint: Advice for other records, as the end of a message.

    Raises:
      AdapterFileError: It is not.
    """
    if not isinstance(content, dict) or content.get("format") != name:
        raise AdapterFileError(
            f"{where} is not of mora_jax: its format must be {name!r}; {hint}"
        )
    written = content.get("format_version")
    if type(written) is not int or written != VERSION:
        raise AdapterFileError(
            f"format_version of {where} must be {VERSION}, got {short(written)}: "
            "another mora_jax is needed for other versions, such as a newer one"
        )
    return check_record(content, kinds, where)


def restore_plan(
    content: Mapping[str, Any], where: str, base: Base, arrays: Arrays | None
) -> tuple[Plan, dict[Path, np.ndarray]]:
    """Undo `describe_plan`. Everything is checked, and nothing is filled in.

    Args:
      content: The record, which `check_plan_record` has seen.
      where: The name of the record in messages.
      base: The model that the plan must fit.
      arrays: The arrays of the file, which must be the plan's; None for a file without.

    Returns:
      The plan, and {path: array} of what is trained.

    Raises:
      AdapterFileError: Something is wrong. The message names the layer.
    """
    if content["base_parameters"] < 1:
        raise AdapterFileError(
            f"base_parameters of {where} must be a positive integer, "
            f"got {short(content['base_parameters'])}"
        )
    leaves: dict[Path, np.ndarray] = {}

    def layer(record: dict[str, Any], *path: str) -> Any:
        name = "/".join(path) + SUFFIX
        m = given = None
        if arrays is not None:
            m = leaves[*path[:-1], path[-1] + SUFFIX] = _take(arrays, name)
            below = [other for other in arrays if other.startswith(f"{name}/")]
            given = {n.removeprefix(f"{name}/"): arrays.pop(n) for n in below}
        return restore(record, m, base, given or {})

    def trained(record: dict[str, Any], *path: str) -> Any:
        array = _restore_trained(record, base)
        if arrays is not None:
            leaves[path] = copy = _take(arrays, array.name)
            array.check(copy, " in the file")
        return array

    specs = _each(content, "layers", _layers.KINDS, where, layer)
    copied = _each(content, "trained", TRAINED_KINDS, where, trained)
    plan = Plan(specs, content["base_parameters"], content["traced"], trained=copied)
    return plan, leaves


def _each(
    content: Mapping[str, Any],
    key: str,
    kinds: Mapping[str, type],
    where: str,
    restore: Callable[..., T],
) -> tuple[T, ...]:
    """Return what a function makes of each record below a key, and of its path."""
    restored: dict[str, T] = {}
    for number, record in enumerate(content[key]):
        place = f"{key}[{number}] of {where}"
        path = check_record(record, kinds, place)["path"]
        names = all(isinstance(p, str) and p not in ("", ".", "..") for p in path)
        if not path or not names:
            raise AdapterFileError(
                f"{place} must have a path of names, got {short(path)}"
            )
        name = "/".join(path)
        if name in restored:
            raise AdapterFileError(f"{place} is {name!r}, which is there twice")
        try:
            restored[name] = restore(record, *path)
        except (TypeError, ValueError, OverflowError) as error:
            raise AdapterFileError(f"{name} of {where}: {error}") from error
    return tuple(restored.values())


def _take(arrays: Arrays, name: str) -> np.ndarray:
    """Take an array of finite numbers out of `arrays`."""
    if name not in arrays:
        raise AdapterFileError(f"the file lacks {name}")
    array = arrays.pop(name)
    if not np.isfinite(array).all():
        raise AdapterFileError(f"{name} in the file holds NaN or infinity")
    return array


def shapes_of(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the base that a plan was made for, as far as the plan knows it."""
    shape = jax.ShapeDtypeStruct
    kernels = {spec.name: shape(spec.kernel_shape, jnp.float32) for spec in plan.specs}
    return kernels | {a.name: shape(a.shape, a.dtype) for a in plan.trained}


# --- Arrays that train themselves ---


def _describe_trained(array: TrainedArray) -> dict[str, Any]:
    return {
        "path": list(array.path),
        "shape": list(array.shape),
        "dtype": jnp.dtype(array.dtype).name,
        "base_dtype": jnp.dtype(array.base_dtype).name,
    }


def _restore_trained(record: Mapping[str, Any], base: Base) -> TrainedArray:
    shape, dtypes = tuple(record["shape"]), (record["dtype"], record["base_dtype"])
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"shape must be integers, got {short(shape)}")
    array = TrainedArray(tuple(record["path"]), shape, *dtypes)
    if dump(_describe_trained(array)) != dump(record):
        raise ValueError(f"its dtypes must be names of dtypes, got {short(dtypes)}")
    if base is not None:
        if array.name not in base:
            raise ValueError(f"the model has no such array{lacking(array.name, base)}")
        array.check(base[array.name], " in the model")
    return array
