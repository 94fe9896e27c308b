"""Calls of a model: their inputs, their programs, and what tells programs apart."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax
from jax.extend.core import Jaxpr

from mora_jax._common.warnings import warn
from mora_jax._jax.qwix_guard import intercepted
from mora_jax._jax.traces import split_static


@dataclasses.dataclass(frozen=True, init=False)
class Call:
    """The inputs of one call of a model, for `linen.plan` and `nnx.plan`.

    Args:
      *args, **kwargs: The inputs, arrays or shapes, as the model takes them.

    Example: a plan that holds for training and for evaluation::

      >>> import flax.linen as nn, jax, jax.numpy as jnp, mora_jax
      >>> class Model(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         x = nn.Dense(8)(x)
      ...         return nn.BatchNorm(use_running_average=not train)(x)
      >>> model, x = Model(), jnp.ones((2, 8))
      >>> variables = model.init(jax.random.key(0), x, True)
      >>> train = mora_jax.Call(x, train=True, mutable=["batch_stats"])
      >>> calls = [train, mora_jax.Call(x, train=False)]
      >>> plan = mora_jax.linen.plan(model, variables, calls=calls)
      >>> plan.traced, plan.unproven
      (True, ())
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        vars(self).update(args=args, kwargs=kwargs)


def program_of(function: Callable[..., Any], tree: Any, *args: Any) -> Jaxpr:
    """The program of `function(tree, *args)`; all but arrays and shapes is static."""
    arrays, join = split_static(args)

    def call(tree: Any, arrays: list[Any]) -> list[Any]:
        return jax.tree.leaves(function(tree, *join(arrays)))

    return jax.make_jaxpr(call)(tree, arrays).jaxpr


def kind_of_call(rows: Mapping[str, int], *args: Any) -> Hashable:
    """Key of all calls that Python may take another way through a model for.

    Flags, texts, methods and the names of collections are in it. Shapes and numbers are
    not, or a loop over positions would have a key for each of them. But if `rows` have
    adapters of their own, as in `check_call`, shapes tell which axes may have the rows.
    """
    leaves, structure = jax.tree.flatten(args)
    shapes = [getattr(leaf, "shape", ()) for leaf in leaves if rows]
    own = tuple(rows.items()), tuple(map(tuple, shapes))
    return str(structure), tuple(map(_kind, leaves)), own


def _kind(leaf: Any) -> Hashable:
    if isinstance(leaf, bool | str | bytes):
        return leaf
    if inspect.ismethod(leaf) or inspect.isfunction(leaf):
        return leaf.__code__  # a lambda is another object each time
    return type(leaf)


_inside: ContextVar[bool] = ContextVar("inside", default=False)


@contextlib.contextmanager
def proving(
    proven: dict[Hashable, str], kind: Hashable, check: Callable[..., str], *args: Any
) -> Iterator[None]:
    """Before a call that runs inside, `check(*args)` if it is the first of its kind.

    `proven` keeps the results: "", or why a trace does not show what the call does.
    """
    if _inside.get() or intercepted():
        yield
        return
    with jax.transfer_guard("allow"):  # the check computes with a few numbers
        why = proven[kind] if kind in proven else check(*args)
    # Methods that it calls itself are parts of the same program.
    with unchecked(not why):
        yield
    if why and kind not in proven:  # and not for a call that fails
        warn(why)
    proven[kind] = why


@contextlib.contextmanager
def unchecked(value: bool = True) -> Iterator[None]:
    """No call that runs inside is checked."""
    token = _inside.set(value)
    try:
        yield
    finally:
        _inside.reset(token)
