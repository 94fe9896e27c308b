"""Claim: pretrained with restarts, MoRA comes closer to full rank than LoRA does.

A small Llama learns to foretell the bytes of medical definitions from scratch: with all
of its parameters, and with adapters on its projections, whose other parameters are
trained in full (ReLoRA, and the paper's section on pretraining). All begin with some
steps of all parameters. With restarts (ReLoRA, ReMoRA) the adapters are merged into the
kernels at equal intervals, and start again. You will see the loss of text that was not
trained on, at the best rate of each, after the same number of steps and over seconds.

    python -m benchmarks.quality.restarts --quick
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

import mora_jax
from benchmarks.common.harness import next_token_loss, save, show
from benchmarks.common.plots import figure, legend_below, plot_mean
from benchmarks.quality import cells, earlier, ladders, language, learners, teaching
from models.options import positive
from models.smollm2 import Config, Llama
from mora_jax import MoRAConfig, linen, remora
from mora_jax._tree.paths import adapters_in

MODEL = Llama(Config(vocab=256, layers=3, width=128, hidden=384, heads=4, kv_heads=4))
TARGETS = r"layers_\d+/.*_proj/kernel"
ROWS, BYTES = 16, 96  # of a batch
FIRST_STEPS, FIRST_RATE = 50, 1e-3  # with all parameters
METHODS = {
    "full": 5e-4,
    "lora": 1e-3,
    "relora": 1e-3,
    "signed_decoupling": 5e-4,
    "signed_decoupling, restarts": 5e-4,
    "signed_decoupling, restarts, moments kept": 5e-4,
    "sharing": 5e-4,
    "sharing, restarts": 5e-4,
    "subspace": 5e-4,
    "subspace, restarts": 5e-4,
    "block_diagonal": 5e-4,
    "block_diagonal, restarts": 5e-4,
}
"""Each with the lowest rate that it is tried with first."""


@functools.lru_cache
def text() -> tuple[np.ndarray, np.ndarray]:
    """Bytes to train on, and bytes that are held out, (32, BYTES)."""
    lines = list(language.definitions())
    np.random.default_rng(0).shuffle(lines)
    data = np.frombuffer("\n".join(lines).encode(), np.uint8).astype(np.int32)
    count = 2 * ROWS * BYTES
    return data[count:], data[:count].reshape(-1, BYTES)


def batches(seed: int) -> Iterator[np.ndarray]:
    """Stretches of text, without end."""
    data, random = text()[0], np.random.default_rng(seed)
    while True:
        starts = random.integers(0, len(data) - BYTES, ROWS)
        yield data[starts[:, None] + np.arange(BYTES)]


@functools.lru_cache
def beginning() -> Any:
    """Parameters after the first steps, in which all are trained."""
    data = batches(seed=-1 % 2**32)
    params = MODEL.init(jax.random.key(0), next(data))["params"]
    tx = optax.adam(FIRST_RATE)

    @jax.jit
    def step(params: Any, state: Any, ids: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            logits: Any = MODEL.apply({"params": params}, ids)
            return next_token_loss(logits, ids)

        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(FIRST_STEPS):
        params, state = step(params, state, next(data))
    return params


class Part(NamedTuple):
    """Training from one restart to the next.

    Attributes:
        params: The kernels that are frozen, and all else.
        adapters: The trained part of the projections.
        apply: (adapters, params, ids) -> logits.
        state: The optimizer's state for the adapters.
    """

    params: Any
    adapters: Any
    apply: Callable[..., Any]
    state: Any


def start(method: str, rank: int, tx: Any) -> Part:
    """The first part."""
    params = beginning()
    if method == "full":
        learner = learners.full(MODEL, params, TARGETS)
    elif method in ("lora", "relora"):
        learner = learners.lora(MODEL, params, TARGETS, rank)
    else:
        operator = method.partition(",")[0]
        along = operator == "subspace"
        operator = "orthogonal" if along else operator
        config = MoRAConfig(operator=operator, rank=rank, scale="fine-tuning")
        plan = learners.plan_of(MODEL, params, TARGETS, config, text()[1])
        if along:
            plan = mora_jax.gradient_bases(gradient(params, seed=0), plan)
        plan = earlier.aligned(plan)
        adapted, adapters = linen.wrap(MODEL, plan), mora_jax.init(plan)

        def apply(adapters: Any, params: Any, ids: jax.Array) -> jax.Array:
            return adapted(adapters, {"params": params}, ids)

        return Part(params, adapters, apply, tx.init(adapters))
    return learned_part(params, learner, tx)


def learned_part(params: Any, learner: learners.Learner, tx: Any) -> Part:
    """A part with any learner."""

    def apply(trained: Any, params: Any, ids: jax.Array) -> jax.Array:
        return learner.apply(trained, learner.frozen(params), ids)

    return Part(params, learner.start, apply, tx.init(learner.start))


def gradient(params: Any, seed: int) -> Any:
    """Gradients of the projections, of a batch of its own."""
    ids = jnp.asarray(next(batches(2**31 + seed)))
    loss = functools.partial(next_token_loss, ids=ids)
    task = learners.Task(MODEL, params, TARGETS, (ids,), loss)
    return unflatten_dict(task.gradient(params))


def following(part: Part, method: str, rank: int, tx: Any, number: int) -> Part:
    """The part after a restart."""
    if method == "relora":
        learner = learners.lora(MODEL, part.params, TARGETS, rank, seed=number)
        flat: dict[tuple[str, ...], Any] = flatten_dict(part.params)
        for path, delta in learner.deltas(part.adapters).items():
            flat[path] += delta
        return learned_part(unflatten_dict(flat), learner, tx)
    if method.startswith("subspace"):
        params = mora_jax.merge(part.params, part.adapters)
        grads = gradient(params, seed=number)
        plan = mora_jax.Plan(adapters_in(part.adapters).specs)
        adapters = mora_jax.init(mora_jax.gradient_bases(grads, plan))
        return Part(params, adapters, part.apply, tx.init(adapters))
    after = remora.restart(part.params, part.adapters, part.state, tx)
    state = after.opt_state
    if method.endswith("kept"):  # the old moments, for the new adapters
        state = jax.tree.unflatten(
            jax.tree.structure(state), jax.tree.leaves(part.state)
        )
    return Part(after.params, after.adapters, part.apply, state)


def compute(cell: cells.Cell) -> cells.Cell:
    """Pretrain with one method and rate; the losses at the end of each interval."""
    method, steps, every = cell["method"], cell["steps"], cell["every"]
    restarts = "restarts" in method or method == "relora"
    interval = every if restarts else steps
    warmup = max(1, every // 10)
    cosine = optax.cosine_decay_schedule(1.0, steps, alpha=0.1)

    def schedule(step: Any) -> Any:
        return cosine(step) * jnp.minimum((step % interval + 1) / warmup, 1.0)

    tx, data = optax.scale_by_adam(), batches(cell["seed"])
    part = start(method, cell["rank"], tx)
    others = tx.init(rest(part.params))
    step, loss = compiled(part, tx)
    losses, seconds = [], 0.0
    for number in range(steps // every):
        if number and restarts:
            part = following(part, method, cell["rank"], tx, number)
            step, loss = compiled(part, tx)
        for k in range(every):
            now = schedule(number * every + k)
            begun = time.perf_counter()
            part, others = step(part, others, now, cell["rate"], next(data))
            jax.block_until_ready(part.adapters)
            seconds += (time.perf_counter() - begun) * (k > 0)  # the first compiles
        losses.append(float(loss(part.adapters, part.params, text()[1])))
    size = sum(leaf.size for leaf in jax.tree.leaves(part.adapters))
    return {"losses": losses, "parameters": size, "seconds": seconds}


def rest(params: Any) -> Any:
    """The parameters that no adapter has: embedding and norms."""
    flat = flatten_dict(params)
    return {path: leaf for path, leaf in flat.items() if path[-1] != "kernel"}


def compiled(part: Part, tx: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A step of training, and the loss of some text."""

    def loss(adapters: Any, params: Any, ids: jax.Array) -> jax.Array:
        return next_token_loss(part.apply(adapters, params, ids), ids)

    @jax.jit
    def update(
        part_arrays: Any, others: Any, schedule: Any, rate: Any, ids: jax.Array
    ) -> Any:
        adapters, params, state = part_arrays

        def of_both(adapters: Any, others: Any) -> jax.Array:
            return loss(adapters, unflatten_dict(flatten_dict(params) | others), ids)

        leaves = rest(params)
        grads, other_grads = jax.grad(of_both, (0, 1))(adapters, leaves)
        updates, state = tx.update(grads, state)
        other_updates, others = tx.update(other_grads, others)
        adapters = _moved(adapters, updates, schedule * rate)
        leaves = _moved(leaves, other_updates, schedule * FIRST_RATE)
        return adapters, leaves, state, others

    def step(part: Part, others: Any, schedule: Any, rate: Any, ids: Any) -> Any:
        arrays = part.adapters, part.params, part.state
        adapters, leaves, state, others = update(arrays, others, schedule, rate, ids)
        params = unflatten_dict(flatten_dict(part.params) | leaves)
        return part._replace(adapters=adapters, params=params, state=state), others

    return step, jax.jit(loss)


