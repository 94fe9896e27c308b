"""Claim: folding into a bfloat16 kernel slows learning at first.

A fold rounds kernel + delta to bfloat16 in every step, and so loses what is small
compared to the kernel; the other way adds the delta to the layer's output.
SmolLM2-135M learns the same facts three times: in float32, and in bfloat16 both ways.
You will see the loss at each step; loss and recall go to a JSON file, and the loss to a
plot. Because of the difference, `execution="auto"` does not fold in 16-bit dtypes.

    python -m benchmarks.bfloat16 --facts 8 --steps 20
"""

import argparse
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import optax

import mora_jax
from benchmarks.harness import Row, options, save, show
from benchmarks.plots import figure
from models import lesson, smollm2
from models.options import positive
from mora_jax import MoRAConfig, Plan, linen

RUNS = (("float32", "activation"), ("bfloat16", "activation"), ("bfloat16", "fold"))


def learn(
    model: smollm2.Llama,
    variables: Any,
    taught: lesson.Lesson,
    args: argparse.Namespace,
    execution: str,
    label: str,
    watch: Callable[[int, Plan, Any], object] = lambda step, plan, adapters: None,
) -> list[Row]:
    """Loss and recall before each step of training adapters for `variables`.

    `watch` is called after each step, with its number, the plan and the adapters.
    """
    config = MoRAConfig(rank=args.rank, operator=args.operator, execution=execution)
    plan = linen.plan(model, variables, config, taught.batch.ids[:1])
    apply, tx = linen.wrap(model, plan), lesson.optimizer(args.learning_rate)

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
        watch(len(progress.history), plan, adapters)
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
    parser.add_argument("--seed", type=int, default=0, help="number that chooses facts")
    args = parser.parse_args()
    model, params, tokenizer = smollm2.load()
    base = functools.partial(jax.jit(model.apply), {"params": params})
    taught = lesson.choose_lesson(base, tokenizer, args.facts, args.seed)
    runs = {}
    for dtype, execution in RUNS:
        variables = {"params": optax.tree_utils.tree_cast(params, dtype)}
        label = f"{dtype}, {execution}"
        runs[label] = learn(model, variables, taught, args, execution, label)
    columns = {"loss at step": "{step}"} | {label: f"{{{label}:.3f}}" for label in runs}
    losses = {label: [row["loss"] for row in rows] for label, rows in runs.items()}
    steps = enumerate(itertools.zip_longest(*losses.values()))
    show(
        columns,
        [{"step": k, **dict(zip(runs, step, strict=True))} for k, step in steps],
    )
    save(sum(runs.values(), []), args)
    with figure(args.out.with_suffix(".png"), figsize=(7, 4)) as (_, [[axis]]):
        for label, line in losses.items():
            axis.plot(line, "o-", markersize=3, label=label)
        axis.set(xlabel="step", ylabel="loss", yscale="log")
        axis.legend()


if __name__ == "__main__":
    main()
