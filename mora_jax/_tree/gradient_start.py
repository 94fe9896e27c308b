"""Adapters that start along the first gradient."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Float

from mora_jax._common.checks import check_finite
from mora_jax._common.warnings import warn
from mora_jax._layer.equation import delta_kernel
from mora_jax._plan.plan import Plan
from mora_jax._tree import paths
from mora_jax._tree.adapters import adapter_items
from mora_jax._tree.merge import array_items, wide

HALVINGS = 20
"""Lengths that are tried at most."""


def gradient_start(
    loss: Callable[[Any], Float[jax.Array, ""]], adapters: Any, plan: Plan
) -> tuple[Any, Plan]:
    r"""Adapters moved by one step of gradient descent, and a plan that says so.

    .. math:: M_0 = -t\, \frac{\|\partial M\|^2}{\|\alpha s\, C\, \partial M\, D\|^2}\,
        \partial M, \qquad \partial M = \alpha s\, C^T G D^T

    is the step whose delta lies nearest to the kernel's own step -t G among all
    adapters. One length t serves all kernels. It begins where a linear loss would be
    zero, |loss| / slope, and is halved while the loss at half of it is lower. That
    takes a gradient and a few losses. If no length lowers the loss, nothing is moved,
    and a `MoRAWarning` says so outside of jit.
    The source is LoRA-SB (Ponkshe et al. 2024), here for operators of any kind; the
    length is ours. docs/what-it-learns.md says where it pays.

    Args:
      loss: A function from adapters to the loss of a first batch. Give it compiled, or
        compile the whole call.
      adapters: New adapters, as `init` makes them, or `nnx.state(model, MoRAParam)`.
        Arrays that the plan trains itself stay.
      plan: Their plan.

    Returns:
      The adapters, and the plan with `init="gradient"`, since the model does not
      compute what its base does any more.

    Raises:
      TypeError, ValueError: The adapters do not fit the plan, their delta is not linear
        in what is trained, or the loss or its gradient is not finite.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> plan = mora_jax.plan(params, mora_jax.MoRAConfig(rank=1))
      >>> def loss(adapters):
      ...     folded = mora_jax.fold(params, adapters, plan)
      ...     return jnp.mean(folded["fc"]["kernel"] ** 2)
      >>> adapters, plan = mora_jax.gradient_start(loss, mora_jax.init(plan), plan)
      >>> bool(loss(adapters) < 0.6), plan["fc/kernel"].init
      (True, 'gradient')
    """
    items, moves, slope = array_items(adapters, plan), {}, jnp.float32(0)
    for spec, _ in items:
        if not spec.operator.linear:
            raise ValueError(
                f"{spec.name}: the delta of {spec.operator.name!r} is not linear in "
                "what is trained, and has no such step"
            )
    value, grads = jax.value_and_grad(loss)(adapters)
    for (spec, m), (_, grad) in zip(items, adapter_items(grads, plan), strict=True):
        grad = wide(grad)
        delta = delta_kernel(spec, grad)
        squares, across = jnp.sum(grad**2), jnp.sum(delta**2)
        step = grad * jnp.where(across > 0, squares / across, 0)
        moves[paths.adapter_path(spec)] = m, step
        slope += jnp.sum(step * grad)
    check_finite(value, "the loss")
    check_finite(slope, "the gradient of the loss")

    def moved(length: jax.Array) -> Any:
        ms = {p: (m - length * step).astype(m.dtype) for p, (m, step) in moves.items()}
        return paths.replace_leaves(adapters, ms)

    def is_best(state: Any) -> jax.Array:
        _, before, now = state
        return (before < value) & (before <= now)

    def halved(state: Any) -> Any:  # the only place of the loss in the program
        number, _, now = state
        return number + 1, now, loss(moved(longest / 2.0**number))

    longest = jnp.where(slope > 0, jnp.abs(value) / slope, 0)
    nothing = jnp.full_like(value, jnp.inf)
    state = jax.lax.while_loop(
        lambda state: (state[0] < HALVINGS) & ~is_best(state),
        halved,
        (0, nothing, nothing),
    )
    length = jnp.where(is_best(state), longest / 2.0 ** (state[0] - 2), 0)
    if not isinstance(length, Tracer) and length == 0:
        warn("no step along the gradient lowers the loss, so that no adapter is moved")
    specs = tuple(dataclasses.replace(spec, init="gradient") for spec in plan.specs)
    plan = dataclasses.replace(plan, specs=specs)
    return paths.with_specs(moved(length), plan), plan