def _moved(tree: Any, updates: Any, rate: Any) -> Any:
    return jax.tree.map(lambda leaf, update: leaf - rate * update, tree, updates)


def final(row: cells.Cell) -> float:
    """The loss at the end; infinite if training broke down."""
    return row["losses"][-1] if math.isfinite(row["losses"][-1]) else math.inf


def main() -> None:
    """Climb the ladders, and report each method at its best rate."""
    quick = "120 steps, three methods, one order of the text"
    parser = teaching.options(__doc__, "out/restarts.json", quick, METHODS)
    add = parser.add_argument
    add("--rank", type=positive, default=8)
    add("--steps", type=positive, default=400)
    add("--every", type=positive, default=80, help="steps between restarts")
    args = parser.parse_args()
    if args.quick:
        args.methods = list(METHODS)[:5:2]
        args.steps, args.every, args.seeds = 120, 40, 1
    shared = {"rank": args.rank, "steps": args.steps, "every": args.every}
    methods = {
        method: (
            {"method": method, **shared},
            ladders.rungs(METHODS[method], 3 if args.quick else 5),
        )
        for method in args.methods
    }
    found = teaching.runs(args, compute, methods, final)
    rows = [row for runs in found.values() for row in runs]
    chosen = {name: teaching.at_best(runs, final) for name, runs in found.items()}
    columns = {
        "method": "{method}",
        "parameters": "{parameters:,}",
        "orders": "{seeds}",
        "best rate": "{rate:.1e}",
        "perplexity": "{perplexity:.3f}",
        "of full rank's": "{ratio:.3f}",
        "error": "{error:.3f}",
        "s/step": "{speed:.3f}",
    }
    summaries = [summary(runs, chosen.get("full", runs)) for runs in chosen.values()]
    show(columns, summaries)
    save(rows, args, summaries=summaries)
    plot(chosen, args.every, args.out.with_suffix(".png"))


