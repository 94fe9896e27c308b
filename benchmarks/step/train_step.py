"""Claim: a step with MoRA takes less time than qwix's LoRA, and about what ours takes.

Our LoRA (`operator="low_rank"`) is computed as MoRA is, and qwix's as a LoRA usually
is: between these two rows is what the fold brings, and between ours and MoRA's what
the square brings. The models are our SmolLM2-135M and transformers' FlaxLlama of the
same shape, with random weights, all seven projections of each layer adapted. The
baseline, which no method can beat, is the frozen model alone: a forward pass, and a
backward pass to its input embeddings. In our model every adapter is first checked
against the merged model; then all run in turns. You will see a table for each model,
number of tokens and rank, with times relative to the baseline, arithmetic, memory and
compile time; and then, which claims hold. A JSON file and a plot are written as well.

By default this takes six minutes on two cores, with the operators and the LoRA that
README shows. With `--all` there are all of them, and a second table has the forward
pass alone, in which a merged model should cost what the base costs.

    python -m benchmarks.step.train_step --quick
    python -m benchmarks.step.train_step --all --models SmolLM2 --rounds 7
    python -m benchmarks.step.train_step --tokens 16 64 256 --operators sharing rotation
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from benchmarks.common import harness
from benchmarks.common.harness import COLUMNS, Contender, Row
from benchmarks.common.plots import plot_bars, plot_lines
from benchmarks.step.base import MODELS, Base
from benchmarks.step.methods import contenders, mora
from benchmarks.step.peers import PEERS
from models.options import positive
from mora_jax.operators import OPERATORS

OPERATORS_OF_README = "block_diagonal", "sharing", "rotation", "low_rank"
FOLDED = harness.method_name("low_rank"), PEERS["folded"][0]
"""LoRAs that are computed as MoRA is: this library's, and one in thirty lines."""
SHARING_AT_MOST = 1.12
"""The time of a step with sharing in FlaxLlama, relative to the frozen model's."""


def forward(
    base: Base, operators: Sequence[str], rank: int
) -> Iterator[tuple[str, Contender]]:
    """Logits alone: of the base, of a merged model, and with adapters."""
    yield "base model", Contender.compile(base.plain, base.params, base.ids)
    _, merge, adapters = mora(base, "rotation", rank)
    merged = jax.jit(merge)(base.params, adapters)
    yield "merged model", Contender.compile(base.plain, merged, base.ids)
    for operator in operators:
        apply, _, adapters = mora(base, operator, rank)
        args = adapters, base.params, base.ids
        contender = Contender.compile(apply, *args, trained=adapters)
        yield harness.method_name(operator), contender


def arguments() -> argparse.Namespace:
    """The options."""
    parser = harness.options(__doc__, "out/train_step.json")
    add = parser.add_argument
    add("--quick", action="store_true", help="4 layers, in a minute")
    add("--all", action="store_true", help="all operators and peers, forward passes")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--layers", type=positive, default=30)
    add("--batch", type=positive, default=8)
    add("--tokens", type=positive, nargs="+", default=[64], help="in each sequence")
    add(
        "--ranks", type=positive, nargs="+", default=[8], help="budgets, as LoRA's rank"
    )
    add(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="base dtype"
    )
    add("--rounds", type=positive, default=3, help="how often each step is timed")
    add("--operators", nargs="*", choices=OPERATORS, default=OPERATORS_OF_README)
    add("--peers", nargs="*", choices=PEERS, default=["qwix"], help="other methods")
    add("--forward", action="store_true", help="forward passes as well")
    text = "an earlier run's file, whose rows of the same methods go to --out as well"
    add("--add-to", type=Path, help=text)
    args = parser.parse_args()
    if args.quick:
        args.layers = 4
    if args.all:
        args.operators, args.peers, args.forward = list(OPERATORS), list(PEERS), True
    return args


def rows_of(
    args: argparse.Namespace, model: str, tokens: int, rank: int
) -> Iterator[Row]:
    """Compile and check all methods of a model, run them in turns, and show them."""
    base = Base.random(model, args.layers, args.batch, tokens, args.dtype)
    entered = {"step": contenders(base, args.operators, rank, args.peers)}
    if args.forward:
        entered["forward"] = forward(base, args.operators, rank)
    for kind, programs in entered.items():
        title = f"{model}, {kind}, {args.batch} x {tokens} tokens, r = {rank}"
        programs = dict(tqdm(programs, f"compiling: {title}"))
        # In training a step follows one of its kind, whose memory it finds.
        harness.race(programs, args.rounds, warm=1)
        table = harness.results(programs)
        harness.show(COLUMNS, table, title)
        sizes = {"model": model, "tokens": args.batch * tokens, "rank": rank}
        yield from ({"kind": kind, **sizes, **row} for row in table)


def claims(rows: Sequence[Row]) -> None:
    """Print which claims hold for the steps of one model, and one size and rank."""
    times = {row["method"]: row["time"] for row in rows}
    ours = [time for name, time in times.items() if name.startswith("MoRA")]
    model = "{model}, {tokens:,} tokens, r = {rank}".format(**rows[0])
    for name, time in times.items():
        if ours and name.startswith("LoRA"):
            text = f"MoRA {min(ours):.2f} to {max(ours):.2f}, {name} {time:.2f}"
            limit, words = time, "less time than"
            if name in FOLDED:
                limit, words = 1.05 * time, "at most 5% more time than"
            claim = f"{model}: each operator takes {words} {name}"
            harness.claim(claim, max(ours) < limit, text)
    if len(pair := [times[name] for name in FOLDED if name in times]) == 2:
        claim = f"{model}: {FOLDED[0]} takes at most 5% more time than {FOLDED[1]}"
        text = f"{pair[0]:.2f} and {pair[1]:.2f}"
        harness.claim(claim, pair[0] < 1.05 * pair[1], text)
    if rows[0]["model"] == "FlaxLlama" and "MoRA, sharing" in times:
        time = times["MoRA, sharing"]
        claim = f"{model}: sharing takes at most {SHARING_AT_MOST} of the frozen model"
        harness.claim(claim, time <= SHARING_AT_MOST, f"{time:.2f}")


def main() -> None:
    """Time all models and sizes, and report."""
    args = arguments()
    sizes = args.models, args.tokens, args.ranks
    runs = [list(rows_of(args, *size)) for size in itertools.product(*sizes)]
    print()
    for run in runs:
        claims([row for row in run if row["kind"] == "step"])
    rows = list(itertools.chain(*runs))
    if args.add_to:
        earlier = json.loads(args.add_to.read_text())["results"]
        same = {(row["kind"], row["model"], row["method"]) for row in rows}
        named = [(row["kind"], row["model"], row["method"]) for row in earlier]
        kept = [row for row, name in zip(earlier, named, strict=True) if name in same]
        rows = kept + rows
    harness.save(rows, args, leave_out=("quick", "all", "add_to"))
    plot([row for row in rows if row["kind"] == "step"], args.out.with_suffix(".png"))


def plot(steps: Sequence[Row], path: Path) -> None:
    """Plot the times of steps, over the sizes if there are several."""
    if len({(row["tokens"], row["rank"]) for row in steps}) == 1:
        return plot_bars(steps, path)
    if len({row["model"] for row in steps}) > 1:
        steps = [row | {"method": "{method}, {model}".format(**row)} for row in steps]
    return plot_lines(steps, ("tokens", "rank"), path)


if __name__ == "__main__":
    main()
