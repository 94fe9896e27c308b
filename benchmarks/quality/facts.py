"""Claim: at equal recall of new facts MoRA forgets no more than LoRA.

SmolLM2 learns the codes of airports, with questions in two wordings, a step for each in
turn. While it learns, it is asked in a third: a fact is recalled if each token of its
code is the likeliest, after the words before it. And what it says to ordinary questions
and text is compared with what the untouched model says, which is the first point of
each run. Each method has a ladder of learning rates. You will see the steps at each
rate, and what was forgotten when the facts were recalled; and the least that was
forgotten at equal recall, over all rates.

With --filled two kernels of a late layer learn so many facts that the adapter is nearly
full; steps are counted until half of them are recalled.

    python -m benchmarks.quality.facts --quick
"""

import argparse
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.common.harness import save, show
from benchmarks.common.plots import figure, legend_below, plot_mean
from benchmarks.quality import cells, ladders, language, pairs, teaching
from models import lesson, smollm2
from models.airports import all_facts
from models.lesson import Batch
from models.options import positive

TAUGHT = ("Tell me the IATA code of {}.", "Which IATA code does {} have?")
ASKED = "What is the airport code of {}?"
ANSWER = "The IATA code of {} is"
METHODS = (
    "full",
    "lora",
    "rotation",
    "subspace",
    "subspace, renewed",
    "block_diagonal",
    "block_diagonal, damped",
    "block_diagonal, damped 4",
    "block_diagonal, damped 64",
    "lora, damped",
    "rotation, damped",
)
RENEW = 24  # steps
LENGTH = 44  # tokens of the longest question and answer together
EVERY = 3  # steps between questions
RECALLED = 0.95
HALF = 0.5
"""Shares of the facts that methods are compared at; the second with --filled."""
SHARES = (HALF, 0.75, RECALLED)
"""Shares at which the least that was forgotten is shown."""
LEVELS = np.linspace(0.05, 1, 20)
"""The same, in the picture."""
USUAL = {"facts": 16, "steps": 31}
FILLED = {"facts": 96, "steps": 240, "batch": 32, "every": 12, "begin": pairs.BEGIN}
"""Settings in which little is trained, and many facts nearly fill it."""


def taught_and_asked(
    count: int, seed: int, size: int | None = None
) -> tuple[list[Batch], Batch]:
    """Facts as they are taught, in each wording, and as they are asked.

    By default a batch has all of them with the whole answers. With a `size` it has so
    many, and their codes alone are taught.
    """
    tokenizer = language.base().tokenizer
    facts = list(itertools.islice(all_facts(seed), count))
    # "Tell me the IATA code of NAME."
    names = [fact.question[len(TAUGHT[0]) - len("{}.") : -1] for fact in facts]
    before = [tokenizer.encode(ANSWER.format(name)) for name in names]
    codes = [[*tokenizer.encode(f" {fact.code}."), smollm2.EOS] for fact in facts]

    def batch(wording: str, *, whole: bool) -> Batch:
        prompts, replies = [], []
        for name, first, code in zip(names, before, codes, strict=True):
            prompts.append(tokenizer.chat(wording.format(name)) + first * (not whole))
            replies.append(first * whole + code)
        return lesson.batch(prompts, replies, size=(LENGTH, 0))

    asked = batch(ASKED, whole=False)
    taught = [batch(wording, whole=size is None) for wording in TAUGHT]
    if size is not None:
        parts = itertools.product(taught, range(0, count, size))
        taught = [Batch(*(part[k : k + size] for part in all_)) for all_, k in parts]
    return taught, asked


