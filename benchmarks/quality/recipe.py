"""Claim: at full fine-tuning's rate MoRA needs fewer steps than LoRA, and forgets less.

SmolLM2 learns random pairs until 99% of their tokens are the likeliest, and the codes
of airports until 95% are recalled. LoRA has the rate at which it needs the fewest
steps, another one in each setting. Full fine-tuning has its own best rate. So has every
M, in all settings: nothing is searched. What is damped is damped by text that the
untouched model says of itself. You will see the steps, beside LoRA's of the same sets,
and what was forgotten by then, in nats a token.

Runs of LoRA and of full fine-tuning are those of `pairs.py` and `facts.py`, and are
run where they are missing.

    python -m benchmarks.quality.recipe --quick
"""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.common.harness import save, show
from benchmarks.quality import cells, damping, facts, pairs, teaching

FULL = 4e-4
"""Full fine-tuning's best rate for pairs and for facts, and the rate of every M."""


class Setting(NamedTuple):
    """What is learned, and LoRA's best rate for it.

    Attributes:
        task: "pairs" or "facts".
        extent: The setting of `pairs.py`; facts have its rank and kernels.
        lora: The rate at which LoRA needs the fewest steps.
    """

    task: str
    extent: str
    lora: float


SETTINGS = {
    "pairs, r=8": Setting("pairs", "r=8", 4e-3),
    "pairs, r=1": Setting("pairs", "r=1", 8e-3),
    "pairs, r=1, 4 layers": Setting("pairs", "r=1, 4 layers", 1.6e-2),
    "facts, r=8": Setting("facts", "r=8", 4e-3),
}
METHODS = (
    "lora",
    "lora, damped 0",
    "block_diagonal",
    "block_diagonal, damped 0",
    "block_diagonal, damped 4",
    "rotation",
    "sharing",
    "subspace",
    "subspace, damped 0",
    "full",
)
TEXT = "own"


def cell_of(setting: Setting, method: str, seed: int) -> cells.Cell:
    """The settings of one run."""
    extent = pairs.SETTINGS[setting.extent]
    cell = teaching.settings(method, extent.rank, extent.targets)
    if setting.task == "pairs":
        cell |= {"pairs": 16, "steps": extent.steps}
    else:
        cell |= facts.USUAL
    if "damped" in method:
        cell["text"] = TEXT
    rate = setting.lora if method.startswith("lora") else FULL
    return {**cell, "rate": rate, "seed": seed}


def compute(cell: cells.Cell) -> cells.Cell:
    """Learn with one method."""
    return facts.compute(cell) if "facts" in cell else pairs.compute(cell)


def runs_of(
    args: argparse.Namespace, setting: Setting, method: str
) -> list[cells.Cell]:
    """The runs of a method, all that are finished with --report."""
    wanted = [cell_of(setting, method, seed) for seed in range(args.seeds)]
    others = teaching.RESULTS / f"{setting.task}.jsonl"
    found = []
    for cell in wanted:
        rows = cells.kept(others, cell) or cells.kept(teaching.store_of(args), cell)
        if not rows and not args.report:
            rows = cells.run([cell], compute, teaching.store_of(args))
        found += [{**row, "task": setting.task} for row in rows]
    return found


def main() -> None:
    """Learn with all methods, and report steps and forgetting."""
    quick = "pairs at r=8 alone, one set, LoRA and the default"
    parser = teaching.options(__doc__, "out/recipe.json", quick, METHODS)
    names = list(SETTINGS)
    parser.add_argument("--settings", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    if args.quick:
        args.settings, args.seeds = names[:1], 1
        args.methods = ["lora", "block_diagonal"]
    summaries: list[dict[str, Any]] = []
    rows: list[cells.Cell] = []
    for name in args.settings:
        setting = SETTINGS[name]
        found = {method: runs_of(args, setting, method) for method in args.methods}
        found = {method: of_method for method, of_method in found.items() if of_method}
        beside = found.get("lora", [])
        for method, of_method in found.items():
            rows += [{"setting": name, "name": method, **row} for row in of_method]
            summaries.append(
                {
                    "setting": name,
                    "name": method,
                    "title": teaching.title(method),
                    "parameters": of_method[0]["parameters"],
                    "rate": of_method[0]["rate"],
                    **damping.summary(of_method, beside),
                    "forgotten_ratio": forgotten_ratio(of_method, beside),
                }
            )
    columns = {
        "setting": "{setting}",
        "method": "{title}",
        "parameters": "{parameters:,}",
        "rate": "{rate:.1e}",
        "sets": "{sets}",
        "steps": "{steps:.1f}",
        "of LoRA's": "{ratio:.2f}",
        "error": "{error:.2f}",
        "forgotten (nats)": "{forgotten:.3f}",
        "of what LoRA forgets": "{forgotten_ratio:.2f}",
    }
    show(columns, summaries)
    short = [{k: v for k, v in r.items() if not isinstance(v, list)} for r in rows]
    save(short, args, summaries=summaries)


def forgotten_ratio(
    rows: Sequence[cells.Cell], others: Sequence[cells.Cell]
) -> float | None:
    """What a method forgot, of what LoRA did with the same sets."""
    mine = {row["seed"]: damping.learned(row)[1] for row in rows}
    theirs = {row["seed"]: damping.learned(row)[1] for row in others}
    both = mine.keys() & theirs.keys()
    if not both:
        return None
    return sum(mine[k] for k in both) / sum(theirs[k] for k in both)


if __name__ == "__main__":
    main()
