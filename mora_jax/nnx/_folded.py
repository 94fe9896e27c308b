"""Layers whose methods read W + delta in the place of their kernels."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax._flax.layer_rules import folded_kernels
from mora_jax._layer.fold import folded_kernel
from mora_jax._plan.spec import SUFFIX
from mora_jax.nnx._param import is_m, value_of

Read = Callable[[nnx.Module, str, jax.Array], jax.Array]
"""(module, name of its kernel, the kernel) to what its methods read."""

Seen = Callable[[nnx.Module], dict[str, Any]]
"""A module to the attributes that its methods see."""


def derived(cls: type, methods: Mapping[str, Any]) -> type:
    """A subclass of `cls` with the same name, and other methods."""
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "plain_class": cls,
    }
    return type(cls)(cls.__name__, (cls,), {**namespace, **methods})


def reading_class(cls: type, read: Read) -> type:
    """A subclass of `cls` whose methods read something else in place of each kernel.

    Args:
      cls: The class of a layer, with a `products.Folded` for each kernel.
      read: What they read.
    """

    def seen(module: nnx.Module) -> dict[str, Any]:
        attributes = {k: v for k, v in vars(module).items() if not is_m(v)}
        for name in folded_kernels(cls):
            if isinstance(variable := attributes.get(name), nnx.Variable):
                kernel = read(module, name, variable[...])
                metadata = dict(variable.get_metadata())
                attributes[name] = type(variable).from_metadata(kernel, metadata)
        return attributes

    return on_copies(cls, seen, cls)


def on_copies(cls: type, seen: Seen, plain: type) -> type:
    """A subclass of `cls` whose methods run on copies with other attributes.

    Args:
      cls: The class of a layer, which the copies have.
      seen: A function of the layer to the attributes of its copy.
      plain: The class that the layer had before it was adapted.
    """
    methods = {
        name: _on_copy(cls, method, seen)
        for name, method in inspect.getmembers(cls, inspect.isfunction)
        if getattr(nnx.Module, name, None) is not method
        and (not name.startswith("__") or name == "__call__")
        and not isinstance(inspect.getattr_static(cls, name), staticmethod)
    }
    return derived(cls, {**methods, "plain_class": plain})


def with_delta(module: nnx.Module, name: str, kernel: jax.Array) -> jax.Array:
    """The kernel of a module with the delta of its adapter, if it has one."""
    m: Any = getattr(module, name + SUFFIX, None)
    if m is None:
        return kernel
    if not (hasattr(kernel, "dtype") and jnp.issubdtype(kernel.dtype, jnp.floating)):
        raise TypeError(
            f"{name} of {type(module).__name__} must be a floating-point array for "
            f"products.Folded, got {type(kernel).__name__}; is it quantized?"
        )
    return folded_kernel(m.spec, value_of(m), kernel)


def _on_copy(cls: type, method: Callable[..., Any], seen: Seen) -> Callable[..., Any]:
    """A method that runs on a copy of its module.

    The copy is of the class `cls` and has other attributes. So whatever the method does
    with it (`nnx.remat` of a part, calls of other methods) changes no array a second
    time, and other threads may be in the same module.
    """

    @functools.wraps(method)
    def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        copy, own, attributes = object.__new__(cls), vars(self), seen(self)
        vars(copy).update(attributes)
        y = method(copy, *args, **kwargs)
        # What the method has set, such as intermediate values.
        own.update({k: v for k, v in vars(copy).items() if v is not attributes.get(k)})
        return y

    return call
