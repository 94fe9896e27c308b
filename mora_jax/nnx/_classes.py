"""Layer classes with an adapter, made from those without."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from flax import nnx

from mora_jax._compute.adapted import check_product
from mora_jax._flax.adapted_call import adapt_call
from mora_jax._flax.layer_rules import LayerRule, planning_rules, rules_of, unknown_use
from mora_jax._flax.survey import refuse_untraced
from mora_jax._interception import intercepted
from mora_jax._spec import SUFFIX, AdapterSpec
from mora_jax.nnx._dropout import AdapterDropout
from mora_jax.nnx._param import MoRAParam

Around = Callable[[LayerRule, nnx.Module, Any, Any, Any], Any]
"""(rule, module, args, kwargs, the bound method) to what is returned instead."""

DROPOUT = "dropout_mora"

_running: ContextVar[tuple[int, ...]] = ContextVar("running", default=())


def subclass(cls: type, around: Around, *, strict: bool) -> type:
    """`cls` with `around` put around each method that a rule describes.

    Its name and its attributes stay as they were, and with them the parameters' paths.

    Args:
      cls: the class of a layer.
      around: see `Around`.
      strict: refuse any other method that is called from without: it might use the
        kernel in a way that is not known.
    """
    rules = rules_of(cls)
    namespace: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "plain_class": cls,
    }
    for name, method in inspect.getmembers(cls, inspect.isfunction):
        inherited = getattr(nnx.Module, name, None) is method
        if name in rules:
            namespace[name] = _surround(method, rules[name], around)
        elif strict and not inherited and (name[0] != "_" or name == "__call__"):
            namespace[name] = _refuse(cls, method)
    return type(cls)(cls.__name__, (cls,), namespace)


def adapted_class(cls: type) -> type:
    """The class of adapted layers of class `cls`."""
    return _adapted_class(cls, tuple(rules_of(cls).values()))


@functools.cache  # two classes for the same would be two programs for nnx.jit
def _adapted_class(cls: type, rules: tuple[LayerRule, ...]) -> type:
    return subclass(cls, call_adapted, strict=True)


def plain_class(module: nnx.Module) -> type:
    """The class that `module` had before it was adapted."""
    return getattr(module, "plain_class", type(module))


def call_adapted(
    rule: LayerRule, module: nnx.Module, args: Any, kwargs: Any, call: Any
) -> Any:
    """What `call`, the layer's method, gives with its adapter."""
    call = functools.partial(call, *args, **kwargs)
    product, x = rule.read(module, args, kwargs)
    kernel = rule.name(module)
    m: Any = getattr(module, kernel + SUFFIX, None)
    if m is None:  # another kernel of the layer is adapted
        return call()
    if isinstance(m, _Aside):  # by another thread
        m = m.m
    dropout: Any = getattr(module, DROPOUT, None)
    key = None
    if dropout is not None and not dropout.deterministic:
        key = dropout.key(m[...], getattr(module, kernel))

    def own_product() -> Any:
        with _adapters_aside(module):
            return call()

    own = own_product if intercepted() else call
    return adapt_call(own, module, rule, m.spec, lambda: m[...], x, product, key)


@dataclasses.dataclass(frozen=True)
class _Aside:
    """An M where only the adapter finds it."""

    m: MoRAParam


@contextlib.contextmanager
def _adapters_aside(module: nnx.Module) -> Iterator[None]:
    """No M among the module's parameters for now.

    qwix asks what a product multiplies, and takes each array for a weight that has the
    shape of some parameter: an input of (q, q) numbers would be M.
    """
    attributes = vars(module)
    found = {name: v for name, v in attributes.items() if isinstance(v, MoRAParam)}
    attributes.update({name: _Aside(m) for name, m in found.items()})
    try:
        yield
    finally:
        attributes.update(found)


def attach(
    module: nnx.Module,
    spec: AdapterSpec,
    m: Any,
    *,
    seed: int,
    traced: bool,
) -> None:
    """Give `module` its adapter; one that would have no effect is refused."""
    cls, kernel = plain_class(module), spec.path[-1]
    rule = planning_rules(module).get(kernel)
    if rule is None:
        raise unknown_use(spec.name, cls, "__call__")
    product = rule.product(module)
    if not traced:
        refuse_untraced(spec.name, product)
    if product is not None:
        check_product(spec, product)
    object.__setattr__(module, "__class__", adapted_class(cls))
    setattr(module, kernel + SUFFIX, MoRAParam.of(spec, m))
    if spec.dropout > 0:
        setattr(module, DROPOUT, AdapterDropout(spec.dropout, seed))


def detach(module: nnx.Module) -> None:
    """Undo `attach`."""
    names = [name for name, v in vars(module).items() if isinstance(v, MoRAParam)]
    for name in [*names, DROPOUT]:
        if name in vars(module):
            delattr(module, name)
    object.__setattr__(module, "__class__", plain_class(module))


def _surround(
    method: Callable[..., Any], rule: LayerRule, around: Around
) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        if id(self) in _running.get():  # one rule tells all about what it calls
            return method(self, *args, **kwargs)
        token = _running.set((*_running.get(), id(self)))
        try:
            run = functools.partial(method, self)
            return around(rule, self, args, kwargs, run)
        finally:
            _running.reset(token)

    return call


def _refuse(cls: type, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        if id(self) in _running.get():
            return method(self, *args, **kwargs)
        raise unknown_use("kernel", cls, method.__name__)

    return call
