"""A start along the first gradient: M moved by one step of gradient descent."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Float

from mora_jax._common import checks
from mora_jax._common.messages import warn
from mora_jax._layer.adapter import Adapter, delta_of, wide
from mora_jax._tree import losses, paths

HALVINGS = 20  # lengths that are tried at most


def gradient_start(loss: Callable[[Any], Float[jax.Array, ""]], adapters: Any) -> Any:
    r"""Adapters moved by one step of gradient descent, which say so.

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
      loss: A function from adapters to a first batch's loss, one floating-point number.
        Compile it, or the call.
      adapters: New adapters, as `init` makes them, or `nnx.state(model, MoRAParam)`.
        Arrays that are trained themselves stay.

    Returns:
      The adapters, with `init="gradient"` in their specs, since the model does not
      compute what its base does any more.

    Raises:
      TypeError: An argument is of another kind, or `loss` does not return one
        floating-point number.
      ValueError: A delta is not linear in what is trained, or the loss or its gradient
        is not finite.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
      >>> plan = mora_jax.plan(params, mora_jax.MoRAConfig(rank=1))
      >>> def loss(adapters):
      ...     folded = mora_jax.fold(params, adapters)
      ...     return jnp.mean(folded["fc"]["kernel"] ** 2)
      >>> adapters = mora_jax.gradient_start(loss, mora_jax.init(plan))
      >>> bool(loss(adapters) < 0.8), adapters["fc"]["kernel_mora"].spec.init
      (True, 'gradient')
    """
    losses.check_loss(loss)
    loss = losses.checked_loss(loss)
    found = paths.checked_adapters(adapters).kernels
    found.refuse_nonlinear("and has no such step")
    steps = {}
    slope = jnp.float32(0)
    value, grads = jax.value_and_grad(loss)(adapters)
    for path, gradient in paths.adapters_in(grads).kernels.items():
        grad, delta = wide(gradient.m), delta_of(gradient)
        squares, across = jnp.sum(grad**2), jnp.sum(delta**2)
        steps[path] = grad * jnp.where(across > 0, squares / across, 0)
        slope += jnp.sum(steps[path] * grad)
    checks.check_finite(value, "the loss")
    checks.check_finite(slope, "the gradient of the loss")

    def moved(length: jax.Array, **changes: Any) -> Any:
        new = {}
        for path, adapter in found.items():
            m = (adapter.m - length * steps[path]).astype(adapter.m.dtype)
            new[path] = Adapter(m, dataclasses.replace(adapter.spec, **changes))
        return paths.replace_adapters(adapters, new)

    def is_best(state: Any) -> jax.Array:
        _, before, now = state
        return (before < value) & (before <= now)

    def halved(state: Any) -> Any:  # the only place of the loss in the program
        number, _, now = state
        return number + 1, now, loss(moved(longest / 2.0**number))

    longest = jnp.where(slope > 0, jnp.abs(value) / slope, 0)
    nothing = jnp.full_like(value, jnp.inf)
    start = 0, nothing, nothing
    state = jax.lax.while_loop(lambda s: (s[0] < HALVINGS) & ~is_best(s), halved, start)
    length = jnp.where(is_best(state), longest / 2.0 ** (state[0] - 2), 0)
    if not isinstance(length, Tracer) and length == 0:
        warn("no step along the gradient lowers the loss, so that no adapter is moved")
    return moved(length, init="gradient")
