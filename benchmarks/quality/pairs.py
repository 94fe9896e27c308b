"""Claim: SmolLM2 learns random pairs in fewer steps with MoRA than with LoRA.

A pair is a key of 8 random hexadecimal digits and a value of 32, which is 128 bits, as
in the paper's table 2. All pairs are one batch, trained with Adam until 99% of the
tokens of their values are the likeliest. Each method has a ladder of learning rates of
its own, by factors of 2, until the best is not on an edge; other sets of pairs are
learned at the best rate and beside it. You will see steps and seconds of each method at
its own best rate, and what it forgot by then: the divergence, in nats a token, of what
it says to ordinary questions from what the untouched model says.

In the settings "half a bit" and "one bit" two kernels of a late layer learn pairs of
words, so many that the adapter is full.

Finished runs are kept next to --out, and a run that was stopped goes on. The whole
takes hours on two cores; --quick takes a few minutes, on a smaller task. --report shows
what is finished: some methods may have more sets of pairs than others.

    python -m benchmarks.quality.pairs --quick
"""

import argparse
import functools
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common.harness import save, show
from benchmarks.common.plots import figure, legend_below, plot_mean
from benchmarks.quality import baselines, cells, ladders, language, teaching
from models.lesson import Batch, batch
from models.options import positive

DIGITS = list("0123456789abcdef")
KEY, VALUE = 8, 32  # digits
WORDS = 1024
KEY_WORDS, VALUE_WORDS = 2, 8
OTHERS = 4
"""Pairs that are not taught, for a first gradient."""


class Setting(NamedTuple):
    """Extent of adaptation: the less is adapted, the more bits for each number.

    Attributes:
        rank: The rank.
        targets: The kernels.
        steps: The largest number of steps of a run.
        words: The number of pairs of words, where it is not --pairs of digits.
        renew: The number of steps after which what is "renewed" is.
        lift: The factor of the rates that ladders begin with.
        begin: The first layer with such kernels, if what comes before is computed once.
    """

    rank: int
    targets: str
    steps: int
    words: int = 0
    renew: int = 0
    lift: float = 1.0
    begin: int = 0


PART = r"layers_26/mlp/(up|down)_proj/kernel"
"""Two kernels, with 4,224 numbers at r = 1."""
BEGIN = 26
"""Its layer: a step computes what comes before no more."""
LIFT = 16.0
"""The factor of its rates: few numbers must move further."""


SETTINGS = {
    "r=8": Setting(8, teaching.TARGETS, 60),
    "r=1": Setting(1, teaching.TARGETS, 60),
    "r=1, 4 layers": Setting(1, r"layers_1[3-6]/.*_proj/kernel", 150),
    "half a bit": Setting(1, PART, 400, words=26, renew=24, lift=LIFT, begin=BEGIN),
    "one bit": Setting(1, PART, 400, words=53, renew=24, lift=LIFT, begin=BEGIN),
    "an eighth of a bit": Setting(1, PART, 400, words=6, lift=LIFT, begin=BEGIN),
    "a quarter of a bit": Setting(1, PART, 400, words=13, lift=LIFT, begin=BEGIN),
    "two kernels, r=8": Setting(8, PART, 400, words=26, lift=LIFT, begin=BEGIN),
}
USUAL = list(SETTINGS)[:5]
"""The others have two kernels with room, to see whether the load decides there."""


def pairs(count: int, seed: int, *, of_words: bool = False) -> Batch:
    """Random keys with their values, of digits or of common words.

    A value has 128 bits, or 80 in a quarter of the tokens.
    """
    tokenizer, random = language.base().tokenizer, np.random.default_rng(seed)
    if of_words:
        texts = random.choice(words(), (count, KEY_WORDS + VALUE_WORDS))
        keys = [tokenizer.encode("".join(text[:KEY_WORDS]) + ":") for text in texts]
        values = [tokenizer.encode("".join(text[KEY_WORDS:])) for text in texts]
        return batch(keys, values)
    texts = ["".join(random.choice(DIGITS, KEY + VALUE)) for _ in range(count)]
    keys = [tokenizer.encode(f"{text[:KEY]}:") for text in texts]
    return batch(keys, [tokenizer.encode(text[KEY:]) for text in texts])


