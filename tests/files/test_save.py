"""Adapters come back from files bit for bit, or an error says why not."""

import hashlib
import os
import struct
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from adapter_files import (
    PARAMS,
    PLAN,
    assert_same,
    config_of,
    contents,
    made,
    rewrite,
    signed,
    single,
    specs_of,
    with_metadata,
)
from cases import CASES, by_case
from flax import traverse_util

from mora_jax import init, io, load, make_operator, save
from mora_jax.io import AdapterFileError
from mora_jax.io._files import CONFIG, TENSORS


@by_case
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip(tmp_path, case, dtype):
    operator = case.make(12, 20, 6, seed=3)
    settings = {"alpha": -0.75, "init": "gaussian", "param_dtype": dtype}
    path = "mlp/~/linear_0", "w"  # Haiku's names have slashes
    plan = single(operator, path=path, **settings)
    adapters = made(plan)
    save(tmp_path, adapters)
    back = load(tmp_path, {path[0]: {path[1]: jnp.ones((12, 20))}})
    assert_same(back, adapters)
    ((name, spec),) = specs_of(back).items()
    assert name == "/".join(path) and spec == plan[name]
    assert hash(spec) == hash(plan[name]) and spec.operator == operator
    m = jax.tree.leaves(adapters)[0]
    found, expected = (case.delta(op, m) for op in (spec.operator, operator))
    np.testing.assert_array_equal(found, expected)


def test_round_trip_of_a_tree(tmp_path):
    adapters = made(PLAN)
    kept = {"a": None, "b": [True, 1, 2.5, "x"], "c": {"d": {}}, "e": np.float64(0.5)}
    save(tmp_path, adapters, metadata=kept)
    for model in (None, PARAMS, jax.eval_shape(lambda: PARAMS)):
        back = load(tmp_path, model)
        assert_same(back, adapters)
        assert specs_of(back) == dict(PLAN)
    assert io.read_metadata(tmp_path) == kept
    assert os.listdir(tmp_path) == [TENSORS]


def test_float64(tmp_path, float64):
    plan = single(CASES[0].make(12, 20, 6), param_dtype="float64")
    adapters = made(plan)
    save(tmp_path, adapters)
    assert_same(load(tmp_path), adapters)
    jax.config.update("jax_enable_x64", False)
    with pytest.raises(AdapterFileError, match="jax_enable_x64"):
        load(tmp_path)


def test_others_read_the_tensors(tmp_path):
    """Each M once, in row-major order, under its path."""
    adapters = made(PLAN, dtype="float32")
    save(tmp_path, adapters)
    found = safetensors.numpy.load_file(tmp_path / TENSORS)
    flat = traverse_util.flatten_dict(adapters, sep="/")
    expected = {name: np.asarray(adapter.m) for name, adapter in flat.items()}
    assert_same(found, expected)
    config = config_of(tmp_path)
    paths = [layer["path"] for layer in config["layers"]]
    assert paths == [list(path) for path in PLAN.specs]
    assert config["layers"][-1]["operator"] == {"name": "orthogonal", "seed": 7}
    pieces = [expected[name].tobytes() for name in sorted(expected)]
    digest = hashlib.sha256(b"".join(pieces)).hexdigest()
    assert config["tensors_sha256"] == digest
    with safetensors.safe_open(tmp_path / TENSORS, "numpy") as file:
        assert file.metadata() == {"mora_jax": signed(config)}


def test_replaces_and_leaves_others_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for seed in range(2):
        save(tmp_path, made(PLAN, seed))
        assert_same(load(tmp_path), made(PLAN, seed))
    assert sorted(os.listdir(tmp_path)) == [TENSORS, "notes.txt"]


@pytest.mark.parametrize(
    ("kept", "config"),
    [
        ((CONFIG, TENSORS), None),
        ((TENSORS,), None),
        ((CONFIG,), b"{"),
        ((CONFIG,), b"[1]"),
        ((CONFIG, TENSORS), b"\xff\xfe"),
    ],
)
def test_somebody_elses_adapter_is_not_replaced(tmp_path, kept, config):
    """PEFT's, or one of which nobody can say whose it is."""
    path = "model", "layers", "0", "mlp", "up_proj", "kernel"
    plan = single(make_operator("sharing", 12, 20, 6), path=path)
    io.export(tmp_path, made(plan), "peft")
    for name in {CONFIG, TENSORS}.difference(kept):
        (tmp_path / name).unlink()
    if config is not None:
        (tmp_path / CONFIG).write_bytes(config)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=f"whose {kept[0]} is not mora_jax's"):
        save(tmp_path, made(plan))
    assert contents(tmp_path) == before


