"""Teaching SmolLM2 until it knows what it should, with each method and rate."""

import argparse
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.flax

from benchmarks.common import harness
from benchmarks.common.harness import Contender, race
from benchmarks.quality import baselines, cells, earlier, ladders, language
from benchmarks.quality.learners import Learner
from benchmarks.quality.optimizers import optimizer
from models.lesson import Batch
from models.options import positive

WARMUP = 3  # steps in which the rate grows
RATES = 5  # of a ladder, at first
KNOWN = 0.99  # of the tokens, as they are likeliest
MOSTLY = 0.9
RESULTS = Path(__file__).with_name("results")
"""What the pages show."""
TARGETS = r"layers_\d+/.*_proj/kernel"
METHODS = {
    "full": 5e-5,
    "lora": 1e-3,
    "lora+": 1e-4,
    "rotation": 1e-4,
    "block_diagonal": 5e-5,
    "block_diagonal, damped": 5e-5,
    "rotation, damped": 1e-4,
    "lora, damped": 1e-3,
    "signed_decoupling": 1e-4,
    "decoupling": 1e-4,
    "signed_sharing": 1e-4,
    "sharing": 1e-4,
    "subspace": 1e-4,
    "rotation paper": 4e-4,
    "orthogonal": 1e-4,
    "lora-one": 1e-3,
    "lora-ga": 1e-3,
    "lora-xs": 1e-4,
    "miss": 1e-4,
    "signed_miss": 1e-4,
    "rotation, start": 1e-4,
    "subspace, start": 1e-4,
    "subspace, others": 1e-4,
    "halves": 1e-4,
    "lora, renewed": 1e-3,
    "orthogonal, renewed": 1e-4,
    "subspace, renewed": 1e-4,
    "subspace, start, renewed": 1e-4,
    "block_diagonal, damped 0": 5e-5,
    "block_diagonal, damped 16": 5e-5,
    "lora, damped 0": 1e-3,
    "subspace, damped 0": 1e-4,
    "block_diagonal, damped 4": 5e-5,
    "block_diagonal, damped 64": 5e-5,
    "sharing, damped": 1e-4,
    "subspace, damped": 1e-4,
    "lora, nadam": 1e-3,
    "block_diagonal, nadam": 5e-5,
    "block_diagonal, b1=0.8": 5e-5,
    "block_diagonal, soap": 5e-5,
}
"""Each with the lowest rate that it is tried with first.

MoRA is called by its operator and has scale="fine-tuning". If its name ends with
"paper" it has that scale, and with "aligned" it is as `earlier.py` makes it. "subspace"
is between the directions of the first gradient. With "start" M starts as a step of
gradient descent. What is "renewed" is merged at equal intervals and starts again
between other maps, along a new gradient if it was along one. With "others" the first
gradient is of a few other samples than those that are taught. What is "damped" has
damped inputs, by ordinary text unless a cell says else; with 16 directions unless it
says how many, and with 0 each feature is scaled alone. What ends with one of
`OPTIMIZERS` is trained with that, and all else with Adam.
"""


def settings(name: str, rank: int, targets: str = TARGETS) -> dict[str, Any]:
    """Settings in the cell of one of `METHODS`."""
    method, scale = name, "fine-tuning"
    for other in ("paper", earlier.SCALE):
        if name.endswith(f" {other}"):
            method, scale = name.removesuffix(f" {other}"), other
    is_lora = method.partition(",")[0] in baselines.LORAS
    return {
        "method": method,
        "rank": None if method == "full" else rank,
        "scale": None if is_lora or method == "full" else scale,
        "targets": targets,
    }


def rates(name: str, *, quick: bool) -> list[float]:
    """The rates that one of `METHODS` is tried with first."""
    every = ladders.rungs(METHODS[_of_today(name)], RATES)
    return every[1:-1] if quick else every


TITLES = {
    "full": "every kernel",
    "lora": "LoRA",
    "lora+": "LoRA+",
    "lora-one": "LoRA-One",
    "lora-ga": "LoRA-GA",
    "relora": "ReLoRA",
    "lora-xs": "LoRA-XS, at MoRA's size",
    "miss": "MiSS",
    "signed_miss": "MiSS with signs",
    "subspace": "MoRA, directions of a gradient",
    "halves": "MoRA, half rotation, half directions",
}
"""In words. Other methods are MoRA by its operator."""


def _of_today(name: str) -> str:
    """The name of a method without "aligned"."""
    return name.removesuffix(f" {earlier.SCALE}")


def title(name: str) -> str:
    """One of `METHODS` in words."""
    method, *extras = _of_today(name).split(", ")
    words = TITLES.get(method) or "MoRA, " + method.replace("_", " ")
    return ", ".join([words, *extras])


def style(name: str) -> dict[str, Any]:
    """How one of `METHODS` is drawn in plots, and called there."""
    if name == "full":
        return {"color": "black", "label": title(name)}
    round_, colour = divmod(list(METHODS).index(_of_today(name)), 10)
    line = ("-", "--", ":", "-.")[round_]
    return {"color": f"C{colour}", "linestyle": line, "label": title(name)}


