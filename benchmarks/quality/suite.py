"""Question: which adapter learns the most, and forgets the least, on tasks you know?

SmolLM2 learns eight tasks of BIG-bench and four of reasoning-gym, each with LoRA, MoRA
and full fine-tuning, with and without damped inputs, from three streams of batches with
a cosine schedule. Each method has one learning rate for all tasks. LoRA, LoRA+ and full
fine-tuning have the best of a ladder on two other tasks. Nothing is searched for the
others: LoRA with damped inputs has LoRA's rate, and every M full fine-tuning's. You
will see for each method its mean rank over the tasks, the loss on held-out answers and
the steps relative to LoRA's, what was forgotten, and the seconds of a step; then the
losses by task.

    python -m benchmarks.quality.suite --quick

BIG-bench's tasks are read from a Python package (358 MB, downloaded once, see
bigbench.py). They stay in out/bigbench and are not part of this repository, as their
authors wish.
"""

import argparse
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks.common.harness import save, show
from benchmarks.common.plots import figure
from benchmarks.quality import (
    answers,
    cells,
    ladders,
    language,
    puzzles,
    tasks,
    teaching,
)
from models.options import positive

METHODS = (
    "lora",
    "lora+",
    "lora, damped 0",
    "block_diagonal",
    "block_diagonal, damped 0",
    "subspace, damped 0",
    "full",
)
LADDER = ("linguistic_mappings/past_tense_json", "color/hex")
"""The tasks that rates are chosen on, which are not reported."""
TASKS = (*(task for task in tasks.FORMS if task not in LADDER), *puzzles.SIZES)
LEAST = 1e-6  # loss, so that means of logarithms are finite


def compute(cell: cells.Cell) -> cells.Cell:
    """Learn a task with one method and rate."""
    rows = cell["rows"]
    task = tasks.task_of(cell["task"], rows)
    held_out = answers.in_batches(task.held_out, rows, task.size)
    score = functools.partial(answers.score, batches=held_out)
    return teaching.study(cell, task.stream(cell["seed"], rows), score)


def settings(args: argparse.Namespace, method: str, task: str) -> cells.Cell:
    """The cell of a method and a task, without rate and seed."""
    cell = {
        **teaching.settings(method, args.rank),
        "task": task,
        "steps": args.steps,
        "rows": args.rows,
    }
    if "damped" in method:
        cell["text"] = args.text
    return cell


def losses_of(row: cells.Cell) -> list[float]:
    """The losses of held-out answers, at the start and after each quarter.

    They are infinite after training broke down, and at least `LEAST`.
    """
    scores = row["scores"]
    return [math.inf if one is None else max(one["loss"], LEAST) for one in scores]


def final(row: cells.Cell) -> float:
    """The loss of held-out answers at the end."""
    return losses_of(row)[-1]


def searched(method: str) -> str:
    """The method whose ladder gives the rate of a method."""
    if method in ("lora", "lora+"):
        return method
    return "lora" if method.startswith("lora") else "full"


def best_rate(args: argparse.Namespace, method: str) -> float:
    """The rate with the least mean loss over the tasks of the ladder, on one stream.

    With --report it is found among finished runs.

    Raises:
        ValueError: The best is on an edge, or no rate was tried.
    """
    ways = [settings(args, method, task) for task in LADDER]
    if args.report:
        found = finished_ladder(args.report, ways)
        if not found:
            raise ValueError("no rate was tried on all tasks of the ladder")
        return ladders.best_of(found)

    def losses_at(rates: Sequence[float]) -> list[float]:
        wanted = [{**way, "rate": rate, "seed": 0} for rate in rates for way in ways]
        rows = cells.run(wanted, compute, teaching.store_of(args))
        losses = np.reshape([final(row) for row in rows], (len(rates), len(ways)))
        return [ladders.mean(of_rate) for of_rate in losses]

    found = ladders.climb(losses_at, teaching.rates(method, quick=True))
    return ladders.best_of(found)


def finished_ladder(store: Path, ways: Sequence[cells.Cell]) -> dict[float, float]:
    """The mean loss at each rate that is finished on all tasks of the ladder."""
    losses: dict[float, list[float]] = {}
    for way in ways:
        for row in cells.finished(store, way):
            if row["seed"] == 0:
                losses.setdefault(row["rate"], []).append(final(row))
    return {
        rate: ladders.mean(of_rate)
        for rate, of_rate in sorted(losses.items())
        if len(of_rate) == len(ways)
    }


