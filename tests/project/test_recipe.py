"""The table of one rate: which runs it has, and what stands in it."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import pytest

import mora_jax
from benchmarks.quality import earlier, recipe, recipe_losses, teaching
from mora_jax import MoRAConfig


def found(cell):
    """A run that knows all after a step more for each seed, and LoRA after twice."""
    steps = (4 + cell["seed"]) * (2 if cell["method"] == "lora" else 1)
    points = [{"step": k, "recall": float(k >= steps)} for k in range(steps + 1)]
    return {
        "accuracies": [0.0] * steps + [1.0],
        "points": [{**point, "divergence": 0.5} for point in points],
        "parameters": 7,
        "forgetting": {"divergence": 0.5 if cell["method"] == "lora" else 0.1},
    }


def test_the_recipe_from_its_options_to_its_file(monkeypatch, tmp_path, capsys):
    computed = []

    def compute(cell):
        computed.append(cell)
        return found(cell)

    def main(*options):
        computed.clear()
        out = ["--out", str(tmp_path / "recipe.json")]
        monkeypatch.setattr(sys, "argv", ["recipe", *out, *options])
        recipe.main()
        return json.loads((tmp_path / "recipe.json").read_text())

    monkeypatch.setattr(recipe, "compute", compute)
    monkeypatch.setattr(teaching, "RESULTS", tmp_path)
    damped = "block_diagonal, damped 0"
    options = ["--methods", "lora", damped, "--seeds", "2"]
    first = main(*options)
    assert len(computed) == 2 * 2 * len(recipe.SETTINGS)
    rates = {(c["method"], c["rank"], c["rate"]) for c in computed}
    assert {rate for method, _, rate in rates if method == damped} == {recipe.FULL}
    assert {c.get("text") for c in computed if c["method"] == damped} == {"own"}
    for row in first["settings"]["summaries"]:
        lora = row["title"] == "LoRA"
        assert row["sets"] == 2
        assert row["ratio"] == pytest.approx(1 if lora else 0.5, rel=0.1)
        if row["setting"].startswith("pairs"):
            assert row["forgotten"] == pytest.approx(0.5 if lora else 0.1)
            assert row["forgotten_ratio"] == pytest.approx(1 if lora else 0.2)
    assert "| LoRA |" in capsys.readouterr().out
    reported = main(*options, "--report", str(tmp_path / "recipe.jsonl"))
    assert not computed and reported["results"] == first["results"]
    quick = main("--quick")
    assert {row["seed"] for row in quick["results"]} == {0}


def test_earlier_adapters_have_the_factor_of_aligned_inputs():
    """And the blocks of each kernel's own budget."""
    widths = {"a": (576, 576), "b": (576, 192), "c": (576, 1536)}
    shapes = {
        name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
        for name, shape in widths.items()
    }
    blocks = earlier.aligned(mora_jax.plan(shapes))
    assert [spec.operator.square_rank for spec in blocks.values()] == [36, 24, 64]
    assert [spec.scale for spec in blocks.values()] == [36, 24, 64]
    rotation = earlier.aligned(mora_jax.plan(shapes, MoRAConfig(operator="rotation")))
    for spec in rotation.values():
        ratio = spec.scale / spec.operator.fine_tuning_scale
        q = spec.operator.square_rank
        assert math.isclose(ratio, (spec.in_features / q) ** 0.25)


def test_methods_of_earlier_runs_are_named(monkeypatch):
    parser = teaching.options("", "out/pairs.json", "", ("lora", "rotation", "full"))
    args = parser.parse_args(["--earlier"])
    assert args.methods == ["lora", "rotation aligned", "full"]
    args = parser.parse_args(["--methods", "rotation", "--earlier"])
    assert args.methods == ["rotation aligned"]
    cell = teaching.settings("rotation aligned", 8)
    assert (cell["method"], cell["scale"]) == ("rotation", earlier.SCALE)
    assert teaching.title("rotation aligned") == "MoRA, rotation"
    assert teaching.style("rotation aligned") == teaching.style("rotation")


def test_losses_of_the_recipe_from_options_to_its_file(monkeypatch, tmp_path, capsys):
    computed = []

    def compute(cell):
        computed.append(cell)
        lora = cell["method"] == "lora"
        loss = (2.0 if lora else 1.0) + cell["seed"]
        return {
            "scores": [{"definitions": loss, "loss": loss, "other": 1.0}],
            "parameters": 7,
            "forgetting": {"divergence": 0.5 if lora else 0.1},
        }

    def main(*options):
        computed.clear()
        out = ["--out", str(tmp_path / "recipe_losses.json")]
        monkeypatch.setattr(sys, "argv", ["recipe_losses", *out, *options])
        recipe_losses.main()
        return json.loads((tmp_path / "recipe_losses.json").read_text())

    for task in recipe_losses.TASKS.values():
        monkeypatch.setattr(task.module, "compute", compute)
    monkeypatch.setattr(teaching, "RESULTS", tmp_path)
    damped = "block_diagonal, damped 0"
    options = ["--methods", "lora", damped, "--seeds", "2"]
    first = main(*options)["settings"]["summaries"]
    assert len(computed) == 2 * 2 * 2
    for name, task in recipe_losses.TASKS.items():
        of_task = [cell for cell in computed if cell["task"] == name]
        rates = {cell["method"]: cell["rate"] for cell in of_task}
        assert rates == {"lora": task.lora, damped: task.full}
        assert {c.get("text") for c in of_task if c["method"] == damped} == {"own"}
    lora, blocks = first[:2]
    # Means are geometric: of losses 2 and 3, and of 1 and 2.
    assert lora["loss"] == pytest.approx(math.sqrt(6))
    assert (lora["loss_ratio"], lora["forgotten_ratio"]) == (1, 1)
    assert blocks["loss"] == pytest.approx(math.sqrt(2))
    assert blocks["loss_ratio"] == pytest.approx(math.sqrt(2 / 6))
    assert blocks["forgotten_ratio"] == pytest.approx(0.2)
    assert "| LoRA |" in capsys.readouterr().out
    store = str(tmp_path / "recipe_losses.jsonl")
    again = main(*options, "--report", store)["settings"]["summaries"]
    assert not computed and again == first
