"""Files can grow: a version reads those of another one, or says which wrote it.

`newer` is a copy of this library in which a layer, its settings, its operator and the
file have a field more, since version 9.0.0. It stands for a version to come.
"""

import dataclasses
import functools
import importlib
import json
import re
import shutil
import sys
from operator import itemgetter
from pathlib import Path

import jax
import numpy as np
import pytest
from adapter_files import assert_same, config_of, contents, rewrite, run, signed

import mora_jax
from mora_jax import AdapterSpec, MoRAConfig, Plan, TrainedArray, init, io, load, save
from mora_jax._common.types import FIRST
from mora_jax._plan.settings import AdapterSettings
from mora_jax.io import AdapterFileError, _tensors
from mora_jax.io._json import REQUIRED, Field, read_record, record_of
from mora_jax.io.native import _adapter, _plan_json, _records
from mora_jax.operators import OPERATORS, Subspace

TABLES = {
    "settings": _records.SETTINGS,
    "layer": _records.LAYER,
    "trained": _records.TRAINED,
    "parts": _records.PARTS,
    "plan": _plan_json.PLAN,
    "file": _adapter.MORE,
    "tensor": _tensors.ENTRY,
}
LATER = "9.0.0"
PARAMS = {"fc": {"kernel": np.ones((8, 12), np.float32), "bias": np.ones(12, "f4")}}
SETTINGS = {"rank": 2, "operator": "rotation", "train": "fc/bias"}
PLAN = mora_jax.plan(PARAMS, MoRAConfig(**SETTINGS))


def by_version(text):
    return tuple(map(int, text.split(".")))


def names_of(record):
    return {field.name for field in dataclasses.fields(record)}


# Laws of the tables.


@pytest.mark.parametrize("name", TABLES)
def test_what_is_added_later_has_a_default(name):
    for field in TABLES[name].values():
        assert by_version(field.since) >= by_version(FIRST)
        assert field.since == FIRST or field.default is not REQUIRED
        assert field.default in (REQUIRED, None) or type(field.default) is field.kind


@pytest.mark.parametrize("kind", [*OPERATORS.values(), Subspace, AdapterSettings])
def test_what_operators_and_settings_add_later_has_a_default(kind):
    for field in dataclasses.fields(kind):
        if field.metadata.get("since", FIRST) != FIRST:
            assert field.default is not dataclasses.MISSING


def test_all_that_decides_what_an_adapter_is_is_in_a_table():
    """But its path in the tree, and its place on a mesh."""
    assert _records.SETTINGS.keys() == names_of(AdapterSettings)
    defaults = {key: field.default for key, field in _records.SETTINGS.items()}
    assert AdapterSettings(**defaults) == AdapterSettings()
    own = names_of(AdapterSpec) - names_of(AdapterSettings) - {"layout"}
    assert own <= _records.LAYER.keys()
    assert names_of(TrainedArray) <= _records.TRAINED.keys()
    compared = {field.name for field in dataclasses.fields(Plan) if field.compare}
    assert compared - {"parts"} <= _plan_json.PLAN.keys()


def records(table):
    """A record of the table, with a value of its kind for each field."""
    values = {str: "x", int: 3, float: 0.5, bool: True, list: [1], dict: {"a": 1}}
    return {key: values[field.kind] for key, field in table.items()}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("default", [0, 0.5, "", None, False])
def test_a_field_more_is_not_written_at_its_default(name, default):
    """So the older version reads such a record, and the newer one all of the older."""
    table = {
        key: field._replace(get=lambda r, k=key: r[k])
        for key, field in TABLES[name].items()
    }
    kind = int if default is None else type(default)
    more = Field(kind, itemgetter("more"), default, LATER)
    newer, record = table | {"more": more}, records(table)
    assert record_of(record | {"more": default}, newer) == record
    assert read_record(record, newer, "it") == record | {"more": default}
    assert read_record(record_of(record, table), table, "it") == record
    value = {int: 7, float: 0.7, str: "x", bool: True}[kind]
    written = record_of(record | {"more": value}, newer)
    assert read_record(written, newer, "it") == written == record | {"more": value}
    match = (
        f"it must not hold .'more'., .* mora_jax '{LATER}', which wrote it, or a newer"
    )
    with pytest.raises(AdapterFileError, match=match):
        read_record(written, table, "it", LATER)