class Program(NamedTuple):
    """A way to train, compiled when it is first called.

    Attributes:
        learner: The method of training.
        init: (trained) -> the optimizer's state.
        step: (trained, state, rate, frozen, batch) -> both after a step, and loss and
            accuracy before it.
        apply: (trained, frozen, ids, at) -> logits; the ids as `read` returns them.
        read: (ids) -> what is the same in all steps.
    """

    learner: Learner
    init: Callable[..., Any]
    step: Callable[..., Any]
    apply: Callable[..., Any]
    read: Callable[[Any], Any]

    @property
    def frozen(self) -> Any:
        """What is not trained at first."""
        return self.learner.frozen(language.base().params)

    def prepared(self, batch: Batch) -> Batch:
        """A batch with what `read` returns, as `step` is given it."""
        return batch._replace(ids=self.read(batch.ids))

    def model(self, step: "Step") -> Callable[..., jax.Array]:
        """(ids, at) -> logits with what was trained before a step."""
        return lambda ids, at: self.apply(step.trained, step.frozen, self.read(ids), at)

    @property
    def parameters(self) -> int:
        """The number of parameters that it trains."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.learner.start))


class First(NamedTuple):
    """The first batch, for methods that begin with its gradient."""

    batch: Batch

    def __eq__(self, other: object) -> bool:
        return isinstance(other, First) and hash(self) == hash(other)

    def __hash__(self) -> int:
        return hash(tuple(array.tobytes() for array in self.batch))


def program_of(cell: Mapping[str, Any], first: Batch) -> Program:
    """The program of a cell's method; `first` is the first batch.

    "text" in a cell is what inputs are damped by, and is ordinary text if it is not
    there: see `language.damping_inputs`.
    """
    settings = {k: cell[k] for k in ("method", "rank", "scale", "targets")}
    settings["begin"] = cell.get("begin", 0)
    settings["text"] = cell.get("text", "ordinary")
    reads_first = baselines.prepasses(cell["method"]) or settings["text"] == "inputs"
    known = First(first) if reads_first else None
    return program(**settings, first=known)


@functools.lru_cache(maxsize=1)
def program(first: First | None, **settings: Any) -> Program:
    """The program of a method with its settings; see `language.learner`."""
    learner = language.learner(**settings, first=first.batch if first else None)
    tx = optimizer(settings["method"])

    @jax.jit
    def step(trained: Any, state: Any, rate: Any, frozen: Any, batch: Batch) -> Any:
        def loss(trained: Any) -> Any:
            logits = learner.apply(trained, frozen, batch.ids, batch.at)
            return language.loss_and_accuracy(logits, batch)

        found, grads = jax.value_and_grad(loss, has_aux=True)(trained)
        updates, state = tx.update(grads, state)
        updates = jax.tree.map(lambda u, s: -rate * s * u, updates, learner.speeds)
        return optax.apply_updates(trained, updates), state, found

    read = functools.partial(language.read, begin=settings["begin"])
    return Program(learner, tx.init, step, jax.jit(learner.apply), read)


class Step(NamedTuple):
    """What is trained and what is not, with loss and accuracy on the batch to come."""

    trained: Any
    frozen: Any
    renewals: int
    loss: float
    accuracy: float


def warmed_up(rate: float) -> Callable[[int], float]:
    """A rate that grows in the first steps."""
    return lambda step: rate * min(1, (step + 1) / WARMUP)


def train(
    program: Program,
    batches: Iterable[Batch],
    rate_at: Callable[[int], float],
    renew: int = 0,
    stalled: float = 1.0,
) -> Iterator[Step]:
    """Train on each batch for a step, and renew the adapters after each `renew` steps.

    With `stalled` below 1 only if the loss fell by less than this share from the first
    of these steps to the last. It ends before its time if a loss is not finite.
    """
    frozen, trained = program.frozen, program.learner.start
    state, renewals = program.init(trained), 0
    losses: list[float] = []  # since it was renewed
    for batch in batches:
        due = renew and len(losses) >= renew
        if due and losses[-1] >= (1 - stalled) * losses[-renew]:
            assert program.learner.renewed is not None
            trained, frozen = program.learner.renewed(trained, frozen)
            state, renewals, losses = program.init(trained), renewals + 1, []
        rate = rate_at(len(losses))
        after, state, found = program.step(trained, state, rate, frozen, batch)
        yield (step := Step(trained, frozen, renewals, *map(float, found)))
        if not math.isfinite(step.loss):
            return
        losses.append(step.loss)
        trained = after


def memorise(cell: cells.Cell, batch: Batch, first: Batch | None = None) -> cells.Cell:
    """Teach `batch` until it is known, and see what was forgotten then.

    Args:
        cell: The settings.
        batch: What is taught.
        first: The batch of the first gradient, by default the same.

    Returns:
        Losses and accuracies before each of at most `cell["steps"]` steps; the number
        of parameters that were trained, and of renewals; what was forgotten when it was
        known, and when most of it was, None if it never was.
    """
    losses, accuracies, forgot, early, renewals = [], [], None, None, 0
    program = program_of(cell, first or batch)
    batches = itertools.repeat(program.prepared(batch), cell["steps"])
    renewal = cell.get("renew", 0), cell.get("stalled", 1.0)
    for step in train(program, batches, warmed_up(cell["rate"]), *renewal):
        renewals = step.renewals
        losses.append(round(step.loss, 4))
        accuracies.append(round(step.accuracy, 4))
        if early is None and step.accuracy >= MOSTLY:
            early = language.forgetting(program.model(step))
        if step.accuracy >= KNOWN:
            forgot = language.forgetting(program.model(step))
            break
    return {
        "losses": losses,
        "accuracies": accuracies,
        "parameters": program.parameters,
        "renewals": renewals,
        "forgetting": forgot,
        "forgetting_mostly": early,
    }


def study(
    cell: cells.Cell,
    batches: Iterable[Batch],
    score: Callable[[Callable[..., jax.Array]], Any],
) -> cells.Cell:
    """Train for `cell["steps"]`, with a cosine schedule down to a tenth of the rate.

    Returns:
        Losses before each step; the score of the model after each quarter of them,
        None after a loss that was not finite; what was forgotten at the end; the median
        of the seconds of a step.
    """
    steps, losses, scores, forgot = cell["steps"], [], [], None
    seconds: list[float] = []
    schedule: Any = optax.warmup_cosine_decay_schedule(0, 1, WARMUP, steps, 0.1)
    quarters = {round(steps * k / 4) for k in range(5)}
    batches = list(itertools.islice(batches, steps + 1))
    program = program_of(cell, batches[0])
    run = train(program, batches, lambda k: cell["rate"] * float(schedule(k + 1)))
    start = time.perf_counter()
    for k, step in enumerate(run):
        seconds.append(time.perf_counter() - start)
        losses.append(round(step.loss, 4))
        if k in quarters:
            model = program.model(step)
            scores.append(score(model))
            forgot = language.forgetting(model) if k == steps else None
        start = time.perf_counter()
    return {
        "losses": losses,
        "scores": scores if forgot else [*scores, None],
        "forgetting": forgot,
        "parameters": program.parameters,
        "seconds": round(float(np.median(seconds)), 3),
    }


class Costs(NamedTuple):
    """Costs of a method.

    Attributes:
        seconds: Of a step, the median.
        memory: Megabytes of all arrays during a step, as XLA plans it: the weights,
            what is trained and its moments before and after, and all between.
        file: Megabytes of what is trained, as safetensors.
    """

    seconds: float
    memory: float
    file: float


def costs(
    methods: Mapping[str, Mapping[str, Any]], batch: Batch, rounds: int
) -> dict[str, Costs]:
    """Costs of each method; steps after others of their kind are timed in turns."""
    contenders = {}
    for name, settings in methods.items():
        one = program_of(settings, batch)
        start, state = one.learner.start, one.init(one.learner.start)
        args = start, state, jnp.float32(0), one.frozen, one.prepared(batch)
        contenders[name] = Contender.compile(one.step, *args)
    race(contenders, rounds, warm=2)
    found = {}
    for name, contender in contenders.items():
        plan, trained = contender.run.memory_analysis(), contender.args[0]
        sizes = "argument", "output", "temp"
        memory = sum(getattr(plan, f"{size}_size_in_bytes") for size in sizes) / 1e6
        leaves = {str(k): leaf for k, leaf in enumerate(jax.tree.leaves(trained))}
        file = len(safetensors.flax.save(leaves)) / 1e6
        found[name] = Costs(float(np.median(contender.seconds)), memory, file)
    return found


def steps_to(row: cells.Cell, share: float) -> float:
    """Steps until a share of the tokens is known; infinite if it never was."""
    return ladders.first_above(row["accuracies"], share)


def _earlier(name: str) -> str:
    """The name of a method as it was until December 3, if it is not the same."""
    cell = settings(name, 1)
    return f"{name} {earlier.SCALE}" if cell["scale"] == "fine-tuning" else name


class _Earlier(argparse.Action):
    """Takes the methods as they were until December 3."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Rename the methods that were given before."""
        namespace.methods = [_earlier(name) for name in namespace.methods]


