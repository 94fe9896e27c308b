"""Adapters and plans as records in JSON, and back.

The tables of fields say what files hold. A field that a later version adds has a
default, for the files that lack it, and the version that added it (see `Field`).
"""

import dataclasses
import functools
import hashlib
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
from mora_jax._plan.settings import AdapterSettings
from mora_jax._plan.spec import (
    SUFFIX,
    AdapterSpec,
    Spec,
    TrainedArray,
    check_same,
    operator_settings,
)
from mora_jax._tree.paths import place_of
from mora_jax._tree.plan import Parts, Plan, check_plan, refuse_other_kernels
from mora_jax.io._files import AdapterFileError
from mora_jax.io._json import Field, Fields, dump, parse, read_record, record_of, short
from mora_jax.operators import Operator, Subspace, make_operator

FORMAT, VERSION = "mora_jax plan", 1
"""The format of a plan without adapters, and the version of that and of adapters."""

LARGEST_WIDTH, LARGEST_ARRAY = 2**22, 2**28
"""The most features on a side of a kernel, and numbers in an array, of a file alone."""

Part = tuple[Path, Any]
"""The path of an array of the base, and the meaning of what is trained for it."""

SETTINGS: Fields = {
    field.name: Field(
        object, lambda s, n=field.name: s[n], field.default, field.metadata["since"]
    )
    for field in dataclasses.fields(AdapterSettings)
}
"""The settings of an adapter, whose values are checked by `AdapterSettings`."""

LAYER: Fields = {
    "path": Field(list, lambda part: list(part[0])),
    "kernel_shape": Field(list, lambda part: list(part[1].kernel_shape)),
    "axes": Field(str, lambda part: part[1].axes),
    "operator": Field(dict, lambda part: operator_settings(part[1].operator)),
    "operator_check": Field(list, lambda part: fingerprint(part[1].operator)),
    "square_rank": Field(int, lambda part: part[1].operator.square_rank),
    "settings": Field(dict, lambda part: record_of(part[1].to_json(), SETTINGS)),
    "dtype": Field(str, lambda part: jnp.dtype(part[1].param_dtype).name),
    "base_digest": Field(
        object, lambda part: part[1].base_digest and list(part[1].base_digest), None
    ),
    "rank": Field(object, lambda part: part[1].rank, None),
}
"""The record of an adapter; its `dtype` is the one that M has in the file."""

TRAINED: Fields = {
    "path": Field(list, lambda part: list(part[0])),
    "shape": Field(list, lambda part: list(part[1].shape)),
    "dtype": Field(str, lambda part: jnp.dtype(part[1].dtype).name),
    "base_dtype": Field(str, lambda part: jnp.dtype(part[1].base_dtype).name),
}
"""The record of an array that trains itself."""

PARTS: Fields = {
    "format_version": Field(int, lambda parts: VERSION),
    "library_version": Field(str, lambda parts: version("mora-jax")),
    "layers": Field(list, lambda parts: _records_of(parts, AdapterSpec, LAYER)),
    "trained": Field(list, lambda parts: _records_of(parts, TrainedArray, TRAINED)),
}
"""The record of adapters, beside its `format`."""

PLAN: Fields = {
    "base_parameters": Field(int, lambda plan: plan.base_parameters),
    "traced": Field(bool, lambda plan: plan.traced),
}
"""What the record of a plan has beside that of its adapters."""

Base = Mapping[str, Any] | None
"""{path: array or shape} of the model that a file must fit; None for any model."""

Record = Mapping[str, Any]

Arrays = dict[str, np.ndarray] | None
"""{name: array} of a file; None for a plan alone."""


def _records_of(parts: Parts, kind: type, fields: Fields) -> list[dict[str, Any]]:
    of_kind = (part for part in parts.items() if isinstance(part[1], kind))
    return [record_of(part, fields) for part in of_kind]


def signature(content: Record) -> str:
    """The SHA-256 of a record without itself, in hexadecimal."""
    signed = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(dump(signed)).hexdigest()


