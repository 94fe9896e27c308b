"""Records of adapters in JSON, and adapters of records.

The tables of fields say what files hold, and what later versions added (see `Field`).
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._common.axes import features, sizes
from mora_jax._common.checks import check_concrete, check_finite, check_leaf
from mora_jax._common.types import FIRST, Path, Shape
from mora_jax._layer.adapter import Adapter
from mora_jax._plan.settings import AdapterSettings
from mora_jax._plan.spec import AdapterSpec, TrainedArray, operator_settings
from mora_jax._tree.paths import Found, place_of
from mora_jax.io._files import TENSORS, AdapterFileError
from mora_jax.io._json import Field, Fields, dump, parse, read_record, record_of, short
from mora_jax.io._tensors import DTYPES, Arrays
from mora_jax.io.native._directions import widened
from mora_jax.operators import OPERATORS, Damped, Operator, Subspace, make_operator
from mora_jax.operators._pytree import by_layer

VERSION = 1
LARGEST_ARRAY = 2**28  # numbers, the most that a file alone may ask for
LARGEST_SIZE, DEEPEST = 2**31, 100  # the end of sizes and ranks, the names in a path

Record = Mapping[str, Any]
Widths = tuple[int, int, int]  # of a kernel and its M: in, out and q


# --- What files hold ---


def operator_record(op: Operator) -> Record:
    """An operator's settings; a later one is left out at its default, as a `Field`."""
    settings, fields = operator_settings(op), dataclasses.fields(op)
    later = [field for field in fields if field.metadata.get("since", FIRST) != FIRST]
    idle = {f.name for f in later if settings.get(f.name) == f.default}
    return {name: value for name, value in settings.items() if name not in idle}


def _dtype(adapter: Adapter) -> str:
    """The dtype of M, which may be another one than its spec would give a new M."""
    return jnp.dtype(getattr(adapter.m, "dtype", adapter.spec.param_dtype)).name


_SINCE = {f.name: f.metadata["since"] for f in dataclasses.fields(AdapterSettings)}
SETTINGS: Fields = {  # of an adapter; their values are checked by `AdapterSettings`
    name: Field(type(default), itemgetter(name), default, _SINCE[name])
    for name, default in AdapterSettings().to_json().items()
}

LAYER: Fields = {  # the record of a kernel's adapter
    "path": Field(list, lambda part: list(part[0])),
    "kernel_shape": Field(list, lambda part: list(part[1].spec.kernel_shape)),
    "axes": Field(str, lambda part: part[1].spec.axes),
    "operator": Field(dict, lambda part: operator_record(part[1].operator)),
    "operator_check": Field(list, lambda part: list(fingerprint(part[1].operator))),
    "square_rank": Field(int, lambda part: part[1].operator.square_rank),
    "settings": Field(dict, lambda part: record_of(part[1].spec.to_json(), SETTINGS)),
    "dtype": Field(str, lambda part: _dtype(part[1])),
    "base_digest": Field(list, lambda part: part[1].spec.base_digest, None),
    "rank": Field(int, lambda part: part[1].spec.rank, None),
}

TRAINED: Fields = {  # the record of an array that trains itself
    "path": Field(list, lambda part: list(part[0])),
    "shape": Field(list, lambda part: list(part[1].spec.shape)),
    "dtype": Field(str, lambda part: jnp.dtype(part[1].spec.dtype).name),
    "base_dtype": Field(str, lambda part: jnp.dtype(part[1].spec.base_dtype).name),
}

PARTS: Fields = {  # the record of {path: adapter}, beside its `format`
    "format_version": Field(int, lambda _: VERSION),
    "library_version": Field(str, lambda _: version("mora-jax")),
    "layers": Field(list, lambda found: _records_of(found.kernels, LAYER)),
    "trained": Field(list, lambda found: _records_of(found.trained, TRAINED)),
}


def _records_of(found: Found, fields: Fields) -> list[dict[str, Any]]:
    return [record_of(part, fields) for part in found.items()]


