"""Experiments on learning: cells are kept, best rates are found, and programs run."""

import json
import math

import jax.numpy as jnp
import pytest
from processes import ROOT, python

from benchmarks.quality import cells, one_rate


def test_finished_cells_are_not_computed_again(tmp_path):
    """Also if the run was killed, once in the middle of a line."""
    path, computed = tmp_path / "new/cells.jsonl", []

    def compute(cell):
        computed.append(cell["k"])
        if cell["k"] == 2:
            raise KeyboardInterrupt
        return {"square": cell["k"] ** 2}

    wanted = [{"k": k} for k in range(4)]
    with pytest.raises(KeyboardInterrupt):
        cells.run(wanted, compute, path)
    path.write_text(path.read_text() + '{"cell": {"k": 2}, "fo')
    found = cells.run(wanted, lambda cell: {"square": cell["k"] ** 2}, path)
    assert computed == [0, 1, 2]
    assert found == [{"k": k, "square": k**2} for k in range(4)]
    assert cells.run(wanted[2:], compute, path) == found[2:]
    path.write_text('{"cell": 1}\n')
    with pytest.raises(ValueError, match="line 1 of .* must hold cell and found"):
        cells.run(wanted, compute, path)


def test_the_best_rate_of_a_ladder():
    """A parabola over the logarithm of the rate has its own vertex."""
    rates = [2.0**k for k in range(-3, 4)]
    steps = [8 * math.exp((math.log2(rate) - 0.3) ** 2) for rate in rates]
    rate, fewest = one_rate.best(rates, steps)
    assert (math.log2(rate), fewest) == pytest.approx((0.3, 8.0))
    middle = one_rate.at_rate(rates, steps, 2**0.5)
    assert steps[3] < middle < steps[4] or steps[4] < middle < steps[3]
    with pytest.raises(ValueError, match="on an edge"):
        one_rate.best(rates, sorted(steps))
    with pytest.raises(ValueError, match="no rate came"):
        one_rate.best(rates, [math.inf] * 7)
    assert one_rate.means([[2.0, None], [8.0, 3.0]]) == [4.0, math.inf]
    at = one_rate.first_above(jnp.array([0.0, 0.5, 1.0]), 0.75)
    assert at == 1.5 and one_rate.first_above(jnp.zeros(3), 0.75) == math.inf


@pytest.mark.slow
def test_one_rate(tmp_path):
    out = tmp_path / "one_rate.json"
    args = f"--quick --widths 32 --operators rotation --out {out}"
    printed = python("-m", "benchmarks.quality.one_rate", *args.split(), cwd=ROOT)
    rows = json.loads(out.read_text())["results"]
    assert [row["method"] for row in rows] == ["full", "rotation", "rotation"]
    assert "| rotation | 8 |" in printed
    assert all(row["fewest"] > 1 for row in rows)
    assert out.with_suffix(".png").exists()
