"""Problems of reasoning-gym with their answers, and streams of new ones."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

Pair = tuple[str, str]
"""A prompt and its answer."""

SIZES: dict[str, dict[str, Any]] = {
    "chain_sum": {"max_terms": 3, "min_digits": 1, "max_digits": 1},
    "number_sorting": {
        "min_numbers": 3,
        "max_numbers": 5,
        "min_decimals": 0,
        "max_decimals": 0,
        "min_value": 0,
        "max_value": 99,
    },
    "spell_backward": {"min_word_len": 3, "max_word_len": 7},
    "gcd": {"max_value": 60},
}
"""The settings of each generator: problems that a small model can learn a bit of."""


def problems(task: str, count: int, seed: int) -> list[Pair]:
    """Short prompts and answers of one of `SIZES`.

    Problem k of a seed is problem 0 of the seed + k.

    Raises:
        ImportError: reasoning-gym is not installed.
    """
    try:
        import reasoning_gym  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("this needs `pip install reasoning-gym==0.1.25`") from error
    made = reasoning_gym.create_dataset(task, size=count, seed=seed, **SIZES[task])
    return [_short(task, item) for item in made]


def _short(task: str, item: Any) -> Pair:
    """A problem without its instructions."""
    known = item["metadata"]
    if task == "chain_sum":
        return item["question"].partition(": ")[2], item["answer"]
    if task == "number_sorting":
        order = "descending" if "descending" in item["question"] else "ascending"
        prompt = f"Sort {_numbers(known['original_numbers'])} in {order} order:"
        return prompt, _numbers(known["sorted_numbers"])
    if task == "spell_backward":
        return f"Spell backward: {known['word']} ->", item["answer"]
    assert task == "gcd"
    numbers = item["question"].partition(": ")[2].partition(".")[0]
    return f"The greatest common divisor of {numbers} is", item["answer"]


def _numbers(texts: list[str]) -> str:
    return ", ".join(str(int(float(text))) for text in texts)


def stream(
    task: str, seed: int, rows: int, wanted: Callable[[Pair], bool]
) -> Iterator[list[Pair]]:
    """Lists of new problems, without end.

    Args:
        task: One of `SIZES`.
        seed: The number of the stream.
        rows: The length of each list.
        wanted: True for problems that may be in it. At least half of them must be.

    Raises:
        ValueError: Too few problems are wanted.
    """
    for first in itertools.count(1_000_000 * (seed + 1), 2 * rows):
        made = problems(task, 2 * rows, first)
        found = [problem for problem in made if wanted(problem)]
        if len(found) < rows:
            raise ValueError(
                f"at least {rows} of {2 * rows} problems of {task} must be wanted, got "
                f"{len(found)}"
            )
        yield found[:rows]