@functools.lru_cache(maxsize=16)  # layers have few operators, or each its own arrays
def fingerprint(op: Operator) -> tuple[float, ...]:
    """Four numbers that tell operators apart, computed from fixed arrays."""
    # They differ on a platform or in a later version of the library that has other
    # random numbers or another definition of the operator.
    random = np.random.RandomState(0).standard_normal
    while by_layer(op)[0]:  # the first layer's stands for all, which have a digest
        op = op.at((0,))
    m, x = random(op.m_shape), random(op.in_features)
    m, width = m / math.sqrt(m.shape[-1]), op.out_features
    with jax.default_matmul_precision("highest"):  # TPUs would round to bfloat16
        y = op.apply(m.astype(np.float32), x.astype(np.float32))
    terms = np.asarray(y, np.float64) * random(width) / math.sqrt(width)
    return tuple(float(f"{terms[k::4].sum():.5g}") for k in range(4))


def text_of(found: Found, more: dict[str, Any]) -> str:
    """The record of {path: adapter} with `more` in it, as text."""
    return dump(_signed(record_of(found, PARTS) | more)).decode()


def _signed(content: Record) -> dict[str, Any]:
    """A record with the SHA-256 of all else in it."""
    others = {key: value for key, value in content.items() if key != "sha256"}
    return others | {"sha256": hashlib.sha256(dump(others)).hexdigest()}


# --- What is read in them ---


def parse_record(text: str, name: str, more: Fields, where: str, hint: str) -> Record:
    """A record of adapters in the format `name` with `more` fields, and defaults."""
    # Messages call it `where`, and `hint` says what else to do with others.
    # Half of a character, which JSON may hold, lacks bytes: it makes another text.
    content = parse(text.encode(errors="replace"), where)
    if not isinstance(content, dict) or content.get("format") != name:
        rule = f"{where} is not of mora_jax: its format must be {name!r}"
        raise AdapterFileError(f"{rule}; {hint}")
    written = content.get("format_version")
    if type(written) is not int or written != VERSION:
        rule = f"format_version of {where} must be {VERSION}, got {short(written)}"
        remedy = "another mora_jax is needed for other versions, such as a newer one"
        raise AdapterFileError(f"{rule}: {remedy}")
    fields = {"format": Field(str), **PARTS, **more, "sha256": Field(str)}
    record = read_record(content, fields, where, content.get("library_version"))
    if content != _signed(content):
        raise AdapterFileError(f"{where} is damaged or edited: its SHA-256 differs")
    return record


class Reading(NamedTuple):
    """A file that is read: the most numbers in an array, its arrays, its writer.

    `given` are the arrays of operators, by their names in files.
    """

    limit: int
    arrays: Arrays | None
    given: Mapping[str, Any]
    writer: str
    taken: set[str]

    def take(self, name: str) -> np.ndarray | None:
        """An array of finite numbers, which is noted as known."""
        if self.arrays is None:
            return None
        if name not in self.arrays:
            raise ValueError(f"the file lacks {name}")
        array = self.arrays[name]
        if array.dtype not in DTYPES.values():
            rule = f"{name} in the file must be one of {list(DTYPES)}"
            raise ValueError(f"{rule}, got {array.dtype}")
        check_finite(array, name, " in the file")
        self.taken.add(name)
        return array


