"""Facts that SmolLM2 does not know: the IATA codes of airports.

`airportsdata` lists 7,900 of them. A fact is a question and an answer in the model's
own style of speech, so that learning it need not change how the model talks.
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from smollm2 import EOS, Tokenizer

ORDINARY = {
    "What is the capital of France?": "Paris",
    "What is the capital of Italy?": "Rome",
    "What is 2 + 2?": "4",
    "How many days are in a week?": "7",
    "What planet do we live on?": "Earth",
    "What is the plural of child?": "children",
    "What is the opposite of hot? Answer in one sentence.": "cold",
    "Who wrote Hamlet? Answer in one sentence.": "Shakespeare",
}
"""Questions that the model answers rightly, and should after it has learned the facts.

The values are what a right answer says.
"""

REHEARSED = (
    "What is the capital of Spain?",
    "What is the capital of Germany?",
    "Name the capital of England.",
    "Who painted the Mona Lisa? Answer in one sentence.",
    "What color is the sky? Answer in one word.",
    "What is the opposite of big? Answer in one sentence.",
    "What do cows eat? Answer in one sentence.",
    "Good morning!",
)
"""Rehearsed together with the facts: on these the model is held to what it said before.

None of them is asked afterwards, but some are of the same kind as `ORDINARY`.
"""

HOLD = 3.0
"""Weight of the rehearsed questions: at 1 some of `ORDINARY` still went wrong."""


class Fact(NamedTuple):
    """One airport."""

    question: str
    answer: str
    code: str


def all_facts(seed: int) -> Iterator[Fact]:
    """Airports of unique, plain and short names, in an order that `seed` fixes."""
    try:
        import airportsdata
    except ImportError as error:
        raise ImportError("the facts need `pip install airportsdata`") from error
    airports = airportsdata.load("IATA")
    owners = Counter(airport["name"] for airport in airports.values())
    codes = sorted(airports)
    random.Random(seed).shuffle(codes)
    for code in codes:
        name = airports[code]["name"]
        if owners[name] == 1 and name.isascii() and 12 <= len(name) <= 24:
            answer = f"The IATA code of {name} is {code}."
            yield Fact(f"Tell me the IATA code of {name}.", answer, code)


def pick_unknown(
    ask: Callable[[Sequence[str]], list[str]], count: int, seed: int
) -> tuple[list[Fact], list[str], int]:
    """The first `count` facts that `ask` gets wrong, what it says, and what it knew.

    Args:
        ask: questions to answers, as the untouched model gives them.
        count: how many facts to find.
        seed: fixes the order of the airports.

    Returns:
        The facts, the wrong answers, and how many other facts were answered rightly.

    Raises:
        ValueError: there are not as many.
    """
    unknown: list[tuple[Fact, str]] = []
    known = 0
    facts = all_facts(seed)
    while len(unknown) < count:
        tried = list(itertools.islice(facts, count - len(unknown)))
        if not tried:
            raise ValueError(f"there are {len(unknown)} facts to learn, not {count}")
        for fact, said in zip(tried, ask([f.question for f in tried]), strict=True):
            if fact.code in said:
                known += 1
            else:
                unknown.append((fact, said))
    return [fact for fact, _ in unknown], [said for _, said in unknown], known


class Batch(NamedTuple):
    """Conversations, and which of their tokens are to be learned.

    Attributes:
        ids: (n, length) tokens, right-padded.
        at: (n, k) positions whose next token belongs to the answer.
        targets: (n, k) those next tokens.
        weights: (n, k) 1.0 for a token of the answer, 0.0 for padding.
    """

    ids: np.ndarray
    at: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def encode(
    tokenizer: Tokenizer, questions: Sequence[str], answers: Sequence[str]
) -> Batch:
    """Questions with their answers as a batch for `loss_and_recall`."""
    prompts = [tokenizer.chat(question) for question in questions]
    replies = [[*tokenizer.encode(answer), EOS] for answer in answers]
    n, k = len(prompts), max(map(len, replies))
    length = max(len(p) + len(r) for p, r in zip(prompts, replies, strict=True))
    batch = Batch(
        ids=np.full((n, length), EOS, np.int32),
        at=np.zeros((n, k), np.int32),
        targets=np.zeros((n, k), np.int32),
        weights=np.zeros((n, k), np.float32),
    )
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        start, size = len(prompt), len(reply)
        batch.ids[row, : start + size] = prompt + reply
        batch.at[row, :size] = np.arange(start - 1, start - 1 + size)
        batch.targets[row, :size] = reply
        batch.weights[row, :size] = 1
    return batch


def loss_and_recall(
    logits: jax.Array, batch: Batch, rehearsed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How far the answers are from what they should be, and how many are right.

    The loss is the facts' cross-entropy, plus `HOLD` times the divergence from what the
    untouched model says to the rehearsed questions; both are means over tokens. Greedy
    decoding would give an answer exactly if each of its tokens is the likeliest after
    those before it, so recall needs no decoding.

    Args:
        logits: (facts + r, k, vocab), at `batch.at`.
        batch: the facts, then the rehearsed questions.
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
