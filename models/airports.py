"""Facts that SmolLM2 does not know: the IATA codes of airports.

`airportsdata` lists 7,900 of them. A fact is a question and an answer in the model's
own style, so that learning it need not change how the model talks.
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

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
"""Questions that the model can answer, and what a correct answer contains.

It should answer them correctly after it has learned the facts, too.
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
"""Questions to which the model should say what it said before, trained with the facts.

None of them is asked afterwards, but some are similar to those in `ORDINARY`.
"""


class Fact(NamedTuple):
    """An airport's code, as a question and its answer."""

    question: str
    answer: str
    code: str


def all_facts(seed: int) -> Iterator[Fact]:
    """All airports with unique, plain and short names, in an order given by `seed`."""
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
    """The first `count` facts that a model does not know.

    Args:
        ask: A function from questions to the answers of the model.
        count: The number of facts to find.
        seed: The number that gives the order of the airports.

    Returns:
        The facts, the model's wrong answers, and how many other facts it knew.

    Raises:
        ValueError: There are not as many facts.
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
