"""Question: which text serves for damped inputs, how much of it, and damped how?

SmolLM2 learns random pairs until 99% of their tokens are the likeliest, and the codes
of airports until 95% are recalled, at r = 8. Inputs are damped by text of several
kinds: ordinary text, what the untouched model says of itself, random tokens, and what
is taught. "damped 0" scales features alone, and other numbers are of directions that
are taken away before. Each method has one rate, which is named. You will see the steps
beside LoRA's, and what was forgotten by then.

    python -m benchmarks.quality.damping --quick
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common.harness import save, show
from benchmarks.quality import cells, facts, pairs, teaching

RANK = 8
LORA = 4e-3
FULL = 4e-4
"""Rates with the fewest steps: LoRA's, and full fine-tuning's, which every M has."""


class Way(NamedTuple):
    """A method, the text that its inputs are damped by, and its rate."""

    method: str
    text: str
    rate: float


DAMPED = "block_diagonal, damped 0"
WAYS = (
    Way("lora", "", LORA),
    Way("block_diagonal", "", FULL),
    Way(DAMPED, "own", FULL),
    Way(DAMPED, "random", FULL),
    Way(DAMPED, "inputs", FULL),
    Way(DAMPED, "ordinary", FULL),
    Way(DAMPED, "chat", FULL),
    Way("block_diagonal, damped 4", "own", FULL),
    Way("block_diagonal, damped 16", "own", FULL),
    Way(DAMPED, "own 2", FULL),
    Way(DAMPED, "own 6", FULL),
)
TASKS = ("pairs", "facts")


def cell_of(task: str, way: Way, seed: int) -> cells.Cell:
    """The settings of one run."""
    usual = facts.USUAL
    if task == "pairs":
        usual = {"pairs": 16, "steps": pairs.SETTINGS["r=8"].steps}
    cell = {**teaching.settings(way.method, RANK), **usual, "task": task}
    if way.text:
        cell["text"] = way.text
    return {**cell, "rate": way.rate, "seed": seed}


def compute(cell: cells.Cell) -> cells.Cell:
    """Learn with one method, text and set."""
    return facts.compute(cell) if cell["task"] == "facts" else pairs.compute(cell)


def learned(row: cells.Cell) -> tuple[float, float]:
    """Steps until it is learned, and what was forgotten by then, in nats a token."""
    if row["task"] == "pairs":
        forgot = row["forgetting"] or {}
        return pairs.steps(row), forgot.get("divergence", math.nan)
    points = row["points"]
    for before, after in zip(points, points[1:], strict=False):
        if after["recall"] >= facts.RECALLED:
            # Between two questions it is on a line.
            gained = after["recall"] - before["recall"]
            part = (facts.RECALLED - before["recall"]) / gained
            steps, forgot = (
                before[key] + part * (after[key] - before[key])
                for key in ("step", "divergence")
            )
            return steps, forgot
    return facts.steps(row), math.nan


def summary(rows: Sequence[cells.Cell], others: Sequence[cells.Cell]) -> dict[str, Any]:
    """Means of the runs of a way, beside LoRA's with the same sets."""
    steps = {row["seed"]: learned(row)[0] for row in rows}
    theirs = {row["seed"]: learned(row)[0] for row in others}
    both = sorted(steps.keys() & theirs.keys())
    ratio = error = None
    if both:
        ratio, error = teaching.paired(
            [steps[k] for k in both], [theirs[k] for k in both]
        )
    return {
        "sets": len(rows),
        "steps": float(np.mean(list(steps.values()))),
        "ratio": ratio,
        "error": error,
        "forgotten": float(np.mean([learned(row)[1] for row in rows])),
    }


def runs(
    args: argparse.Namespace, task: str, ways: Sequence[Way]
) -> dict[Way, list[cells.Cell]]:
    """The runs of each way, all that are finished with --report."""
    store = teaching.store_of(args)
    found: dict[Way, list[cells.Cell]] = {}
    for seed in range(args.seeds):
        for way in ways:
            cell = cell_of(task, way, seed)
            if args.report:
                rows = cells.kept(store, cell)
            else:
                rows = cells.run([cell], compute, store)
            found.setdefault(way, []).extend(rows)
    return {way: rows for way, rows in found.items() if rows}


def main() -> None:
    """Learn with all ways, and report steps and forgetting."""
    quick = "pairs alone, one set, LoRA and two ways"
    default = "out/damping.json"
    methods = sorted({way.method for way in WAYS})
    parser = teaching.options(__doc__, default, quick, methods)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    args = parser.parse_args()
    ways = [way for way in WAYS if way.method in args.methods]
    if args.quick:
        args.tasks, args.seeds, ways = ["pairs"], 1, list(WAYS[:3])
    rows, summaries = [], []
    for task in args.tasks:
        found = runs(args, task, ways)
        beside = found.get(WAYS[0], [])
        for way, of_way in found.items():
            rows += [{"text": "", **row} for row in of_way]
            title = teaching.title(way.method)
            summaries.append(
                {
                    "task": task,
                    "title": title,
                    "text": way.text or "-",
                    "rate": way.rate,
                    **summary(of_way, beside),
                }
            )
    columns = {
        "task": "{task}",
        "method": "{title}",
        "damped by": "{text}",
        "rate": "{rate:.0e}",
        "sets": "{sets}",
        "steps": "{steps:.1f}",
        "of LoRA's": "{ratio:.2f}",
        "error": "{error:.2f}",
        "forgotten (nats)": "{forgotten:.3f}",
    }
    show(columns, summaries)
    short = [{k: v for k, v in r.items() if not isinstance(v, list)} for r in rows]
    save(short, args, summaries=summaries)


if __name__ == "__main__":
    main()
