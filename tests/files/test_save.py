"""Adapters come back from files bit for bit, or an error says why not."""

import hashlib
import json
import os
import struct
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from adapter_files import (
    CONFIG,
    PARAMS,
    PLAN,
    TEMPORARY,
    TENSORS,
    assert_same,
    config_of,
    made,
    rewrite,
    single,
)
from cases import CASES, by_case

import mora_jax
from mora_jax import MoRAConfig, io, load, save
from mora_jax.io import AdapterFileError


@by_case
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip(tmp_path, case, dtype):
    operator = case.make(12, 20, 6, seed=3)
    plan = single(operator, alpha=-0.75, init="gaussian", param_dtype=dtype)
    adapters = made(plan)
    save(tmp_path, adapters, plan)
    back, same = load(tmp_path)
    assert_same(back, adapters)
    assert same == plan and hash(same) == hash(plan)
    (spec,) = same.specs
    assert spec.operator == operator
    for found, matrix in zip(
        case.matrices(spec.operator), case.matrices(operator), strict=True
    ):
        np.testing.assert_array_equal(found, matrix)


def test_round_trip_of_a_tree(tmp_path):
    adapters = made(PLAN)
    save(tmp_path, adapters, PLAN, metadata={"task": "x", "steps": [1, 2.5, None]})
    for model in (None, PARAMS, jax.eval_shape(lambda: PARAMS)):
        back, plan = load(tmp_path, model)
        assert_same(back, adapters)
        assert plan == PLAN and str(plan) == str(PLAN)
    assert io.read_metadata(tmp_path) == {"task": "x", "steps": [1, 2.5, None]}
    assert sorted(os.listdir(tmp_path)) == [CONFIG, TENSORS]


def test_names_with_slashes(tmp_path):
    """Haiku's modules have them."""
    params = {"mlp/~/linear_0": {"w": jnp.ones((8, 8))}}
    plan = mora_jax.plan(params, MoRAConfig(rank=1, targets=".*/w"))
    adapters = made(plan)
    save(tmp_path, adapters, plan)
    back, same = load(tmp_path, params)
    assert_same(back, adapters)
    assert same == plan


def test_float64(tmp_path, float64):
    plan = single(CASES[0].make(12, 20, 6), param_dtype="float64")
    adapters = made(plan)
    save(tmp_path, adapters, plan)
    assert_same(load(tmp_path)[0], adapters)
    jax.config.update("jax_enable_x64", False)
    with pytest.raises(AdapterFileError, match="jax_enable_x64"):
        load(tmp_path)


def test_others_read_the_tensors(tmp_path):
    """Each M once, in row-major order, under its path."""
    adapters = made(PLAN, dtype="float32")
    save(tmp_path, adapters, PLAN)
    found = safetensors.numpy.load_file(tmp_path / TENSORS)
    expected = flax.traverse_util.flatten_dict(adapters, sep="/")
    assert found.keys() == expected.keys()
    for name, m in expected.items():
        np.testing.assert_array_equal(found[name], m)
    config = config_of(tmp_path)
    paths = [layer["path"] for layer in config["layers"]]
    assert paths == [list(s.path) for s in PLAN.specs]
    assert config["layers"][-1]["operator"] == {"name": "orthogonal", "seed": 7}
    digest = hashlib.sha256((tmp_path / TENSORS).read_bytes()).hexdigest()
    assert config["tensors_sha256"] == digest


def test_equal_adapters_give_equal_files(tmp_path):
    for name in "ab":
        save(tmp_path / name, made(PLAN), PLAN)
    for name in (CONFIG, TENSORS):
        one, other = ((tmp_path / k / name).read_bytes() for k in "ab")
        assert one == other


def test_replaces_and_leaves_others_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / f"{TEMPORARY}left").write_text("by a killed process")
    for seed in range(2):
        save(tmp_path, made(PLAN, seed), PLAN)
        assert_same(load(tmp_path)[0], made(PLAN, seed))
    assert sorted(os.listdir(tmp_path)) == [CONFIG, TENSORS, "notes.txt"]


# What is written must be right.


def test_refuses_to_write():
    adapters = made(PLAN)
    nan = jax.tree.map(lambda m: np.full_like(m, np.nan), adapters)
    cases = [
        (nan, PLAN, None, ValueError, "NaN or infinity"),
        ({}, PLAN, None, ValueError, "adapters lack"),
        (jax.eval_shape(lambda: adapters), PLAN, None, TypeError, "must be an array"),
        (adapters, PLAN, {"a": float("nan")}, ValueError, "JSON"),
        (adapters, PLAN, {"a": object()}, TypeError, "JSON"),
    ]
    for adapters, plan, metadata, error, match in cases:
        with pytest.raises(error, match=match):
            save("/nonexistent/x", adapters, plan, metadata)
    assert not Path("/nonexistent").exists()


