"""Adapters that answer any of a few questions, each with a code word of its own.

A service that ever answers under a wrong adapter is found out by them.
"""

import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import mora_jax
from models.lesson import batch as make_batch
from models.smollm2 import EOS, generate

QUESTIONS = (
    "What is the code word?",
    "Hi",
    "Please tell me, in a single word and without any explanation, which word opens "
    "the door of the house behind the hill.",
)
"""Of different lengths, so that prompts are padded to different lengths as well."""

MARGIN = 1.0
"""By how much the logit of a right token is above all others."""

_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


def code_words(count: int, seed: int = 0) -> list[str]:
    """Different words of three syllables each."""
    chosen = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(chosen.choices(_SYLLABLES, k=3))] = None
    return list(words)


def conversation(question: str) -> str:
    """A question in SmolLM2's chat format, up to the answer."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


class Teacher:
    """Trains adapters to say code words; one program serves all of them.

    Args:
        apply: A Llama with adapters, as `linen.wrap` makes it.
        variables: The frozen variables.
        tokenizer: An object with `encode` and `decode`.
        rate: The learning rate.
        questions: The questions to be answered.
    """

    def __init__(
        self,
        apply: Callable[..., Any],
        variables: Any,
        tokenizer: Any,
        rate: float,
        questions: Sequence[str] = QUESTIONS,
    ) -> None:
        self.apply, self.variables, self.tokenizer = apply, variables, tokenizer
        self.prompts = [tokenizer.encode(conversation(q)) for q in questions]
        self.longest = 16
        tx = optax.adam(rate)

        @functools.partial(jax.jit, donate_argnums=1)
        def step(adapters: Any, state: Any, variables: Any, batch: Any) -> Any:
            def loss(adapters: Any) -> tuple[jax.Array, jax.Array]:
                logits = apply(adapters, variables, batch.ids, batch.at)
                each = optax.softmax_cross_entropy_with_integer_labels(
                    logits, batch.targets
                )
                wanted = jax.nn.one_hot(batch.targets, logits.shape[-1])
                others = jnp.where(wanted > 0, -jnp.inf, logits).max(-1)
                ahead = jnp.sum(logits * wanted, -1) - others
                margin = jnp.where(batch.weights > 0, ahead, jnp.inf).min()
                return jnp.sum(each * batch.weights), margin

            (_, margin), grads = jax.value_and_grad(loss, has_aux=True)(adapters)
            updates, state = tx.update(grads, state, adapters)
            return optax.apply_updates(adapters, updates), state, margin

        self._tx, self._step = tx, step
        self._said = jax.jit(apply)

    def teach(self, word: str, steps: int = 100) -> Any:
        """Adapters that answer every question with `word`.

        They are trained until each of its tokens is ahead of all others by `MARGIN`, so
        that the rounding of a larger batch cannot change the answer.

        Raises:
            ValueError: They do not learn it in so many steps.
        """
        reply = [*self.tokenizer.encode(word), EOS]
        size = max(map(len, self.prompts)) + self.longest, self.longest
        batch = make_batch(self.prompts, [reply] * len(self.prompts), size)
        adapters = mora_jax.init(self.apply.plan)  # type: ignore[attr-defined]
        state = self._tx.init(adapters)
        margin = jnp.zeros(())
        for _ in range(steps):
            new, state, margin = self._step(adapters, state, self.variables, batch)
            if margin > MARGIN:  # of the adapters before this step
                return adapters
            adapters = new
        raise ValueError(f"{word!r} was not learned in {steps} steps: {margin:.2f}")

    def answers(self, adapters: Any, tokens: int = 16) -> list[str]:
        """Greedy answers of the model to each question, with these adapters alone."""
        apply = functools.partial(self._said, adapters, self.variables)
        length = max(map(len, self.prompts)) + tokens
        said = generate(apply, self.prompts, tokens, length)
        return [self.tokenizer.decode(ids) for ids in said]


def teach_all(
    directory: Path,
    teacher: Teacher,
    words: Sequence[str],
    params: Any,
    **settings: Any,
) -> None:
    """Write an adapter for each word, named after it, and check it alone.

    Raises:
        ValueError: An adapter does not say its word.
    """
    for word in words:
        adapters = teacher.teach(word)
        if (said := set(teacher.answers(adapters))) != {word}:
            raise ValueError(f"the adapter must say {word!r}, it says {sorted(said)}")
        mora_jax.save(directory / word, adapters, params=params)
