"""Sums of any adapters cut back to a plan."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._common.checks import check_finite
from mora_jax._layer.equation import delta_kernel
from mora_jax._layer.rounding import ratio
from mora_jax._plan.plan import Plan, check_plan
from mora_jax._plan.spec import AdapterSpec
from mora_jax._plan.trained_arrays import refuse_trained
from mora_jax._tree.adapters import Tree, nest, refuse_nonlinear
from mora_jax._tree.merge import finite_items, wide
from mora_jax._tree.paths import adapter_path
from mora_jax.mixing._sums import (
    NO_DELTA,
    NOT_LINEAR,
    Adapter,
    Weights,
    check_one_base,
    pairs_of,
)

STEPS = 100
"""The most steps of `project`: one for each different singular value of the map from M
to the delta. Operators have a few, isometric ones with equal blocks one."""


def project(
    adapters: Sequence[Adapter], weights: Weights, plan: Plan
) -> tuple[Tree, dict[str, Any]]:
    r"""The adapter of `plan` that is nearest to a weighted sum of any adapters.

    Their plans may have other operators, square ranks and kernels. Of each kernel this
    takes the M that minimises :math:`\lVert \sum_i w_i \Delta_i - \alpha s\, C M D
    \rVert` in the Frobenius norm, by conjugate gradients on the normal equations.
    Memory holds the deltas of one kernel at a time. It says what is lost, which may be
    most of it: a delta between other maps has little in common with `plan`'s deltas.

    Args:
      adapters: Pairs (adapters, plan), of one base.
      weights: A real number for each, or an array of them.
      plan: The plan of the result. It has all kernels of the others.

    Returns:
      The adapters, and {path: norm(sum - delta) / norm(sum)}, which is 0 where nothing
      is lost and 1 where all is: numbers, or arrays in a compiled function.

    Raises:
      TypeError, ValueError: `plan` lacks a kernel or has it in another shape, or its
        deltas are not linear in what is trained; bases differ; or as `weighted_sum`.
    """
    pairs, factors = pairs_of(adapters, weights)
    plans = [*(made_for for _, made_for in pairs), check_plan(plan)]
    for other in plans:
        refuse_trained(other.trained, NO_DELTA)
    refuse_nonlinear(plan.specs, NOT_LINEAR)
    check_one_base(plans)
    terms = defaultdict(list)
    for pair, factor in zip(pairs, factors, strict=True):
        for spec, m in finite_items(*pair):
            _check_kernel(plan, spec)
            terms[spec.name].append((factor, spec, m))
    ms, lost = {}, {}
    for spec in plan.specs:
        deltas = (f * delta_kernel(s, wide(m)) for f, s, m in terms[spec.name])
        goal = sum(deltas, jnp.zeros(spec.kernel_shape, jnp.float32))
        m, lost[spec.name] = _nearest(spec, goal)
        ms[adapter_path(spec)] = m = m.astype(spec.param_dtype)
        check_finite(m, f"the M of {spec.name}", f" in {m.dtype}")
    return nest(ms), lost


def _check_kernel(plan: Plan, spec: AdapterSpec) -> None:
    """Raise unless `plan` has the kernel of `spec`."""
    name, shape = spec.name, spec.kernel_shape
    if name not in plan:
        raise ValueError(f"plan must have the adapters' kernels, and lacks {name!r}")
    if (other := plan[name].kernel_shape) != shape:
        raise ValueError(f"plan must have {name!r} in the shape {shape}, got {other}")


def _nearest(spec: AdapterSpec, goal: jax.Array) -> tuple[jax.Array, Any]:
    """The M whose delta is nearest to `goal`, and the share of `goal` that it lacks."""
    start = jnp.zeros(spec.shape, goal.dtype)
    with jax.default_matmul_precision("highest"):
        _, transpose = jax.vjp(lambda m: delta_kernel(spec, m), start)

        def normal(m: jax.Array) -> jax.Array:
            return transpose(delta_kernel(spec, m))[0]

        m, _ = jax.scipy.sparse.linalg.cg(
            normal, transpose(goal)[0], x0=start, tol=1e-7, maxiter=STEPS
        )
        missing = jnp.linalg.norm((goal - delta_kernel(spec, m)).ravel())
    return m, ratio(missing, jnp.linalg.norm(goal.ravel()))
