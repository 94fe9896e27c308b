"""Claim: what MoRA adds to the kernels has a far higher rank than what LoRA adds.

SmolLM2 learns random pairs as in pairs.py, with each method at its best rate there. You
will see the effective rank of what was added to the kernels (the exponential of the
entropy of their singular values), and the mean of their spectra: the paper's figures.

    python -m benchmarks.quality.spectra --quick
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.harness import options, save, show
from benchmarks.common.plots import figure
from benchmarks.quality import cells, earlier, pairs, teaching
from models.options import positive
from mora_jax.diagnostics import effective_rank

RATES = {
    "full": 2e-4,
    "lora": 4e-3,
    "rotation": 4e-4,
    "signed_decoupling": 4e-4,
    "signed_sharing": 4e-4,
    "subspace": 4e-4,
}
"""Each with its best rate in pairs.json, r = 8; full fine-tuning with half of it, at
which it needs about as many steps and forgets less."""
SMALL = 0.01  # of the largest singular value


def compute(cell: cells.Cell) -> cells.Cell:
    """Learn some pairs; the singular values of all that was added."""
    batch = pairs.pairs(cell["pairs"], cell["seed"])
    program, trained = teaching.program_of(cell, batch), None
    batches = itertools.repeat(batch, cell["steps"])
    steps = teaching.train(program, batches, teaching.warmed_up(cell["rate"]))
    for step in steps:
        trained = step.trained
        if step.accuracy >= teaching.KNOWN:
            break
    names = "path", "width", "effective_rank", "above", "spectrum"
    found: dict[str, list[Any]] = {name: [] for name in names}
    deltas = program.learner.deltas(trained)
    for path, delta in deltas.items():
        values = np.linalg.svd(np.asarray(delta), compute_uv=False)
        values = values / values[0]
        found["path"].append("/".join(path))
        found["width"].append(len(values))
        found["effective_rank"].append(round(float(effective_rank(values)), 2))
        found["above"].append(int((values > SMALL).sum()))
        share = np.linspace(0, 1, 33)
        along = np.interp(share, np.linspace(0, 1, len(values)), values)
        found["spectrum"].append([float(f"{value:.3g}") for value in along])
    return {**found, "parameters": program.parameters}


def main() -> None:
    """Learn, and report ranks and spectra."""
    parser = options(__doc__, "out/spectra.json")
    add = parser.add_argument
    add("--methods", nargs="+", choices=RATES, default=list(RATES))
    add("--rank", type=positive, default=8)
    add("--pairs", type=positive, default=16)
    add("--steps", type=positive, default=60, help="largest number of steps")
    add("--quick", action="store_true", help="4 pairs, rotation and LoRA")
    args = parser.parse_args()
    if args.quick:
        args.methods, args.pairs = ["lora", "rotation"], 4
    wanted = [
        teaching.settings(f"{name} {earlier.SCALE}", args.rank)
        | {"rate": RATES[name], "pairs": args.pairs, "seed": 0, "steps": args.steps}
        for name in args.methods
    ]
    rows = cells.run(wanted, compute, args.out.with_suffix(".jsonl"))
    columns = {
        "method": "{method}",
        "parameters": "{parameters:,}",
        "effective rank": "{rank_of_deltas:.0f}",
        "singular values above 1% of the largest": "{above_small:.0f}",
        "of": "{width:.0f}",
    }
    summaries = [
        {
            **row,
            "rank_of_deltas": np.mean(row["effective_rank"]),
            "above_small": np.mean(row["above"]),
            "width": np.mean(row["width"]),
        }
        for row in rows
    ]
    show(columns, summaries)
    save(rows, args)
    plot(rows, args.out.with_suffix(".png"))


def plot(rows: Sequence[cells.Cell], path: Path) -> None:
    """The mean spectrum of each method."""
    with figure(path, 1, 1, figsize=(6, 4)) as (_, axes):
        for row in rows:
            spectrum = np.mean(row["spectrum"], axis=0)
            share = np.linspace(0, 1, len(spectrum))
            style = teaching.style(row["method"])
            axes[0, 0].plot(share, np.maximum(spectrum, 1e-4), **style)
        axes[0, 0].set(yscale="log", xlabel="number of the singular value / all")
        axes[0, 0].set(ylabel="singular value / the largest")
        axes[0, 0].legend()


if __name__ == "__main__":
    main()
