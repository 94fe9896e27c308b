"""Teach SmolLM2-135M facts that it does not know, with Tunix's own trainer and sampler.

You will see which kernels are adapted, Tunix's progress bar, and what the model
answers before, after, and once the adapters are merged. The model is Tunix's Qwen2, the
trainer its `PeftTrainer`; neither knows MoRA. The folder `out/tunix_sft` gets the
adapter. It takes some minutes on 2 cores:

    pip install google-tunix
    python -m examples.tunix_sft --facts 8
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import mora_jax
from models import airports, lesson, smollm2_tunix
from models.options import positive
from mora_jax import MoRAConfig


def loss(
    model: Any, ids: Any, at: Any, targets: Any, weights: Any, rehearsed: Any
) -> tuple[jax.Array, jax.Array]:
    """The loss of the lesson, and the share of facts that are recalled."""
    logits = smollm2_tunix.next_tokens(model, ids, at)
    batch = lesson.Batch(ids, at, targets, weights)
    return lesson.loss_and_recall(logits, batch, rehearsed)


def train(model: nnx.Module, batch: dict[str, Any], steps: int, rate: float) -> None:
    """Train the adapters of `model`: all that Tunix finds to train in it."""
    from tunix.sft import peft_trainer  # pyright: ignore

    config = peft_trainer.TrainingConfig(eval_every_n_steps=steps + 1, max_steps=steps)
    trainer = peft_trainer.PeftTrainer(model, lesson.optimizer(rate), config)
    trainer = trainer.with_loss_fn(loss, has_aux=True)
    trainer = trainer.with_gen_model_input_fn(lambda batch: batch)
    trainer.train([batch] * steps)


def main() -> None:
    """Ask, teach, merge, and ask again."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--facts", type=positive, default=8, help="number of facts to learn")
    add("--rank", type=positive, default=8, help="budget, as the rank of a LoRA")
    add("--operator", default="auto", help="rotation, sharing, ...")
    add("--steps", type=positive, default=16, help="number of steps")
    add("--learning-rate", type=float, default=lesson.RATE)
    add("--out", type=Path, default=Path("out/tunix_sft"), help="folder to write")
    args = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)  # Tunix uses old names of JAX

    model, tokenizer = smollm2_tunix.load()
    ask = smollm2_tunix.asker(model, tokenizer)
    facts, said, _ = airports.pick_unknown(ask, args.facts, seed=0)
    ordinary = list(airports.ORDINARY)
    said += ask([*ordinary, *airports.REHEARSED])
    kept = said[-len(airports.REHEARSED) :]
    questions = [fact.question for fact in facts]
    answers = [*(fact.answer for fact in facts), *kept]
    batch = lesson.encode(tokenizer.plain, [*questions, *airports.REHEARSED], answers)
    inputs = batch.ids[args.facts :], batch.at[args.facts :]
    rehearsed = nnx.jit(smollm2_tunix.next_tokens)(model, *inputs)

    adapted = mora_jax.nnx.wrap(model, MoRAConfig(args.rank, args.operator))
    print(f"\n{mora_jax.nnx.plan_of(adapted)}\n")
    given = batch._asdict() | {"rehearsed": rehearsed}
    train(adapted, given, args.steps, args.learning_rate)
    mora_jax.save(args.out, mora_jax.nnx.adapters(adapted))

    merged = mora_jax.nnx.merge_adapters(adapted)
    asked = [*questions, *ordinary]
    after, of_merged = (
        smollm2_tunix.asker(m, tokenizer)(asked) for m in (adapted, merged)
    )
    recall = np.mean([f.code in a for f, a in zip(facts, after, strict=False)])
    answered = zip(airports.ORDINARY.values(), after[args.facts :], strict=True)
    right = sum(word in answer for word, answer in answered)
    print(f"\nrecall of the facts: 0% before, {recall:.0%} after")
    print(f"ordinary questions: {right} of {len(ordinary)} answered correctly after")
    print(f"merged model: {'the same' if of_merged == after else 'OTHER'} answers\n")
    rows = zip(asked, said, after, strict=False)  # the rehearsed ones come last
    lesson.show([("question", "before", "after"), *rows])
    print(f"\nthe adapter is in {args.out}")


if __name__ == "__main__":
    main()