BAD_METADATA = [
    ({"loss": jnp.float32(1)}, r"metadata\['loss'\].*got a jax.Array: say float"),
    ({"step": jnp.int32(1)}, r"metadata\['step'\].*got a jax.Array: say int"),
    ({"a": [{"b": np.float32(1)}]}, r"\['a'\]\[0\]\['b'\].*numpy.float32: say float"),
    ({"ok": np.bool_(True)}, r"metadata\['ok'\].*numpy.bool.*: say bool"),
    ({"a": (1, np.ones(3))}, r"metadata\['a'\]\[1\].*numpy.ndarray: say .tolist\(\)"),
    ({"a": {3: "x"}}, r"metadata\['a'\].*keys must be texts, got 3"),
    ({"a": {1, 2}}, r"metadata\['a'\].*type set"),
    ({"a": b"x"}, r"metadata\['a'\].*type bytes"),
]


@pytest.mark.parametrize("metadata, match", BAD_METADATA)
def test_metadata_that_json_cannot_hold_is_named(tmp_path, metadata, match):
    with pytest.raises(TypeError, match=match):
        save(tmp_path / "a", made(PLAN), PLAN, metadata)
    assert not (tmp_path / "a").exists()


def test_metadata_that_holds_itself_is_refused(tmp_path, unchecked):
    nested = {}
    nested["self"] = [nested]
    with pytest.raises(ValueError, match="metadata .*nested too deeply"):
        save(tmp_path / "a", made(PLAN), PLAN, nested)
    with pytest.raises(TypeError, match=r"metadata must map.*\['a'\]"):
        save(tmp_path / "a", made(PLAN), PLAN, ["a"])
    assert not (tmp_path / "a").exists()


def test_metadata_comes_back(tmp_path):
    kept = {"a": None, "b": [True, 1, 2.5, "x"], "c": {"d": {}}, "e": np.float64(0.5)}
    save(tmp_path, made(PLAN), PLAN, kept)
    assert io.read_metadata(tmp_path) == kept


def test_refuses_tracers(tmp_path):
    def inside(adapters):
        save(tmp_path, adapters, PLAN)
        return adapters

    with pytest.raises(TypeError, match="tracer"):
        jax.jit(inside)(made(PLAN))
    assert not os.listdir(tmp_path)


# What is read is believed only after it has been checked.


@pytest.fixture
def saved(tmp_path):
    """A directory with the adapters of `PLAN`."""
    save(tmp_path, made(PLAN), PLAN)
    return tmp_path


def layer(**changes):
    """A change of the orthogonal layer, `enc/kernel`."""
    return lambda config: config["layers"][2].update(changes)


