"""A plan and its adapters as records in JSON, and back."""

import functools
import json
import math
import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._common.axes import check_axes, features, sizes
from mora_jax._common.checks import LEAVE_OUT, check_finite, check_leaf
from mora_jax._common.suggestions import lacking
from mora_jax._common.types import Path
from mora_jax._plan.plan import Plan, check_plan, refuse_other_plan
from mora_jax._plan.settings import SETTINGS
from mora_jax._plan.spec import SUFFIX, AdapterSpec, TrainedArray, operator_settings
from mora_jax.io._files import AdapterFileError
from mora_jax.io._json import Fields, check_record, dump, parse, short
from mora_jax.operators import Operator, Subspace, make_operator

FORMAT, VERSION = "mora_jax plan", 1
"""The format of a plan without adapters, and the version of that and of adapters."""

LARGEST_WIDTH, LARGEST_ARRAY = 2**22, 2**28
"""The most features on a side of a kernel, and numbers in an array, of a file alone."""

LAYER: Fields = {
    "path": (list, lambda spec: list(spec.path)),
    "kernel_shape": (list, lambda spec: list(spec.kernel_shape)),
    "axes": (str, lambda spec: spec.axes),
    "operator": (dict, lambda spec: operator_settings(spec.operator)),
    "operator_check": (list, lambda spec: fingerprint(spec.operator)),
    "square_rank": (int, lambda spec: spec.operator.square_rank),
    "settings": (dict, lambda spec: spec.to_json()),
    "dtype": (str, lambda spec: jnp.dtype(spec.param_dtype).name),
    "base_digest": (object, lambda spec: spec.base_digest and list(spec.base_digest)),
}
"""The record of an adapter; its `dtype` is the one that M has in the file."""

TRAINED: Fields = {
    "path": (list, lambda array: list(array.path)),
    "shape": (list, lambda array: list(array.shape)),
    "dtype": (str, lambda array: jnp.dtype(array.dtype).name),
    "base_dtype": (str, lambda array: jnp.dtype(array.base_dtype).name),
}
"""The record of an array that trains itself."""

PLAN: Fields = {
    "format_version": (int, lambda plan: VERSION),
    "library_version": (str, lambda plan: version("mora-jax")),
    "base_parameters": (int, lambda plan: plan.base_parameters),
    "traced": (bool, lambda plan: plan.traced),
    "layers": (list, lambda plan: [record_of(s, LAYER) for s in plan.specs]),
    "trained": (list, lambda plan: [record_of(a, TRAINED) for a in plan.trained]),
}
"""The record of a plan, beside its `format`."""

Base = Mapping[str, Any] | None
"""{path: array or shape} of the model that a file must fit; None for any model."""

Record = Mapping[str, Any]

Arrays = dict[str, np.ndarray] | None
"""{name: array} of a file; None for a plan alone."""


def record_of(thing: Any, fields: Fields) -> dict[str, Any]:
    """Return an object as a record that JSON can hold."""
    return {key: get(thing) for key, (_, get) in fields.items()}


def parse_plan(
    text: str, name: str, more: Fields, where: str, hint: str
) -> dict[str, Any]:
    """Return the record of a plan in the format `name`, which also holds `more`.

    Messages call the text `where`, and `hint` says what else to do with others.
    """
    # Half of a character, which JSON may hold, lacks bytes: it makes another text.
    content = parse(text.encode(errors="replace"), where)
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
    return check_record(content, {"format": (str,), **PLAN, **more}, where)


def restore_plan(
    content: Record, where: str, base: Base, arrays: Arrays
) -> tuple[Plan, dict[Path, np.ndarray]]:
    """Return the plan of a record, and {path: array} of what is trained.

    Messages call the record `where`, and name the layer. What belongs to the plan is
    taken out of `arrays`, the file's; None stands for a plan alone.
    """
    if (count := content["base_parameters"]) < 1:
        raise AdapterFileError(
            f"base_parameters of {where} must be a positive integer, got {short(count)}"
        )
    leaves: dict[Path, np.ndarray] = {}
    parts: dict[str, dict[str, Any]] = {"layers": {}, "trained": {}}
    for key, kind, suffix, fields, undo in (
        ("layers", "kernel", SUFFIX, LAYER, _restore_adapter),
        ("trained", "array", "", TRAINED, _restore_trained),
    ):
        for number, record in enumerate(content[key]):
            here = f"{key}[{number}] of {where}"
            path = check_record(record, fields, here)["path"]
            # A user may write the tree as directories, where ".." is above it.
            if not path or not all(isinstance(p, str) and p.strip(".") for p in path):
                must = f"{here} must have a path of names"
                raise AdapterFileError(f"{must}, got {short(path)}")
            if (name := "/".join(path)) in parts[key]:
                raise AdapterFileError(f"{here} is {name!r}, which is there twice")
            try:
                array = _take(arrays, name + suffix)
                if base is not None and name not in base:
                    why = lacking(name, base)
                    raise ValueError(f"the model has no such {kind}{why}")
                parts[key][name] = undo(record, array, base and base[name], arrays)
            except (TypeError, ValueError, OverflowError) as error:
                raise AdapterFileError(f"{name} of {where}: {error}") from error
            if array is not None:
                leaves[*path[:-1], path[-1] + suffix] = array
    specs, trained = (tuple(named.values()) for named in parts.values())
    return Plan(specs, count, content["traced"], trained=trained), leaves