def test_our_own_adapter_is_replaced_whatever_became_of_it(tmp_path):
    """Of a newer format, damaged, or without its file."""
    save(tmp_path, made(PLAN))
    for harm in (
        (tmp_path / TENSORS).unlink,
        lambda: rewrite(tmp_path, lambda config: config.update(format_version=2)),
        lambda: (tmp_path / TENSORS).write_bytes(b"{"),
    ):
        harm()
        save(tmp_path, made(PLAN, 1))
        assert_same(load(tmp_path), made(PLAN, 1))


# What is written must be right.


def test_refuses_to_write():
    adapters = made(PLAN)
    for bad, error, match in (
        (
            jax.tree.map(lambda m: m.at[..., 0].set(jnp.nan), adapters),
            ValueError,
            "NaN",
        ),
        ({}, ValueError, "adapters hold no adapter"),
        (jax.eval_shape(lambda: adapters), TypeError, "must be a concrete array"),
    ):
        with pytest.raises(error, match=match):
            save("/nonexistent/x", bad)
    with pytest.raises(TypeError, match="must be a concrete array, got .*Tracer"):
        jax.jit(lambda adapters: save("/nonexistent/x", adapters))(adapters)
    assert not Path("/nonexistent").exists()


NESTED = {}
NESTED["self"] = [NESTED]
NO_JSON = [
    (
        {"loss": jnp.float32(1)},
        r"metadata\['loss'\].*type ArrayImpl: say .tolist\(\)",
    ),
    ({"step": jnp.int32(1)}, r"metadata\['step'\].*type ArrayImpl: say .tolist\(\)"),
    ({"a": [{"b": np.float32(1)}]}, r"\['a'\]\[0\]\['b'\].*float32: say .tolist"),
    ({"ok": np.bool_(True)}, r"metadata\['ok'\].*bool.*: say .tolist"),
    ({"a": (1, np.ones(3))}, r"metadata\['a'\]\[1\].*ndarray: say .tolist\(\)"),
    ({"a": {3: "x"}}, r"metadata\['a'\].*keys must be texts, got 3"),
    ({"a": {1, 2}}, r"metadata\['a'\].*type set"),
    ({"a": b"x"}, r"metadata\['a'\].*type bytes"),
    ({"a": object()}, "JSON.*type object"),
    (["a"], r"metadata must map.*\['a'\]"),
]


@pytest.mark.usefixtures("unchecked")
def test_metadata_that_json_cannot_hold_is_named():
    cases = [(TypeError, *case) for case in NO_JSON]
    cases += [(ValueError, {"a": float("nan")}, "JSON")]
    cases += [(ValueError, NESTED, "metadata is nested too deeply")]
    for error, metadata, match in cases:
        with pytest.raises(error, match=match):
            save("/nonexistent/x", made(PLAN), metadata)
    assert not Path("/nonexistent").exists()


# What is read is believed only after it has been checked.


@pytest.fixture
def saved(tmp_path):
    """A directory with adapters of `PLAN`, all in float32, which NumPy can read."""
    save(tmp_path, made(PLAN, dtype="float32"))
    return tmp_path


def layer(**changes):
    """A change of the orthogonal layer, `enc/kernel`."""
    return lambda config: config["layers"][2].update(changes)


def settings(**changes):
    return lambda config: config["layers"][2]["settings"].update(changes)


def operator(**entries):
    return layer(operator=entries)


