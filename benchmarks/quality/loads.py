"""Claim: the more an adapter has to learn, the further MoRA is ahead of LoRA.

A small Llama (see small.py) learns random facts: 0.05, 0.5 and 1 bit for each parameter
that LoRA trains, which are about as many as MoRA's. You will see the steps to 90% and
to 99% of the tokens, of each method at its own best rate.

    python -m benchmarks.quality.loads --quick
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks.common.harness import options, save, show
from benchmarks.common.plots import figure, legend_below
from benchmarks.quality import baselines, cells, earlier, ladders, small, teaching
from benchmarks.quality.learners import Learner
from models.options import positive

WIDTH = 64
BITS = small.VALUE * math.log2(small.VOCAB)
LOADS = (0.05, 0.5, 1.0)
METHODS = {
    "full": 1e-3,
    "lora": 4e-3,
    "lora+": 1e-3,
    "lora, renewed": 4e-3,
    "lora-one": 4e-3,
    "lora-ga": 4e-3,
    "lora-xs": 1e-3,
    "miss": 1e-3,
    "signed_miss": 1e-3,
    "signed_decoupling": 1e-3,
    "decoupling": 1e-3,
    "signed_sharing": 1e-3,
    "sharing": 1e-3,
    "rotation": 1e-3,
    "block_diagonal": 1e-3,
    "block_diagonal, damped": 1e-3,
    "rotation, start": 1e-3,
    "orthogonal": 1e-3,
    "orthogonal, renewed": 1e-3,
    "subspace": 1e-3,
    "subspace, start": 1e-3,
    "halves": 1e-3,
    "subspace, renewed": 1e-3,
    "subspace, start, renewed": 1e-3,
}
"""Each with the lowest rate of its ladder."""
RATES = 7


def learner(method: str, rank: int, ids: jax.Array) -> Learner:
    """A way to teach the small model some facts."""
    task = small.task(small.base(WIDTH), ids)
    return baselines.make(method, task, rank, earlier.SCALE, multiple_of=1)


@functools.lru_cache
def size(method: str, rank: int) -> int:
    """The number of parameters that a method trains."""
    found = learner(method, rank, small.facts(1, seed=0))
    return sum(leaf.size for leaf in jax.tree.leaves(found.start))


def compute(cell: cells.Cell) -> cells.Cell:
    """Steps on a ladder of rates, to 90% and to 99% of the tokens."""
    make = functools.partial(learner, cell["method"], cell["rank"])
    rates = ladders.rungs(METHODS[cell["method"]], RATES)
    settings = cell["facts"], cell["seeds"], cell["steps"], cell.get("renew", 0)
    curves = small.learn(make, small.base(WIDTH), rates, *settings)
    steps = {str(share): small.steps_to(share, curves) for share in (0.9, 0.99)}
    best = np.max(np.mean(curves, axis=0), axis=-1).tolist()
    return {"rates": rates, **steps, "accuracies": best}


def main() -> None:
    """Learn at each load with each method, and report the best rates."""
    parser = options(__doc__, "out/loads.json")
    add = parser.add_argument
    add("--rank", type=positive, default=8)
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--loads", type=float, nargs="+", default=list(LOADS))
    add("--seeds", type=positive, default=3, help="sets of facts")
    add("--steps", type=positive, default=200, help="largest number of steps")
    add("--renew", type=positive, default=48, help="steps until what is renewed is")
    add("--quick", action="store_true", help="the least load, rotation and LoRA")
    args = parser.parse_args()
    if args.quick:
        args.methods, args.loads, args.seeds = ["lora", "rotation"], args.loads[:1], 1
    budget = size("lora", args.rank)
    wanted = [
        {
            "method": method,
            "rank": args.rank,
            "facts": max(1, round(load * budget / BITS)),
            "seeds": args.seeds,
            "steps": args.steps,
        }
        | ({"renew": args.renew} if method.endswith("renewed") else {})
        for load in args.loads
        for method in args.methods
    ]
    found = cells.run(wanted, compute, args.out.with_suffix(".jsonl"))
    loads = [load for load in args.loads for _ in args.methods]
    rows = [{"load": load, **row} for load, row in zip(loads, found, strict=True)]
    columns = {
        "bits for each parameter": "{load}",
        "facts": "{facts}",
        "method": "{method}",
        "parameters": "{parameters:,}",
        "best rate": "{rate:.1e}",
        "steps to 90%": "{to90:.1f}",
        "to 99%": "{to99:.1f}",
        "of LoRA's": "{ratio:.2f}",
        "error": "{error:.2f}",
        "with gradients beside": "{passes:.2f}",
        "most tokens known": "{known:.1%}",
    }
    show(columns, [{**row, **summary(row, rows, args.rank)} for row in rows])
    save(rows, args)
    plot(rows, args.methods, args.out.with_suffix(".png"))


def summary(row: cells.Cell, rows: Sequence[cells.Cell], rank: int) -> cells.Cell:
    """A method at its best rate, beside LoRA at its own on the same facts.

    Where no rate of the ladder came there, or the best is on an edge, there is None.
    """
    at, steps = at_best(row)
    beside = next(
        (r for r in rows if r["method"] == "lora" and r["load"] == row["load"]), row
    )
    _, others = at_best(beside)
    ratio = error = passes = None
    if steps and others:
        ratio, error = teaching.paired(steps, others)
        renew = row.get("renew") or math.inf
        counts = [baselines.passes(row["method"], s, s // renew) for s in steps]
        passes, _ = teaching.paired(counts, others)
    to90 = ladders.means(row["0.9"])
    return {
        "parameters": size(row["method"], rank),
        "rate": at,
        "to90": min(to90) if math.isfinite(min(to90)) else None,
        "to99": ladders.mean(steps) if steps else None,
        "ratio": ratio,
        "error": error,
        "passes": passes,
        "known": max(row["accuracies"]),
    }


def at_best(row: cells.Cell) -> tuple[float | None, list[float]]:
    """The best rate, and the steps of each seed there; nothing if there is none."""
    means = dict(zip(row["rates"], ladders.means(row["0.99"]), strict=True))
    try:
        best = ladders.best_of(means)
    except ValueError as error:
        print(f"{row['method']}, {row['facts']} facts: {error}")
        return None, []
    column = row["rates"].index(best)
    return best, [steps[column] for steps in row["0.99"]]


def plot(rows: Sequence[cells.Cell], methods: Sequence[str], path: Path) -> None:
    """Steps to 99% over rates, at each load."""
    loads = list(dict.fromkeys(row["load"] for row in rows))
    size = 3.5 * len(loads) + 2, 3.5
    with figure(path, 1, len(loads), figsize=size, sharey=True) as (made, axes):
        for axis, load in zip(axes[0], loads, strict=True):
            for row in (row for row in rows if row["load"] == load):
                settings = {
                    "marker": ".",
                    "capsize": 2,
                    **teaching.style(row["method"]),
                }
                steps, errors = ladders.means(row["0.99"]), ladders.errors(row["0.99"])
                axis.errorbar(row["rates"], steps, errors, **settings)
            axis.set(xscale="log", yscale="log", xlabel="learning rate")
            axis.set_title(f"{load} bits for each parameter")
        axes[0, 0].set_ylabel("steps to 99% of the tokens")
        legend_below(made, axes[0, 0])


if __name__ == "__main__":
    main()
