"""Claim: a training step with MoRA takes less time than one with LoRA.

The model is SmolLM2-135M's shape with random weights, all seven projections of each
layer adapted. The baseline, which no method can beat, is the frozen model alone: a
forward pass, and a backward pass to its input embeddings. Every adapter is first
checked against the merged model; then all run in turns. You will see a table for each
number of tokens and each rank, with times relative to the baseline, arithmetic, memory
and compile time. A second table has the forward pass alone, in which a merged model
should cost what the base costs. A JSON file and a plot are written as well.

    python -m benchmarks.step.train_step --quick
    python -m benchmarks.step.train_step --tokens 16 64 256 --operators sharing rotation
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

import mora_jax
from benchmarks.common import harness
from benchmarks.common.harness import COLUMNS, Contender, Row, random_like
from benchmarks.common.plots import plot_bars, plot_lines
from benchmarks.step.methods import Base, Params, contenders, mora
from models.options import positive
from mora_jax import linen
from mora_jax.operators import OPERATORS


def forward(
    base: Base, operators: list[str], rank: int
) -> Iterator[tuple[str, Contender]]:
    """Logits alone: of the base, of a merged model, and with adapters."""

    def logits(params: Params, ids: Any) -> Any:
        return base.model.apply({"params": params}, ids)

    yield "base model", Contender.compile(logits, base.params, base.ids)
    plan = linen.plan(base.model, {"params": base.params}, None, base.ids)
    adapters = random_like(mora_jax.init(plan), 0.01)
    merge = jax.jit(lambda params, adapters: mora_jax.merge(params, adapters, plan))
    merged = merge(base.params, adapters)
    yield "merged model", Contender.compile(logits, merged, base.ids)
    for operator in operators:
        apply, _, adapters = mora(base, operator, rank)
        args = adapters, base.params, base.ids
        yield f"MoRA, {operator}", Contender.compile(apply, *args, trained=adapters)


def arguments() -> argparse.Namespace:
    """The options."""
    parser = harness.options(__doc__, "out/train_step.json")
    add = parser.add_argument
    add("--quick", action="store_true", help="4 layers, in some minutes")
    add("--layers", type=positive, default=30)
    add("--batch", type=positive, default=8)
    add("--tokens", type=positive, nargs="+", default=[64], help="in each sequence")
    add(
        "--ranks", type=positive, nargs="+", default=[8], help="budgets, as LoRA's rank"
    )
    add(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="base dtype"
    )
    add("--rounds", type=positive, default=9)
    add("--operators", nargs="*", choices=list(OPERATORS), default=list(OPERATORS))
    add("--no-peers", dest="peers", action="store_false")
    add("--no-forward", dest="forward", action="store_false")
    add("--add-to", type=Path, help="a file of an earlier run, copied to --out as well")
    args = parser.parse_args()
    if args.quick:
        args.layers, args.rounds = 4, 5
    return args


def main() -> None:
    """Compile and check all, run them in turns, and report one table after another."""
    args = arguments()
    rows: list[Row] = []
    if args.add_to:
        rows = json.loads(args.add_to.read_text())["results"]
    for tokens, rank in itertools.product(args.tokens, args.ranks):
        base = Base.random(args.layers, args.batch, tokens, args.dtype)
        sizes = {"tokens": args.batch * tokens, "rank": rank}
        made = {"step": contenders(base, args.operators, rank, args.peers)}
        if args.forward:
            made["forward"] = forward(base, args.operators, rank)
        for kind, entered in made.items():
            title = f"{kind}, {args.batch} x {tokens} tokens, r = {rank}"
            others = 1 + 5 * args.peers if kind == "step" else 2
            total = others + len(args.operators)
            entered = dict(tqdm(entered, f"compiling: {title}", total))
            harness.race(entered, args.rounds)
            table = harness.results(entered)
            harness.show(COLUMNS, table, title)
            rows += [{"kind": kind, **sizes, **row} for row in table]
    harness.save(rows, args, leave_out=("quick", "add_to"))
    steps, image = (
        [r for r in rows if r["kind"] == "step"],
        args.out.with_suffix(".png"),
    )
    if len({(row["tokens"], row["rank"]) for row in steps}) == 1:
        plot_bars(steps, image)
    else:
        plot_lines(steps, ("tokens", "rank"), image)


if __name__ == "__main__":
    main()
