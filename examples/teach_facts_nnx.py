"""Teach SmolLM2-135M facts that it does not know, with MoRA, in Flax NNX.

You will see what teach_facts.py shows, with the same losses, because the model is the
twin of that in Linen. The folder `out/teach_facts_nnx` gets the adapter and plots. It
takes a few minutes on 2 cores:

    python -m examples.teach_facts_nnx --facts 8 --rank 8 --operator rotation
"""

import argparse
import functools
from typing import Any

import jax
from flax import nnx

import mora_jax
from models import lesson, smollm2_nnx
from models.spectrum import plot_spectrum
from mora_jax import MoRAConfig


def train(
    model: nnx.Module, taught: lesson.Lesson, args: argparse.Namespace
) -> lesson.Progress:
    """Train the adapters in `model` alone, until all facts are recalled."""
    tx, batch = lesson.optimizer(lesson.rate_of(args)), taught.batch
    optimizer = mora_jax.nnx.adapter_optimizer(model, tx)

    @nnx.jit
    def step(model: Any, optimizer: nnx.Optimizer, rehearsed: jax.Array) -> Any:
        def loss(model: Any) -> tuple[jax.Array, jax.Array]:
            logits = model(batch.ids, batch.at)
            return lesson.loss_and_recall(logits, batch, rehearsed)

        found, grads = mora_jax.nnx.value_and_grad(loss, has_aux=True)(model)
        optimizer.update(model, grads)
        return found

    progress = lesson.Progress(args.steps, lesson.method_of(args.operator))
    for _ in progress:
        progress.note(*step(model, optimizer, taught.rehearsed))
    return progress


def main() -> None:
    """Ask, teach, merge, and ask again."""
    args = lesson.options(str(__doc__), "out/teach_facts_nnx").parse_args()
    lesson.announce(args)
    model, tokenizer = smollm2_nnx.load(args.model)
    forward: Any = nnx.jit(lambda model, ids, at: model(ids, at))
    untouched = functools.partial(forward, model)
    if args.model is None:
        lesson.check_model(untouched)
    taught = lesson.choose_lesson(untouched, tokenizer, args.facts, args.seed)

    config = MoRAConfig(rank=args.rank, operator=args.operator)
    adapted = mora_jax.nnx.wrap(model, config)
    print(f"\n{mora_jax.nnx.plan_of(adapted)}\n")
    progress = train(adapted, taught, args)
    adapters = mora_jax.nnx.adapters(adapted)
    mora_jax.save(args.out, adapters)
    plot_spectrum(adapters, args.out / "spectrum.png")
    merged = mora_jax.nnx.merge_adapters(adapted)

    lesson.save_histories({progress.label: [progress]}, args.out)
    ask_adapted, ask_merged = (functools.partial(forward, m) for m in (adapted, merged))
    lesson.report(taught, progress, ask_adapted, ask_merged, args.out)


if __name__ == "__main__":
    main()
