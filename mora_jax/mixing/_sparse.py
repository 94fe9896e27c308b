"""Sums of many adapters, freed of what contradicts."""

import math
from collections.abc import Sequence
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from mora_jax._common.checks import check_key, check_number
from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree.adapters import Tree
from mora_jax.mixing._pairs import (
    Adapter,
    Weights,
    factors_of,
    mixed,
    of_one_plan,
    pairs_of,
    refuse_no_deltas,
)


def ties(
    adapters: Sequence[Adapter],
    weights: Weights | None = None,
    *,
    density: float | int = 0.2,
) -> tuple[Tree, Plan]:
    r"""Adapters of one plan merged without those numbers in which they contradict.

    TIES (https://arxiv.org/abs/2306.01708), of each M: each adapter keeps the `density`
    of its numbers that are largest, each place gets the sign of their sum, and the
    result is the mean of the numbers that have that sign. The paper does this to all
    weights of a model; here it is done to M's, so it is not the same as TIES of the
    deltas.

    Args:
      adapters: As in `weighted_sum`.
      weights: A real number for each, by which its numbers are multiplied once they are
        trimmed; 1 by default.
      density: The share of the numbers that is kept, above 0 and at most 1.

    Returns:
      (adapters, plan), as of `weighted_sum`. `scaled` multiplies it, which the paper
      does by 0.8 to 1.8 and calls lambda.

    Raises:
      TypeError: As `weighted_sum`.
      ValueError: As `weighted_sum`, or `density` is out of its range.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> plan = mora_jax.plan({"kernel": jnp.ones((2, 2))}, mora_jax.MoRAConfig(
      ...     operator="truncation", square_rank=2))
      >>> a, b = ({"kernel_mora": jnp.array(m)} for m in (
      ...     [[3.0, 1.0], [2.0, 0.0]], [[1.0, -4.0], [2.0, 0.0]]))
      >>> mora_jax.mixing.ties([(a, plan), (b, plan)], density=0.75)[0]["kernel_mora"]
      Array([[ 2., -4.],
             [ 2.,  0.]], dtype=float32)
    """
    check_number("density", density)
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {density}")
    pairs = pairs_of(adapters)
    refuse_no_deltas(pairs)
    plan, found = of_one_plan(pairs)
    weights = [1.0] * len(found) if weights is None else weights
    factors = factors_of(weights, len(found))

    def merged(ms: Sequence[jax.Array], spec: AdapterSpec) -> jax.Array:
        trimmed = [
            factor * _largest(m, density, len(spec.operator.m_shape))
            for m, factor in zip(ms, factors, strict=True)
        ]
        stack = jnp.stack(trimmed)
        agree = (jnp.sign(stack) == jnp.sign(stack.sum(0))) & (stack != 0)
        return jnp.where(agree, stack, 0).sum(0) / jnp.maximum(agree.sum(0), 1)

    return mixed(plan, found, merged)


def _largest(m: jax.Array, density: float, axes: int) -> jax.Array:
    """The M's with zeros in place of all but the largest numbers of each of them."""
    rows = m.reshape(-1, math.prod(m.shape[-axes:]))
    count = max(1, int(density * rows.shape[1]))
    _, places = jax.lax.top_k(jnp.abs(rows), count)
    kept = jnp.zeros(rows.shape, bool)
    kept = jnp.put_along_axis(kept, places, True, axis=1, inplace=False)
    return jnp.where(kept, rows, 0).reshape(m.shape)


def dare(adapter: Adapter, rate: float | int, key: PRNGKeyArray) -> tuple[Tree, Plan]:
    r"""An adapter of which a share of the numbers is dropped and the rest grows.

    DARE (https://arxiv.org/abs/2311.03099): each number of an M is 0 with probability
    `rate`, and otherwise :math:`1 / (1 - rate)` times itself, so that the mean over
    keys is the adapter. Adapters that are added after it disturb each other less. As
    with `ties`, the numbers are those of the M's.

    Args:
      adapter: A pair (adapters, plan).
      rate: The share that is dropped, at least 0 and below 1.
      key: The random key. What is dropped of an M depends on it and on its path.

    Raises:
      TypeError: An argument has another type.
      ValueError: `rate` is out of its range, or an M is not finite.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> plan = mora_jax.plan({"kernel": jnp.ones((8, 8))})
      >>> ones = jax.tree.map(jnp.ones_like, mora_jax.init(plan)), plan
      >>> dropped, _ = mora_jax.mixing.dare(ones, 0.75, jax.random.key(0))
      >>> sorted(set(dropped["kernel_mora"].ravel().tolist()))
      [0.0, 4.0]
    """
    check_number("rate", rate)
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be at least 0 and below 1, got {rate}")
    check_key(key)
    pairs = pairs_of([adapter])
    refuse_no_deltas(pairs)
    plan, found = of_one_plan(pairs)

    def dropped(ms: Sequence[jax.Array], spec: AdapterSpec) -> jax.Array:
        own = jax.random.fold_in(key, np.uint32(crc32(spec.name.encode())))
        keep = jax.random.bernoulli(own, 1.0 - rate, ms[0].shape)
        return jnp.where(keep, ms[0] / (1 - rate), 0)

    return mixed(plan, found, dropped)
