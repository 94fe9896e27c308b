"""Operators as dataclasses and pytrees."""

import dataclasses
from typing import Any, Literal, TypeVar, dataclass_transform

import jax

ClassT = TypeVar("ClassT", bound=type)


def array_field(*, init: Literal[False] = False) -> Any:
    """A field that `__post_init__` fills from the seed: no part of eq, hash or repr."""
    return dataclasses.field(init=init, compare=False, repr=False)


def given_array_field(*, init: Literal[True] = True) -> Any:
    """A field whose array the caller gives: no part of eq, hash or repr."""
    return dataclasses.field(init=init, compare=False, repr=False)


_FIELDS = array_field, given_array_field, dataclasses.field


@dataclass_transform(frozen_default=True, field_specifiers=_FIELDS)
def operator(cls: ClassT) -> ClassT:
    """Make `cls` a frozen dataclass and a pytree whose leaves are its `arrays`."""
    cls = dataclasses.dataclass(frozen=True)(cls)  # type: ignore[assignment]
    static = [f.name for f in dataclasses.fields(cls) if f.name not in cls.arrays]

    def flatten_with_keys(op: Any) -> tuple[list[Any], tuple[Any, ...]]:
        children = [(jax.tree_util.GetAttrKey(n), getattr(op, n)) for n in cls.arrays]
        return children, tuple(getattr(op, name) for name in static)

    def unflatten(aux: tuple[Any, ...], children: Any) -> Any:
        # Not through __init__: the leaves of a tree_map may be anything.
        op = object.__new__(cls)
        for name, value in zip([*static, *cls.arrays], [*aux, *children], strict=True):
            object.__setattr__(op, name, value)
        return op

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls
