"""Claim: at equal recall of new facts MoRA forgets no more than LoRA.

SmolLM2 learns the codes of airports, with questions in two wordings. While it learns,
it is asked in a third, and what it says to ordinary questions and text is compared
with what the untouched model says. The first point of each run is that model. Each
method has a ladder of learning rates. You will see recall against forgetting along
every run, and for each rate what was forgotten when the facts were recalled.

    python -m benchmarks.quality.facts --quick
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import options, save, show
from benchmarks.plots import figure
from benchmarks.quality import cells, language, teaching
from models import lesson, smollm2
from models.airports import all_facts
from models.lesson import Batch
from models.options import positive

TAUGHT = ("Tell me the IATA code of {}.", "Which IATA code does {} have?")
ASKED = "What is the airport code of {}?"
ANSWER = "The IATA code of {} is {}."
METHODS = ("full", "lora", "rotation", "subspace")
EVERY = 2  # steps between questions
RECALLED = 0.95


def taught_and_asked(count: int, seed: int) -> tuple[Batch, Batch]:
    """Facts as they are taught, and as they are asked."""
    tokenizer = language.base().tokenizer
    facts = list(itertools.islice(all_facts(seed), count))
    # "Tell me the IATA code of NAME."
    names = [fact.question[len(TAUGHT[0]) - len("{}.") : -1] for fact in facts]
    codes = [fact.code for fact in facts]

    def batch(wordings: Sequence[str]) -> Batch:
        facts = list(zip(names, codes, strict=True))
        pairs = [(w.format(n), n, c) for w in wordings for n, c in facts]
        prompts = [tokenizer.chat(question) for question, _, _ in pairs]
        replies = [ANSWER.format(name, code) for _, name, code in pairs]
        ended = [[*tokenizer.encode(reply), smollm2.EOS] for reply in replies]
        return lesson.batch(prompts, ended)

    return batch(TAUGHT), batch([ASKED])


def compute(cell: cells.Cell) -> cells.Cell:
    """Recall and forgetting along a run."""
    taught, asked = taught_and_asked(cell["facts"], cell["seed"])
    points, program = [], teaching.program_of(cell, taught)
    batches = itertools.repeat(taught, cell["steps"])
    run = teaching.train(program, batches, teaching.warmed_up(cell["rate"]))
    for k, step in enumerate(run):
        if k % EVERY:
            continue
        model = program.model(step.trained)
        recall = language.recall(model(asked.ids, asked.at), asked)
        points.append({"step": k, "recall": recall, **language.forgetting(model)})
        if recall == 1:
            break
    return {"points": points, "parameters": program.parameters}


def main() -> None:
    """Learn with all methods and rates, and report recall and forgetting."""
    parser = options(__doc__, "out/facts.json")
    add = parser.add_argument
    add("--methods", nargs="+", choices=teaching.METHODS, default=list(METHODS))
    add("--rank", type=positive, default=8)
    add("--facts", type=positive, default=16)
    add("--seeds", type=positive, default=1, help="sets of facts")
    add("--steps", type=positive, default=31, help="largest number of steps")
    add("--quick", action="store_true", help="8 facts, rotation and LoRA, three rates")
    args = parser.parse_args()
    if args.quick:
        args.methods, args.facts = ["lora", "rotation"], 8
    wanted = [
        teaching.settings(name, args.rank)
        | {"rate": rate, "facts": args.facts, "seed": seed, "steps": args.steps}
        for name in args.methods
        for rate in teaching.rates(name, quick=args.quick)
        for seed in range(args.seeds)
    ]
    each = len(wanted) // len(args.methods)
    names = [name for name in args.methods for _ in range(each)]
    found = cells.run(wanted, compute, args.out.with_suffix(".jsonl"))
    rows = [
        {"name": name, **row, "recalled": when_recalled(row)}
        for name, row in zip(names, found, strict=True)
    ]
    columns = {
        "method": "{name}",
        "parameters": "{parameters:,}",
        "rate": "{rate:.1e}",
        "steps": "{step}",
        "recall": "{recall:.0%}",
        "divergence": "{divergence:.3f}",
        "same tokens": "{same:.0%}",
        "text": "{text:.2f}",
    }
    show(columns, [{**row, **(row["recalled"] or row["points"][-1])} for row in rows])
    save(rows, args)
    plot(rows, args.methods, args.out.with_suffix(".png"))


def when_recalled(row: cells.Cell) -> cells.Cell | None:
    """The first point of a run at which the facts are recalled."""
    return next((p for p in row["points"] if p["recall"] >= RECALLED), None)


def plot(rows: Sequence[cells.Cell], methods: Sequence[str], path: Path) -> None:
    """Recall against forgetting: every run, and where the facts are recalled."""
    with figure(path, 1, 2, figsize=(11, 4)) as (made, axes):
        for name in methods:
            colour = teaching.colour(name)
            here = [row for row in rows if row["name"] == name]
            for number, row in enumerate(here):
                points = [(p["divergence"], p["recall"]) for p in row["points"]]
                label = None if number else name
                style = {"color": colour, "label": label, "linewidth": 0.7}
                axes[0, 0].plot(*zip(*points, strict=True), **style)
            ends = [row["recalled"] for row in here if row["recalled"]]
            points = [(end["step"], end["divergence"]) for end in ends]
            if points:
                axes[0, 1].plot(*zip(*points, strict=True), "o-", color=colour)
        axes[0, 0].set(xscale="symlog", xlabel="forgotten (nats a token)")
        axes[0, 0].set(ylabel="facts recalled in another wording")
        axes[0, 1].set(xlabel=f"steps to {RECALLED:.0%}", yscale="log")
        axes[0, 1].set(ylabel="forgotten (nats a token)")
        made.legend(loc="outside right center")


if __name__ == "__main__":
    main()
