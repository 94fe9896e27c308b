"""Teach SmolLM2-135M facts that it does not know, with MoRA, in Flax Linen.

You will see which kernels are adapted, a progress bar with loss and recall, and what
the model answers before and after: it knows the facts, still answers ordinary
questions, and says the same after the adapters are merged into its kernels. The folder
`out/teach_facts` gets the adapter and plots. It takes a few minutes on 2 cores:

    python -m examples.teach_facts --facts 20 --rank 8 --operator rotation
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

import mora_jax
from models import lesson, smollm2
from models.lora import qwix_lora
from mora_jax import MoRAConfig, linen


def train(
    apply: Callable[..., jax.Array],
    adapters: Any,
    variables: Any,
    taught: lesson.Lesson,
    args: argparse.Namespace,
    label: str,
) -> tuple[Any, lesson.Progress]:
    """Train `adapters` alone, until all facts are recalled or `args.steps` are done.

    `variables` is an argument of the compiled step, because XLA would otherwise compile
    its arrays into the program as constants.
    """
    tx, batch = lesson.optimizer(args.learning_rate), taught.batch

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(adapters: Any, state: Any, variables: Any, rehearsed: jax.Array) -> Any:
        def loss(adapters: Any) -> tuple[jax.Array, jax.Array]:
            logits = apply(adapters, variables, batch.ids, batch.at)
            return lesson.loss_and_recall(logits, batch, rehearsed)

        found, grads = jax.value_and_grad(loss, has_aux=True)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, found

    state, progress = tx.init(adapters), lesson.Progress(args.steps, label)
    for _ in progress:
        adapters, state, found = step(adapters, state, variables, taught.rehearsed)
        progress.note(*found)
    return adapters, progress


def compare(trained: dict[str, lesson.Progress], sizes: dict[str, int]) -> None:
    """Print the number of parameters, steps and speed of each method."""
    rows = [("method", "parameters", "steps", "s/step", "final loss", "recall")]
    for label, progress in trained.items():
        (loss, recall), steps = progress.history[-1], len(progress.history)
        numbers = f"{sizes[label]:,}", f"{steps}", f"{progress.seconds_per_step:.2f}"
        rows.append((label, *numbers, f"{loss:.3f}", f"{recall:.0%}"))
    print()
    lesson.show(rows)


def main() -> None:
    """Ask, teach, merge, and ask again."""
    parser = lesson.options(str(__doc__), "out/teach_facts")
    parser.add_argument("--compare", action="store_true", help="train a LoRA as well")
    args = parser.parse_args()
    model, params, tokenizer = smollm2.load()
    variables = {"params": params}
    base = jax.jit(model.apply)
    untouched = functools.partial(base, variables)
    taught = lesson.choose_lesson(untouched, tokenizer, args.facts, args.seed)

    config = MoRAConfig(rank=args.rank, operator=args.operator, seed=args.seed)
    plan = linen.plan(model, variables, config, taught.batch.ids[:1])
    print(f"\n{plan}\n")
    apply = linen.wrap(model, plan)
    adapters = mora_jax.init(plan)
    adapters, progress = train(apply, adapters, variables, taught, args, "MoRA")
    mora_jax.save(args.out, adapters, plan)
    figure = mora_jax.diagnostics.plot_spectrum(adapters, plan)
    figure.savefig(args.out / "spectrum.png", dpi=150)
    merged = {"params": mora_jax.merge(params, adapters, plan)}

    trained = {"MoRA": progress}
    if args.compare:
        lora, first = qwix_lora(model, args.rank)
        size = sum(leaf.size for leaf in jax.tree.leaves(first))
        sizes = {"MoRA": plan.trainable_parameters, "LoRA": size}
        _, trained["LoRA"] = train(lora, first, variables, taught, args, "LoRA")
        compare(trained, sizes)
    lesson.save_histories(trained, args.out)
    adapted = functools.partial(jax.jit(apply), adapters, variables)
    merged_model = functools.partial(base, merged)
    lesson.report(taught, progress, adapted, merged_model, args.out)


if __name__ == "__main__":
    main()