@functools.lru_cache
def words() -> list[str]:
    """The most frequent words that are a token each, with the space before them."""
    tokenizer, found = language.base().tokenizer, []
    for token in itertools.count():  # the first are the first that were merged
        word = tokenizer.decode([token])
        if re.fullmatch(" [a-z]{3,}", word):
            found.append(word)
        if len(found) == WORDS:
            return found
    raise AssertionError


def compute(cell: cells.Cell) -> cells.Cell:
    """Learn some pairs with one method and rate."""
    others = {**cell, "pairs": OTHERS, "seed": cell["seed"] + 1000}
    first = batch_of(others) if cell["method"].endswith("others") else None
    return teaching.memorise(cell, batch_of(cell), first)


def batch_of(cell: cells.Cell) -> Batch:
    """The pairs of a cell."""
    return pairs(cell["pairs"], cell["seed"], of_words=cell.get("words", False))


def main() -> None:
    """Climb the ladders, and report each method at its best rate."""
    quick = "8 pairs, one set, rotation and LoRA"
    parser = teaching.options(__doc__, "out/pairs.json", quick, seeds=5)
    add = parser.add_argument
    add("--settings", nargs="+", choices=SETTINGS, default=USUAL)
    add("--pairs", type=positive, default=16)
    add("--renew", type=positive, help="steps between renewals; by default 24")
    add("--stalled", type=float, help="renew if the loss fell by less than this share")
    add("--untimed", action="store_true", help="leave out the seconds of steps")
    add("--ladders", action="store_true", help="a row for each rate")
    args = parser.parse_args()
    if args.quick:
        args.settings, args.pairs, args.seeds = args.settings[:1], 8, 1
        args.methods = ["lora", "rotation"]
    rows, summaries = [], []
    for setting in args.settings:
        methods = {name: first(setting, name, args) for name in args.methods}
        found = teaching.runs(args, compute, methods, steps)
        speeds = {} if args.untimed else time_steps(setting, list(found), args)
        chosen = {name: teaching.at_best(runs, steps) for name, runs in found.items()}
        for name, runs in found.items():
            rows += [{"setting": setting, "name": name, **row} for row in runs]
            lora = chosen.get("lora", chosen[name]), speeds.get("lora")
            of_rates = teaching.by_rate(runs) if args.ladders else [chosen[name]]
            summaries += [
                {
                    "setting": setting,
                    "name": name,
                    **summary(of_rate, speeds.get(name), *lora),
                }
                for of_rate in of_rates
            ]
    columns = {
        "setting": "{setting}",
        "method": "{name}",
        "parameters": "{parameters:,}",
        "sets": "{seeds}",
        "best rate": "{rate:.1e}",
        "known at most": "{known:.1%}",
        "steps to 90%": "{steps90:.1f}",
        "of LoRA's": "{ratio90:.2f}",
        "its error": "{error90:.2f}",
        "to 99%": "{steps99:.1f}",
        "at most of LoRA's": "{ratio:.2f}",
        "error": "{error:.2f}",
        "with gradients before": "{passes:.2f}",
        "s/step": "{speed:.2f}",
        "seconds of LoRA's": "{seconds_ratio:.2f}",
        "divergence at 90%": "{divergence90:.3f}",
        "divergence": "{divergence:.3f}",
    }
    show(columns, summaries)
    # The curves are with the finished runs.
    short = [{k: v for k, v in r.items() if not isinstance(v, list)} for r in rows]
    save(short, args, summaries=summaries)
    for setting in args.settings:
        name = re.sub(r"\W", "", f"{args.out.stem}_{setting}")
        here = [row for row in rows if row["setting"] == setting]
        plot(here, args.out.with_name(f"{name}.png"))


def first(setting: str, name: str, args: argparse.Namespace) -> Any:
    """Cell of a method in a setting, and the rates to begin with."""
    rank, targets, limit, words, renew, lift, begin = SETTINGS[setting]
    cell = teaching.settings(name, rank, targets)
    cell |= {"pairs": words or args.pairs, "steps": limit}
    cell |= {"words": True} if words else {}
    cell |= {"begin": begin} if begin else {}
    if name.endswith("renewed"):
        cell["renew"] = args.renew or renew
        cell |= {} if args.stalled is None else {"stalled": args.stalled}
    rates = teaching.rates(name, quick=args.quick or lift != 1)
    return cell, [lift * rate for rate in rates]


def time_steps(
    setting: str, methods: Sequence[str], args: argparse.Namespace
) -> dict[str, float]:
    """Seconds of a step with each method, in turns."""
    wanted = {name: first(setting, name, args)[0] for name in methods}
    batch = batch_of({**wanted[methods[0]], "seed": 0})
    found = teaching.costs(wanted, batch, rounds=1 if args.quick else 5)
    return {name: costs.seconds for name, costs in found.items()}


def steps(row: cells.Cell) -> float:
    """Steps to 99%.

    Of a run that never came there, it is more than its steps, by what is missing.
    """
    found = known(row)
    if math.isfinite(found):
        return found
    return row["steps"] * (2 - max(row["accuracies"]))


def known(row: cells.Cell) -> float:
    """Steps to 99%; infinite if it never came there."""
    return teaching.steps_to(row, teaching.KNOWN)


def mostly(row: cells.Cell) -> float:
    """Steps to 90%; infinite if it never came there."""
    return teaching.steps_to(row, teaching.MOSTLY)


def passes(row: cells.Cell) -> float:
    """Steps to 99%, with the gradients before them and between."""
    taken, renew = steps(row), row.get("renew") or math.inf
    renewals = row["renewals"] if "stalled" in row else taken // renew
    return baselines.passes(row["method"], taken, renewals)


def summary(
    chosen: Sequence[cells.Cell],
    speed: float | None,
    other: Sequence[cells.Cell],
    other_speed: float | None,
) -> cells.Cell:
    """A method at one rate, beside LoRA at its best one on the same sets of pairs."""
    ratio, error = teaching.compared(chosen, other, steps)
    ratio90 = error90 = math.nan
    if all(map(math.isfinite, map(mostly, other))):
        ratio90, error90 = teaching.compared(chosen, other, mostly)
    with_others, _ = teaching.compared(chosen, other, passes)
    found = {
        "parameters": chosen[0]["parameters"],
        "rate": chosen[0]["rate"],
        "seeds": len(chosen),
        "known": ladders.mean(max(row["accuracies"]) for row in chosen),
        "steps90": ladders.mean(map(mostly, chosen)),
        "ratio90": ratio90,
        "error90": error90,
        "steps99": ladders.mean(map(known, chosen)),
        "ratio": ratio,
        "error": error,
        "passes": with_others,
        "speed": speed,
        "seconds_ratio": speed and other_speed and ratio * speed / other_speed,
        "divergence90": forgotten(chosen, "forgetting_mostly"),
        "divergence": forgotten(chosen, "forgetting"),
    }
    return {key: _finite(value) for key, value in found.items()}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def forgotten(rows: Sequence[cells.Cell], when: str) -> float | None:
    """The mean divergence of the runs that came there, if any did."""
    found = [row[when]["divergence"] for row in rows if row.get(when)]
    return ladders.mean(found) if found else None


def plot(rows: Sequence[cells.Cell], path: Path) -> None:
    """Of one setting: accuracy over steps at the best rates, and forgetting."""
    # Where LoRA never comes to 99%, methods are compared at 90%.
    early = all("forgetting_mostly" in row for row in rows)
    when, until, share = "forgetting", steps, "99%"
    if early:
        when, until, share = "forgetting_mostly", mostly, "90%"
    with figure(path, 1, 2, figsize=(10, 4.2)) as (made, ((left, right),)):
        for name in dict.fromkeys(row["name"] for row in rows):
            here = [row for row in rows if row["name"] == name]
            style = teaching.style(name)
            curves = [row["accuracies"] for row in teaching.at_best(here, steps)]
            longest = max(map(len, curves))  # what is known stays so
            whole = [[*c, *[c[-1]] * (longest - len(c))] for c in curves]
            plot_mean(left, np.arange(longest), whole, **style)
            ladder = [r for r in here if r["seed"] == 0 and r.get(when)]
            ladder.sort(key=lambda row: row["rate"])
            points = [(until(r), r[when]["divergence"]) for r in ladder]
            right.plot(*zip(*points, strict=True), marker="o", markersize=3, **style)
        left.set(xlabel="step", ylabel="tokens known", title="at the best rate")
        right.set(xlabel=f"steps to {share}", ylabel="forgotten (nats a token)")
        right.set(yscale="log", title="over each ladder of rates")
        legend_below(made, left)


if __name__ == "__main__":
    main()
