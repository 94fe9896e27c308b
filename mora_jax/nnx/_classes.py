"""Derived classes: layers whose methods run on a plain copy of the layer."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from mora_jax._common.checks import check_kernel
from mora_jax._flax.calls import LayerCall, adapt_call, errors_of
from mora_jax._flax.layer_rules import folded_kernels, rules_of, unknown_use
from mora_jax._layer.adapter import Adapter
from mora_jax._layer.equation import folded_kernel
from mora_jax._plan.settings import MoRAConfig
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax.nnx import _held
from mora_jax.nnx._held import TrainedParam, dropout_key, held, plain_class, set_class

MARKED = "mora_marked"
"""The attribute of a layer whose calls are recorded and not adapted, a `Marked`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Marked:
    """The survey that records a layer, and the beginning of its kernels' paths."""

    # Not equal to others, so that `nnx.jit` uses no earlier trace.
    survey: Any
    prefix: str


def adapt(module: nnx.Module) -> None:
    """Give a layer the class that it has once it is adapted."""
    set_class(module, adapted_class(plain_class(module)))


def adapted_class(cls: type) -> type:
    """The class that a layer of class `cls` has once it is adapted."""
    return _adapted_class(cls, *rules_of(cls).values(), *folded_kernels(cls).items())


# nnx.jit would compile a program for each of several classes. Other rules need another
# class, or it would run what it has compiled for the old ones.
@functools.cache
def _adapted_class(cls: type, *_: Any) -> type:
    # A method runs on a copy of its layer without M's. So whatever it does (`nnx.remat`
    # of a part, calls of other methods) adds no delta a second time, other threads may
    # be in the same layer, and qwix, which knows weights by their shapes, sees no M.
    rules, folded = rules_of(cls), folded_kernels(cls)

    def wrapped(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        rule = rules.get(name)
        # A method without a rule may call those that have one, so its copy is adapted.
        plain = rule is not None or bool(folded)
        is_unknown = not plain and (name[0] != "_" or name == "__call__")

        @functools.wraps(method)
        def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            if is_unknown and any(key.endswith(SUFFIX) for key in vars(self)):
                raise unknown_use("kernel", cls, name)
            with _copied(self, plain) as copy:
                own = functools.partial(method, copy)
                if rule is None:
                    return own(*args, **kwargs)
                kernel = rule.name(self)
                called = LayerCall(rule, copy, own, args, kwargs)
                adapter, marked = held(self, kernel), vars(self).get(MARKED)
                if marked is not None:
                    path = marked.prefix + kernel
                    return marked.survey.record_call(path, called, adapter)
                if adapter is None:  # another kernel of the layer is adapted
                    return own(*args, **kwargs)
                key = dropout_key(self, kernel, adapter)
                return adapt_call(called, kernel, lambda: adapter, key)

        return call

    return subclass(cls, wrapped)


def subclass(cls: type, wrapped: Callable[[str, Callable[..., Any]], Any]) -> type:
    """A subclass of `cls` with the same name, and its methods as `wrapped` has them."""
    methods = {
        name: wrapped(name, method)
        for name, method in inspect.getmembers(cls, inspect.isfunction)
        if getattr(nnx.Module, name, None) is not method
        and (not name.startswith("__") or name == "__call__")
        and not isinstance(inspect.getattr_static(cls, name), staticmethod)
    }
    kept = {key: getattr(cls, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(cls)(cls.__name__, (cls,), {**kept, "plain_class": cls, **methods})


@contextlib.contextmanager
def _copied(module: nnx.Module, plain: bool) -> Iterator[Any]:
    """A copy of a layer for one call, without its adapters if it is `plain`."""
    cls, attributes = plain_class(module) if plain else type(module), {}
    for name, value in vars(module).items():
        # An array that trains in float32 has the base's dtype in the copy, since the
        # dtype of what a layer computes often follows from its parameters.
        if isinstance(value, TrainedParam) and value.dtype != value.spec.base_dtype:
            value = value.plain()
        if not plain or not (name.endswith(SUFFIX) or name == MARKED):
            attributes[name] = value
    for name in folded_kernels(cls) if plain else ():
        if isinstance(variable := attributes.get(name), nnx.Variable):
            attributes[name] = variable.replace(_read(module, name, variable[...]))
    copy = object.__new__(cls)
    vars(copy).update(attributes)
    yield copy
    # What the call sets, such as intermediate values, is set on the layer as well.
    after, own = vars(copy), vars(module)
    own.update({k: v for k, v in after.items() if v is not attributes.get(k)})
    for name in attributes.keys() - after.keys():  # qwix deletes statistics
        own.pop(name, None)


def _read(module: nnx.Module, name: str, kernel: jax.Array) -> jax.Array:
    """The kernel as the methods of a module read it, with the delta of its adapter."""
    adapter, marked = held(module, name), vars(module).get(MARKED)
    if marked is not None:
        path, cls = marked.prefix + name, plain_class(module)
        return marked.survey.record_read(path, cls, kernel, adapter)
    if adapter is None:
        return kernel
    check_kernel(kernel, f"{name} of {type(module).__name__}")  # it may be quantized
    with errors_of(name):
        return folded_kernel(adapter.spec, adapter.m, kernel)


class MoRALinear(nnx.Linear):
    """`nnx.Linear` with an adapter: the same attributes, and `kernel_mora`.

    Args:
      in_features, out_features: The lengths of the input and the output vectors.
      config: As in `MoRADense`; None for the defaults.
      rngs: The source of the keys for the parameters.
      seed: The seed of the dropout masks, as in `wrap`.
      **kwargs: Further arguments of `nnx.Linear`.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> config = mora_jax.MoRAConfig(rank=2)
      >>> layer = mora_jax.nnx.MoRALinear(16, 8, config=config, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((3, 16))).shape, layer.kernel_mora.shape
      ((3, 8), (4, 4, 2))
    """

    plain_class = nnx.Linear
    __call__ = adapted_class(nnx.Linear).__call__

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        config: MoRAConfig | None = None,
        rngs: nnx.Rngs,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(in_features, out_features, rngs=rngs, **kwargs)
        shape = (in_features, out_features)
        spec = AdapterSpec.from_config(config, shape, kernel_dtype=self.kernel.dtype)
        m = spec.start(("kernel",), rngs.params() if spec.init == "gaussian" else None)
        _held.hold_adapter(self, "kernel", Adapter(m, spec), seed)
