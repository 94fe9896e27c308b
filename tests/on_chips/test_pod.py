"""Steps on slices of TPUs and on one chip of them, by the program that reports them."""

import json

import pytest
from processes import ROOT, python


@pytest.mark.slow
def test_a_small_model_on_a_slice(tmp_path):
    out = tmp_path / "pod.json"
    options = "--quick --methods block_diagonal --out"
    printed = python("-m", "benchmarks.chips.pod", *options.split(), out, cwd=ROOT)
    frozen, adapted = json.loads(out.read_text())["results"]
    assert frozen["name"] == "frozen" and frozen["time"] == frozen["alone"] == 1
    assert adapted["name"] == "MoRA, block_diagonal" and adapted["devices"] == 8
    for row in frozen, adapted:
        assert row["needs"] is None and row["milliseconds"] > 0
        assert f"| {row['name']} | {row['arguments_GB']:.2f} |" in printed
    assert "tiny on v5e:2x4, fsdp 4 x model 2, 4 x 512 tokens" in printed
    # M and two moments; of its gradient a chip receives no more than twice as much
    held = adapted["arguments_GB"] - frozen["arguments_GB"]
    sent = adapted["all_reduce_GB"] - frozen["all_reduce_GB"]
    assert 0 < sent < held