def options(
    description: str | None,
    out: str,
    quick: str,
    methods: Iterable[str] = METHODS,
    seeds: int = 3,
) -> argparse.ArgumentParser:
    """The options that experiments share; `quick` says what a quick run has."""
    parser = harness.options(description, out)
    add, methods = parser.add_argument, list(methods)
    choices = [*methods, *map(_earlier, methods)]
    add("--methods", nargs="+", choices=choices, default=methods)
    text = "after --methods: adapters as they were until December 3, see earlier.py"
    add("--earlier", action=_Earlier, nargs=0, help=text)
    add("--seeds", type=positive, default=seeds, help="of the data, at the best rates")
    shown = RESULTS / Path(out).with_suffix(".jsonl").name
    text = "report finished runs, by default those of the pages, and run nothing"
    add("--report", nargs="?", type=Path, const=shown, metavar="RUNS", help=text)
    add("--quick", action="store_true", help=quick)
    return parser


def store_of(args: argparse.Namespace) -> Path:
    """The file of the runs, a line each."""
    return args.report or args.out.with_suffix(".jsonl")


def runs(
    args: argparse.Namespace,
    compute: Callable[[cells.Cell], cells.Cell],
    methods: Mapping[str, tuple[Mapping[str, Any], Sequence[float]]],
    value: Callable[[cells.Cell], float],
) -> dict[str, list[cells.Cell]]:
    """The runs of every method, which are kept in a file.

    With --report these are the finished ones of its file, of at most --seeds sets of
    data, of methods that have any.

    Args:
        args: The options, as `options` parses them.
        compute: The function that gives what is found with some settings.
        methods: Of each its settings, and the rates to begin with.
        value: Of a row, the less the better.

    Raises:
        SystemExit: None is finished.
    """
    store = store_of(args)
    if not args.report:
        run = functools.partial(cells.run, compute=compute, path=store)
        return climb_all(run, methods, args.seeds, value)
    rows = {
        name: [r for r in cells.finished(store, cell) if r["seed"] < args.seeds]
        for name, (cell, _) in methods.items()
    }
    found = {name: of_cell for name, of_cell in rows.items() if of_cell}
    if not found:
        raise SystemExit(f"{store} holds no finished run: leave out --report")
    return found


