"""The record of a plan: what both of this library's formats hold of it as JSON."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import SUFFIX
from mora_jax._plan.trained_arrays import TrainedArray
from mora_jax._tree.paths import Path, lacking
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._json import check_record, dump, short
from mora_jax.io.native._layers import KINDS as LAYER_KINDS
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


def describe_plan(
    plan: Plan, file_format: str, dtypes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the record of a plan.

    Args:
      plan: The plan.
      file_format: The name of the format.
      dtypes: {path of a kernel: dtype of its trained array}.
    """
    return {
        "format": file_format,
        "format_version": VERSION,
        "library_version": version("mora-jax"),
        "base_parameters": plan.base_parameters,
        "traced": plan.traced,
        "layers": [describe(spec, dtypes[spec.name]) for spec in plan.specs],
        "trained": [_describe_trained(array) for array in plan.trained],
    }


def check_format(content: Any, file_format: str, where: str, hint: str) -> None:
    """Raise unless a record is of a format, and of the version that is read here.

    Args:
      content: The parsed record.
      file_format: The name of the format.
      where: The name of the record in messages.
      hint: Where files of the format come from, as the end of a message.

    Raises:
      AdapterFileError: It is not.
    """
    if not isinstance(content, dict) or content.get("format") != file_format:
        raise AdapterFileError(
            f"{where} is not of mora_jax: its format must be {file_format!r}; {hint}"
        )
    written = content.get("format_version")
    if type(written) is not int or written < 1:
        raise AdapterFileError(
            f"format_version of {where} must be a positive integer, "
            f"got {short(written)}"
        )
    if written != VERSION:
        raise AdapterFileError(
            f"{where} is of format version {written}, and this mora_jax reads version "
            f"{VERSION}: a newer mora_jax is needed"
        )


def restore_plan(
    content: Mapping[str, Any], where: str, base: Base, arrays: Arrays | None
) -> tuple[Plan, dict[Path, np.ndarray]]:
    """Undo `describe_plan`. Everything is checked, and nothing is filled in.

    Args:
      content: The record, whose own keys and types are checked.
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
    specs, trained, leaves = {}, {}, {}
    for number, record in enumerate(content["layers"]):
        place = f"layers[{number}] of {where}"
        name = _name(record, LAYER_KINDS, place, specs)
        m = given = None
        if arrays is not None:
            m = _take(arrays, f"{name}{SUFFIX}")
            leaves[*record["path"][:-1], record["path"][-1] + SUFFIX] = m
            given = _take_below(arrays, f"{name}{SUFFIX}/")
        try:
            specs[name] = restore(record, m, base, given or {})
        except (TypeError, ValueError, OverflowError) as error:
            raise AdapterFileError(f"{name} of {where}: {error}") from error
    for number, record in enumerate(content["trained"]):
        place = f"trained[{number}] of {where}"
        name = _name(record, TRAINED_KINDS, place, trained)
        copy = None if arrays is None else _take(arrays, name)
        try:
            trained[name] = array = _restore_trained(record, base)
            if copy is not None:
                array.check(copy, " in the file")
                leaves[array.path] = copy
        except (TypeError, ValueError) as error:
            raise AdapterFileError(f"{name} of {where}: {error}") from error
    plan = Plan(
        tuple(specs.values()),
        content["base_parameters"],
        content["traced"],
        trained=tuple(trained.values()),
    )
    return plan, leaves


def shapes_of(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the base that a plan was made for, as far as the plan knows it."""
    kernels = {
        spec.name: jax.ShapeDtypeStruct(spec.kernel_shape, jnp.float32)
        for spec in plan.specs
    }
    return kernels | {
        array.name: jax.ShapeDtypeStruct(array.shape, array.dtype)
        for array in plan.trained
    }


def _name(
    record: Any, kinds: Mapping[str, type], place: str, known: Mapping[str, Any]
) -> str:
    """Return the path in a record, slash-joined, if it is a new one."""
    path = check_record(record, kinds, place)["path"]
    if not path or not all(map(_is_key, path)):
        raise AdapterFileError(f"{place} must have a path of names, got {short(path)}")
    name = "/".join(path)
    if name in known:
        raise AdapterFileError(f"{place} is {name!r}, which is there twice")
    return name


def _is_key(key: Any) -> bool:
    return isinstance(key, str) and key not in ("", ".", "..")


def _take(arrays: Arrays, name: str) -> np.ndarray:
    """Take an array of finite numbers out of `arrays`."""
    if name not in arrays:
        raise AdapterFileError(f"the file lacks {name}")
    array = arrays.pop(name)
    if not np.isfinite(array).all():
        raise AdapterFileError(f"{name} in the file holds NaN or infinity")
    return array


def _take_below(arrays: Arrays, start: str) -> Arrays:
    """Take out the arrays of an operator, whose names start so."""
    names = [name for name in arrays if name.startswith(start)]
    return {name.removeprefix(start): arrays.pop(name) for name in names}


# --- Arrays that train themselves ---


def _describe_trained(array: TrainedArray) -> dict[str, Any]:
    return {
        "path": list(array.path),
        "shape": list(array.shape),
        "dtype": jnp.dtype(array.dtype).name,
        "base_dtype": jnp.dtype(array.base_dtype).name,
    }


def _restore_trained(record: Mapping[str, Any], base: Base) -> TrainedArray:
    shape = tuple(record["shape"])
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"shape must be integers, got {short(shape)}")
    dtypes = record["dtype"], record["base_dtype"]
    array = TrainedArray(tuple(record["path"]), shape, *dtypes)
    if dump(_describe_trained(array)) != dump(record):
        raise ValueError(f"its dtypes must be names of dtypes, got {short(dtypes)}")
    if base is not None:
        if array.name not in base:
            raise ValueError(f"the model has no such array{lacking(array.name, base)}")
        array.check(base[array.name], " in the model")
    return array
