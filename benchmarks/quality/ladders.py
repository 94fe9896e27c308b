"""Ladders of learning rates: climb one until the best is not on an edge; compare them.

Steps are those that a run took until it knew what it should learn; infinite if it never
did, and None in JSON, which lacks infinity.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import geometric_mean

import numpy as np

FACTOR = 2.0
"""Between neighbouring rates."""
LONGEST = 10  # rates that are tried before a ladder is given up


def rungs(lowest: float, count: int) -> list[float]:
    """`count` neighbouring rates."""
    return [lowest * FACTOR**k for k in range(count)]


def climb(
    steps_at: Callable[[Sequence[float]], Sequence[float]], rates: Sequence[float]
) -> dict[float, float]:
    """Steps at each of `rates`, and at further ones while the best is on an edge.

    Args:
        steps_at: A function from rates to steps, or to anything that should be small.
        rates: The rates to begin with, increasing.

    Raises:
        ValueError: The best is on an edge still, or no rate came there.
    """
    found = dict(zip(rates, steps_at(rates), strict=True))
    while len(found) < LONGEST:
        low, high = min(found), max(found)
        best = min(found, key=lambda rate: found[rate])
        if best == low and math.isfinite(found[best]):
            further = low / FACTOR
        elif best == high and math.isfinite(found[best]):
            further = high * FACTOR
        else:
            break
        found[further] = steps_at([further])[0]
        found = dict(sorted(found.items()))
    best_of(found)
    return found


def best_of(found: dict[float, float]) -> float:
    """The rate with the fewest steps.

    Raises:
        ValueError: It is the first or the last, or none came there.
    """
    best = min(found, key=lambda rate: found[rate])
    if not math.isfinite(found[best]):
        raise ValueError(f"no rate came there: {list(found)}")
    if best in (min(found), max(found)):
        raise ValueError(f"the best rate is on an edge: {found}")
    return best


def vertex(rates: Sequence[float], steps: Sequence[float]) -> tuple[float, float]:
    """The best rate and its steps, between rates by a parabola over logarithms.

    Raises:
        ValueError: As `best_of`.
    """
    best = best_of(dict(zip(rates, steps, strict=True)))
    k = list(rates).index(best)
    if not np.isfinite(steps[k - 1 : k + 2]).all():
        return rates[k], steps[k]
    left, middle, right = np.log(steps[k - 1 : k + 2])
    curve = left - 2 * middle + right
    at = 0.5 * (left - right) / curve if curve > 0 else 0.0
    rate = rates[k] * (rates[k + 1] / rates[k]) ** at
    return float(rate), float(np.exp(middle - 0.25 * (left - right) * at))


def at_rate(rates: Sequence[float], steps: Sequence[float], rate: float) -> float:
    """Steps at a rate between two of the ladder, along lines of logarithms."""
    for there, value in zip(rates, steps, strict=True):
        if math.isclose(there, rate):
            return value
    return float(np.exp(np.interp(math.log(rate), np.log(rates), np.log(steps))))


def mean(steps: Iterable[float]) -> float:
    """The geometric mean; infinite if one is."""
    return math.exp(np.mean(np.log(list(steps))))


def means(steps: Sequence[Sequence[float | None]]) -> list[float]:
    """The geometric mean over seeds for each rate; infinite if one never came there."""
    columns = zip(*steps, strict=True)
    return [math.inf if None in c else geometric_mean(c) for c in columns]


def errors(steps: Sequence[Sequence[float | None]]) -> list[float]:
    """The standard error of each of `means`; zero if it is infinite, or of one seed."""
    found = []
    for column in zip(*steps, strict=True):
        if None in column or len(column) == 1:
            found.append(0.0)
            continue
        spread = np.std(np.log(np.asarray(column, float)), ddof=1)
        found.append(geometric_mean(column) * spread / math.sqrt(len(column)))
    return found


def first_above(values: Sequence[float], limit: float) -> float:
    """Place at which a line through `values` reaches `limit`; infinite if never."""
    there = [k for k, value in enumerate(values) if value >= limit]
    if not there:
        return math.inf
    k = max(there[0], 1)
    low, high = values[k - 1], values[k]
    return k - 1 + (limit - low) / max(high - low, 1e-9)
