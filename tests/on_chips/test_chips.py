"""The benchmark of chips runs, and says what it should."""

import json

from processes import ROOT, python


def test_chips(tmp_path):
    """Without a compiler for GPUs it says how to get one; all its figures are saved."""
    out = tmp_path / "figures/chips.json"
    options = "--quick --only layers --operators rotation sharing --chips v5e h100"
    args = "-m", "benchmarks.chips.compare", *options.split(), "--out", out
    printed = python(*args, cwd=ROOT)
    assert "rooflines" in printed and "no measurements" in printed
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(out.read_text())
    rows = [row for row in report["results"] if row["chip"] == "v5e"]
    methods = {row["method"]: row for row in rows}
    assert list(methods)[:2] == ["frozen", "LoRA, by hand"] and len(methods) == 6
    assert methods["frozen"]["time"] == 1
    assert methods["rotation, fold"]["auto"]
    assert not methods["rotation, activation"]["auto"]
    for row in rows:
        assert row["milliseconds"] > 0 and row["moved_MB"] > 0 and not row["notes"]
        assert f"| {row['method']} |" in printed
    if not any(row["chip"] == "h100" for row in report["results"]):
        assert "h100 is left out" in printed and "jax-cuda12-pjrt" in printed
