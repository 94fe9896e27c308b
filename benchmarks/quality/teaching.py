"""Teaching SmolLM2 until it knows what it should, with each method and rate."""

import argparse
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.flax

from benchmarks.common import harness
from benchmarks.common.harness import Contender, race
from benchmarks.quality import cells, ladders, language
from benchmarks.quality.learners import Learner
from models.lesson import Batch
from models.options import positive

WARMUP = 3  # steps in which the rate grows
RATES = 5  # of a ladder, at first
KNOWN = 0.99  # of the tokens, as they are likeliest
TARGETS = r"layers_\d+/.*_proj/kernel"
METHODS = {
    "full": 5e-5,
    "lora": 1e-3,
    "lora+": 1e-4,
    "rotation": 1e-4,
    "signed_decoupling": 1e-4,
    "decoupling": 1e-4,
    "signed_sharing": 1e-4,
    "sharing": 1e-4,
    "subspace": 1e-4,
    "rotation paper": 4e-4,
}
"""Each with the lowest rate that it is tried with first.

MoRA is called by its operator and has scale="fine-tuning"; if its name ends with
"paper" it has that.
"""


def settings(name: str, rank: int, targets: str = TARGETS) -> dict[str, Any]:
    """Settings in the cell of one of `METHODS`."""
    method, _, scale = name.partition(" ")
    is_mora = method not in ("full", "lora", "lora+")
    return {
        "method": method,
        "rank": None if method == "full" else rank,
        "scale": (scale or "fine-tuning") if is_mora else None,
        "targets": targets,
    }


def rates(name: str, *, quick: bool) -> list[float]:
    """The rates that one of `METHODS` is tried with first."""
    every = ladders.rungs(METHODS[name], RATES)
    return every[1:-1] if quick else every


def colour(name: str) -> str:
    """Of one of `METHODS` in plots."""
    return "black" if name == "full" else f"C{list(METHODS).index(name)}"


class Program(NamedTuple):
    """A way to train, compiled when it is first called.

    Attributes:
        learner: The method of training.
        init: (trained) -> the optimizer's state.
        step: (trained, state, rate, params, batch) -> both after a step of Adam, and
            loss and accuracy before it.
        apply: (trained, params, ids, at) -> logits.
    """

    learner: Learner
    init: Callable[..., Any]
    step: Callable[..., Any]
    apply: Callable[..., Any]

    def model(self, trained: Any) -> Callable[..., jax.Array]:
        """(ids, at) -> logits with what was trained."""
        return functools.partial(self.apply, trained, language.base().params)

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
    """The program of a cell's method; `first` is the first batch."""
    settings = {k: cell[k] for k in ("method", "rank", "scale", "targets")}
    known = First(first) if cell["method"] == "subspace" else None
    return program(**settings, first=known)


@functools.lru_cache(maxsize=1)
def program(first: First | None, **settings: Any) -> Program:
    """The program of a method with its settings; see `language.learner`."""
    learner = language.learner(**settings, first=first.batch if first else None)
    adam = optax.scale_by_adam()

    @jax.jit
    def step(trained: Any, state: Any, rate: Any, params: Any, batch: Batch) -> Any:
        def loss(trained: Any) -> Any:
            logits = learner.apply(trained, params, batch.ids, batch.at)
            return language.loss_and_accuracy(logits, batch)

        found, grads = jax.value_and_grad(loss, has_aux=True)(trained)
        updates, state = adam.update(grads, state)
        updates = jax.tree.map(lambda u, s: -rate * s * u, updates, learner.speeds)
        return optax.apply_updates(trained, updates), state, found

    return Program(learner, adam.init, step, jax.jit(learner.apply))


class Step(NamedTuple):
    """Trained values, with loss and accuracy on the batch that comes next."""

    trained: Any
    loss: float
    accuracy: float


def warmed_up(rate: float) -> Callable[[int], float]:
    """A rate that grows in the first steps."""
    return lambda step: rate * min(1, (step + 1) / WARMUP)


