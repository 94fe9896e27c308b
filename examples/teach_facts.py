"""Teach SmolLM2-135M facts that it does not know, with MoRA, in Flax Linen.

You will see which kernels are adapted, a progress bar with loss and recall, and what
the model answers before and after: it knows the facts, still answers ordinary
questions, and says the same after the adapters are merged into its kernels. The folder
`out/teach_facts` gets the adapter and plots. It takes about two minutes on 2 cores:

    python -m examples.teach_facts --facts 8 --rank 8 --operator rotation

`--model DIR` teaches another Llama that talks as SmolLM2 does, from its safetensors.
`--operator low_rank` teaches with a LoRA of this library, at ten times the rate.
`--compare` trains that LoRA and qwix's as well, all of them on three sets of facts, and
plots what is recalled over steps and over seconds. `--base nf4` (or int8, int4) teaches
a base that qwix has quantized.
"""

import functools
from collections.abc import Callable, Iterator
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

Method = tuple[Callable[..., jax.Array], Callable[[], Any], float]
"""Apply, a function that starts adapters, and their rate."""


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


def _loras(model: Any, variables: Any, args: Any) -> Iterator[tuple[str, Method]]:
    """LoRAs of the same rank: this library's, and qwix's."""
    rate = args.learning_rate or lesson.RATE * lesson.LORA_RATE
    config = MoRAConfig(rank=args.rank, operator="low_rank")
    plan = linen.plan(model, variables, config, jnp.zeros((1, 8), jnp.int32))
    init = functools.partial(mora_jax.init, plan)
    yield lesson.method_of("low_rank"), (linen.wrap(model, plan), init, rate)
    lora, start = qwix_lora(model, args.rank)
    yield "LoRA, qwix", (lora, functools.partial(start, jax.random.key(0)), rate)


def _size(adapters: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(adapters))


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
        help="train LoRAs as well, and all on so many sets of facts (3)",
    )
    bases = ("float32", *TYPES)
    parser.add_argument("--base", choices=bases, default=bases[0], help="its kernels")
    args = parser.parse_args()
    if args.compare and (args.operator == "low_rank" or args.base != bases[0]):
        parser.error("--compare needs an operator of MoRA, and a base in float32")
    lesson.announce(args)
    model, params, tokenizer = smollm2.load(args.model)
    variables = {"params": params}
    base = jax.jit(model.apply)
    if args.model is None:
        lesson.check_model(functools.partial(base, variables))
    settings = {"rank": args.rank, "operator": args.operator}
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

    label, rate = lesson.method_of(args.operator), lesson.rate_of(args)
    progress = lesson.Progress(args.steps, label)
    adapters = mora_jax.init(plan)
    adapters = train(apply, adapters, variables, taught, rate, progress)
    mora_jax.save(args.out, adapters)
    plot_spectrum(adapters, args.out / "spectrum.png")
    if in_bits is None:
        merged = {"params": mora_jax.merge(params, adapters)}
    else:
        merged = in_bits.merged(adapters)

    trained = {label: [progress]}
    if args.compare:
        method = apply, functools.partial(mora_jax.init, plan), rate
        others = dict(_loras(model, variables, args)) | {label: method}
        for name, (other, init, own_rate) in others.items():
            runs = trained.setdefault(name, [])
            for number in range(len(runs), args.compare):
                lessons = lesson.choose_lesson(
                    untouched, tokenizer, args.facts, args.seed + number
                )
                runs.append(again := lesson.Progress(args.steps, name))
                train(other, init(), variables, lessons, own_rate, again)
        lesson.compare(
            trained, {name: _size(init()) for name, (_, init, _) in others.items()}
        )
    lesson.save_histories(trained, args.out)
    after = functools.partial(adapted, adapters, variables)
    merged_model = functools.partial(base, merged)
    lesson.report(taught, progress, after, merged_model, args.out)


if __name__ == "__main__":
    main()
