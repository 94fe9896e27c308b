"""Claim: SmolLM2 learns random pairs in fewer steps with MoRA than with LoRA.

A pair is a key of 8 random hexadecimal digits and a value of 32, which is 128 bits, as
in the paper's table 2. All pairs are one batch, trained with Adam until 99% of the
tokens of their values are the likeliest. Each method has a ladder of learning rates of
its own, by factors of 2, until the best is not on an edge; other sets of pairs are
learned at the best rate and beside it. You will see steps and seconds of each method at
its own best rate, and what it forgot by then: the divergence, in nats a token, of what
it says to ordinary questions from what the untouched model says.

Finished runs are kept next to --out, and a run that was stopped goes on. The whole
takes hours on two cores; --quick takes a few minutes, on a smaller task. --report shows
what is finished: some methods may have more sets of pairs than others.

    python -m benchmarks.quality.pairs --quick
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common.harness import save, show
from benchmarks.common.plots import figure
from benchmarks.quality import cells, ladders, language, teaching
from models.lesson import Batch, batch
from models.options import positive

DIGITS = "0123456789abcdef"
KEY, VALUE = 8, 32  # digits
BITS = 4 * VALUE


class Setting(NamedTuple):
    """Extent of adaptation: the less is adapted, the more bits for each number.

    Attributes:
        rank: The rank.
        targets: The kernels.
        steps: The largest number of steps of a run.
    """

    rank: int
    targets: str
    steps: int


SETTINGS = {
    "r=8": Setting(8, teaching.TARGETS, 60),
    "r=1": Setting(1, teaching.TARGETS, 60),
    "r=1, 4 layers": Setting(1, r"layers_1[3-6]/.*_proj/kernel", 150),
}


def pairs(count: int, seed: int) -> Batch:
    """Random keys with their values."""
    tokenizer, random = language.base().tokenizer, np.random.default_rng(seed)
    texts = ["".join(random.choice(list(DIGITS), KEY + VALUE)) for _ in range(count)]
    keys = [tokenizer.encode(f"{text[:KEY]}:") for text in texts]
    return batch(keys, [tokenizer.encode(text[KEY:]) for text in texts])


def compute(cell: cells.Cell) -> cells.Cell:
    """Learn some pairs with one method and rate."""
    return teaching.memorise(cell, pairs(cell["pairs"], cell["seed"]))


def main() -> None:
    """Climb the ladders, and report each method at its best rate."""
    quick = "8 pairs, one set, rotation and LoRA"
    parser = teaching.options(__doc__, "out/pairs.json", quick, seeds=5)
    add = parser.add_argument
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    add("--pairs", type=positive, default=16)
    args = parser.parse_args()
    if args.quick:
        args.settings, args.pairs, args.seeds = args.settings[:1], 8, 1
        args.methods = ["lora", "rotation"]
    rows, summaries = [], []
    for setting in args.settings:
        methods = {name: first(setting, name, args) for name in args.methods}
        found = teaching.runs(args, compute, methods, steps)
        speeds = time_steps(setting, list(found), args)
        chosen = {name: teaching.at_best(runs, steps) for name, runs in found.items()}
        for name, runs in found.items():
            rows += [{"setting": setting, "name": name, **row} for row in runs]
            other = chosen.get("lora", chosen[name])
            summaries.append(
                {
                    "setting": setting,
                    "name": name,
                    **summary(chosen[name], other, speeds[name], speeds.get("lora")),
                }
            )
    columns = {
        "setting": "{setting}",
        "method": "{name}",
        "parameters": "{parameters:,}",
        "sets": "{seeds}",
        "best rate": "{rate:.1e}",
        "steps to 90%": "{steps90:.1f}",
        "to 99%": "{steps99:.1f}",
        "of LoRA's": "{ratio:.2f}",
        "error": "{error:.2f}",
        "s/step": "{speed:.2f}",
        "seconds of LoRA's": "{seconds_ratio:.2f}",
        "divergence": "{divergence:.3f}",
    }
    show(columns, summaries)
    save(rows, args, summaries=summaries)
    for setting in args.settings:
        name = re.sub(r"\W", "", f"{args.out.stem}_{setting}")
        here = [row for row in rows if row["setting"] == setting]
        plot(here, args.out.with_name(f"{name}.png"))


def first(setting: str, name: str, args: argparse.Namespace) -> Any:
    """Cell of a method in a setting, and the rates to begin with."""
    rank, targets, limit = SETTINGS[setting]
    method = teaching.settings(name, rank, targets)
    cell = {**method, "pairs": args.pairs, "steps": limit}
    return cell, teaching.rates(name, quick=args.quick)


def time_steps(
    setting: str, methods: Sequence[str], args: argparse.Namespace
) -> dict[str, float]:
    """Seconds of a step with each method, in turns."""
    batch, (rank, targets, _) = pairs(args.pairs, seed=0), SETTINGS[setting]
    wanted = {name: teaching.settings(name, rank, targets) for name in methods}
    found = teaching.costs(wanted, batch, rounds=1 if args.quick else 5)
    return {name: costs.seconds for name, costs in found.items()}


def steps(row: cells.Cell) -> float:
    """Steps to 99%."""
    return teaching.steps_to(row, teaching.KNOWN)


def summary(
    chosen: Sequence[cells.Cell],
    other: Sequence[cells.Cell],
    speed: float,
    other_speed: float | None,
) -> cells.Cell:
    """A method at its best rate, beside LoRA at its own on the same sets of pairs."""
    ratio, error = teaching.compared(chosen, other, steps)
    forgot = [row["forgetting"]["divergence"] for row in chosen if row["forgetting"]]
    return {
        "parameters": chosen[0]["parameters"],
        "rate": chosen[0]["rate"],
        "seeds": len(chosen),
        "steps90": ladders.mean(teaching.steps_to(row, 0.9) for row in chosen),
        "steps99": ladders.mean(map(steps, chosen)),
        "ratio": ratio,
        "error": error,
        "speed": speed,
        "seconds_ratio": other_speed and ratio * speed / other_speed,
        "divergence": ladders.mean(forgot),
    }


def plot(rows: Sequence[cells.Cell], path: Path) -> None:
    """Of one setting: accuracy over steps at the best rates, and forgetting."""
    with figure(path, 1, 2, figsize=(10, 3.6)) as (made, ((left, right),)):
        for name in teaching.METHODS:
            here = [row for row in rows if row["name"] == name]
            if not here:
                continue
            style = {"color": teaching.colour(name), "label": name}
            best = teaching.at_best(here, steps)
            left.plot(best[0]["accuracies"], **style)
            ladder = [r for r in here if r["seed"] == 0 and r["forgetting"]]
            ladder.sort(key=lambda row: row["rate"])
            points = [(steps(r), r["forgetting"]["divergence"]) for r in ladder]
            right.plot(*zip(*points, strict=True), "o-", markersize=3, **style)
        left.set(xlabel="step", ylabel="tokens known", title="at the best rate")
        right.set(xlabel="steps to 99%", ylabel="forgotten (nats a token)")
        right.set(yscale="log", title="over each ladder of rates")
        handles, labels = right.get_legend_handles_labels()
        made.legend(handles, labels, loc="outside right center")


if __name__ == "__main__":
    main()