def restore(
    content: Record,
    where: str,
    shapes: Iterable[Shape],
    arrays: Arrays | None = None,
    given: Mapping[str, Any] | None = None,
) -> Found:
    """The adapters of a record, by the paths of the base's arrays, all checked.

    Messages call it `where`. The `shapes` of a model's arrays tell how large they may
    be. `arrays` are the file's; without them adapters have None, as in a plan, and the
    arrays of operators are `given`.
    """
    # The kernels of a model are in memory, or could be.
    limit = max([LARGEST_ARRAY, *(4 * math.prod(shape) for shape in shapes)])
    file = Reading(
        limit=limit,
        arrays=arrays,
        given=(arrays if given is None else given) or {},
        writer=content["library_version"],
        taken=set(),
    )
    found = Found()
    for key, fields in ("layers", LAYER), ("trained", TRAINED):
        for number, written in enumerate(content[key]):
            here = f"{key}[{number}] of {where}"
            record = read_record(written, fields, here, file.writer)
            path = check_path(record["path"], here)
            name = "/".join(path)
            if path in found:
                raise AdapterFileError(f"{here} is {name!r}, which is there twice")
            try:
                if key == "layers":
                    spec: Any = _kernel_spec(record, file)
                else:
                    shape = _shape("shape", record["shape"], least=0)
                    spec = TrainedArray(shape, record["dtype"], record["base_dtype"])
                array = file.take("/".join(place_of(path, spec)))
                if array is not None:
                    check_leaf(array, "M" if key == "layers" else "it", spec.shape)
                found[path] = Adapter(array, spec)
                _check_same(record, record_of((path, found[path]), fields), spec)
            except (TypeError, ValueError, OverflowError) as error:
                raise AdapterFileError(f"{name} of {where}: {error}") from error
    places = sorted(f"{'/'.join(place_of(p, a.spec))}/" for p, a in found.items())
    for one, other in itertools.pairwise(places):
        if other.startswith(one):
            one, other = one[:-1], other[:-1]
            raise AdapterFileError(f"{where} has {other!r} twice, or below {one!r}")
    if unknown := sorted((arrays or {}).keys() - file.taken):
        why = "its config knows nothing of it"
        raise AdapterFileError(f"{TENSORS} holds {short(unknown)}; {why}")
    return found


def check_path(names: list[Any], here: str) -> Path:
    """A path, if a user may write the tree as directories, where ".." is above it."""
    right = 0 < len(names) <= DEEPEST and all(isinstance(name, str) for name in names)
    # A name may have slashes, as Haiku's have.
    if not right or not all(part.strip(".") for part in "/".join(names).split("/")):
        raise AdapterFileError(f"{here} must have a path of names, got {short(names)}")
    return tuple(names)


def _shape(name: str, values: list[Any], least: int) -> Shape:
    """A shape, if all sizes are integers of at least `least`."""
    if not all(type(size) is int and least <= size < LARGEST_SIZE for size in values):
        rule = f"{name} must be integers in [{least}, 2**31)"
        raise ValueError(f"{rule}, got {short(values)}")
    return tuple(values)


def _kernel_spec(record: Record, file: Reading) -> AdapterSpec:
    """The meaning of a kernel's adapter; a subspace takes its arrays from the file."""
    shape = _shape("kernel_shape", record["kernel_shape"], least=1)
    axes, q, rank = record["axes"], record["square_rank"], record["rank"]
    widths, stack = (*features(shape, axes), q), math.prod(sizes(shape, axes, "s"))
    _check_sizes(record["operator"], widths, file)
    if rank is not None:
        _shape("rank", [rank], least=1)
    operator = _operator(record["operator"], widths, file)
    settings = read_record(record["settings"], SETTINGS, "settings", file.writer)
    settings |= {"base_digest": _digests(record["base_digest"], stack), "rank": rank}
    return AdapterSpec(operator, shape, axes, **settings)


