"""Claim: with scale="fine-tuning" full fine-tuning's learning rate suits every M.

A small Llama (see small.py) learns 32 facts that it does not know, with Adam: by full
fine-tuning of its projections, and with MoRA of several operators, ranks and widths, on
a ladder of rates and with both settings of `scale`. The best rate is the one with the
fewest steps to 99% of the tokens (geometric mean over several sets of facts; between
rates by a parabola). You will see the best rate of each relative to full fine-tuning's,
and how many times as many steps full fine-tuning's rate takes.

    python -m benchmarks.quality.one_rate --quick
"""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import geometric_mean

import numpy as np

from benchmarks.common.harness import options, save, show
from benchmarks.common.plots import figure
from benchmarks.quality import cells, small
from benchmarks.quality.ladders import at_rate, mean, means, vertex
from models.options import positive
from mora_jax import MoRAConfig

OPERATORS = (
    "rotation",
    "decoupling",
    "signed_decoupling",
    "signed_sharing",
    "sharing",
    "orthogonal",
    "hadamard",
    "truncation",
)
FACTS, STEPS = 32, 150
FULL_RATES = tuple(1e-3 * 2**k for k in range(8))
LADDER = tuple(2.0**k for k in range(-4, 4))
"""Rates relative to full fine-tuning's best at the same width."""


def compute(cell: cells.Cell) -> cells.Cell:
    """Steps on a ladder of rates, for one method, rank and width."""
    base, seeds = small.base(cell["width"]), cell["seeds"]
    if cell["method"] == "full":
        curves = small.learn(
            lambda _: small.full(base), base, FULL_RATES, FACTS, seeds, STEPS
        )
        return {"rates": list(FULL_RATES), "steps": small.steps_to(0.99, curves)}
    config = MoRAConfig(
        operator=cell["method"],
        rank=cell["rank"],
        # Blocks are those of the default.
        multiple_of=None if cell["method"] == "block_diagonal" else 1,
        scale="fine-tuning",
    )
    scale = geometric_mean(spec.scale for spec in small.plan(base, config).values())
    config = dataclasses.replace(config, scale=cell["scale"])
    unit = cell["unit"] * (scale if cell["scale"] == "paper" else 1)
    rates = [unit * x for x in LADDER]
    learner = small.mora(base, config)
    curves = small.learn(lambda _: learner, base, rates, FACTS, seeds, STEPS)
    return {"rates": rates, "steps": small.steps_to(0.99, curves)}


def main() -> None:
    """Learn on all ladders, and report where the best rates are."""
    parser = options(__doc__, "out/one_rate.json")
    parser.add_argument("--widths", type=positive, nargs="+", default=[64, 128])
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 4, 8, 32])
    parser.add_argument("--operators", nargs="+", default=list(OPERATORS))
    parser.add_argument("--seeds", type=positive, default=2, help="sets of facts")
    parser.add_argument("--quick", action="store_true", help="one width and one rank")
    args = parser.parse_args()
    if args.quick:
        args.widths, args.ranks, args.seeds = args.widths[:1], [8], 1
        args.operators = args.operators[:2]
    store = args.out.with_suffix(".jsonl")
    fulls = [{"method": "full", "width": w, "seeds": args.seeds} for w in args.widths]
    rows = cells.run(fulls, compute, store)
    units = {row["width"]: vertex(row["rates"], means(row["steps"])) for row in rows}
    rows += cells.run(list(ladders(args, units)), compute, store)
    for row in rows:
        add_best(row, *units[row["width"]])
    columns = {
        "width": "{width}",
        "operator": "{method}",
        "r": "{rank}",
        "scale": "{scale}",
        "best rate / full's": "{best:.2f}",
        "steps at best": "{fewest:.1f}",
        "at full's rate": "{at_full:.1f}",
    }
    blank = dict.fromkeys(("rank", "scale"))
    show(columns, [{**blank, **row} for row in rows])
    show_ranges(rows)
    show_operators(rows)
    save(rows, args)
    plot(rows, args.out.with_suffix(".png"))