def chosen_rates(args: argparse.Namespace) -> dict[str, float]:
    """The rate of each method; a method without one is printed and left out.

    A quick run climbs no ladder, and takes the middle one of the first rates.
    """
    found: dict[str, float] = {}
    for name in dict.fromkeys(map(searched, args.methods)):
        try:
            if args.quick:
                found[name] = teaching.rates(name, quick=True)[1]
            else:
                found[name] = best_rate(args, name)
        except ValueError as error:
            left_out = [m for m in args.methods if searched(m) == name]
            print(f"{', '.join(left_out)}: left out: {name}: {error}")
    return {
        method: found[searched(method)]
        for method in args.methods
        if searched(method) in found
    }


def rows_of(
    args: argparse.Namespace, rates: Mapping[str, float]
) -> dict[str, list[cells.Cell]]:
    """The runs of each method at its rate, of all tasks and streams.

    With --report these are the finished ones.
    """
    wanted = [
        {**settings(args, name, task), "rate": rate, "seed": seed}
        for seed in range(args.seeds)
        for name, rate in rates.items()  # runs of a method share compiled programs
        for task in args.tasks
    ]
    if args.report:
        rows = [row for cell in wanted for row in cells.kept(args.report, cell)]
    else:
        rows = cells.run(wanted, compute, teaching.store_of(args))
    found: dict[str, list[cells.Cell]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    if not found:
        raise SystemExit(f"{args.report} holds no finished run: leave out --report")
    return found


def steps_to(row: cells.Cell, loss: float) -> float:
    """Steps until the loss of held-out answers is that low; infinite if it never is.

    It is known after each quarter of the steps, and logarithms are on lines between.
    One step is the least.
    """
    losses = losses_of(row)
    if losses[0] <= loss:
        return 1.0
    heights = [-math.log(value) for value in losses]
    quarters = ladders.first_above(heights, -math.log(loss))
    return max(1.0, quarters * row["steps"] / (len(losses) - 1))


def by_run(rows: Sequence[cells.Cell]) -> dict[tuple[str, int], cells.Cell]:
    """The runs by task and stream."""
    return {(row["task"], row["seed"]): row for row in rows}


def mean_ranks(found: Mapping[str, Sequence[cells.Cell]]) -> dict[str, float | None]:
    """The mean over tasks of a method's place among all, by the loss at the end.

    The first place is 1, and methods of equal loss share the mean of their places. Only
    runs that all methods have count. Without one the ranks are None.
    """
    runs = {name: by_run(rows) for name, rows in found.items()}
    common = set.intersection(*(set(of_method) for of_method in runs.values()))
    ranks: dict[str, list[float]] = {name: [] for name in found}
    for task in sorted({task for task, _ in common}):
        losses = {
            name: ladders.mean(
                final(of_method[key]) for key in common if key[0] == task
            )
            for name, of_method in runs.items()
        }
        for name, loss in losses.items():
            below = sum(other < loss for other in losses.values())
            equal = sum(other == loss for other in losses.values())
            ranks[name].append(below + (equal + 1) / 2)
    return {name: float(np.mean(of)) if of else None for name, of in ranks.items()}


def summary(rows: Sequence[cells.Cell], others: Sequence[cells.Cell]) -> cells.Cell:
    """A method beside LoRA, over the runs that both have and where LoRA's ended.

    Args:
        rows: The runs of the method.
        others: LoRA's.
    """
    runs = by_run(rows)
    beside = by_run([row for row in others if math.isfinite(final(row))])
    common = [key for key in runs if key in beside]
    losses = error = steps = never = None
    if common:
        losses, error = teaching.paired(
            [final(runs[key]) for key in common],
            [final(beside[key]) for key in common],
        )
        counts = [steps_to(runs[key], final(beside[key])) for key in common]
        references = [steps_to(beside[key], final(beside[key])) for key in common]
        never = sum(not math.isfinite(count) for count in counts)
        # Those that never come there count as all their steps, which is too few.
        most = rows[0]["steps"]
        capped = [min(count, most) for count in counts]
        steps, _ = teaching.paired(capped, references)
    forgot = [row["forgetting"] for row in rows if row["forgetting"]]
    right = [row["scores"][-1]["right"] for row in rows if row["scores"][-1]]
    return {
        "parameters": rows[0]["parameters"],
        "rate": rows[0]["rate"],
        "runs": len(rows),
        "loss": losses,
        "error": error,
        "steps": steps,
        "never": never,
        "right": float(np.mean(right)) if right else None,
        "divergence": float(np.mean([one["divergence"] for one in forgot]))
        if forgot
        else None,
        "text": float(np.mean([one["text"] for one in forgot])) if forgot else None,
        "seconds": float(np.median([row["seconds"] for row in rows])),
    }


COLUMNS = {
    "method": "{title}",
    "parameters": "{parameters:,}",
    "rate": "{rate:.1e}",
    "runs": "{runs}",
    "mean rank": "{rank:.2f}",
    "loss / LoRA's": "{loss:.3f}",
    "error": "{error:.3f}",
    "right": "{right:.1%}",
    "steps / LoRA's": "{steps:.2f}",
    "never": "{never}",
    "forgotten (nats)": "{divergence:.3f}",
    "ordinary text (nats)": "{text:.3f}",
    "s/step": "{seconds:.2f}",
}


def by_task(found: Mapping[str, Sequence[cells.Cell]]) -> list[cells.Cell]:
    """A row for each task: the loss of each method and the share that is right."""
    table: dict[str, cells.Cell] = {
        row["task"]: {"task": row["task"]} for rows in found.values() for row in rows
    }
    for name, rows in found.items():
        for task, row in table.items():
            ended = [r for r in rows if r["task"] == task and r["scores"][-1]]
            row[name] = None
            if ended:
                loss = ladders.mean(map(final, ended))
                right = np.mean([r["scores"][-1]["right"] for r in ended])
                row[name] = f"{loss:.3f} ({right:.0%})"
    return list(table.values())


def main() -> None:
    """Choose the rates, learn all tasks, and report."""
    quick = "two tasks, LoRA and blocks, 8 steps, one stream, and no ladder"
    parser = teaching.options(__doc__, "out/suite.json", quick, METHODS)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--rank", type=positive, default=8)
    add("--steps", type=positive, default=60)
    add("--rows", type=positive, default=8, help="examples in a batch")
    text = "the text that inputs are damped by"
    add("--text", choices=language.DAMPING, default="own", help=text)
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.seeds, args.steps = ["qa_wikidata", "chain_sum"], 1, 8
        args.methods = ["lora", "block_diagonal"]
    # Programs are kept: runs of a method share them, if their rows are of one length.
    jax.config.update("jax_compilation_cache_dir", str(args.out.parent / "jax_cache"))
    found = rows_of(args, chosen_rates(args))
    ranks = mean_ranks(found)
    beside = found.get("lora", [])
    summaries = [
        {
            "name": name,
            "title": teaching.title(name),
            "rank": ranks[name],
            **summary(rows, beside),
        }
        for name, rows in found.items()
    ]
    how = "the middle of its first ladder"
    if not args.quick:
        how = f"the best of a ladder on {LADDER[0]} and {LADDER[1]} (one stream)"
    how += " of LoRA, LoRA+ and full fine-tuning, whose rate every M has"
    how = f"each method has one rate for all tasks, {how}"
    show(COLUMNS, summaries, f"Held-out answers after {args.steps} steps; {how}:")
    columns = {teaching.title(name): f"{{{name}}}" for name in found}
    title = f"Loss of a token of held-out answers (answers that are right); {how}:"
    table = by_task(found)
    show({"task": "{task}", **columns}, table, title)
    rows = [{"name": name, **row} for name in found for row in found[name]]
    save(rows, args, summaries=summaries, ladder=list(LADDER))
    plot(summaries, args.out.with_suffix(".png"))


def plot(summaries: Sequence[cells.Cell], path: Path) -> None:
    """Bars for each method: its loss beside LoRA's, and what it forgot."""
    shown = list(reversed(summaries))
    names = [row["title"] for row in shown]
    bars = {
        "loss": "loss of held-out answers / LoRA's",
        "divergence": "forgotten (nats a token)",
    }
    size = (9, 1 + 0.35 * len(shown))
    with figure(path, 1, 2, figsize=size, sharey=True) as (_, axes):
        for axis, (key, label) in zip(axes[0], bars.items(), strict=True):
            axis.barh(names, [row[key] or 0 for row in shown])
            axis.set_xlabel(label)


if __name__ == "__main__":
    main()
