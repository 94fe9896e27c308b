"""A lesson for SmolLM2: facts to learn, questions to rehearse, and how well it went.

Programs that teach the model share it, so that they show little besides training.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from models.airports import ORDINARY, REHEARSED, Fact, pick_unknown
from models.options import positive
from models.smollm2 import EOS, Apply, Tokenizer, check_reference, generate

HOLD = 3.0
"""The weight of the rehearsed questions: at 1 some of `ORDINARY` still went wrong."""

RATE = 3e-4
"""A little below full fine-tuning's best rate: above, rehearsed answers drift."""

SHOWN = 4  # facts whose answers are printed
NEW_TOKENS = 16  # of the longest answer
CHUNK = 8  # questions that are asked at once
LENGTH = 44  # tokens of the longest question and answer together


class Batch(NamedTuple):
    """Conversations, and which of their tokens should be learned.

    Attributes:
        ids: (n, length) tokens, padded on the right.
        at: (n, k) positions whose next token belongs to the answer.
        targets: (n, k) those next tokens.
        weights: (n, k) 1.0 for a token of the answer, 0.0 for padding.
    """

    ids: np.ndarray
    at: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


class Lesson(NamedTuple):
    """Facts that a model should learn, and its answers before.

    Attributes:
        tokenizer: The model's tokenizer.
        facts: The facts to learn.
        before: The answers of the untouched model by question.
        batch: The facts with their answers, then the rehearsed questions with those
            that the untouched model gave.
        rehearsed: Its logits for the latter, (questions, k, vocab).
    """

    tokenizer: Tokenizer
    facts: Sequence[Fact]
    before: Mapping[str, str]
    batch: Batch
    rehearsed: jax.Array


def encode(
    tokenizer: Tokenizer, questions: Sequence[str], answers: Sequence[str]
) -> Batch:
    """Questions with their answers as a batch for `loss_and_recall`."""
    prompts = [tokenizer.chat(question) for question in questions]
    return batch(prompts, [[*tokenizer.encode(answer), EOS] for answer in answers])


def batch(
    prompts: Sequence[list[int]],
    replies: Sequence[list[int]],
    size: tuple[int, int] = (0, 0),
) -> Batch:
    """Prompts with their replies; each token of a reply is to be foretold.

    `size` is the least length of the rows, and of the replies: batches of one size
    share compiled programs.
    """
    lengths = [len(p) + len(r) for p, r in zip(prompts, replies, strict=True)]
    length, k = max([size[0], *lengths]), max([size[1], *map(len, replies)])
    n = len(prompts)
    made = Batch(
        ids=np.full((n, length), EOS, np.int32),
        at=np.zeros((n, k), np.int32),
        targets=np.zeros((n, k), np.int32),
        weights=np.zeros((n, k), np.float32),
    )
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        start, count = len(prompt), len(reply)
        made.ids[row, : start + count] = prompt + reply
        made.at[row, :count] = np.arange(start - 1, start - 1 + count)
        made.targets[row, :count] = reply
        made.weights[row, :count] = 1
    return made


