r"""Claim: an adapter's cost grows as arithmetic says, and planning as the kernels do.

The model is a chain of L square Dense layers for T rows of w features in float32, with
k kernels adapted. A step computes the loss and the gradients by adapters and input. The
floor is the same chain frozen. One size grows at a time, and p of y ~ x^p is fitted to
the floor's time and temporary memory, and to what adapters add to them: least squares
of log y on log x over the upper half of the sizes, at least three. Next to it is the p
that arithmetic gives at the same sizes. For times there are two of them, of operations
and of numbers read or written (`Cost` in cost.py), and a time should lie between both.
With q = sqrt(2 r w), and deltas that are folded:

    the floor  4 L T w^2 operations, L (2 w^2 + 4 T w) numbers; holds T w numbers
    rotation   adds 2 k T w q operations: M's gradient, 2 T q max(in, out) a kernel
    sharing    adds 2 k T q^2 operations
    both       add k (4 w^2 + 2 T w) numbers: two folds, and what M's gradient reads
    memory     rotation keeps k T w numbers, sharing k T q; both, one folded kernel

So p of the added operations is 1 in layers, tokens and kernels; in width 1.5 for
rotation and 1 for sharing; in rank 0.5 and 1. The sizes are such that
`execution="auto"` always folds, T >= w.

Two more parts are measured in seconds of this process's own processor time: tracing and
compiling a step, with layers one after another (p is 1 where the start of a compilation
is little compared to the rest) or in nn.scan (p is 0); and `plan` and `init` of 100 to
10,000 kernels (p is 1), which should take less than a second together.

Each adapted step is checked against the frozen one with merged kernels; then all sizes
run in turns. You will see tables of exponents; a JSON file and a plot are written.

    python -m benchmarks.layer.growth --quick
"""

import argparse
import dataclasses
import gc
import time
from collections.abc import Callable

import jax
import numpy as np
from tqdm import tqdm

from benchmarks.common.cost import Cost, way_of_auto
from benchmarks.common.harness import Contender, Row, options, race, save
from benchmarks.layer.chains import Size, Step, contenders, steps
from benchmarks.layer.exponents import FLOOR, curve, fit, plot_curves, show_curves
from benchmarks.layer.planning import kernels, plan_seconds
from models.options import positive
from mora_jax import Plan
from mora_jax.operators import OPERATORS

ITEM = 4  # bytes of a float32
SIZES = {
    "layers": (Size(tokens=512), (2, 4, 8, 16, 32)),
    "width": (Size(), (64, 128, 256, 512, 1024)),
    "rank": (Size(width=512), (1, 2, 4, 8, 16, 32, 64)),
    "tokens": (Size(), (256, 512, 1024, 2048, 4096)),
    "kernels": (Size(layers=16, tokens=512), (1, 2, 4, 8, 16)),
}
"""For each size that grows: the other sizes, and its values."""

COMPILED = (8, 16, 32, 64, 128, 256)
"""The numbers of layers to compile."""


def arithmetic(size: Size, plan: Plan | None) -> dict[str, list[float]]:
    """Terms of each quantity, of the floor or of the part that a plan adds to it."""
    rows, width = size.tokens, size.width
    if plan is None:
        times, kept = size.layers, rows * width
        cost = Cost.dense(width, width, rows, ITEM)
    else:
        spec = next(iter(plan.values()))
        way = way_of_auto(spec, rows, "float32")
        features = width if spec.operator.block else spec.operator.square_rank
        folded = width**2 if way == "fold" else 0
        times, kept = len(plan), len(plan) * rows * features + folded
        cost = Cost.adapter(spec, rows, way, ITEM)
    return {"time": [times * cost.flops, times * cost.bytes], "memory": [ITEM * kept]}


def figures(contender: Contender, floor: Contender) -> dict[str, float]:
    """Seconds and bytes of the floor, or of what another contender adds to it."""
    both = contender, floor
    seconds, least = (np.asarray(one.seconds) for one in both)
    memory, base = (one.run.memory_analysis().temp_size_in_bytes for one in both)
    if contender is not floor:
        seconds, memory = seconds - least, memory - base
    return {"time": float(np.median(seconds)), "memory": memory}


