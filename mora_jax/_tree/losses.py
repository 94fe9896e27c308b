"""Checks of a loss, and of the batches that it takes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

NUMBERS = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


def check_loss(loss: Any) -> None:
    """Raise unless `loss` is a function."""
    if not callable(loss):
        raise TypeError(
            "loss must be a function from adapters, and the arguments of a batch, to a "
            f"number, got {type(loss).__name__}"
        )


def checked_loss(loss: Callable[..., Any]) -> Callable[..., Array]:
    """`loss` with a check that it returns one floating-point number."""

    def checked(*args: Any) -> Array:
        return _one_number(loss(*args))

    return checked


def _one_number(value: Any) -> Array:
    """The value of a loss as an array, if it is one floating-point number."""
    rule = "loss must return one floating-point number"
    if isinstance(value, tuple | list):
        raise TypeError(
            f"{rule}, got a {type(value).__name__} of {len(value)}; if the others are "
            "aux outputs, write lambda *args: loss(*args)[0]"
        )
    if not isinstance(value, NUMBERS):
        raise TypeError(f"{rule}, got {type(value).__name__}")
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{rule}, got {value.dtype}; numbers that are rounded or counted have no "
            "gradient"
        )
    if value.shape:
        raise TypeError(
            f"{rule}, got an array of shape {value.shape}; take its mean or its sum"
        )
    return value


def refuse_traced(argument: str, tree: Any, function: str) -> None:
    """Raise if an array that comes from `argument` is being traced."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, Tracer):
            raise TypeError(
                f"{argument} must use concrete arrays, got a {type(leaf).__name__}; "
                f"call {function} outside of jit, vmap and grad"
            )


def read_batches(batches: Any, function: str) -> list[tuple[Any, ...]]:
    """The batches as tuples of arguments, read once and checked."""
    if not isinstance(batches, Iterable) or isinstance(batches, str | Mapping):
        raise TypeError(
            "batches must be an iterable of batches, each a tuple or list of arguments "
            f"of loss, got {type(batches).__name__}"
        )
    read = []
    for batch in batches:
        if not isinstance(batch, tuple | list):
            raise TypeError(
                "batches must hold a tuple or list of arguments of loss for each "
                f"batch, got {type(batch).__name__}; for one batch write [batch], and "
                "for a loss of one argument [(x,) for x in batches]"
            )
        refuse_traced("batches", batch, function)
        for leaf in jax.tree.leaves(batch):
            kind = type(leaf).__name__
            if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSU":
                kind = f"an array of dtype {leaf.dtype}"
            if kind != type(leaf).__name__ or not isinstance(leaf, NUMBERS):
                raise TypeError(f"batches must hold arrays of numbers, got {kind}")
        if not isinstance(batches, Sequence):
            # A loader may write the next batch where this one is.
            batch = jax.tree.map(_kept, batch)
        read.append(tuple(batch))
    if not read:
        raise ValueError(
            "batches must hold one batch at least, got none; an iterator that was read "
            "before is empty"
        )
    return read


def _kept(leaf: Any) -> Any:
    """A leaf that nobody else can write to."""
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf
