"""Claim: in continued pretraining MoRA comes to a lower perplexity than LoRA.

SmolLM2 reads definitions of the Human Phenotype Ontology (paper, section 5). Each
method has the same seconds, with a cosine schedule: how many steps these are is
measured first, and kept with the runs. You will see the perplexity of definitions that
it did not read, and of other text, which is Python's own documentation, at each
method's own best rate; and how far its answers to ordinary questions moved.

    python -m benchmarks.quality.pretraining --quick
"""

import argparse
import functools
import math
import pydoc_data.topics
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks.common.harness import save, show
from benchmarks.common.plots import figure, legend_below, plot_mean
from benchmarks.quality import cells, ladders, language, teaching
from models.lesson import Batch
from models.options import positive

ROWS, TOKENS = 8, 64  # of a batch
HELD_OUT = 3  # batches of each kind of text that are not trained on
FIRST = ("full", "lora", "rotation", "subspace")
LATER = ("block_diagonal", "block_diagonal, damped")
METHODS = (*FIRST, *LATER)


@functools.lru_cache
def definitions() -> np.ndarray:
    """The definitions in an order of their own, as `chunks`."""
    texts = list(language.definitions())
    np.random.default_rng(0).shuffle(texts)
    return chunks("\n".join(texts))


@functools.lru_cache
def other_text() -> np.ndarray:
    """Python's documentation of its language, as `chunks` in an order of their own."""
    found = chunks("\n".join(pydoc_data.topics.topics.values()))
    return np.random.default_rng(0).permutation(found)


def chunks(text: str) -> np.ndarray:
    """A text as rows of tokens, (chunks, TOKENS + 1)."""
    ids = np.asarray(language.base().tokenizer.encode(text), np.int32)
    count = len(ids) // (TOKENS + 1)
    return ids[: count * (TOKENS + 1)].reshape(count, TOKENS + 1)


def batch(rows: np.ndarray) -> Batch:
    """Chunks of text; each token after the first is to be foretold."""
    places = np.tile(np.arange(TOKENS, dtype=np.int32), (len(rows), 1))
    ones = np.ones(places.shape, np.float32)
    return Batch(rows[:, :-1], places, rows[:, 1:], ones)


def batches(seed: int) -> Iterator[Batch]:
    """Batches to train on, without end."""
    random, rows = np.random.default_rng(seed), definitions()[HELD_OUT * ROWS :]
    while True:
        yield batch(rows[random.choice(len(rows), ROWS, replace=False)])


def score(model: Callable[..., jax.Array]) -> dict[str, float]:
    """Losses of text that is not trained on, in nats a token."""

    def loss(rows: np.ndarray) -> float:
        parts = map(batch, np.split(rows[: HELD_OUT * ROWS], HELD_OUT))
        found = [language.loss_and_accuracy(model(b.ids, b.at), b) for b in parts]
        return float(np.mean([loss for loss, _ in found]))

    return {"definitions": loss(definitions()), "other": loss(other_text())}


def compute(cell: cells.Cell) -> cells.Cell:
    """Read definitions with one method and rate."""
    return teaching.study(cell, batches(cell["seed"]), score)


def final(row: cells.Cell) -> float:
    """The loss of definitions at the end; infinite if training broke down."""
    end = row["scores"][-1]
    return math.inf if end is None else end["definitions"]


def main() -> None:
    """Climb the ladders, and report each method at its best rate."""
    quick = "12 steps, rotation and LoRA, one order of the text"
    parser = teaching.options(__doc__, "out/pretraining.json", quick, METHODS)
    add = parser.add_argument
    add("--rank", type=positive, default=8)
    add("--steps", type=positive, default=30, help="of LoRA; others have its seconds")
    args = parser.parse_args()
    if args.quick:
        args.methods, args.steps, args.seeds = ["lora", "rotation"], 12, 1
    seconds = measured(args)
    methods = {
        name: (
            teaching.settings(name, args.rank)
            | {"steps": round(args.steps * seconds["lora"] / seconds[name])},
            teaching.rates(name, quick=args.quick),
        )
        for name in args.methods
    }
    found = teaching.runs(args, compute, methods, final)
    rows = [{"name": name, **row} for name in found for row in found[name]]
    chosen = {name: teaching.at_best(runs, final) for name, runs in found.items()}
    columns = {
        "method": "{name}",
        "parameters": "{parameters:,}",
        "orders": "{seeds}",
        "best rate": "{rate:.1e}",
        "steps": "{steps}",
        "s/step": "{seconds:.2f}",
        "perplexity before": "{before:.2f}",
        "after": "{after:.2f}",
        "of LoRA's": "{ratio:.3f}",
        "error": "{error:.3f}",
        "other text": "{other:.2f}",
        "divergence": "{divergence:.3f}",
    }
    summaries = [{**summary(name, chosen), "seconds": seconds[name]} for name in chosen]
    show(columns, summaries)
    save(rows, args, summaries=summaries)
    plot(chosen, args.out.with_suffix(".png"))


def measured(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step of each method, as measured when it was first asked.

    Each of `LATER` is measured beside LoRA on a day of its own, and counts by that.
    """

    def seconds(cell: cells.Cell) -> cells.Cell:
        names = cell.get("methods", FIRST)
        ways = {name: teaching.settings(name, cell["rank"]) for name in names}
        found = teaching.costs(ways, next(batches(0)), cell["rounds"])
        return {"seconds": {name: cost.seconds for name, cost in found.items()}}

    cell = {"measured": "seconds of a step", "rank": args.rank}
    cell["rounds"] = 1 if args.quick else 5
    wanted = [cell, {**cell, "methods": ["lora", *LATER]}]
    wanted = wanted if set(LATER) & set(args.methods) else wanted[:1]
    runs = cells.run(wanted, seconds, teaching.store_of(args))
    first, *later = [row["seconds"] for row in runs]
    for day in later:
        first |= {name: day[name] / day["lora"] * first["lora"] for name in LATER}
    return first


def summary(name: str, chosen: dict[str, list[cells.Cell]]) -> cells.Cell:
    """A method at its best rate, beside LoRA at its own on the same text."""
    rows, other = chosen[name], chosen.get("lora", chosen[name])
    ratio, error = teaching.compared(rows, other, lambda row: math.exp(final(row)))
    forgot = ladders.mean(row["forgetting"]["divergence"] for row in rows)
    return {
        "name": name,
        **{key: rows[0][key] for key in ("parameters", "rate", "steps")},
        "seeds": len(rows),
        "before": math.exp(rows[0]["scores"][0]["definitions"]),
        "after": ladders.mean(math.exp(final(row)) for row in rows),
        "ratio": ratio,
        "error": error,
        "other_before": math.exp(rows[0]["scores"][0]["other"]),
        "other": ladders.mean(math.exp(row["scores"][-1]["other"]) for row in rows),
        "divergence": forgot,
    }


def plot(chosen: dict[str, list[cells.Cell]], path: Path) -> None:
    """Both perplexities over the seconds that all have, at the best rates."""
    with figure(path, 1, 2, figsize=(9, 4)) as (made, axes):
        texts = {"definitions": "definitions, held out", "other": "other text"}
        for axis, (text, label) in zip(axes[0], texts.items(), strict=True):
            for name, rows in chosen.items():
                losses = [[at[text] for at in row["scores"]] for row in rows]
                values, style = np.exp(losses), teaching.style(name)
                share = np.linspace(0, 1, values.shape[-1])
                plot_mean(axis, share, values, marker="o", **style)
            axis.set(xlabel="share of the seconds", ylabel=f"perplexity of {label}")
            axis.set_yscale("log")
        legend_below(made, axes[0, 0])


if __name__ == "__main__":
    main()