def ladders(
    args: argparse.Namespace, units: Mapping[int, tuple[float, float]]
) -> Iterator[cells.Cell]:
    """The cells of all adapters."""
    scales = "fine-tuning", "paper"
    every = itertools.product(args.operators, args.ranks, args.widths, scales)
    for operator, rank, width, scale in every:
        yield {
            "method": operator,
            "rank": rank,
            "scale": scale,
            "width": width,
            "unit": units[width][0],
            "seeds": args.seeds,
        }


def add_best(row: cells.Cell, unit: float, fewest: float) -> None:
    """Add to a finished cell its best rate, and its steps there and at full's.

    Values are None where no rate of the ladder came to 99%, or the best is on an edge.
    """
    steps = means(row["steps"])
    at_full = at_rate(row["rates"], steps, unit)
    row |= {"unit": unit, "at_full": at_full if math.isfinite(at_full) else None}
    try:
        rate, row["fewest"] = vertex(row["rates"], steps)
        row["best"] = rate / unit
    except ValueError as error:
        print(f"{row}: {error}")
        row["best"] = row["fewest"] = None


def show_ranges(rows: list[cells.Cell]) -> None:
    """Print what all operators have in common."""
    ranges = []
    for scale, small_rank in itertools.product(("fine-tuning", "paper"), (False, True)):
        found = [
            row
            for row in rows
            if row.get("scale") == scale
            and (row["rank"] == 1) == small_rank
            and row["best"]
        ]
        more = [row["at_full"] / row["fewest"] for row in found if row["at_full"]]
        if more:
            bests = [row["best"] for row in found]
            least, most = min(bests), max(bests)
            ranges.append(
                {
                    "scale": scale,
                    "rank": "1" if small_rank else "4 and more",
                    "best": f"{least:.2f} to {most:.2f}",
                    "steps": f"{min(more):.2f} to {max(more):.2f}",
                    "never": f"{len(found) - len(more)} of {len(found)}",
                }
            )
    columns = {
        "scale": "{scale}",
        "r": "{rank}",
        "best rate / full's": "{best}",
        "steps at full's rate / at best": "{steps}",
        "never": "{never}",
    }
    show(columns, ranges)


def show_operators(rows: list[cells.Cell]) -> None:
    """Print the steps of each operator at its best rate, relative to the fewest.

    With the scale; the mean of all widths.
    """
    found: dict[tuple[int, int], dict[str, float]] = {}
    for row in rows:
        if row.get("scale") == "fine-tuning":
            steps = row["fewest"] or math.inf
            found.setdefault((row["rank"], row["width"]), {})[row["method"]] = steps
    ranks = sorted({rank for rank, _ in found})
    shares: dict[str, dict[str, float]] = {}
    for rank in ranks:
        at_widths = [steps for (at, _), steps in found.items() if at == rank]
        for method in at_widths[0]:
            ratios = (steps[method] / min(steps.values()) for steps in at_widths)
            shares.setdefault(method, {})[f"r{rank}"] = mean(ratios)
    columns = {f"r = {rank}": f"{{r{rank}:.2f}}" for rank in ranks}
    table = [{"operator": method, **row} for method, row in shares.items()]
    show({"operator": "{operator}", **columns}, table)


def plot(rows: list[cells.Cell], path: Path) -> None:
    """Steps over rates, with and without the scale; a line for each adapter."""
    scales = {"paper": "scale='paper'", "fine-tuning": "scale='fine-tuning'"}
    with figure(path, 1, 2, figsize=(10, 4), sharey=True) as (made, axes):
        for axis, (scale, title) in zip(axes[0], scales.items(), strict=True):
            for row in rows:
                if row["method"] == "full":
                    style = {
                        "color": "black",
                        "linewidth": 2,
                        "label": "full fine-tuning",
                    }
                elif row["scale"] == scale:
                    colour = f"C{OPERATORS.index(row['method'])}"
                    style = {"color": colour, "linewidth": 0.8, "label": row["method"]}
                else:
                    continue
                rates = np.divide(row["rates"], row["unit"])
                axis.plot(rates, means(row["steps"]), **style)
            axis.set(xscale="log", yscale="log", title=title)
            axis.set_xlabel("learning rate / full fine-tuning's best at this width")
        axes[0, 0].set_ylabel("steps to 99% of the tokens")
        handles, labels = axes[0, 1].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        made.legend(unique.values(), unique.keys(), loc="outside right center")


if __name__ == "__main__":
    main()
