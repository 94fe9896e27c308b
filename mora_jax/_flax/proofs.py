"""Proofs of calls: which calls of a model were checked, and which others are like them.

A trace shows one way of Python through a model. Another call may take another way where
the two differ in anything that Python sees, which is all but the numbers in arrays. So
calls are alike if JAX would not trace the second one again: if structures, shapes,
dtypes, and the values of all but arrays, are equal.
"""

import contextlib
import dataclasses
import enum
import functools
import re
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from mora_jax._common.messages import warn
from mora_jax._jax.tracing import intercepted
from mora_jax._plan.spec import SUFFIX


class Proofs:
    """The calls of one model that were checked.

    They live as long as the model. NNX makes new objects of a model for each trace, and
    hands on its attributes to them. Those of any two models are equal, or `nnx.jit`
    would compile a program for each model.
    """

    def __init__(self) -> None:
        self.found: dict[Hashable, dict[Hashable, str]] = {}
        """{model: {call: "", or why a trace does not show what it does}}."""
        self.number = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Proofs)

    def __hash__(self) -> int:
        return hash(Proofs)

    def __reduce__(self) -> Any:  # a copy in another process has to prove its own calls
        return Proofs, ()

    @contextlib.contextmanager
    def proving(
        self, model: Any, call: Any, check: Callable[..., str], *args: Any
    ) -> Iterator[None]:
        """Before a call that runs inside, `check(*args)`, unless it is like another."""
        # All that Python sees in it is in `model` and `call`.
        if _inside.get() or intercepted():
            yield
            return
        try:
            known, like = self.found.setdefault(content(model), {}), content(call)
            why = known.get(like)
        except (TypeError, ValueError):  # no hash, no copy, or an empty cell
            known, like, why = {}, None, None
        if is_new := why is None:
            with jax.transfer_guard("allow"):  # the check computes with a few numbers
                why = check(*args)
            self.number += 1
        # Methods that it calls itself are parts of the same program.
        with unchecked(not why):
            yield
        known[like] = why
        if is_new and why:  # and not for a call that fails
            warn(why)


_inside: ContextVar[bool] = ContextVar("inside", default=False)


@contextlib.contextmanager
def unchecked(value: bool = True) -> Iterator[None]:
    """No call that runs inside is checked."""
    token = _inside.set(value)
    try:
        yield
    finally:
        _inside.reset(token)


def content(value: Any) -> Hashable:
    """All that Python sees in a value, equal for values that it cannot tell apart."""
    # It raises a TypeError if not all of it can be read, as copies and pickles read it.
    # Types, numbers of parts and values, as a walk meets them: one flat tuple.
    found, left, met = [], [value], {}
    while left:
        value = left.pop()
        kind = type(value)
        if kind in _VALUES:  # most are, and calls wait for this
            found += kind, value
            continue
        whole, parts = _readers(kind)
        if whole is not None:
            found.append(whole(value))
        elif id(value) in met:  # at two places, or in itself
            found += "met", met[id(value)][0]
        else:
            # It is kept, or another object could get its number.
            met[id(value)] = len(met), value
            own = [*parts(value)]
            found += kind, len(own)
            left += own
    return tuple(found)


_VALUES = {bool, int, str, bytes, type(None), type, types.CodeType, type(jnp.int8)}
_ALONE = type, types.ModuleType, types.CodeType, enum.Enum, np.dtype, np.ufunc, Proofs

Parts: TypeAlias = Callable[[Any], Iterable[Any]]


@functools.cache
def _readers(kind: type) -> tuple[Callable[[Any], Hashable] | None, Parts]:
    """Functions of a value of a type: its content, or None and the parts of that."""
    if issubclass(kind, _ALONE):
        return lambda value: (kind, value), iter
    # NaN is not equal to itself, and -0.0 is equal to 0.0.
    if issubclass(kind, float | complex | np.generic):
        return lambda value: (kind, repr(value)), iter
    if issubclass(kind, jax.Array | Tracer | jax.ShapeDtypeStruct | np.ndarray):
        own = kind if issubclass(kind, np.ndarray) else jax.Array
        return lambda x: (own, x.shape, x.dtype, getattr(x, "weak_type", None)), iter
    if issubclass(kind, set | frozenset):
        return lambda values: (kind, frozenset(map(content, values))), iter
    for known, parts in _PARTS.items():
        if issubclass(kind, known):
            return None, parts
    if issubclass(kind, nn.Module):  # frozen; what else it holds is of the running call
        names = [f.name for f in dataclasses.fields(kind) if f.name != "parent"]
        return None, lambda module: [getattr(module, name) for name in names]
    if dataclasses.is_dataclass(kind):
        return None, lambda value: value.__reduce_ex__(4)
    if kind.__eq__ is not object.__eq__ and kind.__hash__ is not None:
        return lambda value: (kind, value), iter
    return None, _parts_of_object


@functools.cache  # models have few classes, and calls wait for this
def _seen(names: tuple[str, ...]) -> list[str]:
    # Adapters may differ: a proof is about kernels. NNX notes the running trace.
    hidden = re.compile(rf"_pytree_.*|_object_.*|.*{SUFFIX}")
    return [name for name in names if not hidden.fullmatch(name)]


def _parts_of_nnx(value: Any) -> Iterable[Any]:
    held = vars(value)
    names = _seen((*held,))
    return " ".join(names), *map(held.__getitem__, names)


def _parts_of_variable(variable: nnx.Variable[Any]) -> Iterable[Any]:
    metadata = variable.get_metadata()
    return variable.get_raw_value(), " ".join(metadata), *metadata.values()


def _parts_of_function(function: types.FunctionType) -> Iterable[Any]:
    # A lambda is another object each time. Its globals are not looked at.
    own = function.__module__, function.__defaults__, function.__kwdefaults__
    more = filter(None, [vars(function)])
    return function.__code__, *own, *more, *(function.__closure__ or ())


def _parts_of_object(value: Any) -> Iterable[Any]:
    if (wrapped := getattr(value, "__wrapped__", None)) is not None:  # as by jax.jit
        return [wrapped]
    if hasattr(value, "__dict__") and not jax.tree_util.all_leaves([value]):
        return jax.tree.flatten(value)
    return value.__reduce_ex__(4)


_PARTS: dict[Any, Parts] = {
    tuple | list: iter,
    Mapping: lambda mapping: [*mapping, *mapping.values()],
    types.FunctionType: _parts_of_function,
    types.MethodType: lambda method: (method.__func__, method.__self__),
    types.BuiltinFunctionType: lambda method: (method.__name__, method.__self__),
    types.CellType: lambda cell: [cell.cell_contents],
    nnx.Variable: _parts_of_variable,
    nnx.Pytree: _parts_of_nnx,
}
