"""Question: what does the recipe learn and forget in texts and in sums?

SmolLM2 reads medical definitions for 30 steps, as in `pretraining.py`, and learns sums
for 40 steps, as in `reasoning.py`. LoRA and full fine-tuning have their own best rates
there. Every M has full fine-tuning's rate, and a LoRA with damped inputs has LoRA's:
nothing is searched for them. Inputs are damped by text that the untouched model says of
itself. You will see the loss of text or answers that are held out, and what was
forgotten, each beside LoRA's.

Runs that those two programs have kept are taken from them.

    python -m benchmarks.quality.recipe_losses --quick
"""

import argparse
from types import ModuleType
from typing import NamedTuple

from benchmarks.common.harness import save, show
from benchmarks.quality import cells, ladders, pretraining, reasoning, recipe, teaching

RANK = 8


class Task(NamedTuple):
    """What is learned.

    Attributes:
        module: The program that has the batches and the score.
        steps: Of every method.
        lora: LoRA's best rate.
        full: Full fine-tuning's best rate, and the rate of every M.
    """

    module: ModuleType
    steps: int
    lora: float
    full: float


TASKS = {
    "pretraining": Task(pretraining, 30, 8e-3, 4e-4),
    "reasoning": Task(reasoning, 40, 4e-3, 5e-5),
}
METHODS = (
    "lora",
    "lora, damped 0",
    "block_diagonal",
    "block_diagonal, damped 0",
    "subspace, damped 0",
    "full",
)


def cell_of(task: Task, method: str, seed: int) -> cells.Cell:
    """The settings of one run."""
    cell = {**teaching.settings(method, RANK), "steps": task.steps}
    if "damped" in method:
        cell["text"] = recipe.TEXT
    rate = task.lora if method.startswith("lora") else task.full
    return {**cell, "rate": rate, "seed": seed}


def runs_of(args: argparse.Namespace, name: str, method: str) -> list[cells.Cell]:
    """The runs of a method, all that are finished with --report."""
    task = TASKS[name]
    store = teaching.store_of(args)
    kept_before = teaching.RESULTS / f"{name}.jsonl"
    found = []
    for seed in range(args.seeds):
        cell = cell_of(task, method, seed)
        # Both tasks are kept in one file, so that a cell has to name its task.
        named = {"task": name, **cell}
        rows = cells.kept(kept_before, cell) or cells.kept(store, named)
        if not rows and not args.report:
            rows = cells.run([named], task.module.compute, store)
        found += [{**row, "task": name} for row in rows]
    return found


def summary(
    module: ModuleType, rows: list[cells.Cell], others: list[cells.Cell]
) -> cells.Cell:
    """A method's means, and their ratios to LoRA's over the streams that both have."""
    loss, forgotten = _means(module, rows)
    loss_ratio = forgotten_ratio = None
    seeds = {row["seed"] for row in rows} & {row["seed"] for row in others}
    if seeds:
        mine = _means(module, [row for row in rows if row["seed"] in seeds])
        theirs = _means(module, [row for row in others if row["seed"] in seeds])
        loss_ratio = mine[0] / theirs[0]
        forgotten_ratio = mine[1] / theirs[1]
    return {
        "parameters": rows[0]["parameters"],
        "rate": rows[0]["rate"],
        "runs": len(rows),
        "loss": loss,
        "forgotten": forgotten,
        "loss_ratio": loss_ratio,
        "forgotten_ratio": forgotten_ratio,
    }


def _means(module: ModuleType, rows: list[cells.Cell]) -> tuple[float, float]:
    """Geometric means: the loss at the end, and nats a token that were forgotten."""
    loss = ladders.mean(map(module.final, rows))
    return loss, ladders.mean(row["forgetting"]["divergence"] for row in rows)


def main() -> None:
    """Learn with all methods, and report losses and forgetting."""
    quick = "sums alone, one stream, LoRA and the default"
    parser = teaching.options(__doc__, "out/recipe_losses.json", quick, METHODS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.seeds = ["reasoning"], 1
        args.methods = ["lora", "block_diagonal"]
    summaries = []
    for name in args.tasks:
        found = {method: runs_of(args, name, method) for method in args.methods}
        beside = found.get("lora", [])
        summaries += [
            {
                "task": name,
                "name": method,
                "title": teaching.title(method),
                **summary(TASKS[name].module, rows, beside),
            }
            for method, rows in found.items()
            if rows
        ]
    if not summaries:
        raise SystemExit(f"{args.report} holds no finished run: leave out --report")
    columns = {
        "task": "{task}",
        "method": "{title}",
        "parameters": "{parameters:,}",
        "rate": "{rate:.1e}",
        "runs": "{runs}",
        "loss, held out": "{loss:.3f}",
        "of LoRA's": "{loss_ratio:.3f}",
        "forgotten (nats)": "{forgotten:.3f}",
        "of what LoRA forgets": "{forgotten_ratio:.2f}",
    }
    show(columns, summaries)
    save([], args, summaries=summaries)


if __name__ == "__main__":
    main()