def train(
    program: Program, batches: Iterable[Batch], rate_at: Callable[[int], float]
) -> Iterator[Step]:
    """Train on each batch for a step.

    It ends before its time if a loss is not finite.
    """
    params, trained = language.base().params, program.learner.start
    state = program.init(trained)
    for k, batch in enumerate(batches):
        rate = rate_at(k)
        after, state, found = program.step(trained, state, rate, params, batch)
        yield (step := Step(trained, *map(float, found)))
        if not math.isfinite(step.loss):
            return
        trained = after


def memorise(cell: cells.Cell, batch: Batch) -> cells.Cell:
    """Teach `batch` until it is known, and see what was forgotten then.

    Returns:
        Losses and accuracies before each of at most `cell["steps"]` steps; the number
        of parameters that were trained; what was forgotten, None if it never was known.
    """
    losses, accuracies, forgot = [], [], None
    program, batches = program_of(cell, batch), itertools.repeat(batch, cell["steps"])
    steps = train(program, batches, warmed_up(cell["rate"]))
    for trained, loss, accuracy in steps:
        losses.append(round(loss, 4))
        accuracies.append(round(accuracy, 4))
        if accuracy >= KNOWN:
            forgot = language.forgetting(program.model(trained))
            break
    return {
        "losses": losses,
        "accuracies": accuracies,
        "parameters": program.parameters,
        "forgetting": forgot,
    }


def study(
    cell: cells.Cell,
    batches: Iterable[Batch],
    score: Callable[[Callable[..., jax.Array]], Any],
) -> cells.Cell:
    """Train for `cell["steps"]`, with a cosine schedule down to a tenth of the rate.

    Returns:
        Losses before each step; the score of the model after each quarter of them,
        None after a loss that was not finite; what was forgotten at the end.
    """
    steps, losses, scores, forgot = cell["steps"], [], [], None
    schedule: Any = optax.warmup_cosine_decay_schedule(0, 1, WARMUP, steps, 0.1)
    quarters = {round(steps * k / 4) for k in range(5)}
    batches = list(itertools.islice(batches, steps + 1))
    program = program_of(cell, batches[0])
    run = train(program, batches, lambda k: cell["rate"] * float(schedule(k + 1)))
    for k, step in enumerate(run):
        losses.append(round(step.loss, 4))
        if k in quarters:
            model = program.model(step.trained)
            scores.append(score(model))
            forgot = language.forgetting(model) if k == steps else None
    return {
        "losses": losses,
        "scores": scores if forgot else [*scores, None],
        "forgetting": forgot,
        "parameters": program.parameters,
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
    params, contenders = language.base().params, {}
    for name, settings in methods.items():
        one = program_of(settings, batch)
        start, state = one.learner.start, one.init(one.learner.start)
        args = start, state, jnp.float32(0), params, batch
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
    add("--methods", nargs="+", choices=methods, default=methods)
    add("--seeds", type=positive, default=seeds, help="of the data, at the best rates")
    add("--report", action="store_true", help="report what is finished, run nothing")
    add("--quick", action="store_true", help=quick)
    return parser


def runs(
    args: argparse.Namespace,
    compute: Callable[[cells.Cell], cells.Cell],
    methods: Mapping[str, tuple[Mapping[str, Any], Sequence[float]]],
    value: Callable[[cells.Cell], float],
) -> dict[str, list[cells.Cell]]:
    """The runs of every method, which are kept beside `args.out`.

    With --report these are the finished ones, of methods that have any.

    Args:
        args: The options, as `options` parses them.
        compute: The function that gives what is found with some settings.
        methods: Of each its settings, and the rates to begin with.
        value: Of a row, the less the better.

    Raises:
        SystemExit: None is finished.
    """
    store = args.out.with_suffix(".jsonl")
    if not args.report:
        run = functools.partial(cells.run, compute=compute, path=store)
        return climb_all(run, methods, args.seeds, value)
    rows, found = cells.finished(store), {}
    for name, (cell, _) in methods.items():
        if of_cell := [row for row in rows if cell.items() <= row.items()]:
            found[name] = of_cell
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
