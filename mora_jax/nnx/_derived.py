"""Derived classes: layers whose methods run on a plain copy of the layer.

A layer keeps its attributes and the name of its class, and with them the paths of its
parameters. A method that has a rule, or that reads folded kernels, makes a copy of the
plain class, without M's, and runs there. So whatever the method does (`nnx.remat` of a
part, calls of other methods) adds no delta a second time, other threads may be in the
same layer, and qwix, which takes an array for a weight if a parameter has its shape,
sees no M.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from mora_jax._flax.layer_rules import folded_kernels
from mora_jax.nnx._param import TrainedParam, is_m

Through = Callable[[nnx.Module, str, Callable[..., Any], Any, Any], Any]
"""(layer, name of a method, the plain method, args, kwargs) to what a call returns."""

Read = Callable[[nnx.Module, str, jax.Array], jax.Array]
"""(layer, name of its kernel, the kernel) to what its methods read."""


def derived(cls: type, through: Through) -> type:
    """A subclass of `cls` with the same name, whose methods run through `through`."""

    def wrapped(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            return through(self, name, method, args, kwargs)

        return call

    methods = {
        name: wrapped(name, method)
        for name, method in inspect.getmembers(cls, inspect.isfunction)
        if getattr(nnx.Module, name, None) is not method
        and (not name.startswith("__") or name == "__call__")
        and not isinstance(inspect.getattr_static(cls, name), staticmethod)
    }
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "plain_class": cls,
    }
    return type(cls)(cls.__name__, (cls,), {**namespace, **methods})


def plain_class(module: nnx.Module) -> type:
    """The class that `module` had before it was adapted."""
    return getattr(module, "plain_class", type(module))


@contextlib.contextmanager
def copied(module: nnx.Module, read: Read | None) -> Iterator[Any]:
    """A copy of a layer for one call, with the same variables.

    With `read` it is of the plain class without M's, and a `products.Folded` kernel
    is what `read` makes of it. Without, it is still an adapted layer. An array that
    trains in float32 has the base's dtype, since the dtype of what a layer computes
    often follows from its parameters. What the call sets, such as intermediate values,
    is set on the layer as well.
    """
    cls = type(module) if read is None else plain_class(module)
    attributes = {
        name: plain_variable(value) if _is_wider(value) else value
        for name, value in vars(module).items()
        if read is None or not is_m(value)
    }
    for name in folded_kernels(cls):
        variable = attributes.get(name)
        if read is not None and isinstance(variable, nnx.Variable):
            kernel = read(module, name, variable[...])
            metadata = dict(variable.get_metadata())
            attributes[name] = type(variable).from_metadata(kernel, metadata)
    copy = object.__new__(cls)
    vars(copy).update(attributes)
    yield copy
    after, own = vars(copy), vars(module)
    own.update({k: v for k, v in after.items() if v is not attributes.get(k)})
    for name in attributes.keys() - after.keys():  # qwix deletes statistics
        own.pop(name, None)


def _is_wider(value: Any) -> bool:
    return isinstance(value, TrainedParam) and value.spec.dtype != value.spec.base_dtype


def plain_variable(trained: Any) -> nnx.Variable[Any]:
    """A variable as the base has it, with the rounded numbers of a trained one."""
    metadata = dict(trained.get_metadata())
    spec, plain = metadata.pop("spec"), metadata.pop("plain")
    return plain.from_metadata(trained[...].astype(spec.base_dtype), metadata)