@pytest.mark.parametrize("name", TABLES)
def test_a_field_less(name):
    """What lacks it has the default, or is refused where there is none."""
    table, record = TABLES[name], records(TABLES[name])
    for key, field in table.items():
        less = {other: value for other, value in record.items() if other != key}
        if field.default is REQUIRED:
            with pytest.raises(AdapterFileError, match=f"it lacks '{key}'"):
                read_record(less, table, "it")
        else:
            assert read_record(less, table, "it") == record | {key: field.default}


@pytest.mark.parametrize("name", TABLES)
def test_a_value_of_another_type_is_refused(name):
    table, record = TABLES[name], records(TABLES[name])
    for key, field in table.items():
        for value in ("x", 3, 0.5, True, [1], {"a": 1}, None):
            if type(value) is field.kind or value is field.default:
                continue
            match = f"{key} of it must be of type {field.kind.__name__}, got"
            with pytest.raises(AdapterFileError, match=match):
                read_record(record | {key: value}, table, "it")


# A version to come.

CHANGES = {
    "_plan/settings.py": [
        ("        jnp.float32, checks.check_param_dtype, compare=False\n    )\n",
         '    warmth: float = setting(0.5, _rate, since="9.0.0")\n'),
        ("    seed: int = setting(0, lambda _, value: checks.check_seed(value))\n",
         "    warmth: float = setting(0.5, _rate)\n"),
    ],
    "operators/decoupling.py": [
        ("import jax\n", "import dataclasses\n"),
        ('    name = "rotation"\n',
         "    flip: bool = dataclasses.field(\n"
         '        default=False, metadata={"since": "9.0.0"}\n'
         "    )\n"),
    ],
    "io/native/_records.py": [
        ('    "rank": Field(int, lambda part: part[1].spec.rank, None),\n',
         '    "remark": Field(str, lambda part: REMARKS["remark"], "", "9.0.0"),\n'),
        ('    "trained": Field('
         "list, lambda found: _records_of(found.trained, TRAINED)),\n",
         '    "mood": Field(str, lambda found: REMARKS["mood"], "", "9.0.0"),\n'),
        ("# --- What files hold ---\n", 'REMARKS = {"remark": "", "mood": ""}\n'),
    ],
}  # fmt: skip
"""{module: [(a line, the lines that follow it in the newer library)]}."""


@pytest.fixture(scope="module")
def newer(tmp_path_factory):
    """The newer library, beside this one."""
    home = tmp_path_factory.mktemp("newer")
    ours = Path(mora_jax.__file__).parent
    shutil.copytree(ours, home / "newer", ignore=shutil.ignore_patterns("__pycache__"))
    for module, lines in CHANGES.items():
        path = home / "newer" / module
        text = path.read_text()
        for line, more in lines:
            assert text.count(line) == 1, line
            text = text.replace(line, line + more)
        path.write_text(text)
    for path in (home / "newer").rglob("*.py"):
        own = r"(?m)^( *)(from|import) mora_jax\b"
        text = re.sub(own, r"\1\2 newer", path.read_text())
        path.write_text(text.replace('version("mora-jax")', f'"{LATER}"'))
    sys.path.insert(0, str(home))
    try:
        yield importlib.import_module("newer")
    finally:
        sys.path.remove(str(home))
        for name in [name for name in sys.modules if name.split(".")[0] == "newer"]:
            del sys.modules[name]


def remarks(newer, monkeypatch, **texts):
    """Have the newer library write a remark on each layer, or a mood for the file."""
    known = importlib.import_module("newer.io.native._records").REMARKS
    for name, text in texts.items():
        monkeypatch.setitem(known, name, text)


GROWN = {
    "settings": ({"warmth": 0.25}, {}, "settings must not hold .'warmth'."),
    "operator": (
        {"operator": {"name": "rotation", "flip": True}},
        {},
        "operator 'rotation' has settings .'truncate'., got 'flip'",
    ),
    "layer": ({}, {"remark": "x"}, r"layers\[0\] of .* must not hold .'remark'."),
    "file": ({}, {"mood": "x"}, "must not hold .'mood'."),
}
"""{place of a field: settings and remarks that use it, and our error}."""