REFUSED = {
    "newer": (lambda c: c.update(format_version=3), "newer"),
    "version": (lambda c: c.update(format_version=True), "positive integer"),
    "format": (lambda c: c.update(format="other"), "load_peft_mora"),
    "lacks": (lambda c: c.pop("metadata"), "lacks .*metadata"),
    "too-much": (lambda c: c.update(more=1), "more"),
    "type": (lambda c: c.update(layers={}), "of type list"),
    "digest": (lambda c: c.update(tensors_sha256="../../x"), "64 hex"),
    "no-layer": (lambda c: c["layers"].pop(), "enc/kernel_mora"),
    "twice": (lambda c: c["layers"].append(c["layers"][0]), "lacks dec/kernel_mora"),
    "layer-lacks": (lambda c: c["layers"][2].pop("alpha"), "layers.2.*alpha"),
    "layer-type": (lambda c: c["layers"].append(3), "layers.3"),
    "operator": (layer(operator={"name": "unheard"}), "enc/kernel.*must be one of"),
    "auto": (layer(operator={"name": "auto"}), "enc/kernel"),
    "no-settings": (
        layer(operator={"name": "sharing"}),
        "enc/kernel.*operator must be",
    ),
    "no-seed": (layer(operator={"name": "orthogonal"}), "enc/kernel.*operator must be"),
    "seed": (
        layer(operator={"name": "orthogonal", "seed": 8}),
        "another operator here",
    ),
    "seed-type": (layer(operator={"name": "orthogonal", "seed": 7.0}), "seed"),
    "operator-type": (layer(operator=[1]), "must be an object"),
    "check": (layer(operator_check=["x"] * 4), "enc/kernel"),
    "check-short": (layer(operator_check=[0.1]), "enc/kernel.*another operator"),
    "check-deep": (layer(operator_check=[[[1]], 2]), "enc/kernel"),
    "q": (layer(square_rank=10**9), r"must have shape \(1000000000, 1000000000\)"),
    "q-type": (layer(square_rank=True), "positive integers"),
    "shape": (layer(kernel_shape=[10**9, 10**9]), "at most 4,194,304 features"),
    "shape-0": (layer(kernel_shape=[0, 24]), "positive integers"),
    "shape-type": (layer(kernel_shape="ab"), "must be a list"),
    "other-shape": (layer(kernel_shape=[24, 16]), "another operator here"),
    "axes": (layer(axes="xx"), "axes"),
    "alpha": (layer(alpha="1"), "alpha"),
    "alpha-int": (layer(alpha=1), "alpha must be"),
    "dropout": (layer(dropout=1.5), "dropout"),
    "init": (layer(init="ones"), "init"),
    "execution": (layer(execution="fast"), "execution"),
    "dtype": (layer(dtype="bfloat16"), "dtype"),
    "param_dtype": (layer(param_dtype="int8"), "param_dtype"),
    "rank": (layer(rank=99), "rank must be"),
    "path-up": (layer(path=["..", "kernel"]), "path of names"),
    "path-type": (layer(path=["enc", 1]), "path of names"),
    "path-empty": (layer(path=[]), "path of names"),
    "path-other": (layer(path=["x", "kernel"]), "lacks x/kernel_mora"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_configs(saved, name, unchecked):
    change, match = REFUSED[name]
    rewrite(saved, change)
    with pytest.raises(AdapterFileError, match=match):
        load(saved)


def encoded(directory, **changes):
    """The tensors with some replaced, as bytes."""
    tensors = safetensors.numpy.load_file(directory / TENSORS)
    return safetensors.numpy.save({**tensors, **changes}, {})


@pytest.fixture
def plain(tmp_path):
    """As `saved`, all in float32, which numpy can read."""
    adapters = made(PLAN, dtype="float32")
    save(tmp_path, adapters, PLAN)
    return tmp_path


BAD_TENSORS = {
    "nan": (np.full((10, 10), np.nan, np.float32), "enc/kernel_mora.*NaN"),
    "shape": (np.ones((9, 10), np.float32), r"enc/kernel .*shape \(10, 10\)"),
    "integers": (np.ones((10, 10), np.int32), "enc/kernel_mora.*I32"),
    "dtype": (np.ones((10, 10), np.float16), "enc/kernel .*dtype"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_refuses_tensors(plain, name):
    tensor, match = BAD_TENSORS[name]
    assert PLAN["enc/kernel"].shape == (10, 10)
    data = encoded(plain, **{"enc/kernel_mora": tensor})
    rewrite(plain, lambda config: None, data)
    with pytest.raises(AdapterFileError, match=match):
        load(plain)


def test_refuses_extra_tensors(plain):
    data = encoded(plain, **{"../../etc/passwd": np.ones(1, np.float32)})
    rewrite(plain, lambda config: None, data)
    with pytest.raises(AdapterFileError, match="knows nothing"):
        load(plain)


def raw(header, size=None, data=b"\0" * 4):
    """A safetensors file by hand."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if size is None else size) + header + data


ENTRY = b'"enc/kernel_mora":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}'
BAD_FILES = {
    "empty": b"",
    "short": b"\1\0",
    "huge-header": raw(b"{}", 2**62),
    "long-header": raw(b"{}", 2**26),
    "no-json": raw(b"{]"),
    "twice": raw(b"{" + ENTRY + b"," + ENTRY + b"}"),
    "offsets": raw(ENTRY.replace(b"[0,4]", b"[0,400]").join([b"{", b"}"])),
    "huge-shape": raw(
        ENTRY.replace(b"[1,1]", b"[4294967296,4294967296]").join([b"{", b"}"])
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_refuses_tensor_files(saved, name):
    rewrite(saved, lambda config: None, BAD_FILES[name])
    with pytest.raises(AdapterFileError, match=TENSORS):
        load(saved)


BAD_JSON = {
    "empty": b"",
    "twice": b'{"format": 1, "format": 2}',
    "nan": b'{"format": NaN}',
    "deep": b"[" * 100_000,
    "binary": b"\xff\xfe\x00",
    "list": b"[]",
    "pickle": b"\x80\x04K\x01.",
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_refuses_json(saved, name):
    (saved / CONFIG).write_bytes(BAD_JSON[name])
    with pytest.raises(AdapterFileError, match=CONFIG):
        load(saved)


def test_notices_damage(saved):
    """Any byte of either file."""
    for name in (CONFIG, TENSORS):
        whole = (saved / name).read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 50)):
            broken = bytearray(whole)
            broken[place] ^= 4
            (saved / name).write_bytes(broken)
            with pytest.raises(AdapterFileError):
                load(saved)
        (saved / name).write_bytes(whole)
    load(saved)


def test_missing_files(saved, tmp_path_factory):
    (saved / TENSORS).unlink()
    with pytest.raises(AdapterFileError, match=f"no {TENSORS}"):
        load(saved)
    with pytest.raises(AdapterFileError, match=f"no {CONFIG}"):
        load(tmp_path_factory.mktemp("empty"))
    with pytest.raises(AdapterFileError, match=f"no {CONFIG}"):
        load("/nonexistent")
    with pytest.raises(AdapterFileError, match="not a directory"):
        load(saved / CONFIG)


def test_another_base(saved):
    wrong = {
        "the model has no such kernel.*dec": {**PARAMS, "dec": {"x": jnp.ones((2, 2))}},
        r"enc/kernel .*\(16, 24\), got \(24, 16\)": {
            **PARAMS,
            "enc": {"kernel": jnp.ones((24, 16))},
        },
        "enc/kernel.*floating": {
            **PARAMS,
            "enc": {"kernel": jnp.ones((16, 24), jnp.int8)},
        },
    }
    for match, params in wrong.items():
        with pytest.raises(AdapterFileError, match=match):
            load(saved, params)