def loss_and_recall(
    logits: jax.Array, batch: Batch, rehearsed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Distance of the answers from what they should be, and the share of right ones.

    The loss is the cross-entropy of the facts, plus `HOLD` times the divergence from
    what the untouched model says to rehearsed questions; both are means over tokens.
    Recall needs no decoding, because greedy decoding gives an answer exactly if each of
    its tokens is the likeliest after those before it.

    Args:
        logits: (facts + r, k, vocab), at `batch.at`.
        batch: The facts, then r rehearsed questions.
        rehearsed: (r, k, vocab), the untouched model's logits for the latter.
    """
    facts = len(logits) - len(rehearsed)

    def mean(values: jax.Array, weights: np.ndarray) -> jax.Array:
        return jnp.sum(values * weights) / jnp.sum(weights)

    targets, weights = batch.targets[:facts], batch.weights[:facts]
    learn = optax.softmax_cross_entropy_with_integer_labels(logits[:facts], targets)
    before, now = jax.nn.log_softmax(rehearsed), jax.nn.log_softmax(logits[facts:])
    drift = jnp.sum(jnp.exp(before) * (before - now), -1)
    right = (logits[:facts].argmax(-1) == targets) | (weights == 0)
    loss = mean(learn, weights) + HOLD * mean(drift, batch.weights[facts:])
    return loss, jnp.mean(right.all(-1))


LORA_RATE = 10
"""LoRA's rate in MoRA's: between 10 and 20 in docs/what-it-learns.md."""


def method_of(operator: str) -> str:
    """The name of a method in tables and plots."""
    return "LoRA" if operator == "low_rank" else "MoRA"


def rate_of(args: argparse.Namespace) -> float:
    """The learning rate that was asked for, or the usual one of the method."""
    usual = RATE * (LORA_RATE if args.operator == "low_rank" else 1)
    return args.learning_rate or usual


def optimizer(learning_rate: float) -> optax.GradientTransformation:
    """Adam with a short warm-up, on clipped gradients."""
    warmup = optax.linear_schedule(learning_rate / 3, learning_rate, 3)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(warmup))


class Progress:
    """Training steps with a progress bar, until all facts are recalled.

    The body of `for _ in progress` must `note` loss and recall, which go to `history`.
    """

    def __init__(self, steps: int, label: str) -> None:
        self.steps, self.label = steps, label
        self.history: list[tuple[float, float]] = []
        self.seconds: list[float] = []

    def __iter__(self) -> Iterator[int]:
        with tqdm(total=self.steps, desc=f"{self.label} (compiling)") as bar:
            for number in range(self.steps):
                start = time.perf_counter()
                yield number
                self.seconds.append(time.perf_counter() - start)
                loss, recall = self.history[-1]
                bar.set_description(self.label)
                bar.set_postfix(loss=f"{loss:.3f}", recall=f"{recall:.0%}")
                bar.update()
                if recall == 1 and loss < 0.05:
                    break

    def note(self, loss: jax.Array, recall: jax.Array) -> None:
        """Keep the loss and recall of a step, after waiting for both."""
        self.history.append((float(loss), float(recall)))

    @property
    def seconds_per_step(self) -> float:
        """The median without the first step, which is compiled."""
        return float(np.median(self.seconds[1:] or self.seconds))


def asker(apply: Apply, tokenizer: Tokenizer) -> Callable[[Iterable[str]], list[str]]:
    """A function from questions to greedy answers, in chunks of one shape."""

    def ask(questions: Iterable[str]) -> list[str]:
        prompts = [tokenizer.chat(question) for question in questions]
        count = len(prompts)
        prompts += prompts[:1] * (-count % CHUNK)
        answers = []
        chunks = range(0, len(prompts), CHUNK)
        for start in tqdm(chunks, "asking", leave=False, disable=len(chunks) == 1):
            chunk = prompts[start : start + CHUNK]
            answers += generate(apply, chunk, NEW_TOKENS, LENGTH)
        return [tokenizer.decode(answer) for answer in answers[:count]]

    return ask


def check_model(base: Apply) -> None:
    """Print how near the model's logits are to the reference.

    Raises:
        ValueError: They are not.
    """
    worst = check_reference(base)
    print(f"the model's logits are within {worst:.0e} of the reference")


def choose_lesson(base: Apply, tokenizer: Tokenizer, count: int, seed: int) -> Lesson:
    """A lesson of `count` facts that the untouched model `base` does not know."""
    ask = asker(base, tokenizer)
    facts, wrong, known = pick_unknown(ask, count, seed)
    print(f"it knew {known} of {known + count} airports; it should learn the others")
    questions, asked = [fact.question for fact in facts], [*ORDINARY, *REHEARSED]
    before = dict(zip([*questions, *asked], [*wrong, *ask(asked)], strict=True))
    batch = encode(
        tokenizer,
        [*questions, *REHEARSED],
        [*(fact.answer for fact in facts), *(before[q] for q in REHEARSED)],
    )
    rehearsed = base(batch.ids[count:], batch.at[count:])
    return Lesson(tokenizer, facts, before, batch, rehearsed)


def report(
    lesson: Lesson, progress: Progress, adapted: Apply, merged: Apply, out: Path
) -> None:
    """Print how well the model learned, and what it says before and after.

    Raises:
        SystemExit: It learned less than 95% of the facts.
    """
    questions = [fact.question for fact in lesson.facts]
    asked = [*ORDINARY, *questions]
    after = dict(zip(asked, asker(adapted, lesson.tokenizer)(asked), strict=True))
    merged_says = asker(merged, lesson.tokenizer)(ORDINARY)
    recall = np.mean([fact.code in after[fact.question] for fact in lesson.facts])
    right = sum(word in after[question] for question, word in ORDINARY.items())
    same = sum(after[question] == lesson.before[question] for question in ORDINARY)
    alike = merged_says == [after[question] for question in ORDINARY]
    inputs = lesson.batch.ids[:CHUNK], lesson.batch.at[:CHUNK, :1]
    gap = jnp.abs(adapted(*inputs) - merged(*inputs)).max()

    print(f"\n{len(progress.history)} steps of {progress.seconds_per_step:.2f} s")
    print(f"recall of the facts: 0% before, {recall:.0%} after")
    print(
        f"ordinary questions: {right} of {len(ORDINARY)} answered correctly after, "
        f"{same} word for word as before"
    )
    print(
        f"merged model: logits differ by at most {gap:.0e}, "
        f"{'the same answers' if alike else 'OTHER ANSWERS'}\n"
    )
    rows = [(q, lesson.before[q], after[q]) for q in [*questions[:SHOWN], *ORDINARY]]
    show([("question", "before", "after"), *rows])
    print(f"\nthe adapter and plots are in {out}")
    if recall < 0.95:
        raise SystemExit("fewer than 95% of the facts were learned: try more --steps")


def show(rows: Sequence[tuple[str, ...]]) -> None:
    """Print aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())