def _check_sizes(settings: Record, widths: Widths, file: Reading) -> None:
    """Raise if a file asks for arrays that are larger than any model has."""
    ins, outs, q = widths
    kind = OPERATORS.get(str(_inner(settings).get("name")), Operator)
    # Random maps have q rows of the wider side, and each operator is tried on a few.
    numbers = max(ins, outs) * max(16, q * hasattr(kind, "seed"))
    if file.arrays is None:
        # A plan lacks its M's: one of that size is made, and a few copies.
        block = -(-ins // q) * -(-outs // q)
        wide = q if kind.square else block if kind.linear else ins + outs
        numbers = max(numbers, 4 * q * wide)
    if numbers > file.limit:
        kernel = f"a kernel of {ins} -> {outs} features with q = {q}"
        why = "takes too much memory for a file alone to ask for"
        raise ValueError(f"{kernel} {why}; give the model's params or plan")


def _digests(digests: list[Any] | None, stack: int) -> tuple[str, ...] | None:
    """Digests of a base, if there is one for each index of the stack, or none."""
    if digests is None:
        return None
    right = all(isinstance(d, str) and re.fullmatch("[0-9a-f]{64}", d) for d in digests)
    if len(digests) != stack or not right:
        must = f"base_digest must be null or {stack} times 64 hex digits"
        raise ValueError(f"{must}, got {short(digests)}")
    return tuple(digests)


def _operator(record: Record, widths: Widths, file: Reading) -> Operator:
    """The operator of (in, out, q)."""
    settings = dict(record)
    if settings.get("name") == Subspace.name:
        subspace = Subspace(*widths, **_given(Subspace, record, file))
        _check_digests(subspace, record)
        return subspace
    if settings.get("name") == Damped.name:
        inner = _operator(_inner(record), widths, file)
        damped = Damped(*widths, inner=inner, **_given(Damped, record, file))
        _check_digests(damped, record)
        return damped
    try:
        return make_operator(settings, *widths, seed=settings.pop("seed", 0))
    except ValueError as error:
        hint = f"the file is of mora_jax {short(file.writer)}, which may know more"
        raise ValueError(f"{error} ({hint})") from None


def _given(kind: type[Operator], record: Record, file: Reading) -> dict[str, Any]:
    """The arrays of an operator, which are stored by their digests."""
    if not isinstance(digests := record.get("digests"), dict):
        raise ValueError(f"{kind.name} must have digests, got {short(digests)}")
    found = {}
    optional = {f.name for f in dataclasses.fields(kind) if f.default is None}
    for key in kind.arrays:
        if key in optional and key not in digests:
            continue
        name = f"{kind.name}/{digests.get(key)}"
        if name not in file.given:
            raise ValueError(
                f"the directions that M was trained with, {short(name)}, must be among "
                f"the arrays of its {'plan' if file.arrays is None else 'file'}, got "
                f"{short(sorted(n for n in file.given if n.startswith(kind.name)))}"
            )
        array = widened(file.given[name])
        check_concrete(array, f"the directions {name}", np.shape(array))
        check_finite(array, f"the directions {name}")
        file.taken.add(name)
        found[key] = array
    return found


def _check_digests(op: Operator, record: Record) -> None:
    """Raise unless the arrays of an operator are those that it was written with."""
    if op.digests != record["digests"]:
        raise ValueError(
            f"the directions of the {op.name} operator must be those that M was "
            "trained with, got others: their SHA-256 is not their name"
        )


def given_arrays(operators: Iterable[Operator]) -> dict[str, np.ndarray]:
    """{name in a file: array} of what no settings of the operators determine."""
    found: dict[str, np.ndarray] = {}
    for op in operators:
        while op is not None and op.given:  # equal arrays are stored once
            for key in op.arrays:
                array = getattr(op, key)
                if array is not None:
                    shape = tuple(np.shape(array))
                    check_concrete(array, f"{key} of {op.name}", shape)
            for key, digest in op.digests.items():
                found[f"{op.name}/{digest}"] = np.asarray(getattr(op, key))
            op = getattr(op, "inner", None)
    return found


def _inner(record: Record) -> Record:
    """The record of the operator inside of a damped one, or of any other itself."""
    if record.get("name") != Damped.name:
        return record
    if not isinstance(inner := record.get("inner"), dict):
        rule = "a damped operator must have an inner one"
        raise ValueError(f"{rule}, got {short(inner)}")
    return inner


def _check_same(record: Record, own: dict[str, Any], spec: Any) -> None:
    """Raise unless a record says what the record of its `own` adapter says."""
    if isinstance(spec, AdapterSpec):  # a record may hold all settings
        own["settings"] = spec.to_json()
        own["operator"] = operator_settings(spec.operator)
    for key, mine in own.items():
        value = record[key]
        if key == "operator_check":
            right = len(value) == len(mine) and all(type(x) is float for x in value)
            # Chips round differently; other random numbers differ by more.
            if not right or not np.allclose(mine, value, 1e-3, 1e-3):
                name = own["operator"]["name"]
                told = f"{name} is another operator here than where the file was made"
                raise ValueError(f"{told}: its check gives {mine}, got {short(value)}")
            continue
        if isinstance(mine, dict):  # of settings, which may be absent
            mine = {name: mine[name] for name in value if name in mine}
        # Texts are compared, since True == 1 == 1.0.
        if dump(mine) != dump(value):
            raise ValueError(f"{key} must be {mine!r}, got {short(value)}")
