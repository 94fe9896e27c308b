"""How costs grow is measured, and planning is as fast as it should be."""

import json
import math
import time

import jax
import numpy as np
import pytest
from processes import ROOT, python

import mora_jax


def test_planning_takes_time_in_proportion_to_the_kernels():
    """By processor time, against the least of some smaller plans."""

    def seconds(count):
        shapes = {
            f"layer_{k}": {"kernel": jax.ShapeDtypeStruct((64, 64 + k % 5), np.float32)}
            for k in range(count)
        }
        start = time.process_time()
        assert len(mora_jax.plan(shapes)) == count
        return time.process_time() - start

    assert seconds(3000) < 25 * min(seconds(300) for _ in range(3))


def run(*command):
    """As users run it: XLA optimises, and nothing checks annotations."""
    return python(*command, cwd=ROOT, XLA_FLAGS=None)


@pytest.mark.slow
def test_ten_thousand_kernels_take_no_second():
    """Of processor time, to plan and to make their adapters."""
    script = """
from benchmarks import planning
shapes = planning.kernels(10_000)
print(min(planning.plan_seconds(shapes)[2] for _ in range(4)))
"""
    assert float(run("-c", script)) < 1


@pytest.mark.slow
def test_growth(tmp_path):
    out = tmp_path / "figures" / "growth.json"
    printed = run("-m", "benchmarks.growth", "--quick", "--out", str(out))
    rows = json.loads(out.read_text())["results"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    steps = [row for row in rows if row["quantity"] in ("time", "memory")]
    axes = {row["axis"] for row in steps}
    assert axes == {"layers", "width", "rank", "tokens", "kernels"}
    assert {row["method"] for row in steps} == {"frozen model", "sharing", "rotation"}
    for row in rows:
        assert len(row["x"]) == len(row["y"]) >= 3
        low, high = row["arithmetic"]
        if row["exponent"] is None:  # a busy machine: noise hides what an adapter adds
            assert row["quantity"] == "time" and row["method"] != "frozen model"
            assert "noise" in printed
            continue
        assert math.isfinite(row["exponent"])
        if row["quantity"] == "memory":  # is planned, not measured
            assert low - 0.3 < row["exponent"] < high + 0.3, row
        if row["quantity"] in ("plan", "init", "plan and init"):
            assert 0.7 < row["exponent"] < 1.3, row
        if "scanned" in row["quantity"]:
            assert row["exponent"] < 0.3, row
        if row["quantity"] == "trace, unrolled" and row["method"] != "frozen model":
            assert row["exponent"] > 0.3, row
    for title in ("planning", "steps", "compilation"):
        assert f"\n| {title} | |" in printed