def bare(adapters):
    """The arrays alone, which two libraries can compare."""
    return jax.tree.map(np.asarray, jax.tree.leaves(adapters))


def test_an_older_file_has_the_defaults(newer, tmp_path):
    adapters = init(PLAN, params=PARAMS)
    save(tmp_path, adapters)
    found = newer.load(tmp_path, PARAMS)
    assert_same(bare(found), bare(adapters))
    spec = found["fc"]["kernel_mora"].spec
    assert (spec.warmth, spec.operator.flip) == (0.5, False)
    plan = newer.io.plan_from_json(io.plan_to_json(PLAN))
    assert plan["fc/kernel"].warmth == 0.5 and plan["fc/kernel"] == spec
    own = newer.plan(PARAMS, newer.MoRAConfig(**SETTINGS))
    assert newer.io.plan_from_json(io.plan_to_json(PLAN), like=own) == plan == own


def test_a_newer_file_without_what_is_new_is_as_ours(newer, tmp_path):
    """But for the version that wrote it."""
    plan = newer.plan(PARAMS, newer.MoRAConfig(**SETTINGS))
    adapters = newer.init(plan, params=PARAMS)
    newer.save(tmp_path / "new", adapters)
    save(tmp_path / "old", init(PLAN, params=PARAMS))
    assert_same(load(tmp_path / "new", PARAMS), load(tmp_path / "old", PARAMS))
    new, old = (config_of(tmp_path / name) for name in ("new", "old"))
    changed = {key for key in new | old if new.get(key) != old.get(key)}
    assert changed == {"library_version", "sha256"} and new["library_version"] == LATER
    text = newer.io.plan_to_json(plan)
    assert io.plan_from_json(text) == io.plan_from_json(text, like=PLAN) == PLAN


@pytest.mark.parametrize("place", GROWN)
def test_a_newer_file_with_what_is_new_says_who_wrote_it(
    newer, tmp_path, monkeypatch, place
):
    settings, texts, match = GROWN[place]
    remarks(newer, monkeypatch, **texts)
    plan = newer.plan(PARAMS, newer.MoRAConfig(**SETTINGS | settings))
    adapters = newer.init(plan, params=PARAMS)
    newer.save(tmp_path, adapters)
    assert newer.load(tmp_path)["fc"]["kernel_mora"].spec == plan["fc/kernel"]
    text = newer.io.plan_to_json(plan)
    assert newer.io.plan_from_json(text) == plan
    match = f"{match}.* mora_jax '{LATER}'"
    with pytest.raises(AdapterFileError, match=match):
        load(tmp_path)
    with pytest.raises(AdapterFileError, match=match):
        io.plan_from_json(text)
    before = contents(tmp_path)
    told = run("inspect", tmp_path, code=1)
    assert len(told.splitlines()) == 1 and re.search(match, told)
    assert contents(tmp_path) == before


def test_a_setting_that_a_file_lacks_has_its_default(tmp_path):
    """As of a version in which it is no setting any more."""
    plan = mora_jax.plan(PARAMS, MoRAConfig(rank=2, alpha=3.0, dropout=0.5))
    adapters = init(plan)
    save(tmp_path, adapters, params=PARAMS)
    keys = {"settings": _records.SETTINGS, None: ("base_digest", "rank")}
    for place, names in keys.items():
        for name in names:
            rewrite(tmp_path, functools.partial(_without, place, name))
    spec = load(tmp_path)["fc"]["kernel_mora"].spec
    assert (spec.alpha, spec.scale, spec.dropout) == (1.0, 1.0, 0.0)
    assert spec.rank is spec.base_digest is None
    assert spec.operator == plan["fc/kernel"].operator
    content = json.loads(io.plan_to_json(plan))
    _without("settings", "alpha", content)
    assert io.plan_from_json(signed(content))["fc/kernel"].alpha == 1.0
    with pytest.raises(AdapterFileError, match="made for alpha 1.0, not 3.0"):
        io.plan_from_json(signed(content), like=plan)


def _without(place, name, config):
    for layer in config["layers"]:
        (layer[place] if place else layer).pop(name)
