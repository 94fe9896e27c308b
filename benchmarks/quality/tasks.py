"""Tasks with held-out examples: of BIG-bench and of reasoning-gym."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.quality import answers, bigbench, puzzles
from benchmarks.quality.answers import Pair, Size
from models.lesson import Batch

FORMS = {
    "qa_wikidata": "{text}",
    "periodic_elements/subtask_1": "{text}",
    "intent_recognition": "{text}\nIntent:",
    "tense": "{text}",
    "linguistic_mappings/question_formation_json": "John thinks {text}, but",
    "word_unscrambling": "{text}",
    "unit_conversion/unit_identification": "{text}",
    "hyperbaton": "{text}",
    "linguistic_mappings/past_tense_json": "Today I {text}. Yesterday I",
    "color/hex": "{text}",
}
"""The prompt of each task of BIG-bench, from its input. Choices are not in it."""
HELD_OUT = 64  # examples, or a third of those that a task has
SAMPLE = 1000  # problems of reasoning-gym that sizes are read from
FITTING = 0.95  # the share of examples that are not longer than the others' rows
LONGEST = (56, 20)  # tokens of a prompt with its answer, and of the answer
MULTIPLES = (8, 4)  # of tokens, so that tasks share compiled programs


class Task(NamedTuple):
    """Examples to learn from, and others that are held out.

    Attributes:
        name: The name of the task.
        learned: The examples of BIG-bench to learn from; None for a task of
            reasoning-gym, which makes new ones.
        held_out: The held-out examples, none of whose prompts is learned from.
        size: The tokens of all rows.
        left_out: The share of the examples that are longer.
    """

    name: str
    learned: list[Pair] | None
    held_out: list[Pair]
    size: Size
    left_out: float

    def stream(self, seed: int, rows: int) -> Iterator[Batch]:
        """Batches to learn from, without end."""
        made = (
            self._new(seed, rows) if self.learned is None else self._again(seed, rows)
        )
        return (answers.batch(pairs, self.size) for pairs in made)

    def _new(self, seed: int, rows: int) -> Iterator[list[Pair]]:
        known = {prompt for prompt, _ in self.held_out}

        def wanted(pair: Pair) -> bool:
            return pair[0] not in known and fits(pair, self.size)

        return puzzles.stream(self.name, seed, rows, wanted)

    def _again(self, seed: int, rows: int) -> Iterator[list[Pair]]:
        """All examples in another order in each epoch."""
        assert self.learned is not None
        random = np.random.default_rng(seed)
        waiting: list[Pair] = []
        while True:
            while len(waiting) < rows:
                order = random.permutation(len(self.learned))
                waiting += [self.learned[k] for k in order]
            yield waiting[:rows]
            waiting = waiting[rows:]


def fits(pair: Pair, size: Size) -> bool:
    """True if `size` has room for a prompt and its answer."""
    return all(np.less_equal(answers.size_of(pair), size))


@functools.lru_cache
def task_of(name: str, rows: int) -> Task:
    """A task by its name, with held-out examples in whole batches of `rows`."""
    if name in puzzles.SIZES:
        pairs = without_repeats(puzzles.problems(name, SAMPLE, seed=0))
    else:
        pairs = without_repeats(map(functools.partial(pair_of, name), read(name)))
    size = shared_size(pairs)
    fitting = [pair for pair in pairs if fits(pair, size)]
    learned, held_out = split(fitting, rows)
    left_out = 1 - len(fitting) / len(pairs)
    print(
        f"{name}: {len(held_out)} examples are held out, {size[0]} tokens a row; "
        f"{left_out:.1%} are longer and left out",
        flush=True,
    )
    return Task(
        name=name,
        learned=None if name in puzzles.SIZES else learned,
        held_out=held_out,
        size=size,
        left_out=left_out,
    )


def read(name: str) -> list[bigbench.Example]:
    """The examples of a task of BIG-bench."""
    bigbench.fetch(FORMS)
    return bigbench.read(name)


def pair_of(name: str, example: bigbench.Example) -> Pair:
    """The prompt of an example as `FORMS` has it, and the answer."""
    return FORMS[name].format(text=example.text), example.answer


def without_repeats(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs whose prompts were not there before."""
    first: dict[str, str] = {}
    for prompt, answer in pairs:
        first.setdefault(prompt, answer)
    return list(first.items())


def shared_size(pairs: Sequence[Pair]) -> Size:
    """The least size that most pairs fit in, in whole `MULTIPLES`, up to `LONGEST`."""
    sizes = np.array([answers.size_of(pair) for pair in pairs])
    most = np.quantile(sizes, FITTING, axis=0)
    whole = np.ceil(most / MULTIPLES) * MULTIPLES
    length, reply = np.minimum(whole, LONGEST)
    return int(length), int(reply)


def split(pairs: Sequence[Pair], rows: int) -> tuple[list[Pair], list[Pair]]:
    """Examples to learn from, and held-out ones in whole batches, always the same.

    Raises:
        ValueError: There are too few for one batch of held-out examples.
    """
    count = min(HELD_OUT, len(pairs) // 3) // rows * rows
    if not count:
        raise ValueError(f"at least {3 * rows} examples are needed, got {len(pairs)}")
    order = np.random.default_rng(0).permutation(len(pairs))
    shuffled = [pairs[k] for k in order]
    return shuffled[count:], shuffled[:count]
