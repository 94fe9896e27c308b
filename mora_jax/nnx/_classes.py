"""Layers with adapters: their classes, and how adapters are put in and taken out."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax._flax.adapted_call import adapt_call
from mora_jax._flax.layer_rules import (
    folded_kernels,
    planning_rules,
    rules_of,
    unknown_use,
)
from mora_jax._flax.survey import refuse_untraced
from mora_jax._layer.adapted import check_product
from mora_jax._layer.fold import folded_kernel
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._plan.trained_arrays import TrainedArray
from mora_jax.nnx._derived import copied, derived, plain_class, plain_variable
from mora_jax.nnx._dropout import AdapterDropout
from mora_jax.nnx._param import MoRAParam, TrainedParam, is_m, value_of

DROPOUT = "dropout_mora"


def adapted_class(cls: type) -> type:
    """The class that a layer of class `cls` has once it is adapted."""
    rules = tuple(rules_of(cls).values())
    return _adapted_class(cls, rules, tuple(folded_kernels(cls).items()))


# nnx.jit would compile a program for each of several classes. Other rules need another
# class, or it would run what it has compiled for the old ones.
@functools.cache
def _adapted_class(cls: type, *rules: Any) -> type:
    return derived(cls, call_adapted)


def call_adapted(
    module: Any, name: str, method: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """The output of a layer's method, with the adapter's delta added."""
    cls = plain_class(module)
    rule = rules_of(cls).get(name)
    if rule is None and not folded_kernels(cls):
        _refuse_unknown(module, cls, name)
        with copied(module, None) as copy:  # which may call methods that have rules
            return method(copy, *args, **kwargs)
    with copied(module, with_delta) as copy:
        method = functools.partial(method, copy)
        if rule is None:
            return method(*args, **kwargs)
        kernel = rule.name(module)
        m = getattr(module, kernel + SUFFIX, None)
        if m is None:  # another kernel of the layer is adapted
            return method(*args, **kwargs)
        dropout, key = getattr(module, DROPOUT, None), None
        if dropout is not None and not dropout.deterministic:
            key = dropout.key(value_of(m), getattr(module, kernel))
        m_of = functools.partial(value_of, m)
        return adapt_call(rule, copy, method, args, kwargs, m.spec, m_of, key)


def _refuse_unknown(module: nnx.Module, cls: type, method: str) -> None:
    """Raise for a method without a rule that may use an adapted kernel."""
    public = method[0] != "_" or method == "__call__"
    if public and any(map(is_m, vars(module).values())):
        raise unknown_use("kernel", cls, method)


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


def attach(
    module: nnx.Module, spec: AdapterSpec, m: Any, *, seed: int, traced: bool
) -> None:
    """Give `module` its adapter, or raise if it would change nothing."""
    cls, kernel = plain_class(module), spec.path[-1]
    rule = planning_rules(module).get(kernel)
    if rule is None:
        raise unknown_use(spec.name, cls, "__call__")
    product = rule.product(module)
    if not traced:
        refuse_untraced(spec.name, product)
    if product is not None:
        check_product(spec, product)
    if folded_kernels(cls) and spec.dropout > 0:
        raise ValueError(
            f"{spec.name}: dropout must be 0 for a kernel that methods read "
            f"(products.Folded), got {spec.dropout}; say so in overrides"
        )
    object.__setattr__(module, "__class__", adapted_class(cls))
    hold_adapter(module, spec, m, seed)


def hold_adapter(module: nnx.Module, spec: AdapterSpec, m: Any, seed: int) -> None:
    """Put M beside its kernel, and the switch of its dropout where it has any."""
    setattr(module, spec.path[-1] + SUFFIX, MoRAParam.of(spec, m))
    if spec.dropout > 0:
        setattr(module, DROPOUT, AdapterDropout(spec.dropout, seed))


def train_array(module: nnx.Module, trained: TrainedArray, copy: Any) -> None:
    """Put the trained copy of an array into `module` instead of the base's."""
    name = trained.path[-1]
    variable = TrainedParam.in_place_of(getattr(module, name), trained, copy)
    setattr(module, name, variable)
    if trained.dtype != trained.base_dtype:
        cls = adapted_class(plain_class(module))
        object.__setattr__(module, "__class__", cls)


def detach(module: nnx.Module) -> None:
    """Undo `attach` and `train_array`; trained numbers stay."""
    for name, value in list(vars(module).items()):
        if isinstance(value, TrainedParam):
            setattr(module, name, plain_variable(value))
        elif isinstance(value, MoRAParam) or name == DROPOUT:
            delattr(module, name)
    object.__setattr__(module, "__class__", plain_class(module))