def grow_steps(args: argparse.Namespace) -> list[Row]:
    """Time and memory over each size: the floor's, and what operators add."""
    return [row for axis in SIZES for row in grow_axis(axis, args)]


def grow_axis(axis: str, args: argparse.Namespace) -> list[Row]:
    """The same over one size."""
    base, values = SIZES[axis]
    values = values[:: len(values) // 2 if args.quick else 1]
    sizes = [dataclasses.replace(base, **{axis: value}) for value in values]
    made = [steps(size, args.operators) for size in sizes]
    entered = [contenders(one) for one in tqdm(made, f"compiling, checking: {axis}")]
    for _ in tqdm(range(args.rounds), f"running: {axis}"):
        for one in entered:  # together, or noise would hide what is added
            race(one, 2, show_progress=False)
    rows = []
    for method in made[0]:
        found = [figures(one[method], one[FLOOR]) for one in entered]
        plans = [one[method].plan for one in made]
        counts = [arithmetic(*both) for both in zip(sizes, plans, strict=True)]
        for quantity in ("time", "memory"):
            y = [one[quantity] for one in found]
            parts = zip(*(one[quantity] for one in counts), strict=True)
            expected = [fit(values, part) for part in parts]
            rows.append(curve((axis, quantity, method), values, y, expected))
    return rows


def compile_seconds(step: Step) -> tuple[float, float]:
    """Seconds to trace and to compile, with empty caches."""
    jax.clear_caches()
    # What earlier steps left is collected now: else Python does it within the time of
    # whichever step comes next, 20 ms of the 90 that tracing eight layers takes.
    gc.collect()
    start = time.process_time()
    lowered = jax.jit(step.function).lower(*step.args)
    middle = time.process_time()
    lowered.compile()
    return middle - start, time.process_time() - middle


def grow_compilation(args: argparse.Namespace) -> list[Row]:
    """Tracing and compiling over layers, one after another and scanned."""
    values, rounds = COMPILED[: 3 if args.quick else None], 3
    rows = []
    for scanned, way in enumerate(("unrolled", "scanned")):
        sizes = [Size(layers=k, width=64, tokens=64) for k in values]
        made = [steps(size, args.operators, bool(scanned)) for size in sizes]
        taken = [
            [[compile_seconds(step) for step in one.values()] for one in made]
            for _ in tqdm(range(rounds), f"compiling: {way}")
        ]
        median = np.median(taken, axis=0)  # (sizes, methods, trace and compile)
        for m, method in enumerate(made[0]):
            for k, quantity in enumerate(("trace", "compile")):
                names = "layers", f"{quantity}, {way}", method
                rows.append(curve(names, values, median[:, m, k], [1.0 - scanned]))
    return rows


def grow_planning(args: argparse.Namespace) -> list[Row]:
    """Plans and adapters over kernels; the first round is reported separately."""
    counts, rounds = (10_000, 1_000, 100), min(args.rounds, 5)
    trees = [kernels(count) for count in counts]
    taken = [
        [plan_seconds(tree) for tree in trees]
        for _ in tqdm(range(1 + rounds), "planning")
    ]
    first, median = taken[0][0], np.median(taken[1:], axis=0)[::-1]
    names = "plan", "init", "plan and init"
    return [
        curve(("kernels", name, "rotation"), counts[::-1], median[:, k], [1.0])
        | {"first": first[k]}
        for k, name in enumerate(names)
    ]


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "planning": grow_planning,
    "steps": grow_steps,
    "compilation": grow_compilation,
}


def arguments() -> argparse.Namespace:
    """The options."""
    parser = options(__doc__, "out/growth.json")
    add, usual = parser.add_argument, ["sharing", "rotation"]
    add("--quick", action="store_true", help="few sizes, in half a minute")
    add("--rounds", type=positive, default=7, help="each runs all twice")
    add("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    add("--operators", nargs="+", choices=[*OPERATORS], default=usual)
    args = parser.parse_args()
    args.rounds = min(args.rounds, 2) if args.quick else args.rounds
    return args


def main() -> None:
    """Measure and print one part after another, then write all."""
    args = arguments()
    jax.config.update("jax_enable_compilation_cache", False)  # it would hide compiling
    rows: list[Row] = []
    for part in args.parts:
        made = PARTS[part](args)
        show_curves(made, part)
        rows += made
    save(rows, args)
    plot_curves(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
