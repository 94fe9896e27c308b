"""The command line: what it prints, writes and refuses."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_checkpoint import digests, sharded
from test_peft import DATA
from test_save import CONFIG, PLAN, TENSORS, made
from typer.testing import CliRunner

import mora_jax
from mora_jax import save
from mora_jax.cli._app import app

TYPE6 = DATA / "type6"
BASE = TYPE6 / "base_model.safetensors"


def run(*args, code=0):
    """Output of `mora-jax`, which must exit with `code`."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_help_tells_all():
    overview = run("--help")
    for command in ("inspect", "merge", "convert", "diff"):
        assert command in overview
        assert "--names" in run(command, "--help")


def test_inspect(tmp_path):
    save(tmp_path, made(PLAN), PLAN, {"task": "x"})
    report = json.loads(run("inspect", tmp_path, "--json"))
    assert report["format"] == "mora"
    assert report["parameters"] == PLAN.trainable_parameters
    assert report["metadata"] == {"task": "x"}
    assert [layer["path"] for layer in report["layers"]] == list(PLAN)
    values = mora_jax.diagnostics.spectrum(made(PLAN), PLAN)
    for layer in report["layers"]:
        norm = np.linalg.norm(values[layer["path"]])
        np.testing.assert_allclose(layer["norm"], norm, rtol=1e-5)
    table = run("inspect", tmp_path)
    for spec in PLAN.specs:
        assert spec.operator.name in table


def test_inspect_the_references():
    report = json.loads(run("inspect", TYPE6, "--base", BASE, "--json"))
    assert report["format"] == "peft-mora"
    assert len(report["layers"]) == 14
    assert "the base is needed" in run("inspect", TYPE6, code=1)


def test_merge(tmp_path):
    out = tmp_path / "out"
    told = run("merge", "--base", BASE, "--adapter", TYPE6, "--out", out)
    assert "14 kernels merged" in told
    merged = load_file(out / BASE.name)
    for name, expected in load_file(TYPE6 / "merged_weights.safetensors").items():
        np.testing.assert_allclose(merged[name], expected, atol=1e-5)
    before = digests(out)
    args = "merge", "--base", BASE, "--adapter", TYPE6, "--out", out
    assert "force" in run(*args, code=1)
    assert digests(out) == before
    run(*args, "--force")
    assert digests(out) == before


def test_merge_our_own_with_templates(tmp_path):
    base = sharded(tmp_path / "base")
    plan = mora_jax.plan({"l0": {"up_proj": {"kernel": np.ones((24, 40), np.float32)}}})
    save(tmp_path / "a", made(plan), plan)
    names = tmp_path / "names.json"
    names.write_text('{"model.layers.0.mlp.{p}": "l0/{p}/kernel"}')
    out = tmp_path / "out"
    run(
        "merge",
        "--base",
        base,
        "--adapter",
        tmp_path / "a",
        "--out",
        out,
        "--names",
        names,
    )
    one, other = (
        load_file(d / "model-00001-of-00002.safetensors") for d in (base, out)
    )
    changed = [name for name in one if (one[name] != other[name]).any()]
    assert changed == ["model.layers.0.mlp.up_proj.weight"]


def test_convert(tmp_path):
    """From the reference's to ours and back, and to a LoRA."""
    base = "--base", BASE
    run("convert", TYPE6, tmp_path / "ours", "--to", "mora", *base)
    run("convert", tmp_path / "ours", tmp_path / "back", "--to", "peft-mora")
    one, other = (load_file(d / TENSORS) for d in (TYPE6, tmp_path / "back"))
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)
    args = "convert", tmp_path / "ours", tmp_path / "lora", "--to", "peft-lora"
    assert "full rank" in run(*args, code=1)
    told = run(*args, "--rank", 8)
    assert "cut off" in told and len(told.splitlines()) > 14  # a line for each layer
    config = json.loads((tmp_path / "lora" / CONFIG).read_text())
    assert (config["r"], config["peft_type"]) == (8, "LORA")
    assert "must not exist" in run(*args, "--rank", 8, code=1)
    again = "convert", tmp_path / "lora", tmp_path / "x", "--to", "mora", *base
    assert "plain LoRA" in run(*again, code=1)
    save(tmp_path / "a", made(PLAN), PLAN, {"task": "x"})
    run("convert", tmp_path / "a", tmp_path / "copy", "--to", "mora")
    assert digests(tmp_path / "copy") == digests(tmp_path / "a")


