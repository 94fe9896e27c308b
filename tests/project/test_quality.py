"""Experiments on learning: cells are kept, best rates are found, and programs run."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import close, random
from processes import ROOT, python

from benchmarks.quality import (
    baselines,
    cells,
    ladders,
    learners,
    loads,
    optimizers,
    small,
    teaching,
)
from mora_jax.operators.block_diagonal import LEAST_USE


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
    assert ladders.vertex(rates, steps) == pytest.approx((2**0.3, 8.0))
    middle = ladders.at_rate(rates, steps, 2**0.5)
    assert steps[3] < middle < steps[4] or steps[4] < middle < steps[3]
    with pytest.raises(ValueError, match="on an edge"):
        ladders.vertex(rates, sorted(steps))
    with pytest.raises(ValueError, match="no rate came"):
        ladders.vertex(rates, [math.inf] * 7)
    assert ladders.means([[2.0, None], [8.0, 3.0]]) == [4.0, math.inf]
    assert ladders.mean([2.0, 8.0]) == pytest.approx(4.0)
    assert ladders.first_above([0.0, 0.5, 1.0], 0.75) == 1.5
    assert ladders.first_above([0.0] * 3, 0.75) == math.inf


@pytest.mark.parametrize("best", [2.0**-5, 1.0, 2.0**6])
def test_a_ladder_is_climbed_until_the_best_is_not_on_an_edge(best):
    tried = []

    def steps_at(rates):
        tried.extend(rates)
        return [10 + abs(math.log2(rate / best)) for rate in rates]

    found = ladders.climb(steps_at, [0.5, 1.0, 2.0])
    assert ladders.best_of(found) == best
    assert sorted(tried) == list(found) and len(set(tried)) == len(tried)
    with pytest.raises(ValueError, match="on an edge"):
        ladders.climb(lambda rates: [1 / rate for rate in rates], [0.5, 1.0, 2.0])
    with pytest.raises(ValueError, match="no rate came"):
        ladders.climb(lambda rates: [math.inf for _ in rates], [0.5, 1.0, 2.0])


def test_further_seeds_are_run_at_the_best_rate_and_beside_it(capsys):
    def run(wanted):
        return [{**c, "value": abs(math.log2(c["rate"])) + c["seed"]} for c in wanted]

    def value(row):
        return 1 + row["value"]

    rates = [2.0**k for k in range(-2, 3)]
    rows = teaching.climb(run, {"method": "x"}, rates, 3, value)
    assert [row["rate"] for row in rows if row["seed"] == 0] == rates
    assert [row["rate"] for row in rows if row["seed"] == 2] == [0.5, 1.0, 2.0]
    methods = {"x": ({"method": "x"}, rates), "edge": ({"method": "y"}, [64.0, 128.0])}
    found = teaching.climb_all(
        lambda w: [{**c, "value": 1.0} for c in w], methods, 1, value
    )
    assert (
        not found and capsys.readouterr().out.count("is left out: the best rate") == 2
    )
    assert teaching.climb_all(run, methods, 3, value)["x"] == rows
    best = teaching.at_best(rows, value)
    assert [(row["rate"], row["seed"]) for row in best] == [(1.0, k) for k in range(3)]
    ratio, error = teaching.paired([1.0, 2.0, 4.0], [2.0, 4.0, 8.0])
    assert (ratio, error) == pytest.approx((0.5, 0.0))
    ratio, error = teaching.paired([1.0, 4.0], [2.0, 2.0])
    assert error and ratio == pytest.approx(1.0) and error > 0.5
    assert teaching.paired([1.0], [2.0]) == (0.5, None)
    few = [row for row in rows if row["rate"] == 2 and row["seed"] < 2]
    ratio, error = teaching.compared(few, best, value)
    assert (ratio, error) == pytest.approx((3**0.5, 3**0.5 * math.log(4 / 3) / 2))


def test_soap_goes_by_directions_and_not_by_coordinates():
    """Turned gradients have turned steps, and Adam's are others."""
    tx, turns = optimizers.optimizer("lora, soap"), [random(k, 5, 5) for k in (0, 1)]
    u, v = (jnp.linalg.qr(turn)[0] for turn in turns)

    def steps(tx, turned):
        state, found = tx.init(jnp.zeros((2, 5, 5))), []
        for k in range(4):
            g = random(2 + k, 2, 5, 5)
            step, state = tx.update(u @ g @ v if turned else g, state)
            found.append(u.T @ step @ v.T if turned else step)
        return found

    first, *rest = zip(steps(tx, False), steps(tx, True), strict=True)
    assert not np.any(first)  # it fills the moments
    for plain, turned in rest:
        close(turned, plain, 1e-3)
        assert jnp.abs(plain).max() > 0.1
    adam = optimizers.optimizer("lora")
    *_, (plain, turned) = zip(steps(adam, False), steps(adam, True), strict=True)
    assert jnp.abs(turned - plain).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("method", loads.METHODS)
