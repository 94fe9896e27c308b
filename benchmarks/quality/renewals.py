"""Claim: renewed as it trains, an adapter comes near full fine-tuning, in seconds too.

SmolLM2 learns random pairs, as in `pairs`: so many that the adapters of two kernels are
full, or at r = 8 in batches, whose gradients renewals then take. First directions are
`mora_jax.directions`, renewals `remora.renewing`, and each step is timed once it is
compiled. You will see gradients and seconds until 99% of the tokens are known, with
what renewals and first directions take, and what is forgotten then.

"16 pairs" learns at r = 8 on a base of 4 or 8 bits, beside one in float32. The rates
are those at which `pairs` needs the fewest steps, and for some methods one beside.
Finished runs are kept next to --out, and --report shows them.

    python -m benchmarks.quality.renewals --settings "half a bit" --sets 1
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import mora_jax
from benchmarks.common.harness import options, save, show
from benchmarks.quality import cells, ladders, language, learners, pairs, teaching
from models.lesson import Batch
from models.options import positive
from mora_jax import MoRAConfig, linen, remora

RENEWED: dict[str, dict[str, Any]] = {
    "directions, renewed": {"along": "gradient", "moments": "restart"},
    "directions, renewed, moments kept": {"along": "gradient", "moments": "keep"},
    "renewed at random": {"along": "random", "moments": "restart"},
}
"""Settings of `remora.renewing`."""
OPERATORS = {"lora": "low_rank", "rotation": "rotation"}
"""Others are "orthogonal"."""
ROWS = 16  # pairs of digits in a batch
TILES = {"int8": {}, "nf4": {"tile_size": 32}}


class Setting(NamedTuple):
    """What is learned, and by which kernels.

    Attributes:
        rank: The rank.
        targets: The kernels.
        pairs: The number of pairs.
        steps: The largest number of steps.
        begin: The first layer that is computed in a step; then it is pairs of words,
            in one batch.
        methods: (method, steps between renewals, base, rate) of each run.
    """

    rank: int
    targets: str
    pairs: int
    steps: int
    begin: int
    methods: Sequence[tuple[str, int, str, float]]


FLOAT = "float32"
SETTINGS = {
    "half a bit": Setting(
        *(1, pairs.PART, 26, 400, pairs.BEGIN),
        [
            ("full", 0, FLOAT, 2.56e-2),
            ("rotation", 0, FLOAT, 1.024e-1),
            ("directions", 0, FLOAT, 5.12e-2),
            ("directions, renewed", 24, FLOAT, 2.56e-2),
            ("directions, renewed", 6, FLOAT, 6.4e-3),
            ("directions, renewed", 6, FLOAT, 1.28e-2),
            ("directions, renewed", 6, "int8", 1.28e-2),
            ("directions, renewed, moments kept", 6, FLOAT, 1.28e-2),
            ("renewed at random", 6, FLOAT, 1.28e-2),
            ("lora", 0, FLOAT, 1.28e-1),
        ],
    ),
    "one bit": Setting(
        *(1, pairs.PART, 53, 400, pairs.BEGIN),
        [
            ("full", 0, FLOAT, 5.12e-2),
            ("directions", 0, FLOAT, 1.024e-1),
            ("directions, renewed", 6, FLOAT, 6.4e-3),
            ("directions, renewed", 6, FLOAT, 1.28e-2),
            ("renewed at random", 6, FLOAT, 1.28e-2),
        ],
    ),
    "16 pairs": Setting(
        *(8, teaching.TARGETS, 16, 60, 0),
        [
            (method, 0, base, rate)
            for base in (FLOAT, *TILES)
            for method, rate in (("directions", 4e-4), ("lora", 4e-3))
        ],
    ),
    "64 pairs": Setting(
        *(8, teaching.TARGETS, 64, 240, 0),
        [
            ("directions", 0, FLOAT, 4e-4),
            ("directions, renewed", 24, FLOAT, 4e-4),
            ("lora", 0, FLOAT, 4e-3),
            ("full", 0, FLOAT, 4e-4),
        ],
    ),
}


class Run(NamedTuple):
    """A way to train, compiled.

    Attributes:
        state: The state before the first step.
        step: (state, *batch) -> (state, loss); the state has the learning rate.
        predict: (state, ids, at) -> logits.
        seconds: To find the first directions.
        numbers: How many are trained.
    """

    state: Any
    step: Callable[..., Any]
    predict: Callable[..., jax.Array]
    seconds: float
    numbers: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plain:
    """The state of a run without renewals, as `remora.State` names its parts."""

    params: Any
    adapters: Any
    opt_state: Any


ADAM: Any = optax.inject_hyperparams(optax.adam)(learning_rate=0.0)


def with_rate(state: Any, rate: float) -> Any:
    """The state with another learning rate."""
    old = state.opt_state
    new = {**old.hyperparams, "learning_rate": np.float32(rate)}
    return dataclasses.replace(state, opt_state=old._replace(hyperparams=new))


@functools.lru_cache(maxsize=1)
def run_of(setting: str, method: str, every: int, base: str, seed: int) -> Run:
    """How a method trains; `seed` is of the batch that first directions are of."""
    model, params, _ = language.base()
    rank, targets, *_, begin, _ = SETTINGS[setting]
    epoch = batches(setting, seed)
    batch = epoch[0]
    if begin:
        model = language.Tail(model.config, begin)
    if method == "full":
        learner = learners.full(model, params, targets)
        apply, start = learner.apply, learner.start
    else:
        operator = OPERATORS.get(method, "orthogonal")
        config = MoRAConfig(operator=operator, rank=rank, scale="fine-tuning")
        inputs = batch.ids, batch.at
        plan = learners.plan_of(model, params, targets, config, *inputs)
        start = mora_jax.init(plan)
        if method == "lora":
            learner = learners.lora(model, params, targets, rank)
            plan = learner.frozen(params)[1]
            start = plan.adapters(learner.start)
        if base != FLOAT:
            model, params = quantized(model, params, targets, base, inputs)
        adapted = linen.wrap(model, plan)

        def apply(adapters: Any, params: Any, *inputs: Any) -> jax.Array:
            return adapted(adapters, {"params": params}, *inputs)

    def loss(adapters: Any, params: Any, *batch: Any) -> jax.Array:
        return language.mean_loss(apply(adapters, params, *batch[:2]), Batch(*batch))

    def step(state: Plain, *batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(state.adapters, state.params, *batch)
        updates, opt_state = ADAM.update(grads, state.opt_state, state.adapters)
        adapters = optax.apply_updates(state.adapters, updates)
        return Plain(state.params, adapters, opt_state), value

    @jax.jit
    def predict(state: Any, *inputs: Any) -> jax.Array:
        return apply(state.adapters, state.params, *inputs)

    seconds = 0.0
    if method == "directions":
        new, of_all = start, [(params, *batch) for batch in epoch]
        for _ in range(2):  # the first compiles
            begun = time.perf_counter()
            new = mora_jax.directions(loss, start, of_all)
            seconds = time.perf_counter() - begun
        start = new
    numbers = sum(leaf.size for leaf in jax.tree.leaves(start))
    if method in RENEWED:
        how = dict(RENEWED[method])
        if base != FLOAT:
            from mora_jax.qwix import merge_quantized

            how["merge"] = merge_quantized
        init, step, _ = remora.renewing(loss, ADAM, every, **how)
        state = init(params, start)
    else:
        state = Plain(params, start, ADAM.init(start))
    step = jax.jit(step)
    jax.block_until_ready(step(with_rate(state, 0), *batch))
    return Run(state, step, predict, seconds, numbers)


def quantized(
    model: Any, params: Any, targets: str, base: str, inputs: Sequence[Any]
) -> tuple[Any, Any]:
    """A model whose kernels have 4 or 8 bits, and its params."""
    import qwix

    path = targets.removesuffix("/kernel")
    rule = qwix.QuantizationRule(module_path=path, weight_qtype=base, **TILES[base])
    model = qwix.quantize_model(model, qwix.PtqProvider([rule]))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    kept = {name: params[name] for name in shapes}
    return model, qwix.quantize_params(kept, shapes)


def batches(setting: str, seed: int) -> list[Batch]:
    """The batches that are taught in turn, as `step` is given them."""
    chosen = SETTINGS[setting]
    words, count = chosen.begin > 0, chosen.pairs
    whole = pairs.pairs(count, seed, of_words=words)
    size = count if words else ROWS
    cut = [Batch(*(a[k : k + size] for a in whole)) for k in range(0, count, size)]
    return [b._replace(ids=language.read(b.ids, chosen.begin)) for b in cut]


def compute(cell: cells.Cell) -> cells.Cell:
    """Learn some pairs with one method and rate."""
    setting, method, every = (cell[key] for key in ("setting", "method", "every"))
    chosen, epoch = SETTINGS[setting], batches(setting, cell["seed"])
    # Only first directions make a program that differs from set to set.
    own = cell["seed"] if method == "directions" else 0
    run = run_of(setting, method, every, cell["base"], own)
    state, losses, known, seconds = run.state, [], [], []
    for k in range(chosen.steps + 1):
        if k % len(epoch) == 0:
            known.append(float(np.mean([share_known(run, state, b) for b in epoch])))
            if known[-1] >= teaching.KNOWN or k == chosen.steps:
                break
        warm = 1 if method in RENEWED else min(1, (k + 1) / teaching.WARMUP)
        state = with_rate(state, cell["rate"] * warm)
        begun = time.perf_counter()
        state, value = jax.block_until_ready(run.step(state, *epoch[k % len(epoch)]))
        seconds.append(round(time.perf_counter() - begun, 3))
        losses.append(round(float(value), 4))
        if not math.isfinite(losses[-1]):
            break
    return {
        "numbers": run.numbers,
        "losses": losses,
        "known": [round(share, 4) for share in known],
        "seconds": seconds,
        "directions": run.seconds,
        "forgetting": language.forgetting(
            lambda ids, at: run.predict(state, language.read(ids, chosen.begin), at)
        ),
    }


def share_known(run: Run, state: Any, batch: Batch) -> float:
    """The share of the tokens of a batch that are the likeliest."""
    logits = run.predict(state, batch.ids, batch.at)
    return float(language.loss_and_accuracy(logits, batch)[1])


def steps(row: cells.Cell) -> float:
    """Steps to 99%, infinite if it never came there."""
    epoch = len(row["losses"]) / max(1, len(row["known"]) - 1)
    return epoch * ladders.first_above(row["known"], teaching.KNOWN)


def gradients(row: cells.Cell) -> float:
    """Steps, and the two gradients of LoRAs for each set of directions."""
    taken = steps(row)
    if not math.isfinite(taken) or row["method"] == "renewed at random":
        return taken
    if row["every"]:
        return taken + 2 * math.ceil(taken / row["every"])
    sets = len(batches(row["setting"], row["seed"]))
    return taken + 2 * sets * (row["method"] == "directions")


def seconds(row: cells.Cell) -> float:
    """Until 99% are known: all steps, with renewals and first directions."""
    share = steps(row) / len(row["losses"])
    return row["directions"] + share * sum(row["seconds"])


def summary(rows: Sequence[cells.Cell]) -> cells.Cell:
    """The means over sets of pairs."""
    first, forgot = rows[0], [row["forgetting"]["divergence"] for row in rows]
    kept = {
        key: first[key] for key in ("setting", "method", "every", "base", "numbers")
    }
    return {
        **kept,
        "rate": first["rate"],
        "sets": len(rows),
        "known": ladders.mean(max(row["known"]) for row in rows),
        "steps": ladders.mean(map(steps, rows)),
        "gradients": ladders.mean(map(gradients, rows)),
        "seconds": ladders.mean(map(seconds, rows)),
        "step": float(np.median(np.concatenate([row["seconds"] for row in rows]))),
        "forgotten": ladders.mean(forgot),
    }


def main() -> None:
    """Run what is missing, and show it."""
    parser = options(__doc__, "out/renewals.json")
    add = parser.add_argument
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    add("--sets", type=positive, default=3, help="of pairs, for words")
    shown = Path(__file__).with_name("results") / "renewals.jsonl"
    add("--report", action="store_true", help="show the finished runs of the pages")
    args = parser.parse_args()
    store = shown if args.report else args.out.with_suffix(".jsonl")
    found = []
    for setting in args.settings:
        chosen = SETTINGS[setting]
        for method, every, base, rate in chosen.methods:
            names = "setting", "method", "every", "base", "rate"
            values = setting, method, every, base, rate
            cell = dict(zip(names, values, strict=True))
            sets = args.sets if chosen.begin and method != "lora" else 1
            wanted = [{**cell, "seed": seed} for seed in range(sets)]
            if args.report:
                rows = [
                    row
                    for row in cells.finished(store, {k: cell[k] for k in names[:-1]})
                    if row["rate"] == rate and row["seed"] < sets
                ]
            else:
                rows = cells.run(wanted, compute, store)
            if rows:
                found.append(summary(rows))
    columns = {
        "setting": "{setting}",
        "method": "{method}",
        "every": "{every}",
        "base": "{base}",
        "numbers": "{numbers:,}",
        "sets": "{sets}",
        "rate": "{rate:.1e}",
        "known": "{known:.1%}",
        "steps to 99%": "{steps:.1f}",
        "gradients": "{gradients:.1f}",
        "seconds": "{seconds:.1f}",
        "s/step": "{step:.2f}",
        "forgotten": "{forgotten:.2f}",
    }
    show(columns, found)
    finite = [
        {k: v if v != math.inf else None for k, v in row.items()} for row in found
    ]
    save(finite, args)


if __name__ == "__main__":
    main()