REFUSED = {
    "newer": (lambda c: c.update(format_version=2), "newer"),
    "version": (lambda c: c.update(format_version=True), "must be 1, got True"),
    "format": (lambda c: c.update(format="other"), "load_peft"),
    "lacks": (lambda c: c.pop("metadata"), "lacks .*metadata"),
    "too-much": (lambda c: c.update(more=1), "more"),
    "type": (lambda c: c.update(layers={}), "of type list"),
    "digest": (lambda c: c.update(tensors_sha256="../../x"), "SHA-256 of tensors"),
    "no-layer": (lambda c: c["layers"].pop(), "enc/kernel_mora"),
    "twice": (lambda c: c["layers"].append(c["layers"][0]), "'dec/kernel'.*twice"),
    "layer-lacks": (lambda c: c["layers"][2].pop("axes"), "layers.2.*lacks.*axes"),
    "setting-too-much": (settings(x=1), "enc/kernel.*settings must not hold .*'x'"),
    "settings-type": (layer(settings=[]), "settings of layers.2.*of type dict"),
    "layer-type": (lambda c: c["layers"].append(3), "layers.3"),
    "operator": (operator(name="unheard"), "enc/kernel.*must be one of"),
    "auto": (operator(name="auto"), "enc/kernel"),
    "no-settings": (operator(name="sharing"), "enc/kernel.*another operator here"),
    "no-seed": (operator(name="orthogonal"), "enc/kernel.*another operator here"),
    "operator-name": (operator(name=["orthogonal"]), "enc/kernel"),
    "operator-more": (operator(name="orthogonal", seed=7, x=None), "enc/kernel.*'x'"),
    "seed-of-none": (operator(name="sharing", seed=7), "enc/kernel.*operator must be"),
    "seed": (operator(name="orthogonal", seed=8), "another operator here"),
    "seed-type": (operator(name="orthogonal", seed=7.0), "seed"),
    "operator-type": (layer(operator=[1]), "operator of layers.2.*of type dict"),
    "check": (layer(operator_check=["x"] * 4), "enc/kernel"),
    "check-texts": (layer(operator_check=["0"] * 4), "enc/kernel.*another operator"),
    "check-short": (layer(operator_check=[0.1]), "enc/kernel.*another operator"),
    "check-deep": (layer(operator_check=[[[1]], 2]), "enc/kernel"),
    "q": (layer(square_rank=10**9), "enc/kernel.*too much memory"),
    "q-type": (layer(square_rank=True), "square_rank of layers.2.*of type int"),
    "layer-too-much": (layer(more=1), "layers.2.*must not hold .*more"),
    "shape": (layer(kernel_shape=[10**9, 10**9]), "too much memory"),
    "shape-0": (layer(kernel_shape=[0, 24]), r"integers in \[1, 2\*\*31\), got \[0"),
    "shape-type": (layer(kernel_shape="ab"), "of type list"),
    "other-shape": (layer(kernel_shape=[24, 16]), "another operator here"),
    "axes": (layer(axes="xx"), "axes"),
    "alpha": (settings(alpha="1"), "enc/kernel.*alpha"),
    "alpha-int": (settings(alpha=1), "enc/kernel.*alpha .* of type float, got 1$"),
    "alpha-null": (settings(alpha=None), "enc/kernel.*alpha .* type float, got None"),
    "dropout": (settings(dropout=1.5), "dropout"),
    "init": (settings(init="ones"), "init"),
    "execution": (settings(execution="fast"), "execution"),
    "dtype": (layer(dtype="bfloat16"), "dtype"),
    "param_dtype": (settings(param_dtype="int8"), "param_dtype"),
    "scale": (settings(scale=0.0), "enc/kernel.*scale must be above 0"),
    "path-up": (layer(path=["..", "kernel"]), "path of names"),
    "path-type": (layer(path=["enc", 1]), "path of names"),
    "path-empty": (layer(path=[]), "path of names"),
    "path-out": (layer(path=["a/../../../etc", "kernel"]), "path of names"),
    "path-deep": (layer(path=["a"] * 101), "path of names"),
    "path-other": (layer(path=["x", "kernel"]), "lacks x/kernel_mora"),
    **{
        f"base_digest-{value}": (layer(base_digest=value), "base_digest")
        for value in ("x", [], ["x"], ["0" * 64] * 2, [1], 3, ["G" * 64])
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_configs(saved, name, unchecked):
    change, match = REFUSED[name]
    rewrite(saved, change)
    with pytest.raises(AdapterFileError, match=match):
        load(saved)


M = "enc/kernel_mora"
BAD_TENSORS = {
    "nan": (M, np.full((10, 10), np.nan, np.float32), "enc/kernel_mora.*NaN"),
    "shape": (M, np.ones((9, 10), np.float32), r"enc/kernel .*shape \(10, 10\)"),
    "integers": (M, np.ones((10, 10), np.int32), "enc/kernel_mora.*I32"),
    "dtype": (M, np.ones((10, 10), np.float16), "enc/kernel .*dtype"),
    "eight bits": (M, np.ones((10, 10), jnp.float8_e4m3fn), "must be one of.*float8"),
    "extra": ("../../etc/passwd", np.ones(1, np.float32), "knows nothing"),
    "of another operator": ("subspace/0", np.eye(9, 2, dtype="f"), "knows nothing"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_refuses_tensors(saved, case):
    name, tensor, match = BAD_TENSORS[case]
    assert PLAN["enc/kernel"].shape == (10, 10)
    tensors = safetensors.numpy.load_file(saved / TENSORS)
    data = safetensors.numpy.save({**tensors, name: tensor}, {})
    rewrite(saved, tensors=data)
    with pytest.raises(AdapterFileError, match=match):
        load(saved)


def raw(header, size=None):
    """A safetensors file by hand."""
    return struct.pack("<Q", size or len(header)) + header + b"\0" * 4


ENTRY = b'"enc/kernel_mora":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}'
HUGE = b"4294967296,4294967296"
BAD_FILES = {
    "empty": b"",
    "short": b"\1\0",
    "huge-header": raw(b"{}", 2**62),
    "long-header": raw(b"{}", 2**26),
    "no-json": raw(b"{]"),
    "twice": raw(b"{" + ENTRY + b"," + ENTRY + b"}"),
    "offsets": raw(b"{" + ENTRY.replace(b"[0,4]", b"[0,400]") + b"}"),
    "huge-shape": raw(b"{" + ENTRY.replace(b"1,1", HUGE) + b"}"),
}
BAD_CONFIGS = {
    "empty": "",
    "twice": '{"format": 1, "format": 2}',
    "nan": '{"format": NaN}',
    "deep": "[" * 100_000,
    "half-a-character": "\ud800",
    "list": "[]",
    "no-text": 3,
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses_files(saved, case):
    rewrite(saved, tensors=BAD_FILES[case])
    with pytest.raises(AdapterFileError, match=TENSORS):
        load(saved)


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_refuses_texts_for_configs(saved, case):
    data = (saved / TENSORS).read_bytes()
    data = with_metadata(data, {"mora_jax": BAD_CONFIGS[case]})
    (saved / TENSORS).write_bytes(data)
    for read in (load, io.read_metadata):
        with pytest.raises(AdapterFileError, match=TENSORS):
            read(saved)


def test_notices_damage(saved):
    """Any byte of the file."""
    whole = (saved / TENSORS).read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 100)):
        broken = bytearray(whole)
        broken[place] ^= 4
        (saved / TENSORS).write_bytes(broken)
        with pytest.raises(AdapterFileError):
            load(saved)
    (saved / TENSORS).write_bytes(whole)
    load(saved)


def test_missing_files(saved, tmp_path_factory):
    (saved / TENSORS).rename(saved / "notes.txt")
    for place, match in (
        (saved, f"no {TENSORS}"),
        (tmp_path_factory.mktemp("empty"), f"no {TENSORS}"),
        ("/nonexistent", f"no {TENSORS}"),
        (saved / "notes.txt", "not a directory"),
    ):
        with pytest.raises(AdapterFileError, match=match):
            load(place)


def test_a_pipe_is_no_file(saved):
    """Reading one would wait for ever."""
    (saved / TENSORS).unlink()
    os.mkfifo(saved / TENSORS)
    for read in (load, io.read_metadata, io.Checkpoint):
        with pytest.raises(AdapterFileError, match="a device, not a file"):
            read(saved if read is not io.Checkpoint else saved / TENSORS)


def test_another_base(saved):
    for match, changes in (
        (
            "lack the kernel 'dec/kernel'; the",
            {"dec": {"x": np.ones((2, 2))}},
        ),
        (r"\(16, 24\), got \(24, 16\)", {"enc": {"kernel": np.ones((24, 16))}}),
        ("enc/kernel.*floating", {"enc": {"kernel": np.ones((16, 24), np.int8)}}),
    ):
        with pytest.raises(AdapterFileError, match=match):
            load(saved, {**PARAMS, **changes})


def test_numbers_that_were_donated_are_not_saved(tmp_path):
    adapters = init(PLAN)
    jax.jit(lambda tree: jax.tree.map(lambda m: m + 1, tree), donate_argnums=0)(
        adapters
    )
    with pytest.raises(ValueError, match="kernel_mora must hold numbers.* donated"):
        save(tmp_path, adapters)


@pytest.mark.parametrize("read", [load, io.load_peft])
def test_the_name_of_a_model_on_the_hub_is_told(monkeypatch, read):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # it is not installed
    with pytest.raises(io.AdapterFileError, match="snapshot_download"):
        read("someone/adapter")


def test_peft_s_reader_knows_our_files(tmp_path):
    save(tmp_path, init(PLAN))
    with pytest.raises(io.AdapterFileError, match="mora_jax.load reads"):
        io.load_peft(tmp_path)
