"""Teach SmolLM2-135M facts that it does not know, with MoRA: the main job.

You will see what the model answers before, a progress bar with loss and recall, what it
answers after, that ordinary questions still get their answers, and that the merged
model, which has no adapter any more, says the same. `out/teach_facts` gets plots and
the adapter. Takes a few minutes on 2 cores:

    python examples/teach_facts.py --facts 20 --rank 8 --operator rotation
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import airports
import jax
import jax.numpy as jnp
import numpy as np
import optax
import smollm2
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

import mora_jax
from mora_jax import MoRAConfig, linen

SHOWN = 4  # facts whose answers are printed
NEW_TOKENS = 16  # of an answer
CHUNK = 8  # questions asked at once
LENGTH = 44  # tokens of the longest question and answer

History = list[tuple[float, float]]


class Student(NamedTuple):
    """A model that is to learn, in whichever Flax API it is written.

    Attributes:
        base: (variables, ids, at) -> logits, of the model as it is.
        apply: (adapters, variables, ids, at) -> logits, of the model with adapters.
        merge: (adapters, variables) -> variables, for `base`.
        variables: all that is not trained.
        plan: the adapters.
    """

    base: Callable[..., Any]
    apply: Callable[..., Any]
    merge: Callable[..., Any]
    variables: Any
    plan: mora_jax.Plan


def load(config: MoRAConfig) -> tuple[Student, smollm2.Tokenizer]:
    """SmolLM2 in Linen."""
    model, params, tokenizer = smollm2.load()
    variables = {"params": params}
    plan = linen.plan(model, variables, config, np.zeros((1, 8), np.int32))

    def merge(adapters: Any, variables: Any) -> Any:
        return {"params": mora_jax.merge(variables["params"], adapters, plan)}

    apply = linen.wrap(model, plan)
    return Student(model.apply, apply, merge, variables, plan), tokenizer


def arguments(description: str, compare: bool) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--facts", type=int, default=20, help="how many to learn")
    parser.add_argument("--rank", type=int, default=8, help="budget, as LoRA's rank")
    parser.add_argument("--operator", default="auto", help="rotation, sharing, ...")
    parser.add_argument("--steps", type=int, default=30, help="at most")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0, help="chooses the facts")
    if compare:
        text = "train a LoRA of the same budget as well"
        parser.add_argument("--compare", action="store_true", help=text)
    out = Path("out") / Path(sys.argv[0]).stem
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    args.compare = compare and args.compare
    for name in ("facts", "rank", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def asker(
    apply: smollm2.Apply, tokenizer: smollm2.Tokenizer
) -> Callable[[Iterable[str]], list[str]]:
    """Questions to greedy answers, in chunks of one shape."""

    def ask(questions: Iterable[str]) -> list[str]:
        prompts = [tokenizer.chat(question) for question in questions]
        count = len(prompts)
        prompts += prompts[:1] * (-count % CHUNK)
        answers = []
        chunks = range(0, len(prompts), CHUNK)
        for start in tqdm(chunks, "asking", leave=False, disable=len(chunks) == 1):
            chunk = prompts[start : start + CHUNK]
            answers += smollm2.generate(apply, chunk, NEW_TOKENS, LENGTH)
        return [tokenizer.decode(answer) for answer in answers[:count]]

    return ask


def train(
    apply: Callable[..., jax.Array],
    adapters: Any,
    variables: Any,
    batch: airports.Batch,
    rehearsed: jax.Array,
    args: argparse.Namespace,
    label: str,
) -> tuple[Any, History, float]:
    """Adam on `adapters` alone, until all facts are recalled or `args.steps`.

    Args:
        apply: (adapters, variables, ids, at) -> logits.
        adapters: what is trained.
        variables: what is not; an argument of the compiled step and no constant.
        batch: the facts, then the rehearsed questions.
        rehearsed: the untouched model's logits for the latter.
        args: steps and learning rate.
        label: of the progress bar.

    Returns:
        The trained adapters, (loss, recall) before each step, and seconds per step.
    """
    warmup = optax.linear_schedule(args.learning_rate / 3, args.learning_rate, 3)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(warmup))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(adapters: Any, state: Any, variables: Any, rehearsed: jax.Array) -> Any:
        def loss(adapters: Any) -> tuple[jax.Array, jax.Array]:
            logits = apply(adapters, variables, batch.ids, batch.at)
            return airports.loss_and_recall(logits, batch, rehearsed)

        (loss_, recall), grads = jax.value_and_grad(loss, has_aux=True)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, loss_, recall

    state, history, seconds = tx.init(adapters), [], []
    with tqdm(total=args.steps, desc=f"{label} (compiling)") as bar:
        for _ in range(args.steps):
            start = time.perf_counter()
            adapters, state, loss, recall = step(adapters, state, variables, rehearsed)
            history.append((float(loss), float(recall)))
            seconds.append(time.perf_counter() - start)
            bar.set_description(label)
            bar.set_postfix(loss=f"{loss:.3f}", recall=f"{recall:.0%}")
            bar.update()
            if recall == 1 and loss < 0.05:
                break
    return adapters, history, float(np.median(seconds[1:] or seconds))


def lora(
    ids: np.ndarray, rank: int, seed: int, model: smollm2.Llama | None = None
) -> tuple[Callable[..., jax.Array], Any]:
    """LoRA by qwix on the same projections: its `apply`, and its first adapters."""
    try:
        import qwix
    except ImportError as error:
        raise ImportError("--compare needs `pip install qwix`") from error
    rule = {"module_path": ".*_proj", "rank": rank, "alpha": float(rank)}
    provider = qwix.LoraProvider(**rule)
    adapted: Any = qwix.apply_lora_to_model(model or smollm2.Llama(), provider)

    @jax.jit  # so that the rest of the parameters, which we have, is never made
    def init(key: jax.Array) -> dict[str, Any]:
        flat = flatten_dict(adapted.init(key, ids[:1])["params"], sep="/")
        return {path: leaf for path, leaf in flat.items() if "lora" in path}

    def apply(adapters: Any, variables: Any, *inputs: Any) -> jax.Array:
        flat = flatten_dict(variables["params"], sep="/") | adapters
        return adapted.apply({"params": unflatten_dict(flat, sep="/")}, *inputs)

    return apply, init(jax.random.key(seed))


def plot(histories: dict[str, History], path: Path) -> None:
    """Loss and recall over steps, one line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for label, history in histories.items():
        for axis, values in zip(axes, zip(*history, strict=True), strict=True):
            axis.plot(values, marker=".", label=label)
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set(xlabel="step", ylabel="loss", yscale="log", title="Loss on the answers")
    axes[1].set(xlabel="step", ylabel="facts recalled", title="Recall")
    axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def show(rows: Sequence[tuple[str, ...]]) -> None:
    """Print aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())


def compare(mora: tuple[int, History, float], lora: tuple[int, History, float]) -> None:
    """Print parameters, steps and speed side by side."""
    rows = [("method", "parameters", "steps", "s/step", "final loss", "recall")]
    for label, (size, history, seconds) in (("MoRA", mora), ("LoRA", lora)):
        loss, recall = history[-1]
        numbers = f"{len(history)}", f"{seconds:.2f}", f"{loss:.3f}", f"{recall:.0%}"
        rows.append((label, f"{size:,}", *numbers))
    print()
    show(rows)


def main(
    load: Callable[[MoRAConfig], tuple[Student, smollm2.Tokenizer]] = load,
    lora: Callable[..., Any] | None = lora,
    description: str = str(__doc__).split("\n")[0],
) -> None:
    """Ask, teach, ask again, merge, ask once more."""
    args = arguments(description, compare=lora is not None)
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    print("loading SmolLM2-135M-Instruct")
    config = MoRAConfig(rank=args.rank, operator=args.operator, seed=args.seed)
    student, tokenizer = load(config)
    plan, variables = student.plan, student.variables
    base, apply = jax.jit(student.base), jax.jit(student.apply)
    worst = smollm2.check_reference(functools.partial(base, variables))
    print(f"its logits are within {worst:.0e} of the reference")

    ask = asker(functools.partial(base, variables), tokenizer)
    facts, wrong, known = airports.pick_unknown(ask, args.facts, args.seed)
    print(
        f"it knew {known} of {known + len(facts)} airports; it is to learn the others"
    )
    questions = [fact.question for fact in facts]
    said = ask([*airports.ORDINARY, *airports.REHEARSED])
    ordinary = len(airports.ORDINARY)
    batch = airports.encode(
        tokenizer,
        [*questions, *airports.REHEARSED],
        [*(fact.answer for fact in facts), *said[ordinary:]],
    )
    rehearsed = base(variables, batch.ids[len(facts) :], batch.at[len(facts) :])

    print(f"\n{plan}\n")
    data = variables, batch, rehearsed, args
    first = mora_jax.init(plan)
    adapters, history, seconds = train(student.apply, first, *data, "MoRA")
    histories = {"MoRA": history}
    mora_jax.save(args.out, adapters, plan)
    figure = mora_jax.diagnostics.plot_spectrum(adapters, plan)
    figure.savefig(args.out / "spectrum.png", dpi=150)

    merged = jax.jit(student.merge)(adapters, variables)
    adapted = functools.partial(apply, adapters, variables)
    answers = asker(adapted, tokenizer)([*airports.ORDINARY, *questions])
    after, recalled = answers[:ordinary], answers[ordinary:]
    recall = np.mean([f.code in a for f, a in zip(facts, recalled, strict=True)])
    right = [w in a for w, a in zip(airports.ORDINARY.values(), after, strict=True)]
    same = [b == a for b, a in zip(said, after, strict=False)]
    merged_says = asker(functools.partial(base, merged), tokenizer)(airports.ORDINARY)
    inputs = batch.ids[:CHUNK], batch.at[:CHUNK, :1]
    gap = jnp.abs(adapted(*inputs) - base(merged, *inputs)).max()

    print(f"\n{len(history)} steps of {seconds:.2f} s")
    print(f"recall of the facts: 0% before, {recall:.0%} after")
    print(
        f"ordinary questions: {sum(right)} of {ordinary} answered rightly after, ",
        end="",
    )
    print(f"{sum(same)} word for word as before")
    print(f"merged model: logits differ by at most {gap:.0e}, ", end="")
    print("the same answers\n" if merged_says == after else "OTHER ANSWERS\n")
    shown = [*zip(questions, wrong, recalled, strict=True)][:SHOWN]
    shown += zip(airports.ORDINARY, said, after, strict=False)
    show([("question", "before", "after"), *shown])

    if lora is not None and args.compare:
        lora_apply, first = lora(batch.ids, args.rank, args.seed)
        size = sum(leaf.size for leaf in jax.tree.leaves(first))
        _, histories["LoRA"], each = train(lora_apply, first, *data, "LoRA")
        mora = plan.trainable_parameters, history, seconds
        compare(mora, (size, histories["LoRA"], each))

    (args.out / "learning.json").write_text(json.dumps(histories))
    plot(histories, args.out / "learning.png")
    print(f"\nplot and adapter in {args.out}; {time.perf_counter() - began:.0f} s")
    if recall < 0.95:
        raise SystemExit("fewer than 95% of the facts were learned: try more --steps")


if __name__ == "__main__":
    main()
