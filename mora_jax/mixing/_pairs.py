"""Adapters with their plans, and the weights by which they are mixed, checked."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from mora_jax._common.checks import check_finite, check_number
from mora_jax._common.types import Path
from mora_jax._plan.plan import Plan, check_plan, refuse_other_plan
from mora_jax._plan.spec import AdapterSpec
from mora_jax._plan.trained_arrays import refuse_trained
from mora_jax._tree.adapters import Tree, nest
from mora_jax._tree.merge import finite_items, wide
from mora_jax._tree.paths import adapter_path

Adapter = tuple[Any, Plan]
"""Adapters, as `init` makes them, and the plan that they follow."""

Weights = Sequence[ArrayLike] | jax.Array
"""A real number for each adapter, or an array of them."""

NO_DELTA = (
    "and is no delta, which this needs: mixing.weighted_sum takes such arrays with "
    "params=, and merge puts them into a base"
)
"""Why arrays that train themselves are refused."""


def pairs_of(adapters: Any) -> list[Adapter]:
    """`adapters`, if they are pairs of adapters and a plan."""
    rule = "adapters must be pairs (adapters, plan), as load returns them"
    if isinstance(adapters, dict) or not isinstance(adapters, Iterable):
        raise TypeError(f"{rule}, got {type(adapters).__name__}")
    found = list(adapters)
    if not found:
        raise ValueError(f"{rule}, got none")
    for pair in found:
        fits = isinstance(pair, tuple | list) and len(pair) == 2
        if not fits or not isinstance(pair[1], Plan):
            raise TypeError(f"{rule}, got {type(pair).__name__} among them")
    return found


def refuse_no_deltas(pairs: Sequence[Adapter]) -> None:
    """Raise if a plan trains arrays themselves."""
    for _, plan in pairs:
        refuse_trained(plan.trained, NO_DELTA)


def of_one_plan(
    pairs: Sequence[Adapter],
) -> tuple[Plan, list[list[tuple[AdapterSpec, jax.Array]]]]:
    """The plan of all adapters, and the specs and M's of each."""
    plans = [check_plan(plan) for _, plan in pairs]
    for other in plans[1:]:
        try:
            refuse_other_plan(other, plans[0])
        except ValueError as error:
            raise ValueError(f"{error}; mixing.project adds different plans") from None
    check_one_base(plans)
    knows = [plan for plan in plans if any(s.base_digest for s in plan.specs)]
    return (knows or plans)[0], [finite_items(tree, plan) for tree, plan in pairs]


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


def mixed(
    plan: Plan,
    found: Sequence[Sequence[tuple[AdapterSpec, jax.Array]]],
    mix: Callable[[Sequence[jax.Array], AdapterSpec], jax.Array],
    trained: Mapping[Path, jax.Array] | None = None,
) -> tuple[Tree, Plan]:
    """`mix` of the M's of each kernel, in float32 or wider, then in their dtype.

    `trained` are the arrays that train themselves, mixed already.
    """
    result = {}
    for column in zip(*found, strict=True):
        spec, ms = column[0][0], [m for _, m in column]
        m = mix([wide(m) for m in ms], spec).astype(jnp.result_type(*ms))
        result[adapter_path(spec)] = m
    result |= dict(trained or {})
    for path, array in result.items():
        check_finite(array, f"the mixture's {'/'.join(path)}", f" in {array.dtype}")
    return nest(result), plan