def test_diff(tmp_path):
    adapters = made(PLAN)
    save(tmp_path / "a", adapters, PLAN)
    save(tmp_path / "b", jax.tree.map(lambda m: 2 * m, adapters), PLAN)
    rows = json.loads(run("diff", tmp_path / "a", tmp_path / "b", "--json"))
    assert [row["path"] for row in rows] == sorted(PLAN)
    for row in rows:
        assert row["settings"] == "same"
        np.testing.assert_allclose(row["difference"], 1, rtol=1e-2)
    rows = json.loads(run("diff", tmp_path / "a", tmp_path / "a", "--json"))
    assert all(row["difference"] == 0 for row in rows)
    half = jax.tree.map(lambda m: m.astype("bfloat16"), adapters)
    save(tmp_path / "half", half, PLAN)
    rows = json.loads(run("diff", tmp_path / "a", tmp_path / "half", "--json"))
    assert 0 < max(row["difference"] for row in rows) < 0.01
    run("convert", TYPE6, tmp_path / "c", "--to", "mora", "--base", BASE)
    table = run("diff", tmp_path / "a", tmp_path / "c")
    assert "only in" in table


def test_exit_codes(tmp_path, unchecked):
    no_map, twice = tmp_path / "list.json", tmp_path / "twice.json"
    no_map.write_text("[1]")
    twice.write_text('{"a": "b", "a": "c"}')
    for args, code, told in (
        (["inspect", tmp_path], 1, "there is no adapter_config.json"),
        (["inspect", TYPE6, "--base", tmp_path / "x"], 1, "there is no x"),
        (["inspect", TYPE6, "--base", BASE, "--names", "lama"], 1, "must be one of"),
        (["inspect", TYPE6, "--base", BASE, "--names", "a.json"], 1, "a.json"),
        (
            ["inspect", TYPE6, "--base", BASE, "--names", tmp_path / "list.json"],
            1,
            "map",
        ),
        (
            ["inspect", TYPE6, "--base", BASE, "--names", tmp_path / "twice.json"],
            1,
            "a",
        ),
        (["inspect"], 2, "Missing argument"),
        (["melt"], 2, "No such command"),
        (["convert", TYPE6, tmp_path / "x", "--to", "pickle"], 2, "Invalid value"),
    ):
        error = run(*args, code=code)
        assert told in error
        if code == 1:
            assert len(error.splitlines()) == 1 and error.startswith("error: ")


def test_installed_command():
    """The entry point itself, and its advice where typer is missing."""
    command = [sys.executable, "-m", "mora_jax.cli", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "merge" in told
    code = "import sys; sys.modules['typer'] = None; import mora_jax.cli as c; c.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install mora-jax[cli]" in done.stderr


KILLER = """
import os, random, signal, sys, time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import mora_jax
from mora_jax import io
from mora_jax.io import _checkpoint, _files

base, out = Path(sys.argv[1]), Path(sys.argv[2])
adapters, plan = io.load_peft_mora(base.parent, io.Checkpoint(base).shapes())
io.merge_checkpoint(base, adapters, plan, out)
expected = {p.name: p.read_bytes() for p in out.iterdir()}
for path in out.iterdir():
    path.unlink()
out.rmdir()
cached = {}
sites = _checkpoint._sites(io.Checkpoint(base), adapters, plan, None)
updates = {name: site.update() for name, site in sites.items()}


def slow(function):
    def run(*args, **kwargs):
        time.sleep(0.001)
        return function(*args, **kwargs)

    return run


chance, killed, whole = random.Random(0), 0, 0
while killed < 200:
    child = os.fork()
    if child == 0:  # JAX is not for forks: updates were computed before
        _checkpoint._sites = lambda *args: sites
        _checkpoint._Site.update = lambda site: next(
            updates[name] for name in sites if sites[name] is site
        )
        for name in ("fsync", "rename", "replace"):
            setattr(os, name, slow(getattr(os, name)))
        original = _files.write_file
        while True:
            io.merge_checkpoint(base, adapters, plan, out, force=True)
    time.sleep(chance.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    if out.exists():
        found = {p.name: p.read_bytes() for p in out.iterdir()}
        assert found == expected, sorted(found)
        whole += 1
print(killed, whole)
assert whole > 50
"""


@pytest.mark.slow
def test_merge_killed_200_times(tmp_path):
    """By SIGKILL: the output is whole, or is not there."""
    command = [sys.executable, "-c", KILLER, BASE, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("200 ")
