"""The steps at which a renewal is due."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mora_jax._common import checks


def schedule(every: Any) -> Callable[[Array], Array]:
    """A function from the number of steps to whether a renewal is due, of `every`."""
    if not callable(every):
        number = checks.positive_integer("every", every)
        return lambda count: count % number == 0

    def is_due(count: Array) -> Array:
        try:
            due = jnp.asarray(every(count))
        except (TypeError, ValueError) as error:
            raise TypeError(
                "every must be a positive integer, or a function of the number of "
                "steps that jit can trace, such as lambda step: step % 6 == 0: "
                f"{error}"
            ) from error
        if due.dtype != bool or due.shape:
            raise TypeError(
                "every must return True or False for a number of steps, got "
                f"{due.dtype}{[*due.shape]}; write lambda step: step % 6 == 0"
            )
        return due

    jax.eval_shape(is_due, jax.ShapeDtypeStruct((), jnp.int32))
    return is_due


def accumulation(opt_state: Any, step: Array) -> tuple[Array, Array]:
    """The number of steps of the optimizer, and True if it holds no unfinished sum.

    Without `optax.MultiSteps` each call of a training step, `step`, is one of its own.
    """
    count = step
    is_finished = jnp.asarray(True)
    for sums in _sums_in(opt_state):
        if isinstance(sums, optax.MultiStepsState):
            count = jnp.asarray(sums.gradient_step)
            is_finished &= jnp.asarray(sums.mini_step) == 0
        else:
            is_finished &= jnp.asarray(sums.count) == 0
    return count, is_finished


def check_accumulation(opt_state: Any) -> None:
    """Raise if an optimizer accumulates gradients in more than one place."""
    found = [s for s in _sums_in(opt_state) if isinstance(s, optax.MultiStepsState)]
    if len(found) > 1:
        raise ValueError(
            f"tx must have one optax.MultiSteps at most, got {len(found)}: a renewal "
            "waits until its sum is complete; put one around the whole optimizer"
        )


def _sums_in(opt_state: Any) -> Iterator[Any]:
    """The states of `optax.MultiSteps` and `optax.apply_every`, also nested ones."""
    kinds = optax.MultiStepsState, optax.ApplyEvery

    def is_sum(node: Any) -> bool:
        return isinstance(node, kinds)

    for node in jax.tree.leaves(opt_state, is_leaf=is_sum):
        if is_sum(node):
            yield node
            yield from _sums_in(getattr(node, "inner_opt_state", ()))
