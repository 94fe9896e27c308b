"""The record of a plan: what both of this library's formats hold of it as JSON."""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._common.checks import check_finite
from mora_jax._common.types import Path
from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import SUFFIX
from mora_jax._plan.trained_arrays import TrainedArray
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._json import Fields, check_record, dump, record_of, short
from mora_jax.io.native._layers import LAYER, Base, describe, in_model, restore

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

TRAINED: Fields = {
    "path": (list, lambda array: list(array.path)),
    "shape": (list, lambda array: list(array.shape)),
    "dtype": (str, lambda array: jnp.dtype(array.dtype).name),
    "base_dtype": (str, lambda array: jnp.dtype(array.base_dtype).name),
}
"""The record of an array that trains itself."""

Restore = Callable[[dict[str, Any], Any, Base, Any], Any]
"""Function of a record, its array, the model and the arrays of its operator."""


def describe_plan(plan: Plan, name: str, dtypes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a plan in the format `name`.

    `dtypes` are {path of a kernel: dtype of its trained array}.
    """
    return {
        "format": name,
        "format_version": VERSION,
        "library_version": version("mora-jax"),
        "base_parameters": plan.base_parameters,
        "traced": plan.traced,
        "layers": [describe(spec, dtypes[spec.name]) for spec in plan.specs],
        "trained": [record_of(array, TRAINED) for array in plan.trained],
    }


def check_plan_record(
    content: Any, name: str, kinds: dict[str, type], where: str, hint: str
) -> dict[str, Any]:
    """Return a parsed record if it is of the format `name`, in the version read here.

    Messages call the record `where`, and `hint` says what else to do with others.
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
    return check_record(content, KINDS | kinds, where)


def restore_plan(
    content: Mapping[str, Any],
    where: str,
    base: Base,
    arrays: dict[str, np.ndarray] | None,
) -> tuple[Plan, dict[Path, np.ndarray]]:
    """Undo `describe_plan`. Everything is checked, and nothing is filled in.

    Args:
      content: The record, which `check_plan_record` has seen.
      where: The name of the record in messages, which also name the layer.
      base: The model that the plan must fit.
      arrays: The arrays of the file, from which the plan's are taken; None for a plan
        without arrays.

    Returns:
      The plan, and {path: array} of what is trained.
    """
    if content["base_parameters"] < 1:
        raise AdapterFileError(
            f"base_parameters of {where} must be a positive integer, "
            f"got {short(content['base_parameters'])}"
        )
    leaves: dict[Path, np.ndarray] = {}

    def each(key: str, fields: Fields, suffix: str, restore: Restore) -> tuple:
        restored = []
        for name, record in _by_name(content, key, fields, where).items():
            *parents, last = record["path"]
            array, given = None, {}
            try:
                if arrays is not None:
                    array, given = _take(arrays, name + suffix)
                    leaves[*parents, last + suffix] = array
                restored.append(restore(record, array, base, given))
            except (TypeError, ValueError, OverflowError) as error:
                raise AdapterFileError(f"{name} of {where}: {error}") from error
        return tuple(restored)

    specs = each("layers", LAYER, SUFFIX, restore)
    trained = each("trained", TRAINED, "", _restore_trained)
    plan = Plan(specs, content["base_parameters"], content["traced"], trained=trained)
    return plan, leaves


def _by_name(
    content: Mapping[str, Any], key: str, fields: Fields, where: str
) -> dict[str, Any]:
    """Return {slash-joined path: record}, each with the right keys, types and path."""
    kinds = {key: kind for key, (kind, _) in fields.items()}
    named: dict[str, Any] = {}
    for number, record in enumerate(content[key]):
        here = f"{key}[{number}] of {where}"
        path = check_record(record, kinds, here)["path"]
        names = all(isinstance(p, str) and p not in ("", ".", "..") for p in path)
        if not path or not names:
            raise AdapterFileError(
                f"{here} must have a path of names, got {short(path)}"
            )
        name = "/".join(path)
        if name in named:
            raise AdapterFileError(f"{here} is {name!r}, which is there twice")
        named[name] = record
    return named


def _take(
    arrays: dict[str, np.ndarray], name: str
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Take an array out of a file's, and the operator's arrays if it is an M."""
    if name not in arrays:
        raise ValueError(f"the file lacks {name}")
    check_finite(arrays[name], name, " in the file")
    below = [key for key in arrays if key.startswith(f"{name}/")]
    given = below if name.endswith(SUFFIX) else []
    return arrays.pop(name), {n.removeprefix(f"{name}/"): arrays.pop(n) for n in given}


def _restore_trained(
    record: Mapping[str, Any], array: np.ndarray | None, base: Base, _: Any
) -> TrainedArray:
    shape, dtypes = tuple(record["shape"]), (record["dtype"], record["base_dtype"])
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"shape must be integers, got {short(shape)}")
    trained = TrainedArray(tuple(record["path"]), shape, *dtypes)
    if dump(record_of(trained, TRAINED)) != dump(record):
        raise ValueError(f"its dtypes must be names of dtypes, got {short(dtypes)}")
    if base is not None:
        trained.check(in_model(base, trained.name, "array"), " in the model")
    if array is not None:
        trained.check(array, " in the file")
    return trained


def shapes_of(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the base that a plan was made for, as far as the plan knows it."""
    shape = jax.ShapeDtypeStruct
    kernels = {spec.name: shape(spec.kernel_shape, jnp.float32) for spec in plan.specs}
    return kernels | {a.name: shape(a.shape, a.dtype) for a in plan.trained}
