"""Operators as dataclasses and pytrees, and the arrays that a seed determines."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, dataclass_transform

import jax
import numpy as np
from jax.tree_util import GetAttrKey, register_pytree_with_keys

ClassT = TypeVar("ClassT", bound=type)
Compute = Callable[[Any], Any]


def seeded(compute: Compute, *, init: Literal[False] = False) -> Any:
    """Array that settings determine, as `compute(operator)`: no part of eq and repr."""
    settings = {"compare": False, "repr": False, "metadata": {"compute": compute}}
    return dataclasses.field(init=init, **settings)


def given(check: Compute, *, default: Any = dataclasses.MISSING) -> Any:
    """Array that the caller gives, as `check(operator)` returns it: no part of repr."""
    settings: Any = {"compare": False, "repr": False, "metadata": {"compute": check}}
    return dataclasses.field(default=default, **settings)


@dataclass_transform(
    frozen_default=True, field_specifiers=(seeded, given, dataclasses.field)
)
def operator(cls: ClassT) -> ClassT:
    """Make `cls` a frozen dataclass and a pytree whose leaves are its arrays."""
    cls = dataclasses.dataclass(frozen=True)(cls)  # type: ignore[assignment]
    fields = dataclasses.fields(cls)
    cls.arrays = tuple(f.name for f in fields if "compute" in f.metadata)
    cls.given = any(f.init for f in fields if "compute" in f.metadata)
    if cls.given:
        cls.__eq__ = _alike  # type: ignore[method-assign]
    # An operator inside of another one, whose arrays are leaves, too.
    inner = [field.name for field in fields if "nested" in field.metadata]
    register_pytree(cls, [*cls.arrays, *inner])
    return cls


def by_layer(op: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays that differ between a stack's layers, and the operator of others."""
    # Arrays of one layer have two axes at most; what has more begins with the stack's.
    if not op.given:
        return [], lambda arrays: op
    leaves, tree = jax.tree.flatten(op)
    own = [k for k, leaf in enumerate(leaves) if getattr(leaf, "ndim", 0) > 2]

    def with_arrays(arrays: Sequence[Any]) -> Any:
        changed = dict(zip(own, arrays, strict=True))
        return tree.unflatten([changed.get(k, leaf) for k, leaf in enumerate(leaves)])

    return [leaves[k] for k in own], with_arrays


def _alike(one: Any, other: Any) -> bool:
    """True for operators with equal settings and equal given arrays."""
    if type(one) is not type(other):
        return False
    fields = [f.name for f in dataclasses.fields(one) if f.compare] + ["digests"]
    return all(getattr(one, name) == getattr(other, name) for name in fields)


class Carried(tuple[Any, ...]):
    """Static values of a pytree that the comparison of its structure ignores."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Carried)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(Carried)


def register_pytree(cls: type, children: Sequence[str]) -> None:
    """Make a dataclass a pytree whose children are these fields; the rest is static.

    Of the rest, the structure of the pytree compares what `==` of the class compares.
    """
    others = [f for f in dataclasses.fields(cls) if f.name not in children]
    compared = [f.name for f in others if f.compare]
    carried = [f.name for f in others if not f.compare]

    def flatten(record: Any) -> tuple[list[Any], tuple[Any, ...]]:
        pairs = [(GetAttrKey(name), getattr(record, name)) for name in children]
        values = [getattr(record, name) for name in compared]
        return pairs, (*values, Carried([getattr(record, name) for name in carried]))

    def unflatten(aux: tuple[Any, ...], values: Any) -> Any:
        # Not through __init__: the leaves of a tree_map may be anything.
        record = object.__new__(cls)
        names = [*compared, *carried, *children]
        for name, value in zip(names, [*aux[:-1], *aux[-1], *values], strict=True):
            object.__setattr__(record, name, value)
        return record

    register_pytree_with_keys(cls, flatten, unflatten)


# NumPy promises that the streams of `RandomState` never change; `Generator` and
# `jax.random` may change theirs, and have. Arrays are computed in float64 and rounded
# to float32, which is part of their definition.
def _state(kind: int, features: int, seed: int) -> np.random.RandomState:
    """One stream for each kind of array and width: equal widths get equal arrays."""
    return np.random.RandomState([seed, features, kind])


def _frozen(array: np.ndarray, dtype: type) -> np.ndarray:
    array = np.ascontiguousarray(array, dtype)
    array.setflags(write=False)  # it is cached, and shared by all layers of its shape
    return array


@functools.cache
def orthonormal(features: int, columns: int, seed: int) -> np.ndarray:
    """(features, columns) with orthonormal columns, uniform over all such matrices."""
    gaussian = _state(0, features, seed).standard_normal((features, columns))
    basis, triangle = np.linalg.qr(gaussian)
    # LAPACK leaves the signs open; a positive diagonal makes the factorisation unique.
    return _frozen(basis * np.sign(np.diag(triangle)), np.float32)


@functools.cache
def permutation(features: int, seed: int) -> np.ndarray:
    """(features,) a permutation of the indices."""
    keys = _state(1, features, seed).random_sample(features)
    return _frozen(np.argsort(keys, kind="stable"), np.int32)


@functools.cache
def signs(features: int, seed: int) -> np.ndarray:
    """(features,) of -1 and 1."""
    coins = _state(2, features, seed).random_sample(features) < 0.5
    return _frozen(np.where(coins, -1, 1), np.float32)