def climb(
    run: Callable[[Sequence[cells.Cell]], list[cells.Cell]],
    cell: Mapping[str, Any],
    rates: Sequence[float],
    seeds: int,
    value: Callable[[cells.Cell], float],
) -> list[cells.Cell]:
    """A ladder on one seed, then the other seeds at the best rate and beside it.

    Args:
        run: A function from cells to rows, as `cells.run`.
        cell: The settings, without rate and seed.
        rates: The rates to begin with.
        seeds: The number of seeds.
        value: Of a row, the less the better, as its steps.
    """
    rows: dict[float, cells.Cell] = {}

    def values(rates: Sequence[float]) -> list[float]:
        found = run([{**cell, "rate": rate, "seed": 0} for rate in rates])
        rows.update(zip(rates, found, strict=True))
        return [value(row) for row in found]

    ladder = ladders.climb(values, rates)
    best, order = ladders.best_of(ladder), sorted(ladder)
    near = order[order.index(best) - 1 : order.index(best) + 2]
    more = [
        {**cell, "rate": rate, "seed": seed}
        for seed in range(1, seeds)
        for rate in near
    ]
    return [rows[rate] for rate in order] + run(more)


def climb_all(
    run: Callable[[Sequence[cells.Cell]], list[cells.Cell]],
    methods: Mapping[str, tuple[Mapping[str, Any], Sequence[float]]],
    seeds: int,
    value: Callable[[cells.Cell], float],
) -> dict[str, list[cells.Cell]]:
    """The runs of every method, from its settings and the rates to begin with.

    A method whose ladder lacks a best rate is printed, and left out.
    """
    found = {}
    for name, (cell, first) in methods.items():
        try:
            found[name] = climb(run, cell, first, seeds, value)
        except ValueError as error:
            print(f"{name} is left out: {error}")
    return found


def at_best(
    rows: Sequence[cells.Cell], value: Callable[[cells.Cell], float]
) -> list[cells.Cell]:
    """The rows at the rate that is best over all seeds, in the order of seeds."""
    by_rate: dict[float, list[cells.Cell]] = {}
    for row in rows:
        by_rate.setdefault(row["rate"], []).append(row)
    most = max(map(len, by_rate.values()))
    whole = [found for found in by_rate.values() if len(found) == most]
    return min(whole, key=lambda found: ladders.mean(map(value, found)))


def by_rate(rows: Iterable[cells.Cell]) -> list[list[cells.Cell]]:
    """The rows of each rate, the lowest first."""
    ordered = sorted(rows, key=lambda row: row["rate"])
    groups = itertools.groupby(ordered, key=lambda row: row["rate"])
    return [list(group) for _, group in groups]


def compared(
    rows: Iterable[cells.Cell],
    others: Iterable[cells.Cell],
    value: Callable[[cells.Cell], float],
) -> tuple[float, float | None]:
    """`paired` of what rows have for the seeds that both have."""
    left, right = ({row["seed"]: value(row) for row in way} for way in (rows, others))
    seeds = left.keys() & right.keys()
    return paired([left[seed] for seed in seeds], [right[seed] for seed in seeds])


def paired(
    values: Sequence[float], others: Sequence[float]
) -> tuple[float, float | None]:
    """The mean ratio of values to others, seed by seed, and its standard error.

    One seed lacks an error.
    """
    logs = np.log(np.divide(values, others))
    ratio = float(np.exp(logs.mean()))
    if len(logs) < 2:
        return ratio, None
    return ratio, ratio * float(logs.std(ddof=1)) / len(logs) ** 0.5