def parse_record(
    text: str, name: str, more: Fields, where: str, hint: str
) -> dict[str, Any]:
    """The record of parts in the format `name`, which also holds `more` fields.

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
    fields = {"format": Field(str), **PARTS, **more, "sha256": Field(str)}
    record = read_record(content, fields, where, content.get("library_version"))
    if record["sha256"] != signature(content):
        raise AdapterFileError(f"{where} is damaged or edited: its SHA-256 differs")
    return record


def restore_parts(
    content: Record, where: str, base: Base, arrays: Arrays
) -> tuple[dict[Path, Spec], dict[Path, np.ndarray]]:
    """What a record says of each trained array, and {path: array} of the arrays.

    Messages call the record `where`, and name the layer. What belongs to it is taken
    out of `arrays`, the file's; None stands for a plan alone.
    """
    parts: dict[Path, Spec] = {}
    leaves: dict[Path, np.ndarray] = {}
    writer = content["library_version"]
    for key, kind, fields, undo in (
        ("layers", AdapterSpec, LAYER, _restore_adapter),
        ("trained", TrainedArray, TRAINED, _restore_trained),
    ):
        names = set()
        for number, written in enumerate(content[key]):
            here = f"{key}[{number}] of {where}"
            record = read_record(written, fields, here, writer)
            # A user may write the tree as directories, where ".." is above it.
            names_of_path = record["path"]
            if not names_of_path or not all(
                isinstance(p, str) and p.strip(".") for p in names_of_path
            ):
                must = f"{here} must have a path of names"
                raise AdapterFileError(f"{must}, got {short(names_of_path)}")
            path, name = tuple(names_of_path), "/".join(names_of_path)
            if name in names:
                raise AdapterFileError(f"{here} is {name!r}, which is there twice")
            names.add(name)
            place = "/".join(_place(path, kind))
            try:
                array = _take(arrays, place)
                if base is not None and name not in base:
                    what = "kernel" if kind is AdapterSpec else "array"
                    why = lacking(name, base)
                    raise ValueError(f"the model has no such {what}{why}")
                given = {"written": written, "writer": writer, "arrays": arrays}
                spec = undo(record, place, array, base and base[name], **given)
            except (TypeError, ValueError, OverflowError) as error:
                raise AdapterFileError(f"{name} of {where}: {error}") from error
            parts[path] = spec
            if array is not None:
                leaves[place_of(path, spec)] = array
    return parts, leaves


def _place(path: Path, kind: type) -> Path:
    """The path of what is trained for the base's array at `path`."""
    return (*path[:-1], path[-1] + SUFFIX) if kind is AdapterSpec else path


def _take(arrays: Arrays, name: str) -> np.ndarray | None:
    """Take an array of finite numbers out of a file's; None for a plan alone."""
    if arrays is None:
        return None
    if name not in arrays:
        raise ValueError(f"the file lacks {name}")
    check_finite(arrays[name], name, " in the file")
    return arrays.pop(name)


