"""The benchmarks run, and say what they should."""

import json

import pytest
from processes import ROOT, python

from mora_jax.operators import OPERATORS


def run(script, *args, code=0):
    return python("-m", f"benchmarks.{script}", *args, code=code, cwd=ROOT)


@pytest.mark.slow
def test_train_step(tmp_path):
    out = tmp_path / "figures" / "train_step.json"
    sizes = "--layers 1 --batch 2 --tokens 8 --rounds 2 --operators sharing rotation"
    printed = run("train_step", *sizes.split(), "--out", out)
    report = json.loads(out.read_text())
    rows = {r["method"]: r for r in report["results"] if r["kind"] == "step"}
    first = next(iter(rows.values()))
    assert first["method"] == "frozen model" and first["time"] == 1
    assert all(row["seconds"] > 0 and row["time"] > 0 for row in rows.values())
    assert rows["MoRA, sharing"]["parameters"] <= rows["LoRA, qwix"]["parameters"]
    assert {"LoRA, by hand", "LoRA, flax.nnx", "every kernel"} < set(rows)
    assert report["settings"]["layers"] == 1 and "jax" in report["machine"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for name in rows:
        assert f"| {name} |" in printed
    forward = {r["method"]: r for r in report["results"] if r["kind"] == "forward"}
    assert {"base model", "merged model", "MoRA, rotation"} <= set(forward)


@pytest.mark.slow
def test_several_sizes_in_one_file(tmp_path):
    first, out = tmp_path / "first.json", tmp_path / "all.json"
    sizes = "--layers 1 --batch 1 --rounds 1 --operators sharing --no-peers".split()
    run("train_step", *sizes, "--tokens", "4", "--out", first)
    more = ["--tokens", "4", "8", "--ranks", "2", "--add-to", first]
    run("train_step", *sizes, *more, "--out", out)
    rows = json.loads(out.read_text())["results"]
    assert {(r["tokens"], r["rank"]) for r in rows} == {(4, 8), (4, 2), (8, 2)}
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_one_layer(tmp_path):
    """Each operator both ways, one of which is what "auto" takes."""
    out = tmp_path / "one_layer.json"
    sizes = "--kernels 64x96 --rows 8 --rounds 1 --dtype bfloat16".split()
    printed = run("one_layer", *sizes, "--out", out)
    rows = {r["method"]: r for r in json.loads(out.read_text())["results"]}
    for operator in OPERATORS:
        ways = [rows[f"{operator}, {way}"] for way in ("activation", "fold")]
        assert [row["auto"] for row in ways] == ["auto", ""]
        assert all(row["time"] > 0 and row["model"] > 1 for row in ways)
    assert rows["no adapter"]["time"] == rows["no adapter"]["model"] == 1
    assert "| LoRA 8 |" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "args", "message"),
    [
        ("train_step", ["--layers", "0"], "--layers: must be at least 1, got 0"),
        ("train_step", ["--tokens", "8", "0"], "--tokens: must be at least 1, got 0"),
        ("train_step", ["--operators", "rotate"], "got 'rotate'"),
        ("one_layer", ["--kernels", "64"], "must be like 1024x4096, got '64'"),
        ("one_layer", ["--rows", "0"], "--rows: must be at least 1, got 0"),
        ("one_layer", ["--operators", "rotate"], "invalid choice: 'rotate'"),
        ("growth", ["--rounds", "0"], "--rounds: must be at least 1"),
        ("scale", ["--tokens", "1"], "--tokens: must be at least 2, got 1"),
        ("scale", ["--models", "7b"], "--models: invalid choice: '7b'"),
        ("scale", ["--devices", "5"], "--devices: invalid choice: "),
        ("scale", ["--methods", "rotate"], "--methods: invalid choice: 'rotate'"),
    ],
)
def test_bad_options(script, args, message):
    assert message in run(script, *args, code=2)
