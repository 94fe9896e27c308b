"""Experiments on SmolLM2, tried on a small Llama in its place."""

import importlib
import itertools
import json
import math
import random
import sys
import types

import jax
import numpy as np
import pytest

from benchmarks.quality import language, teaching
from models.lesson import batch
from models.smollm2 import Config, Llama


class Bytes:
    """A token for each byte, as the tokenizer of a small model."""

    def encode(self, text):
        return list(text.encode())

    def chat(self, text):
        return self.encode(text)[-30:]


@pytest.fixture
def layers():
    """The number of layers of the small model."""
    return 1


@pytest.fixture
def small(monkeypatch, layers):
    """A small Llama in place of SmolLM2."""
    sizes = {"width": 32, "hidden": 64, "heads": 2, "kv_heads": 1}
    model = Llama(Config(vocab=256, layers=layers, **sizes))
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))
    params = params["params"]
    if jax.config.read("jax_enable_x64"):
        params = jax.tree.map(lambda leaf: leaf.astype("float64"), params)
    base = language.Base(model, params, Bytes())  # type: ignore[arg-type]
    monkeypatch.setattr(language, "base", lambda: base)
    monkeypatch.setattr(language, "definitions", lambda: itertools.repeat("ab" * 99, 2))
    monkeypatch.setattr(language, "TEXT", 20)
    caches = (
        language.ordinary,
        language._read,
        language.own_text,
        language.random_text,
        teaching.program,
    )
    for cache in caches:
        cache.cache_clear()
    yield base
    for cache in caches:
        cache.cache_clear()


def pairs():
    return batch([[1, 2, 3], [4, 5, 6]], [[7, 8, 9, 10], [20, 30, 40, 50]])


def cell(name, **settings):
    return {**teaching.settings(name, 2), "steps": 60, "seed": 0, **settings}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rate"),
    [("full", 3e-3), ("lora", 3e-2), ("rotation", 3e-3), ("subspace", 3e-3)],
)
def test_pairs_are_taught_until_they_are_known(small, name, rate):
    program = teaching.program_of(cell(name), pairs())
    untouched = next(teaching.train(program, [pairs()], lambda _: 0.0))
    before = language.forgetting(program.model(untouched))
    assert before["divergence"] == pytest.approx(0.0, abs=1e-5)
    assert before["same"] > 0.9  # an answer that was cut off ends all the same
    assert before["text"] == pytest.approx(math.log(256), abs=1.0)
    found = teaching.memorise(cell(name, rate=rate), pairs())
    known = teaching.KNOWN
    assert found["accuracies"][-1] >= known > max(found["accuracies"][:-1])
    assert found["losses"][-1] < found["losses"][0] / 2
    assert found["forgetting"]["divergence"] > 1e-4
    leaves = jax.tree.leaves(program.learner.start)
    assert found["parameters"] == sum(leaf.size for leaf in leaves)
    # Too high a rate is a run that did not come there.
    broken = teaching.memorise(cell(name, rate=1e12, steps=9), pairs())
    assert broken["forgetting"] is None and len(broken["losses"]) <= 9


