"""The benchmarks run, and say what they should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script, *args):
    command = [sys.executable, BENCHMARKS / script, *args]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_train_step(tmp_path):
    out = tmp_path / "figures" / "train_step.json"
    sizes = "--layers 1 --batch 2 --tokens 8 --rounds 2 --operators sharing rotation"
    done = run("train_step.py", *sizes.split(), "--out", str(out))
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    rows = {row["method"]: row for row in report["results"]}
    first = next(iter(rows.values()))
    assert first["method"] == "frozen model" and first["time"] == 1
    assert all(row["seconds"] > 0 and row["time"] > 0 for row in rows.values())
    assert rows["MoRA, sharing"]["parameters"] <= rows["LoRA, qwix"]["parameters"]
    assert {"LoRA, by hand", "LoRA, flax.nnx", "every kernel"} < set(rows)
    assert report["settings"]["layers"] == 1 and "jax" in report["machine"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for name in rows:
        assert f"| {name} |" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--layers", "0"], "--layers must be at least 1, got 0"),
        (["--operators", "rotate"], "got 'rotate'"),
    ],
)
def test_bad_options(args, message):
    done = run("train_step.py", *args)
    assert done.returncode == 2 and message in done.stderr
