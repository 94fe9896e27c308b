"""Claim: a fold into a bfloat16 kernel learns as well as the other way to compute.

A fold adds the delta to the kernel in every step, and must round the sum to bfloat16.
Its dither keeps a delta that is small compared to the kernel in the mean. SmolLM2-135M
learns the same facts three times: in float32, and in bfloat16 both ways; and all of
that for several sets of facts. You will see the mean loss at each step; loss and recall
go to a JSON file, and the loss to a plot. `execution="auto"` folds 16-bit kernels on
TPUs and GPUs because of it.

    python -m benchmarks.quality.bfloat16 --facts 8 --steps 20 --seeds 3
"""

import argparse
import functools
from collections.abc import Callable
from statistics import mean
from typing import Any

import jax
import optax

import mora_jax
from benchmarks.common.harness import Row, options, save, show
from benchmarks.common.plots import figure
from models import lesson, smollm2
from models.options import positive
from mora_jax import MoRAConfig, linen

RUNS = (("float32", "activation"), ("bfloat16", "activation"), ("bfloat16", "fold"))


def learn(
    model: smollm2.Llama,
    variables: Any,
    taught: lesson.Lesson,
    args: argparse.Namespace,
    execution: str,
    label: str,
    watch: Callable[[int, Any], object] = lambda step, adapters: None,
) -> list[Row]:
    """Loss and recall before each step of training adapters for `variables`.

    `watch` is called after each step, with its number and the adapters.
    """
    settings = dict(operator=args.operator, execution=execution, scale="paper")
    config = MoRAConfig(rank=args.rank, **settings)
    plan = linen.plan(model, variables, config, taught.batch.ids[:1])
    apply, tx = linen.wrap(model, plan), lesson.optimizer(lesson.rate_of(args))

    @jax.jit
    def step(adapters: Any, state: Any, variables: Any, rehearsed: jax.Array) -> Any:
        def loss(adapters: Any) -> tuple[jax.Array, jax.Array]:
            logits = apply(adapters, variables, taught.batch.ids, taught.batch.at)
            return lesson.loss_and_recall(logits, taught.batch, rehearsed)

        found, grads = jax.value_and_grad(loss, has_aux=True)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, found

    progress = lesson.Progress(args.steps, label)
    state = tx.init(adapters := mora_jax.init(plan))
    for _ in progress:
        adapters, state, found = step(adapters, state, variables, taught.rehearsed)
        progress.note(*found)
        watch(len(progress.history), adapters)
    return [
        {"run": label, "step": number, "loss": loss, "recall": recall}
        for number, (loss, recall) in enumerate(progress.history)
    ]


def main() -> None:
    """Train three times, and report."""
    parser = options(__doc__, "out/bfloat16.json")
    parser.add_argument("--facts", type=positive, default=8)
    parser.add_argument("--steps", type=positive, default=20, help="largest number")
    parser.add_argument("--rank", type=positive, default=8)
    parser.add_argument("--operator", default="rotation")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=positive, default=3, help="sets of facts")
    args = parser.parse_args()
    model, params, tokenizer = smollm2.load()
    base = functools.partial(jax.jit(model.apply), {"params": params})
    lesson.check_model(base)
    rows: list[Row] = []
    for seed in range(args.seeds):
        taught = lesson.choose_lesson(base, tokenizer, args.facts, seed)
        for dtype, execution in RUNS:
            variables = {"params": optax.tree_utils.tree_cast(params, dtype)}
            label = f"{dtype}, {execution}"
            found = learn(model, variables, taught, args, execution, label)
            rows += [{"seed": seed, **row} for row in found]
    lines = {f"{dtype}, {execution}": {} for dtype, execution in RUNS}
    for row in rows:
        lines[row["run"]].setdefault(row["step"], []).append(row["loss"])
    columns = {"mean loss at step": "{step}"}
    columns |= {label: f"{{{label}:.3f}}" for label in lines}
    # A run ends when all is learned, so the last steps are the means of fewer runs.
    steps = max(len(line) for line in lines.values())
    show(
        columns,
        [
            {"step": k} | {label: mean(line[k]) for label, line in lines.items()}
            for k in range(steps)
            if all(len(line.get(k, ())) == args.seeds for line in lines.values())
        ],
    )
    save(rows, args)
    with figure(args.out.with_suffix(".png"), figsize=(7, 4)) as (_, [[axis]]):
        for label, line in lines.items():
            axis.plot(
                [mean(line[k]) for k in sorted(line)], "o-", markersize=3, label=label
            )
        axis.set(xlabel="step", ylabel="mean loss", yscale="log")
        axis.legend()


if __name__ == "__main__":
    main()
