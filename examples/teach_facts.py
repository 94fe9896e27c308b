"""Teach SmolLM2-135M facts that it does not know, with MoRA, in Flax Linen.

You will see which kernels are adapted, a progress bar with loss and recall, and what
the model answers before and after: it knows the facts, still answers ordinary
questions, and says the same after the adapters are merged into its kernels. The folder
`out/teach_facts` gets the adapter and plots. It takes a few minutes on 2 cores:

    python -m examples.teach_facts --facts 20 --rank 8 --operator rotation

`--model DIR` teaches another Llama that talks as SmolLM2 does, from its safetensors.
`--compare` trains a LoRA of the same rank as well, at twenty times the rate, and both
on three sets of facts. `--base nf4` (or int8, int4) teaches a base that qwix has
quantized.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import mora_jax
from models import lesson, smollm2
from models.lora import qwix_lora
from models.options import positive
from models.quantized import TYPES, megabytes, quantized
from models.spectrum import plot_spectrum
from mora_jax import MoRAConfig, linen

LORA_RATE = 20
"""LoRA's rate in MoRA's: between 10 and 20 in docs/what-it-learns.md."""


def train(
    apply: Callable[..., jax.Array],
    adapters: Any,
    variables: Any,
    taught: lesson.Lesson,
    rate: float,
    progress: lesson.Progress,
) -> Any:
    """Train `adapters` alone, until all facts are recalled or all steps are done.

    `variables` is an argument of the compiled step, because XLA would otherwise compile
    its arrays into the program as constants.
    """
    tx, batch = lesson.optimizer(rate), taught.batch

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(adapters: Any, state: Any, variables: Any, rehearsed: jax.Array) -> Any:
        def loss(adapters: Any) -> tuple[jax.Array, jax.Array]:
            logits = apply(adapters, variables, batch.ids, batch.at)
            return lesson.loss_and_recall(logits, batch, rehearsed)

        found, grads = jax.value_and_grad(loss, has_aux=True)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, found

    state = tx.init(adapters)
    for _ in progress:
        adapters, state, found = step(adapters, state, variables, taught.rehearsed)
        progress.note(*found)
    return adapters


def main() -> None:
    """Ask, teach, merge, and ask again."""
    parser = lesson.options(str(__doc__), "out/teach_facts")
    parser.add_argument(
        "--compare",
        type=positive,
        nargs="?",
        const=3,
        default=0,
        metavar="SETS",
        help="train a LoRA as well, and both on so many sets of facts (3)",
    )
    bases = ("float32", *TYPES)
    parser.add_argument("--base", choices=bases, default=bases[0], help="its kernels")
    args = parser.parse_args()
    model, params, tokenizer = smollm2.load(args.model)
    variables = {"params": params}
    base = jax.jit(model.apply)
    if args.model is None:
        lesson.check_model(functools.partial(base, variables))
    settings = {"rank": args.rank, "operator": args.operator, "seed": args.seed}
    in_bits = None
    if args.base == "float32":
        config, ids = MoRAConfig(**settings), jnp.zeros((1, 8), jnp.int32)
        plan = linen.plan(model, variables, config, ids)
        apply = linen.wrap(model, plan)
    else:
        in_bits = quantized(model, params, args.base, **settings)
        before, (apply, variables, plan) = megabytes(variables), in_bits
        size = f"{megabytes(variables):.0f} MB, before {before:.0f} MB"
        print(f"in {args.base} the base has {size}")
    print(f"\n{plan}\n")
    adapted = jax.jit(apply)
    untouched = functools.partial(adapted, mora_jax.init(plan), variables)
    taught = lesson.choose_lesson(untouched, tokenizer, args.facts, args.seed)

    rate = args.learning_rate
    progress = lesson.Progress(args.steps, "MoRA")
    adapters = mora_jax.init(plan)
    adapters = train(apply, adapters, variables, taught, rate, progress)
    mora_jax.save(args.out, adapters, plan)
    plot_spectrum(adapters, plan, args.out / "spectrum.png")
    if in_bits is None:
        merged = {"params": mora_jax.merge(params, adapters, plan)}
    else:
        merged = in_bits.merged(adapters)

    trained = {"MoRA": [progress]}
    if args.compare:
        lora, init = qwix_lora(model, args.rank)
        start = init(jax.random.key(0))
        trained["LoRA"] = []
        for number in range(args.compare):
            seed = args.seed + number
            if number:
                other = lesson.choose_lesson(untouched, tokenizer, args.facts, seed)
                trained["MoRA"].append(again := lesson.Progress(args.steps, "MoRA"))
                train(apply, mora_jax.init(plan), variables, other, rate, again)
            else:
                other = taught
            trained["LoRA"].append(again := lesson.Progress(args.steps, "LoRA"))
            first = jax.tree.map(jnp.copy, start)
            train(lora, first, variables, other, LORA_RATE * rate, again)
        size = sum(leaf.size for leaf in jax.tree.leaves(start))
        lesson.compare(trained, {"MoRA": plan.trainable_parameters, "LoRA": size})
    lesson.save_histories(trained, args.out)
    after = functools.partial(adapted, adapters, variables)
    merged_model = functools.partial(base, merged)
    lesson.report(taught, progress, after, merged_model, args.out)


if __name__ == "__main__":
    main()
