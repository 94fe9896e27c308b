"""Prompts with their answers as batches for SmolLM2, and scores of held-out ones."""

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from benchmarks.quality import language
from models import lesson, smollm2
from models.lesson import Batch

Pair = tuple[str, str]
Size = tuple[int, int]
"""Tokens of a prompt with its answer, and of the answer alone."""


def encode(pair: Pair) -> tuple[list[int], list[int]]:
    """The tokens of a prompt, as a chat has it, and of the model's turn, the answer.

    After plain text the model does not expect the end of an answer: then learning
    where it ends is most of what there is to learn.
    """
    tokenizer = language.base().tokenizer
    prompt, answer = pair
    return tokenizer.chat(prompt), [*tokenizer.encode(answer), smollm2.EOS]


def size_of(pair: Pair) -> Size:
    """The size of one prompt and answer."""
    prompt, answer = encode(pair)
    return len(prompt) + len(answer), len(answer)


def batch(pairs: Iterable[Pair], size: Size) -> Batch:
    """Prompts and answers as a batch of at least this size."""
    prompts, replies = zip(*map(encode, pairs), strict=True)
    return lesson.batch(prompts, replies, size=size)


def in_batches(pairs: Sequence[Pair], rows: int, size: Size) -> list[Batch]:
    """Batches of `rows` prompts and answers each."""
    starts = range(0, len(pairs), rows)
    return [batch(pairs[start : start + rows], size) for start in starts]


def score(
    model: Callable[..., jax.Array], batches: Iterable[Batch]
) -> dict[str, float]:
    """Loss of the tokens of answers, and the share of answers that are right.

    An answer is right if each of its tokens is the likeliest after those before it.

    Args:
        model: (ids, at) -> logits.
        batches: Batches of equal numbers of answers.
    """
    losses = []
    right = []
    for part in batches:
        logits = model(part.ids, part.at)
        losses.append(float(language.mean_loss(logits, part)))
        right.append(language.recall(logits, part))
    return {"loss": float(np.mean(losses)), "right": float(np.mean(right))}