@pytest.mark.slow
@pytest.mark.parametrize("layers", [3])
@pytest.mark.parametrize("name", ["lora", "subspace, renewed"])
def test_what_comes_before_the_adapted_layers_is_computed_once(float64, small, name):
    """In 64 bits: in 32 the directions of a new gradient follow from its rounding."""
    late = {"targets": "layers_2/mlp/(up|down)_proj/kernel", "rate": 1e-2, "steps": 7}
    late |= {"renew": 3} if name.endswith("renewed") else {}
    whole, tail = (
        teaching.memorise(cell(name, **late, **begin), pairs())
        for begin in ({}, {"begin": 2})
    )
    assert len(whole["losses"]) == 7 and whole["losses"][-1] < whole["losses"][0]
    assert tail["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    assert tail["parameters"] == whole["parameters"]


@pytest.mark.parametrize(
    ("stalled", "renewed_before"), [(1.0, [3, 6, 9]), (0.5, [3, 9]), (0.0, [])]
)
def test_a_loss_that_stalls_is_a_reason_to_renew(stalled, renewed_before):
    """Each 3 steps at the earliest, if it fell by less than a share in them."""
    losses = iter([9.0, 8.0, 7.0, 6.0, 5.0, 2.0, 1.0, 0.9, 0.8, 0.3, 0.2])
    learner = types.SimpleNamespace(
        start=0, renewed=lambda trained, base: (0, base + 1)
    )

    def step(trained, state, rate, base, batch):
        return trained + 1, state, (next(losses), 0.0)

    program = types.SimpleNamespace(
        learner=learner, frozen=0, init=lambda trained: 0, step=step
    )
    run = list(teaching.train(program, [()] * 11, lambda _: 1.0, 3, stalled))
    renewals = [one.renewals for one in run]
    after = [k for k in range(1, 11) if renewals[k] > renewals[k - 1]]
    assert after == renewed_before
    assert [one.frozen for one in run] == renewals


def test_facts_in_parts_are_the_same_facts(small):
    """Each part teaches the codes alone, which end the whole answers."""
    pytest.importorskip("airportsdata")
    from benchmarks.quality import facts

    whole, asked = facts.taught_and_asked(6, 0)
    parts, again = facts.taught_and_asked(6, 0, size=4)
    assert [len(part.ids) for part in parts] == [4, 2, 4, 2]
    for one, other in zip(asked, again, strict=True):
        np.testing.assert_array_equal(one, other)
    for row in range(12):
        wording, fact = divmod(row, 6)
        part = parts[2 * wording + fact // 4]
        answer, code = (
            batch.targets[k][batch.weights[k] > 0].tolist()
            for batch, k in ((whole[wording], fact), (part, fact % 4))
        )
        np.testing.assert_array_equal(whole[wording].ids[fact], part.ids[fact % 4])
        assert answer[-len(code) :] == code and len(code) < len(answer)


def test_the_least_that_was_forgotten_at_equal_recall():
    """Over all rates and steps of a set; of none if one set never came there."""
    pytest.importorskip("airportsdata")
    from benchmarks.quality import facts

    def run(seed, rate, *points):
        keys = "step", "recall", "divergence", "text"
        points = [dict(zip(keys, (*point, 4.0), strict=True)) for point in points]
        return {"seed": seed, "rate": rate, "points": points, "parameters": 7}

    fast = run(0, 2e-3, (0, 0.0, 0.0), (3, 0.6, 0.9), (6, 1.0, 2.0))
    slow = run(0, 1e-3, (0, 0.0, 0.0), (6, 0.5, 0.3), (9, 0.8, 0.7))
    other = run(1, 1e-3, (0, 0.0, 0.0), (6, 0.9, 0.5))
    half, most = facts.least_forgotten("lora", [fast, slow, other])
    assert (half["recall"], most["recall"]) == (0.5, 0.75)
    assert half["divergence"] == pytest.approx((0.3 + 0.5) / 2)
    assert most["divergence"] == pytest.approx((0.7 + 0.5) / 2)
    assert (half["step"], most["step"], most["seeds"]) == (6, 7.5, 2)


@pytest.mark.slow
def test_inputs_are_damped_by_another_text(small):
    """A run that names none is damped by ordinary text, as recorded runs are."""
    test = pairs()

    def losses(**text):
        run = cell("sharing, damped", rate=1e-2, steps=3, **text)
        return teaching.memorise(run, test)["losses"]

    by_text = {text: losses(text=text) for text in language.DAMPING}
    assert losses() == by_text["ordinary"]
    assert len({tuple(found) for found in by_text.values()}) == len(by_text)
    ids, places = language.own_text()
    assert ids.shape == (16, language.TEXT) and places.shape == (16, 1)
    assert (ids[:, 0] == ids[0, 0]).all() and len({bytes(row) for row in ids}) == 16
    ids, _ = language.random_text()
    assert language.SPECIAL <= ids.min() and ids.max() < 256


@pytest.mark.slow
def test_scores_along_a_run(small):
    """Of the untouched model, and after each quarter; nothing after a breakdown."""
    test = pairs()

    def score(model):
        return language.recall(model(test.ids, test.at), test)

    run = cell("rotation", rate=1e-2, steps=40)
    found = teaching.study(run, itertools.repeat(test), score)
    assert found["scores"][0] == 0.0 and found["scores"][-1] == 1.0
    assert len(found["scores"]) == 5 and len(found["losses"]) == 41
    assert found["seconds"] >= 0
    broken = teaching.study({**run, "rate": math.inf}, itertools.repeat(test), score)
    assert broken["scores"][-1] is None and broken["forgetting"] is None


def test_a_report_of_nothing_says_so(tmp_path):
    args = teaching.options("", str(tmp_path / "x.json"), "").parse_args(["--report"])
    with pytest.raises(SystemExit, match="x.jsonl holds no finished run"):
        teaching.runs(args, lambda cell: cell, {"lora": ({}, [1e-3])}, len)


@pytest.mark.slow
def test_what_a_method_costs(small):
    ways = {name: teaching.settings(name, 2) for name in ("full", "rotation")}
    costs = teaching.costs(ways, pairs(), rounds=1)
    numbers = teaching.program_of(cell("rotation"), pairs()).parameters
    assert costs["rotation"].file == pytest.approx(4e-6 * numbers, abs=1e-3)
    assert costs["rotation"].memory < costs["full"].memory
    assert min(cost.seconds for cost in costs.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "value", "more"),
    [
        ("facts", "points", "--steps 100 --facts 2"),
        ("pretraining", "scores", "--steps 9"),
        ("reasoning", "scores", "--steps 9"),
    ],
)
def test_an_experiment_from_its_options_to_its_file(
    small, experiment, value, more, monkeypatch, tmp_path, capsys
):
    """All of its cells are kept: a second run computes none, and finds the same."""
    pytest.importorskip("airportsdata")
    if experiment == "reasoning":
        pytest.importorskip("reasoning_gym")
    words = ["".join(random.Random(k).choices("abcde", k=24)) for k in range(2000)]
    monkeypatch.setattr(language, "definitions", lambda: iter(words))
    rates = dict.fromkeys(teaching.METHODS, 1e-2)
    monkeypatch.setattr(teaching, "METHODS", rates)
    program = importlib.import_module(f"benchmarks.quality.{experiment}")
    out = tmp_path / "found.json"
    options = f"--methods lora rotation --seeds 1 --rank 2 {more} --out {out}".split()
    monkeypatch.setattr(sys, "argv", [experiment, *options])
    program.main()
    first, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert "lora" in printed and "rotation" in printed
    assert {row["method"] for row in first["results"]} == {"lora", "rotation"}
    assert all(row[value] for row in first["results"])
    assert out.with_suffix(".png").exists()
    monkeypatch.setattr(teaching, "train", None)
    for report in [], ["--report", str(out.with_suffix(".jsonl"))]:
        monkeypatch.setattr(sys, "argv", [experiment, *options, *report])
        program.main()
        again = json.loads(out.read_text())["results"]
        assert sorted(map(str, again)) == sorted(map(str, first["results"]))