def _restore_adapter(
    record: Record,
    place: str,
    m: np.ndarray | None,
    kernel: Any,
    *,
    written: Record,
    writer: str,
    arrays: Arrays,
) -> AdapterSpec:
    """The adapter of a record whose trained array is `m`, everything checked.

    Without arrays `m` is None, and for any model `kernel` is. An operator that no
    settings determine takes its own out of `arrays`, behind its `place`.
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
    if (rank := record["rank"]) is not None and not (type(rank) is int and rank > 0):
        raise ValueError(f"rank must be null or a positive integer, got {short(rank)}")
    settings = read_record(record["settings"], SETTINGS, "settings", writer)
    spec = AdapterSpec(
        _operator(record, (*widths, q), place, writer, arrays),
        kernel_shape=shape,
        axes=axes,
        base_digest=digests and tuple(digests),
        rank=rank,
        **settings,
    )
    if m is not None:
        check_leaf(m, "M", spec.shape)
    path = tuple(record["path"])
    expected = {key: field.get((path, spec)) for key, field in LAYER.items()}
    _check_same(written, expected if m is None else expected | {"dtype": m.dtype.name})
    return spec


def _check_same(record: Record, expected: Record) -> None:
    """Raise unless what a record says is what the record of its own spec would say."""
    for key, value in record.items():
        own = expected[key]
        if isinstance(value, dict):  # of settings, each of which may be absent
            own = {name: own[name] for name in value if name in own}
        # Texts are compared, since True == 1 == 1.0.
        if key != "operator_check" and dump(own) != dump(value):
            raise ValueError(f"{key} must be {own!r}, got {short(value)}")
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


def _operator(
    record: Record,
    widths: tuple[int, int, int],
    place: str,
    writer: str,
    arrays: Arrays,
) -> Operator:
    """The operator of (in, out, q)."""
    settings = dict(record["operator"])
    if settings.get("name") == Subspace.name:
        given: Any = {key: _take(arrays, f"{place}/{key}") for key in Subspace.arrays}
        return Subspace(*widths, **given)
    seed = settings.pop("seed", 0)
    try:
        return make_operator(settings, *widths, seed=seed)
    except ValueError as error:
        hint = f"the file is of mora_jax {short(writer)}, which may know more"
        raise ValueError(f"{error} ({hint})") from None


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


def _restore_trained(
    record: Record, place: str, array: Any, own: Any, *, written: Record, **_: Any
) -> TrainedArray:
    shape, dtypes = tuple(record["shape"]), (record["dtype"], record["base_dtype"])
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"shape must be integers, got {short(shape)}")
    trained = TrainedArray(shape, *dtypes)
    expected = record_of((tuple(record["path"]), trained), TRAINED)
    if dump({key: expected.get(key) for key in written}) != dump(written):
        raise ValueError(f"its dtypes must be names of dtypes, got {short(dtypes)}")
    if own is not None:
        check_leaf(own, f"{place} in the model", shape)
    if array is not None:
        check_leaf(array, f"{place} in the file", shape)
    return trained


def arrays_of(parts: Parts) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape} of the base's arrays that belong to what is trained."""
    shape, found = jax.ShapeDtypeStruct, {}
    for path, spec in parts.items():
        is_kernel = isinstance(spec, AdapterSpec)
        size = spec.kernel_shape if is_kernel else spec.shape
        found["/".join(path)] = shape(size, jnp.float32 if is_kernel else spec.dtype)
    return found


def plan_to_json(plan: Plan) -> str:
    """A plan as JSON, for `plan_from_json`.

    Files of `save` hold what their adapters mean. Where another library stores the
    arrays alone (Orbax, Tunix), keep this text in the checkpoint's metadata: with the
    plan of it `plan.adapters(tree)` makes adapters of them again.

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
    for name, spec in check_plan(plan).items():
        if spec.operator.given:
            raise ValueError(
                f"{name}: JSON cannot hold the directions of a {spec.operator.name}; "
                "keep its adapters with mora_jax.save"
            )
    content = {"format": FORMAT} | record_of(plan.parts, PARTS) | record_of(plan, PLAN)
    return dump(content | {"sha256": signature(content)}).decode()


def plan_from_json(text: str, like: Plan | None = None) -> Plan:
    """The plan that `plan_to_json` wrote.

    It lacks a layout on a mesh: see `sharding.on_mesh`.

    Args:
      text: The text that `plan_to_json` returned.
      like: The plan of the model that the arrays are for; None for any model.

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
    content = parse_record(text, FORMAT, PLAN, where, hint)
    if (count := content["base_parameters"]) < 0:
        raise AdapterFileError(
            f"base_parameters of {where} must be an integer from 0 on, got {count}"
        )
    # With a model, operators are made only for its shapes.
    base = None if like is None else arrays_of(check_plan(like, "like").parts)
    parts, _ = restore_parts(content, where, base, None)
    if like is not None:
        try:
            refuse_other_kernels(parts, like)
            for path, spec in parts.items():
                if isinstance(spec, AdapterSpec):
                    check_same("/".join(path), spec, like.specs[path])
        except ValueError as error:
            raise AdapterFileError(str(error)) from error
    return Plan(parts, count, content["traced"])