def _take(arrays: Arrays, name: str) -> np.ndarray | None:
    """Take an array of finite numbers out of a file's; None for a plan alone."""
    if arrays is None:
        return None
    if name not in arrays:
        raise ValueError(f"the file lacks {name}")
    check_finite(arrays[name], name, " in the file")
    return arrays.pop(name)


def _restore_adapter(
    record: Record, m: np.ndarray | None, kernel: Any, arrays: Arrays
) -> AdapterSpec:
    """Return the adapter of a record whose trained array is `m`, everything checked.

    Without arrays `m` is None, and for any model `kernel` is. An operator that no
    settings determine takes its own out of `arrays`.
    """
    shape, q = tuple(record["kernel_shape"]), record["square_rank"]
    if not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"kernel_shape must be positive integers, got {short(shape)}")
    axes, digests = check_axes(record["axes"], len(shape)), record["base_digest"]
    widths, stack = features(shape, axes), math.prod(sizes(shape, axes, "s"))
    if kernel is None:
        _check_size(widths, q, "seed" in record["operator"], m is not None)
    else:
        check_leaf(kernel, "the model's kernel", shape, LEAVE_OUT)
    listed = re.fullmatch(r'\[("[0-9a-f]{64}",? ?)*\]', json.dumps(digests))
    if digests is not None and not (listed and len(digests) == stack):
        must = f"base_digest must be null or {stack} times 64 hex digits"
        raise ValueError(f"{must}, got {short(digests)}")
    spec = AdapterSpec(
        _operator(record, (*widths, q), arrays),
        kernel_shape=shape,
        axes=axes,
        path=tuple(record["path"]),
        base_digest=digests and tuple(digests),
        **{n: v for n, v in record["settings"].items() if n in SETTINGS},
    )
    if m is not None:
        check_leaf(m, "M", spec.shape)
    expected = record_of(spec, LAYER)
    _check_same(record, expected if m is None else expected | {"dtype": m.dtype.name})
    return spec


def _check_same(record: Record, expected: Record) -> None:
    """Raise unless a record is the one that its own spec has."""
    for key, value in expected.items():
        # Texts are compared, since True == 1 == 1.0.
        if key != "operator_check" and dump(value) != dump(record[key]):
            raise ValueError(f"{key} must be {value!r}, got {short(record[key])}")
    stored, here = record["operator_check"], expected["operator_check"]
    # Chips round differently; other random numbers differ by more.
    there = np.array(stored, np.float64)
    if there.shape != (len(here),) or not np.allclose(here, there, 1e-3, 1e-3):
        raise ValueError(
            f"{record['operator']['name']} is another operator here than where the "
            f"file was made: its check gives {here}, got {short(stored)}"
        )


def _check_size(widths: tuple[int, int], q: int, seeded: bool, has_array: bool) -> None:
    """Raise if a file alone asks for arrays that are larger than any model has."""
    if max(widths) > LARGEST_WIDTH:
        raise ValueError(
            f"sides must have at most {LARGEST_WIDTH:,} features, got {max(widths):,}"
        )
    # Random maps have q rows of the wider side. To check an M that the file lacks takes
    # one of that size, and a few copies.
    numbers = max(seeded * q * max(widths), (not has_array) * 4 * q * q)
    if numbers > LARGEST_ARRAY:
        raise ValueError(
            f"a kernel of {widths[0]} -> {widths[1]} features with q = {q} takes too "
            "much memory for a file alone to ask for; give the model's params or plan"
        )


def _operator(record: Record, widths: tuple[int, int, int], arrays: Arrays) -> Operator:
    """Return the operator of (in, out, q)."""
    settings = dict(record["operator"])
    if settings.get("name") == Subspace.name:
        m = "/".join(record["path"]) + SUFFIX
        given: Any = {key: _take(arrays, f"{m}/{key}") for key in Subspace.arrays}
        return Subspace(*widths, **given)
    seed = settings.pop("seed", 0)
    return make_operator(settings, *widths, seed=seed)


