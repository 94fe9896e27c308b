"""Proofs of calls: which calls of a model were checked, and which others are like them.

A trace shows one way of Python through a model. Another call may take another way where
the two differ in anything that Python sees, which is all but the numbers in JAX's
arrays. So calls are alike if structures, shapes, dtypes, and the values of all but
arrays, are equal.

The numbers in NumPy's arrays count as well, where Python reads them. Of an input, such
as token ids, a second trace with hidden numbers tells if it does. Those inside of an
object or of a function always count.
"""

import contextlib
import dataclasses
import enum
import functools
import hashlib
import re
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeAlias

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
        self,
        model: Any,
        call: Any,
        check: Callable[[], str],
        reads_numbers: Callable[[], bool],
    ) -> Iterator[None]:
        """Check a call that runs inside, unless one like it was checked.

        Args:
          model: The model, as far as Python sees it.
          call: Its inputs and the rest that Python sees.
          check: A function that raises, or returns "" or a warning.
          reads_numbers: A function that says whether the call reads numbers of NumPy
            arrays among its inputs.
        """
        if _inside.get() or intercepted():
            yield
            return
        try:
            known = self.found.setdefault(content(model), {})
            like = content(call)
            why = known.get(like)
            if why is BY_NUMBERS:
                like = content(call, numbers=True)
                why = known.get(like)
        except (TypeError, ValueError):  # no hash, no copy, or an empty cell
            known = {}
            like = None
            why = None
        is_new = why is None
        if why is None:
            with jax.transfer_guard("allow"):  # the check computes with a few numbers
                why = check()
                if like is not None and _has_numpy(call) and reads_numbers():
                    known[like] = BY_NUMBERS
                    like = content(call, numbers=True)
            self.number += 1
        # Methods that it calls itself are parts of the same program.
        with unchecked(not why):
            yield
        known[like] = why
        if is_new and why:  # and not for a call that fails
            warn(why)


BY_NUMBERS = "by numbers"
"""The entry of calls that read numbers of NumPy arrays: others may differ in them."""


def _has_numpy(call: Any) -> bool:
    """True if a call has NumPy arrays among its inputs."""
    return any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(call))


_inside: ContextVar[bool] = ContextVar("inside", default=False)


@contextlib.contextmanager
def unchecked(value: bool = True) -> Iterator[None]:
    """No call that runs inside is checked."""
    token = _inside.set(value)
    try:
        yield
    finally:
        _inside.reset(token)


def content(value: Any, numbers: bool = False) -> Hashable:
    """All that Python sees in a value, equal for values that it cannot tell apart.

    Args:
      value: The inputs of a call, or a model.
      numbers: True to tell apart inputs that differ in the numbers of NumPy arrays.

    Raises:
      TypeError: Not all of it can be read, as copies and pickles read it.
    """
    # Types, numbers of parts and values, as a walk meets them: one flat tuple. First
    # come the inputs, which are leaves of trees, then what objects and functions hold.
    found: list[Any] = []
    met: dict[int, tuple[int, Any]] = {}
    held: list[Any] = []
    for left, is_input in (([value], True), (held, False)):
        while left:
            value = left.pop()
            kind = type(value)
            if kind in _VALUES:  # most are, and calls wait for this
                found += kind, value
                continue
            whole, parts, is_tree = _reader(kind)
            if whole is not None:
                found.append(whole(value))
                if whole is _form and (numbers or not is_input):
                    found.append(_digest(value))
            elif id(value) in met:  # at two places, or in itself
                found += "met", met[id(value)][0]
            else:
                # It is kept, or another object could get its number.
                met[id(value)] = len(met), value
                own = [*parts(value)]
                found += kind, len(own)
                stays = is_tree or not is_input or _is_node(value)
                (left if stays else held).extend(own)
    return tuple(found)


def _form(array: np.ndarray) -> Hashable:
    """All of a NumPy array but its numbers."""
    return type(array), array.shape, array.dtype


def _digest(array: np.ndarray) -> bytes:
    """The bytes of a small array, or the SHA-256 of a large one's."""
    if array.dtype.hasobject:
        raise TypeError("the numbers of an array of objects cannot be compared")
    data = array.tobytes()
    return data if len(data) <= SMALL else hashlib.sha256(data).digest()


def _is_node(value: Any) -> bool:
    """True for a node of a pytree, whose leaves are inputs as well."""
    return not jax.tree_util.all_leaves([value])


SMALL = 1024  # bytes


_VALUES = {bool, int, str, bytes, type(None), type, types.CodeType, type(jnp.int8)}
_ALONE = type, types.ModuleType, types.CodeType, enum.Enum, np.dtype, np.ufunc, Proofs

Parts: TypeAlias = Callable[[Any], Iterable[Any]]


class _Reader(NamedTuple):
    """A way to read values of one type: as a whole, or by their parts."""

    whole: Callable[[Any], Hashable] | None = None
    parts: Parts = iter
    is_tree: bool = False  # True if the parts of an input are inputs for sure


@functools.cache
def _reader(kind: type) -> _Reader:
    """The way to read values of a type."""
    if issubclass(kind, _ALONE):
        return _Reader(lambda value: (kind, value))
    # NaN is not equal to itself, and -0.0 is equal to 0.0.
    if issubclass(kind, float | complex | np.generic):
        return _Reader(lambda value: (kind, repr(value)))
    if issubclass(kind, np.ndarray):
        return _Reader(_form)
    if issubclass(kind, jax.Array | Tracer | jax.ShapeDtypeStruct):
        return _Reader(
            lambda x: (jax.Array, x.shape, x.dtype, getattr(x, "weak_type", None))
        )
    if issubclass(kind, set | frozenset):
        return _Reader(lambda values: (kind, frozenset(map(content, values))))
    for known, parts in _PARTS.items():
        if issubclass(kind, known):
            return _Reader(parts=parts, is_tree=known in _TREES)
    if issubclass(kind, nn.Module):  # frozen; what else it holds is of the running call
        names = [f.name for f in dataclasses.fields(kind) if f.name != "parent"]
        return _Reader(parts=lambda module: [getattr(module, name) for name in names])
    if dataclasses.is_dataclass(kind):
        return _Reader(parts=lambda value: value.__reduce_ex__(4))
    if kind.__eq__ is not object.__eq__ and kind.__hash__ is not None:
        return _Reader(lambda value: (kind, value))
    return _Reader(parts=_parts_of_object)


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


_SEQUENCE = tuple | list
_PARTS: dict[Any, Parts] = {
    _SEQUENCE: iter,
    Mapping: lambda mapping: [*mapping, *mapping.values()],
    types.FunctionType: _parts_of_function,
    types.MethodType: lambda method: (method.__func__, method.__self__),
    types.BuiltinFunctionType: lambda method: (method.__name__, method.__self__),
    types.CellType: lambda cell: [cell.cell_contents],
    nnx.Variable: _parts_of_variable,
    nnx.Pytree: _parts_of_nnx,
}
_TREES = (_SEQUENCE, Mapping, nnx.Variable, nnx.Pytree)
"""Kinds of `_PARTS` that JAX and Flax take apart as well."""
