"""Claim: on arithmetic MoRA and LoRA are equal, as the paper has it.

SmolLM2 learns to add and subtract two or three digits (`chain_sum` of reasoning-gym),
from new problems in each batch. You will see each method at its own best rate in one
table, as the suite of Hugging Face PEFT has it: how many of 128 problems, which it was
not trained on, it answers rightly, digit for digit; the losses of training and of these
answers; what it forgot; the memory and the time of a step; the size of a file.

    python -m benchmarks.quality.reasoning --quick
"""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks.common.harness import save, show
from benchmarks.common.plots import figure, legend_below, plot_mean
from benchmarks.quality import answers, cells, ladders, puzzles, teaching
from models.lesson import Batch
from models.options import positive

TASK = "chain_sum"
ROWS, HELD_OUT = 32, 128  # problems
METHODS = (
    "full",
    "lora",
    "rotation",
    "subspace",
    "block_diagonal",
    "block_diagonal, damped",
)
SIZE = 12, 4  # tokens of the longest problem with its answer, and of that
LAST = 10  # steps whose loss is the training loss


@functools.lru_cache
def questions() -> list[Batch]:
    """The problems that are not trained on, in batches."""
    return answers.in_batches(puzzles.problems(TASK, HELD_OUT, seed=0), ROWS, SIZE)


def batches(seed: int) -> Iterator[Batch]:
    """Batches of new problems, without end."""
    held_out = {question for question, _ in puzzles.problems(TASK, HELD_OUT, seed=0)}
    stream = puzzles.stream(TASK, seed, ROWS, lambda pair: pair[0] not in held_out)
    return (answers.batch(pairs, SIZE) for pairs in stream)


def score(model: Callable[..., jax.Array]) -> dict[str, float]:
    """Loss on the problems that are not trained on, and the share answered rightly."""
    return answers.score(model, questions())


def compute(cell: cells.Cell) -> cells.Cell:
    """Learn with one method and rate."""
    return teaching.study(cell, batches(cell["seed"]), score)


def final(row: cells.Cell) -> float:
    """The loss at the end; infinite if training broke down."""
    return math.inf if row["scores"][-1] is None else row["scores"][-1]["loss"]


def main() -> None:
    """Climb the ladders, and report each method at its best rate."""
    quick = "20 steps, rotation and LoRA, one stream of problems"
    parser = teaching.options(__doc__, "out/reasoning.json", quick, METHODS)
    parser.add_argument("--rank", type=positive, default=8)
    parser.add_argument("--steps", type=positive, default=40)
    args = parser.parse_args()
    if args.quick:
        args.methods, args.steps, args.seeds = ["lora", "rotation"], 20, 1
    methods = {
        name: (
            teaching.settings(name, args.rank) | {"steps": args.steps},
            teaching.rates(name, quick=args.quick),
        )
        for name in args.methods
    }
    found = teaching.runs(args, compute, methods, final)
    rows = [{"name": name, **row} for name in found for row in found[name]]
    chosen = {name: teaching.at_best(runs, final) for name, runs in found.items()}
    columns = {
        "method": "{name}",
        "parameters": "{parameters:,}",
        "streams": "{seeds}",
        "best rate": "{rate:.1e}",
        "right before": "{before:.0%}",
        "after": "{after:.1%}",
        "error": "{error:.1%}",
        "training loss": "{training:.3f}",
        "loss of answers": "{loss:.3f}",
        "divergence": "{divergence:.3f}",
        "memory (MB)": "{memory:,.0f}",
        "s/step": "{seconds:.2f}",
        "file (MB)": "{file:.2f}",
    }
    ways = {name: teaching.settings(name, args.rank) for name in chosen}
    costs = teaching.costs(ways, next(batches(0)), rounds=1 if args.quick else 5)
    summaries = [
        {"name": name, **summary(runs), **costs[name]._asdict()}
        for name, runs in chosen.items()
    ]
    show(columns, summaries)
    save(rows, args, summaries=summaries)
    plot(rows, chosen, args.out.with_suffix(".png"))


def summary(rows: list[cells.Cell]) -> cells.Cell:
    """A method at its best rate."""
    right = [row["scores"][-1]["right"] for row in rows]
    spread = float(np.std(right, ddof=1)) / len(rows) ** 0.5 if len(rows) > 1 else None
    return {
        "parameters": rows[0]["parameters"],
        "rate": rows[0]["rate"],
        "seeds": len(rows),
        "before": rows[0]["scores"][0]["right"],
        "after": float(np.mean(right)),
        "error": spread,
        "training": float(np.mean([row["losses"][-LAST:] for row in rows])),
        "loss": ladders.mean(map(final, rows)),
        "divergence": ladders.mean(row["forgetting"]["divergence"] for row in rows),
    }


def plot(
    rows: list[cells.Cell], chosen: dict[str, list[cells.Cell]], path: Path
) -> None:
    """Right answers over steps at the best rates, and against forgetting over all."""
    with figure(path, 1, 2, figsize=(9, 4)) as (made, ((left, right),)):
        for name, best in chosen.items():
            style = teaching.style(name)
            curves = [[at["right"] for at in row["scores"]] for row in best]
            steps = np.linspace(0, best[0]["steps"], len(curves[0]))
            plot_mean(left, steps, curves, marker="o", **style)
            points = [
                (row["forgetting"]["divergence"], row["scores"][-1]["right"])
                for row in rows
                if row["name"] == name and row["forgetting"]
            ]
            right.plot(*zip(*points, strict=True), "o", color=style["color"])
        left.set(xlabel="step", ylabel="answered rightly", title="at the best rate")
        right.set(xlabel="forgotten (nats a token)", title="at all rates")
        right.set_xscale("log")
        legend_below(made, left)


if __name__ == "__main__":
    main()