def fingerprint(operator: Operator) -> list[float]:
    """Return four numbers that tell operators apart, computed from fixed arrays.

    They differ on a platform or in a later version of the library that has other
    random numbers or another definition of the operator.
    """
    # Those with given arrays differ from layer to layer, and would be kept for nothing.
    compute = _fingerprint.__wrapped__ if operator.given else _fingerprint
    return list(compute(operator))


@functools.lru_cache(maxsize=256)
def _fingerprint(operator: Operator) -> tuple[float, ...]:
    random = np.random.RandomState(0).standard_normal
    m, x = random(operator.m_shape), random(operator.in_features)
    m, width = m / math.sqrt(m.shape[-1]), operator.out_features
    with jax.default_matmul_precision("highest"):  # TPUs would round to bfloat16
        y = operator.apply(m.astype(np.float32), x.astype(np.float32))
    terms = np.asarray(y, np.float64) * random(width) / math.sqrt(width)
    return tuple(float(f"{terms[k::4].sum():.5g}") for k in range(4))


def _restore_trained(record: Record, array: Any, own: Any, _: Any) -> TrainedArray:
    shape, dtypes = tuple(record["shape"]), (record["dtype"], record["base_dtype"])
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"shape must be integers, got {short(shape)}")
    trained = TrainedArray(tuple(record["path"]), shape, *dtypes)
    if dump(record_of(trained, TRAINED)) != dump(record):
        raise ValueError(f"its dtypes must be names of dtypes, got {short(dtypes)}")
    if own is not None:
        check_leaf(own, f"{trained.name} in the model", shape)
    if array is not None:
        check_leaf(array, f"{trained.name} in the file", shape)
    return trained


def shapes_of(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the base that a plan was made for, as far as the plan knows it."""
    shape = jax.ShapeDtypeStruct
    kernels = {spec.name: shape(spec.kernel_shape, jnp.float32) for spec in plan.specs}
    return kernels | {a.name: shape(a.shape, a.dtype) for a in plan.trained}


def plan_to_json(plan: Plan) -> str:
    """Return a plan as JSON, for `plan_from_json`.

    Adapters are only numbers, which mean another delta with another operator, seed or
    alpha. `save` stores the plan with them. If another library stores them (Orbax,
    Tunix), keep this text in the checkpoint's metadata.

    Raises:
      TypeError: `plan` is not a plan.
      ValueError: An operator has arrays that no settings determine, as a subspace.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> plan = mora_jax.plan({"fc": {"kernel": jnp.ones((8, 8))}})
      >>> text = mora_jax.io.plan_to_json(plan)
      >>> mora_jax.io.plan_from_json(text) == plan
      True
    """
    for spec in check_plan(plan).specs:
        if spec.operator.given:
            raise ValueError(
                f"{spec.name}: JSON cannot hold the directions of a "
                f"{spec.operator.name}; keep the plan with mora_jax.save"
            )
    content = {"format": FORMAT} | record_of(plan, PLAN)
    return dump(content | {"digest": plan.digest()}).decode()


def plan_from_json(text: str, like: Plan | None = None) -> Plan:
    """Return the plan that `plan_to_json` wrote.

    The plan lacks a layout on a mesh: see `sharding.plan_on_mesh`.

    Args:
      text: The text that `plan_to_json` returned.
      like: The plan of the model that the adapters are for; None for any model.

    Raises:
      TypeError: `text` is not a string, or `like` is not a plan.
      io.AdapterFileError: The text is not a plan, or as in `load`; or M's mean another
        delta with this plan than with `like`. The message names the settings.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> doubled = mora_jax.plan(params, mora_jax.MoRAConfig(alpha=2.0))
      >>> text = mora_jax.io.plan_to_json(doubled)
      >>> mora_jax.io.plan_from_json(text, like=mora_jax.plan(params))
      Traceback (most recent call last):
      mora_jax.io.AdapterFileError: fc/kernel_mora was made for alpha 2.0, not 1.0
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    where, hint = "the plan", "io.plan_to_json writes it"
    content = parse_plan(text, FORMAT, {"digest": (str,)}, where, hint)
    # With a model, operators are made only for its shapes.
    base = None if like is None else shapes_of(check_plan(like, "like"))
    plan, _ = restore_plan(content, where, base, None)
    if plan.digest() != content["digest"]:
        raise AdapterFileError("the plan is damaged or edited: its digest differs")
    if like is not None:
        try:
            refuse_other_plan(plan, like)
        except ValueError as error:
            raise AdapterFileError(str(error)) from error
    return plan