def summary(rows: Sequence[cells.Cell], full: Sequence[cells.Cell]) -> cells.Cell:
    """A method at its best rate, beside full rank at its own on the same text."""
    ratio, error = teaching.compared(rows, full, lambda row: math.exp(final(row)))
    return {
        **{key: rows[0][key] for key in ("method", "parameters", "rate")},
        "seeds": len(rows),
        "perplexity": ladders.mean(math.exp(final(row)) for row in rows),
        "ratio": ratio,
        "error": error,
        "speed": speed(rows),
    }


def speed(rows: Sequence[cells.Cell]) -> float:
    """Seconds of a step in the fastest run: what else the machine does only adds."""
    return min(row["seconds"] / row["steps"] for row in rows)


def plot(chosen: dict[str, list[cells.Cell]], every: int, path: Path) -> None:
    """Loss over steps and over seconds at the best rates."""
    with figure(path, 1, 2, figsize=(11, 4), sharey=True) as (made, axes):
        for k, (method, rows) in enumerate(chosen.items()):
            losses = [row["losses"] for row in rows]
            steps = every * (1 + np.arange(len(losses[0])))
            line = "o-" if "restarts" in method or method == "relora" else "s--"
            colour = "black" if method == "full" else f"C{k}"
            style = {"color": colour, "label": teaching.title(method)}
            for axis, along in zip(axes[0], (steps, steps * speed(rows)), strict=True):
                plot_mean(axis, along, losses, line, **style)
        axes[0, 0].set(xlabel="step", ylabel="loss of text held out, nats a byte")
        axes[0, 1].set(xlabel="seconds of training")
        legend_below(made, axes[0, 0])


if __name__ == "__main__":
    main()
