"""Classes of adapted layers, each made from the class of the plain layer."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from flax import nnx

from mora_jax._flax.adapted_call import adapt_call
from mora_jax._flax.layer_rules import (
    LayerRule,
    folded_kernels,
    planning_rules,
    rules_of,
    unknown_use,
)
from mora_jax._flax.survey import refuse_untraced
from mora_jax._jax.qwix_guard import intercepted
from mora_jax._layer.adapted import check_product
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax.nnx._dropout import AdapterDropout
from mora_jax.nnx._folded import derived, reading_class, with_delta
from mora_jax.nnx._param import MoRAParam, TrainedParam, is_m, value_of
from mora_jax.nnx._trained import restore_array
from mora_jax.products import Folded

CallWrapper = Callable[[LayerRule, nnx.Module, Callable[..., Any], Any, Any], Any]
"""(rule, layer, its method, args, kwargs) to what the call returns."""

DROPOUT = "dropout_mora"

_running: ContextVar[tuple[int, ...]] = ContextVar("running", default=())


def subclass(cls: type, wrap_call: CallWrapper, *, strict: bool) -> type:
    """A subclass of `cls` that calls `wrap_call` for each method that has a rule.

    Its name and its attributes stay as they were, and with them the parameters' paths.

    Args:
      cls: The class of a layer.
      wrap_call: What is called in place of the methods, with the method.
      strict: Whether public methods without a rule raise when they are called from
        outside of the layer, since nobody knows how they use the kernel.
    """
    rules = rules_of(cls)
    methods: dict[str, Any] = {}
    for name, method in inspect.getmembers(cls, inspect.isfunction):
        inherited = getattr(nnx.Module, name, None) is method
        if name in rules:
            methods[name] = _wrapped(method, rules[name], wrap_call)
        elif strict and not inherited and (name[0] != "_" or name == "__call__"):
            methods[name] = _refused(cls, method)
    return derived(cls, methods)


def adapted_class(cls: type) -> type:
    """The class that a layer of class `cls` has once it is adapted."""
    rules = tuple(rules_of(cls).values())
    return _adapted_class(cls, rules, tuple(folded_kernels(cls).items()))


@functools.cache  # nnx.jit would compile a program for each of several classes
def _adapted_class(
    cls: type,
    rules: tuple[LayerRule, ...],
    folded: tuple[tuple[str, Folded], ...],
) -> type:
    if folded:
        return reading_class(cls, with_delta)
    return subclass(cls, call_adapted, strict=True)


def plain_class(module: nnx.Module) -> type:
    """The class that `module` had before it was adapted."""
    return getattr(module, "plain_class", type(module))


def call_adapted(
    rule: LayerRule,
    module: nnx.Module,
    method: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    """The output of a layer's method, with the adapter's delta added."""
    call = functools.partial(method, *args, **kwargs)
    product, x = rule.read(module, args, kwargs)
    kernel = rule.name(module)
    m: Any = getattr(module, kernel + SUFFIX, None)
    if m is None:  # another kernel of the layer is adapted
        return call()
    if isinstance(m, _Hidden):  # another thread is in the same layer
        m = m.m
    dropout: Any = getattr(module, DROPOUT, None)
    key = None
    if dropout is not None and not dropout.deterministic:
        key = dropout.key(value_of(m), getattr(module, kernel))

    def call_without_adapters() -> Any:
        with _hidden_adapters(module):
            return call()

    plain_call = call_without_adapters if intercepted() else call
    return adapt_call(
        plain_call, module, rule, m.spec, lambda: value_of(m), x, product, key
    )


@dataclasses.dataclass(frozen=True)
class _Hidden:
    """An M that only `call_adapted` finds."""

    m: MoRAParam


@contextlib.contextmanager
def _hidden_adapters(module: nnx.Module) -> Iterator[None]:
    """A context in which the module has no M among its parameters.

    qwix takes each array that a product multiplies for a weight if a parameter of the
    module has its shape. It would take an input of (q, q) numbers for M.
    """
    attributes = vars(module)
    found = {name: v for name, v in attributes.items() if is_m(v)}
    attributes.update({name: _Hidden(m) for name, m in found.items()})
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
    """Give `module` its adapter, or raise if it would have no effect."""
    cls, kernel = plain_class(module), spec.path[-1]
    rule = planning_rules(module).get(kernel)
    if rule is None:
        raise unknown_use(spec.name, cls, "__call__")
    product = rule.product(module)
    if not traced:
        refuse_untraced(spec.name, product)
    if product is not None:
        check_product(spec, product)
    if isinstance(product, Folded) and spec.dropout > 0:
        raise ValueError(
            f"{spec.name}: dropout must be 0 for a kernel that methods read "
            f"(products.Folded), got {spec.dropout}; say so in overrides"
        )
    object.__setattr__(module, "__class__", adapted_class(cls))
    setattr(module, kernel + SUFFIX, MoRAParam.of(spec, m))
    if spec.dropout > 0:
        setattr(module, DROPOUT, AdapterDropout(spec.dropout, seed))


def detach(module: nnx.Module) -> None:
    """Undo `attach` and `train_array`; trained numbers stay."""
    for name, value in list(vars(module).items()):
        if isinstance(value, TrainedParam):
            restore_array(module, name)
        elif isinstance(value, MoRAParam) or name == DROPOUT:
            delattr(module, name)
    object.__setattr__(module, "__class__", plain_class(module))


def _wrapped(
    method: Callable[..., Any], rule: LayerRule, wrap_call: CallWrapper
) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        # A rule covers all that its method calls of the same layer.
        if id(self) in _running.get():
            return method(self, *args, **kwargs)
        token = _running.set((*_running.get(), id(self)))
        try:
            bound_method = functools.partial(method, self)
            return wrap_call(rule, self, bound_method, args, kwargs)
        finally:
            _running.reset(token)

    return call


def _refused(cls: type, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        if id(self) in _running.get():
            return method(self, *args, **kwargs)
        raise unknown_use("kernel", cls, method.__name__)

    return call