def compute(cell: cells.Cell) -> cells.Cell:
    """Recall and forgetting along a run."""
    taught, asked = taught_and_asked(cell["facts"], cell["seed"], cell.get("batch"))
    first = taught[: len(taught) // len(TAUGHT)]  # all facts in one wording
    first = Batch(*map(np.concatenate, zip(*first, strict=True)))
    points, program = [], teaching.program_of(cell, first)
    batches = itertools.cycle(map(program.prepared, taught))
    batches = itertools.islice(batches, cell["steps"])
    rate_at, renew = teaching.warmed_up(cell["rate"]), cell.get("renew", 0)
    run = teaching.train(program, batches, rate_at, renew)
    for k, step in enumerate(run):
        if k % cell.get("every", EVERY):
            continue
        model = program.model(step)
        recall = language.recall(model(asked.ids, asked.at), asked)
        points.append({"step": k, "recall": recall, **language.forgetting(model)})
        if recall == 1:
            break
    return {"points": points, "parameters": program.parameters}


def main() -> None:
    """Learn with all methods and rates, and report recall and forgetting."""
    quick = "8 facts, one set, rotation and LoRA"
    parser = teaching.options(__doc__, "out/facts.json", quick, METHODS, seeds=5)
    add = parser.add_argument
    add("--rank", type=positive, help="by default 8, or 1 with --filled")
    add("--facts", type=positive, help="by default 16, or 96 with --filled")
    add("--steps", type=positive, help="at most; by default 31, or 240 with --filled")
    add("--filled", action="store_true", help="adapt two kernels alone")
    add("--untimed", action="store_true", help="leave out the seconds of steps")
    args = parser.parse_args()
    if args.quick:
        args.methods, args.facts, args.seeds = ["lora", "rotation"], 8, 1
    share = HALF if args.filled else RECALLED
    until = functools.partial(steps, share=share)
    methods = {name: first(name, args) for name in args.methods}
    found = teaching.runs(args, compute, methods, until)
    rows = [
        {"name": name, **row, "recalled": when_recalled(row, share)}
        for name in found
        for row in found[name]
    ]
    best = {name: teaching.at_best(runs, until) for name, runs in found.items()}
    speeds = {} if args.untimed else time_steps(list(found), args)
    summaries = [
        summary(here, best[name], best.get("lora", best[name]), speeds, until)
        for name in found
        for here in teaching.by_rate([row for row in rows if row["name"] == name])
    ]
    columns = {
        "method": "{name}",
        "parameters": "{parameters:,}",
        "rate": "{rate:.1e}",
        "recalled": "{recalled} of {seeds}",
        "at most": "{most:.0%}",
        "steps": "{steps:.1f}",
        "best, of LoRA's": "{ratio:.2f}",
        "error": "{error:.2f}",
        "s/step": "{speed:.2f}",
        "seconds of LoRA's": "{seconds_ratio:.2f}",
        "divergence": "{divergence:.2f}",
        "same tokens": "{same:.0%}",
        "text": "{text:.2f}",
    }
    show(columns, summaries)
    least = [row for name in found for row in least_forgotten(name, found[name])]
    columns = {
        "method": "{name}",
        "parameters": "{parameters:,}",
        "sets": "{seeds}",
        "recall": "{recall:.0%}",
        "least divergence": "{divergence:.2f}",
        "text": "{text:.2f}",
        "rate": "{rate:.1e}",
        "step": "{step:.1f}",
    }
    show(columns, least)
    save(rows, args, summaries=summaries, least_forgotten=least)
    plot(summaries, rows, share, args.out.with_suffix(".png"))


def first(name: str, args: argparse.Namespace) -> tuple[cells.Cell, list[float]]:
    """Cell of a method, and the rates to begin with."""
    rates = teaching.rates(name, quick=args.quick or args.filled)
    given = {k: v for k in USUAL if (v := getattr(args, k)) is not None}
    given |= {"renew": RENEW} if name.endswith("renewed") else {}
    if args.filled:
        cell = teaching.settings(name, args.rank or 1, pairs.PART) | FILLED | given
        return cell, [pairs.LIFT * rate for rate in rates]
    return teaching.settings(name, args.rank or 8) | USUAL | given, rates


def time_steps(methods: Sequence[str], args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step with each method, in turns."""
    ways = {name: first(name, args)[0] for name in methods}
    cell = ways[methods[0]]
    taught, _ = taught_and_asked(cell["facts"], 0, cell.get("batch"))
    found = teaching.costs(ways, taught[0], rounds=1 if args.quick else 5)
    return {name: costs.seconds for name, costs in found.items()}


def steps(row: cells.Cell, share: float = RECALLED) -> float:
    """Steps until a share of the facts is recalled, between questions by a line.

    Of a run in which it never was, it is more than its steps, by what is missing.
    """
    recall = [point["recall"] for point in row["points"]]
    found = row.get("every", EVERY) * ladders.first_above(recall, share)
    return found if math.isfinite(found) else row["steps"] * (2 - max(recall))


def when_recalled(row: cells.Cell, share: float) -> cells.Cell | None:
    """The first point of a run at which a share of the facts is recalled."""
    return next((p for p in row["points"] if p["recall"] >= share), None)


def summary(
    rows: Sequence[cells.Cell],
    best: Sequence[cells.Cell],
    other: Sequence[cells.Cell],
    speeds: Mapping[str, float],
    until: Callable[[cells.Cell], float],
) -> cells.Cell:
    """A method at one rate: means over the sets of facts that were recalled.

    Args:
        rows: Its runs at this rate.
        best: Its runs at its best rate.
        other: LoRA's at its own.
        speeds: Seconds of a step with each method.
        until: The function that gives the steps of a run.
    """
    name, there = rows[0]["name"], [row for row in rows if row["recalled"]]
    found: cells.Cell = {"recalled": len(there), "seeds": len(rows)}
    most = [max(point["recall"] for point in row["points"]) for row in rows]
    found["most"] = float(np.mean(most))
    found |= dict.fromkeys(("steps", "divergence", "same", "text"))
    found |= dict.fromkeys(("ratio", "error", "seconds_ratio"))
    if there:
        points = [row["recalled"] for row in there]
        found["steps"] = ladders.mean(map(until, there))
        found["divergence"] = ladders.mean(point["divergence"] for point in points)
        for key in ("same", "text"):
            found[key] = float(np.mean([point[key] for point in points]))
    if rows[0]["rate"] == best[0]["rate"]:
        found["ratio"], found["error"] = teaching.compared(best, other, until)
        fast, slow = speeds.get(name), speeds.get("lora")
        found["seconds_ratio"] = fast and slow and found["ratio"] * fast / slow
    settings = {key: rows[0][key] for key in ("name", "parameters", "rate")}
    return {**settings, "speed": speeds.get(name), **found}


def least_forgotten(name: str, rows: Sequence[cells.Cell]) -> Iterator[cells.Cell]:
    """The least that was forgotten at each of `SHARES`, in means over sets of facts."""
    for share in SHARES:
        if points := least_points(rows, share):
            keys = "divergence", "text", "rate", "step"
            means = {key: float(np.mean([p[key] for p in points])) for key in keys}
            settings = {"name": name, "parameters": rows[0]["parameters"]}
            yield {**settings, "seeds": len(points), "recall": share, **means}


def least_points(rows: Sequence[cells.Cell], share: float) -> list[cells.Cell]:
    """The point of each set, over its rates and steps, at which least was forgotten.

    These have a share of the facts recalled. If a set has none, the list is empty.
    """
    points: dict[int, list[cells.Cell]] = {row["seed"]: [] for row in rows}
    for row in rows:
        there = [p for p in row["points"] if p["recall"] >= share]
        points[row["seed"]] += [{**p, "rate": row["rate"]} for p in there]
    if not all(points.values()):
        return []
    return [min(of_set, key=lambda p: p["divergence"]) for of_set in points.values()]


def plot(
    summaries: Sequence[cells.Cell],
    rows: Sequence[cells.Cell],
    share: float,
    path: Path,
) -> None:
    """Recall against forgetting, over all rates; steps against it at each rate."""
    with figure(path, 1, 2, figsize=(11, 4)) as (made, axes):
        for name in dict.fromkeys(row["name"] for row in rows):
            style = teaching.style(name)
            here = [row for row in rows if row["name"] == name]
            found = {share: least_points(here, share) for share in LEVELS}
            found = {share: points for share, points in found.items() if points}
            values = [[p["divergence"] for p in points] for points in found.values()]
            if found:
                shares = np.asarray(list(found))
                plot_mean(axes[0, 0], shares, np.transpose(values), **style)
                style["label"] = None
            ladder = [row for row in summaries if row["name"] == name and row["steps"]]
            points = [(row["steps"], row["divergence"]) for row in ladder]
            if points:
                axes[0, 1].plot(*zip(*points, strict=True), marker="o", **style)
        axes[0, 0].set(xlabel="facts recalled in another wording")
        axes[0, 0].set(
            ylabel="forgotten (nats a token)", title="the least, of all rates"
        )
        axes[0, 1].set(xlabel=f"steps to {share:.0%}", yscale="log")
        axes[0, 1].set(ylabel="forgotten (nats a token)", title="over the rates")
        legend_below(made, axes[0, 0], columns=4)


if __name__ == "__main__":
    main()