def test_what_is_trained_and_what_is_added(method):
    """Every method begins as the model, and its deltas make the model that it is.

    Those that start along a gradient begin with a lower loss, and those that are
    renewed compute the same after it.
    """
    base = small.base(32, layers=1)
    ids = base.known[:4]
    task = small.task(base, small.facts(4, seed=0))
    way = baselines.make(method, task, 2, "fine-tuning", multiple_of=1)
    frozen = way.frozen(base.params)
    budget = sum(4 * sum(k.shape) // 2 for k in learners.full(*task[:3]).start.values())
    size = sum(leaf.size for leaf in jax.tree.leaves(way.start))
    least = LEAST_USE if method.startswith("block") else 0.8
    assert method == "full" or least * budget < size <= budget
    if "start" in method or method == "lora-one":
        loss = task.loss_of(way)
        assert loss(way.start, frozen) < task.loss(
            base.model.apply({"params": base.params}, *task.inputs)
        )
    else:
        expected = base.model.apply({"params": base.params}, ids)
        close(way.apply(way.start, frozen, ids), expected)
    trained = jax.tree.map(lambda leaf: leaf + 0.01, way.start)
    kernels = flatten_dict(base.params)
    for path, delta in way.deltas(trained).items():
        assert delta.any() and path[-1] == "kernel"
        kernels[path] = kernels[path] + delta
    merged = base.model.apply({"params": unflatten_dict(kernels)}, ids)
    close(way.apply(trained, frozen, ids), merged, 1e-4)
    assert (way.renewed is not None) == method.endswith("renewed")
    if way.renewed is not None:
        after, frozen = way.renewed(trained, frozen)
        close(way.apply(after, frozen, ids), merged, 1e-4)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, trained)


@pytest.mark.slow
def test_lora_plus_trains_b_faster():
    base = small.base(32, layers=1)
    way = small.lora(base, 2, 16.0)
    for rows in jax.tree.leaves(way.speeds):  # those of A, then those of B
        assert sorted(set(rows.ravel().tolist())) == [1.0, 16.0]
    still = jax.tree.map(lambda rows: 1e-2 * (rows == 1), way.speeds)
    args = way.frozen(base.params), base.known[:4], still, 3
    after, found = small.fit(way.apply, way.start, *args)
    pairs = zip(jax.tree.leaves(after), jax.tree.leaves(way.start), strict=True)
    assert all((now == then).all() for now, then in pairs)  # without B nothing moves
    assert found["loss"].shape == (3,)


@pytest.mark.parametrize("signs", [False, True])
def test_miss_multiplies_sums_of_inputs(signs):
    op = (baselines.SignedMiSS if signs else baselines.MiSS)(10, 6, 4)
    m, x = random(0, 4, 6), random(1, 3, 10)
    sign = op.signs if signs else np.ones(10)
    summed = np.stack([(x * sign)[:, k::4].sum(1) for k in range(4)], 1)
    close(op.apply(m, x), summed @ m)
    close(x @ op.delta_weight(m), summed @ m)
    assert op.widest(2, 10, 6) == 5


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
