"""Adapters with their plans, and the weights by which they are mixed, checked."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from mora_jax._common.checks import check_number
from mora_jax._plan.plan import Plan, refuse_other_plan
from mora_jax._tree.adapters import refuse_nonlinear

Adapter = tuple[Any, Plan]
"""Adapters, as `init` makes them, and the plan that they follow."""

Weights = Sequence[ArrayLike] | jax.Array
"""A real number for each adapter, or an array of them."""

NOT_LINEAR = "so that sums of adapters are not sums of deltas: merge one after another"
"""The reason to refuse an operator, and what to do instead."""

NO_DELTA = (
    "and is no delta, which this needs: mixing.weighted_sum takes such arrays with "
    "params=, and merge puts them into a base"
)
"""The reason to refuse arrays that train themselves."""


def pairs_of(adapters: Any) -> list[Adapter]:
    """`adapters`, if they are pairs of adapters and a plan."""
    rule = "adapters must be pairs (adapters, plan), as load returns them"
    if isinstance(adapters, dict) or not isinstance(adapters, Iterable):
        raise TypeError(f"{rule}, got {type(adapters).__name__}")
    pairs = list(adapters)
    if not pairs:
        raise ValueError(f"{rule}, got none")
    for pair in pairs:
        fits = isinstance(pair, tuple | list) and len(pair) == 2
        if not fits or not isinstance(pair[1], Plan):
            raise TypeError(f"{rule}, got {type(pair).__name__} among them")
    return pairs


def one_plan_of(pairs: Sequence[Adapter]) -> Plan:
    """The plan of all adapters; the one that knows the base, if any does."""
    plans = [plan for _, plan in pairs]
    for other in plans[1:]:
        try:
            refuse_other_plan(other, plans[0])
        except ValueError as error:
            raise ValueError(f"{error}; mixing.project adds different plans") from None
    check_one_base(plans)
    refuse_nonlinear(plans[0].specs, NOT_LINEAR)
    knows = [plan for plan in plans if any(s.base_digest for s in plan.specs)]
    return (knows or plans)[0]


def check_one_base(plans: Sequence[Plan]) -> None:
    """Raise if two plans know that they were trained on different bases."""
    known: dict[str, tuple[str, ...]] = {}
    for plan in plans:
        for spec in plan.specs:
            digest = spec.base_digest
            if digest and known.setdefault(spec.name, digest) != digest:
                raise ValueError(
                    f"adapters must be of one base, and two of them were trained on "
                    f"different weights of {spec.name!r}"
                )


def factors_of(weights: Any, count: int) -> list[Any]:
    """`weights` as factors, one for each of `count` adapters."""
    if isinstance(weights, jax.Array | np.ndarray) and weights.ndim == 1:
        weights = [weights[k] for k in range(len(weights))]
    if not isinstance(weights, list | tuple):
        raise TypeError(
            f"weights must be a sequence of numbers, got {type(weights).__name__}"
        )
    if len(weights) != count:
        raise ValueError(
            f"weights must be one for each adapter, got {len(weights)} for {count}"
        )
    return [factor_of(weight, f"weights[{k}]") for k, weight in enumerate(weights)]


def factor_of(value: Any, name: str) -> Any:
    """A real number, or an array of one, which a trace may have made."""
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        return check_number(name, value)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be a real number, got {value.dtype}{list(value.shape)}"
        )
    if not isinstance(value, Tracer) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value