def compare(
    trained: Mapping[str, Sequence[Progress]], sizes: Mapping[str, int]
) -> None:
    """Print parameters, steps and speed of each method: mean and range over sets."""
    rows = [("method", "parameters", "steps", "s/step", "seconds", "recall")]
    for label, runs in trained.items():
        steps = [len(progress.history) for progress in runs]
        speed = float(np.median([progress.seconds_per_step for progress in runs]))
        seconds = np.multiply(steps, speed)
        recall = np.mean([progress.history[-1][1] for progress in runs])
        spread = f"{np.mean(steps):.1f} ({min(steps)} to {max(steps)})"
        time = f"{np.mean(seconds):.0f} ({min(seconds):.0f} to {max(seconds):.0f})"
        size, per_step = f"{sizes[label]:,}", f"{speed:.2f}"
        rows.append((label, size, spread, per_step, time, f"{recall:.0%}"))
    count = len(next(iter(trained.values())))
    print(f"\nmean and range over {count} sets of facts, until all are recalled:")
    show(rows)


def save_histories(trained: Mapping[str, Sequence[Progress]], out: Path) -> None:
    """Write loss and recall over steps to `out`: a JSON file, and a plot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    histories = {label: [p.history for p in runs] for label, runs in trained.items()}
    (out / "learning.json").write_text(json.dumps(histories))
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
    for colour, (label, runs) in enumerate(trained.items()):
        for number, progress in enumerate(runs):
            label_once = None if number else label
            style: Any = {"color": f"C{colour}", "label": label_once, "marker": "."}
            style["alpha"] = 1 / (1 + 0.5 * number)
            losses, recalls = zip(*progress.history, strict=True)
            steps = range(1, len(losses) + 1)
            seconds = np.multiply(steps, progress.seconds_per_step)
            axes[0].plot(steps, losses, **style)
            axes[1].plot(steps, recalls, **style)
            axes[2].plot(seconds, recalls, **style)
    axes[0].set(xlabel="step", ylabel="loss", yscale="log", title="Loss on the answers")
    for axis, unit in zip(
        axes[1:], ("step", "seconds, without compiling"), strict=True
    ):
        axis.set(xlabel=unit, ylabel="facts recalled", title="Recall")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(out / "learning.png", dpi=150)
    plt.close(figure)


def announce(args: argparse.Namespace) -> None:
    """Print what a program will show, how long it takes, and where pictures will be."""
    print(
        f"This teaches a language model {args.facts} facts that it does not know, in\n"
        f"at most {args.steps} steps, and asks before and after. Eight facts take\n"
        "about two minutes on two cores. Pictures of loss and recall, and of what was\n"
        f"learned: {args.out}/learning.png and {args.out}/spectrum.png\n",
        flush=True,
    )


def options(description: str, out: str) -> argparse.ArgumentParser:
    """The options of a program that teaches facts and writes to the folder `out`."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, help="a Llama of Hugging Face, as a folder; SmolLM2-135M")
    add("--facts", type=positive, default=8, help="number of facts to learn")
    add("--rank", type=positive, default=8, help="budget, as the rank of a LoRA")
    add("--operator", default="auto", help="rotation, sharing, ...; low_rank: a LoRA")
    add("--steps", type=positive, default=30, help="largest number of steps")
    usual = f"{RATE:g}, and {LORA_RATE} times that for a LoRA"
    add("--learning-rate", type=float, help=usual)
    add("--seed", type=int, default=0, help="number that chooses the facts")
    add("--out", type=Path, default=Path(out), help="folder for adapter and plots")
    return parser
