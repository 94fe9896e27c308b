"""Rules for layer classes: the products that methods compute, to be adapted."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mora_jax._common.types import ArrayLike
from mora_jax.products import Contraction, Folded, Product

Equation = str | Product | Callable[..., str | Product]
Name = str | Callable[[Any], str]
Scale = str | Callable[[Any], ArrayLike | float | None]


@dataclasses.dataclass(frozen=True)
class LayerRule:
    """Computation of one method of a layer class; the arguments of `register_layer`."""

    equation: Equation
    kernel: Name = "kernel"
    method: str = "__call__"
    argument: str | None = None
    dot_general: bool = False
    scale: Scale | None = None

    @property
    def folded(self) -> bool:
        """True if all methods read the kernel with its delta in it."""
        return isinstance(self.equation, Folded)

    def name(self, module: Any) -> str:
        """The name of the kernel's parameter."""
        return self.kernel if isinstance(self.kernel, str) else self.kernel(module)

    def kernel_of(self, module: Any) -> Any:
        """The module's kernel; None before it is made, and for one of several parts."""
        name, linen = self.name(module), isinstance(module, nn.Module)
        box = module.get_variable("params", name) if linen else vars(module).get(name)
        leaves = jax.tree.leaves(box)
        return leaves[0] if len(leaves) == 1 else None

    def scale_of(self, module: Any) -> Any:
        """The factor that the module multiplies its kernel by; None for nothing."""
        if not isinstance(self.scale, str):
            return None if self.scale is None else self.scale(module)
        if isinstance(module, nn.Module):
            return nn.unbox(module.get_variable("params", self.scale))
        return getattr(module, self.scale)[...]

    def multiplies_by_dot_general(self, module: Any) -> bool:
        """True if the module multiplies by an attribute that is JAX's own function."""
        plain = None, jax.lax.dot_general
        other = getattr(module, "dot_general_cls", None) or self.scale
        return self.dot_general and other is None and module.dot_general in plain

    def product(self, module: Any) -> Product | None:
        """The product as the module alone tells it; None if only a call does."""
        # The kernel's axes do not depend on how many batch axes an input has.
        x = jax.ShapeDtypeStruct((1,) * 8, jnp.float32)
        with contextlib.suppress(Exception):  # a user's function may need a real input
            return self.of_call(None, module, x)
        return None

    def of_call(self, ndim: int | None, module: Any, *args: Any, **kw: Any) -> Product:
        """The product of a call with an input of `ndim` axes; None for the fewest."""
        rule = self.equation
        product = rule(module, *args, **kw) if callable(rule) else rule
        return Contraction.parse(product, ndim) if isinstance(product, str) else product


RULES: dict[type | str, list[LayerRule]] = {}
"""The rules of each class; by its full name, of one that nobody has imported yet."""


def register_layer(
    cls: type,
    *,
    equation: Equation,
    kernel: Name = "kernel",
    method: str = "__call__",
    argument: str | None = None,
    dot_general: bool = False,
    scale: Scale | None = None,
) -> None:
    """Teach `linen.wrap` and `nnx.wrap` a layer class.

    The method must multiply its input by one kernel, and may add a bias; the class is
    used as it is. If several methods use one kernel, register each of them; plans go by
    the first. A subclass that overrides `method` needs its own registration. With
    `products.Folded` methods may do anything; register each kernel of the class.

    Args:
      cls: The class, of either Flax API.
      equation: The einsum of input and kernel, "...i,io->...o" for a dense layer; or
        one of `mora_jax.products`, such as `Lookup()` for an embedding; or a function
        of (module, *args, **kwargs) that returns either.
      kernel: The name of the kernel's parameter, or a function from the module to it.
      method: The method that computes the product.
      argument: The name of the method's input; None for its first argument.
      dot_general: True if the method multiplies input and kernel, both of the same
        dtype, by `self.dot_general(input, kernel, dimension_numbers, ...)`. Where that
        is None or `jax.lax.dot_general`, the delta can be folded into the kernel.
      scale: The factor of the kernel before an einsum: the name of a parameter, or a
        function of the module that returns an array, a number or None. It broadcasts
        against the kernel, and varies along its input or its output features, not along
        both. In an embedding it is a number, or one for each feature, and may multiply
        the rows that are looked up. Adapters are merged into the kernel itself.

    Raises:
      TypeError: An argument has a wrong type, `cls` lacks the method, the method lacks
        the argument, or `products.Folded` is for a class of Linen.
      ValueError: `equation` is not one of input and kernel, or `products.Folded` is for
        some kernels of a class and not for all.

    Example: a layer that stores its kernel as (out, in)::

      >>> import flax.linen as nn, mora_jax
      >>> class Transposed(nn.Module):
      ...     features: int
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         init = nn.initializers.lecun_normal(1, 0)
      ...         return x @ self.param("w", init, (self.features, x.shape[-1])).T
      >>> mora_jax.register_layer(Transposed, equation="...i,oi->...o", kernel="w")
    """
    rule = LayerRule(equation, kernel, method, argument, dot_general, scale)
    check_rule(cls, rule)
    own = RULES.setdefault(cls, [])  # from here rules by its name do not hold
    _registered.cache_clear()
    if rules_of(cls) if rule.folded else folded_kernels(cls):
        which = f"for all kernels of {cls.__name__} or for none, got {equation!r}"
        raise ValueError(f"equation must be a products.Folded {which} for {kernel!r}")
    own.append(rule)
    _registered.cache_clear()


def check_rule(cls: type, rule: LayerRule) -> None:
    """Raise unless `rule` may be of `cls`."""
    equation, kernel, method = rule.equation, rule.kernel, rule.method
    if not isinstance(cls, type):
        raise TypeError(f"cls must be a class, got {cls!r}")
    if not callable(getattr(cls, method, None)):
        raise TypeError(f"method must name a method of {cls.__name__}, got {method!r}")
    named = "a parameter's name or a function"
    for setting, value, types, wanted in (
        ("equation", equation, str | Product, "a string, a Product or a function"),
        ("kernel", kernel, str, named),
        ("scale", rule.scale, str | None, named),
    ):
        if not (isinstance(value, types) or callable(value)):
            raise TypeError(f"{setting} must be {wanted}, got {value!r}")
    if isinstance(equation, str):
        try:
            Contraction.parse(equation, None)
        except ValueError as error:
            raise ValueError(f"{cls.__name__}: {error}") from None
    names = list(inspect.signature(getattr(cls, method)).parameters)[1:]
    if rule.argument is not None and rule.argument not in names:
        known = f"{names} of {cls.__name__}.{method}"
        raise TypeError(f"argument must be one of {known}, got {rule.argument!r}")
    if rule.folded and issubclass(cls, nn.Module):
        raise TypeError(f"products.Folded is for NNX, got {cls.__name__} of Linen")
    if rule.folded and not isinstance(kernel, str):
        must = "kernel must be a parameter's name with products.Folded"
        raise TypeError(f"{must}, got {kernel!r}")


@functools.cache  # a trace asks for every module, again and again
def _registered(cls: type) -> Mapping[str, LayerRule]:
    """{method, or kernel that all read: its rule} of a class, also inherited ones."""
    cls = vars(cls).get("plain_class", cls)  # a class that `mora_jax.nnx` adapted
    found: dict[str, LayerRule] = {}
    # Statically, since a bound method is a new object each time it is asked for.
    static = inspect.getattr_static
    for base in reversed(cls.__mro__):
        own = RULES.get(base, RULES.get(f"{base.__module__}.{base.__qualname__}", []))
        with contextlib.suppress(TypeError):  # of a version that has another class
            for rule in own:
                check_rule(base, rule)
            for rule in own:
                if rule.folded:
                    found[rule.name(cls)] = rule
                elif static(cls, rule.method) is static(base, rule.method):
                    found[rule.method] = rule
    return found


def folded_kernels(cls: type) -> Mapping[str, Product]:
    """{kernel: its product} of a class whose methods read the kernels themselves."""
    rules = _registered(cls).items()
    return {key: rule.equation for key, rule in rules if rule.folded}  # type: ignore[misc]


def rules_of(cls: type) -> Mapping[str, LayerRule]:
    """{method: its rule} of a class."""
    return {key: rule for key, rule in _registered(cls).items() if not rule.folded}


def planning_rules(module: Any) -> Mapping[str, LayerRule]:
    """{kernel: the rule that plans go by} of a module."""
    rules: dict[str, LayerRule] = {}
    for rule in _registered(type(module)).values():
        rule.multiplies_by_dot_general(module)  # raises if it cannot say
        rules.setdefault(rule.name(module), rule)
    return rules


def unknown_use(name: str, cls: type, method: str) -> TypeError:
    """The error for an adapted kernel that a method uses, perhaps, without a rule."""
    rules = [f"{rule.kernel!r} in {rule.method!r}" for rule in rules_of(cls).values()]
    known = f"only {' and '.join(rules)}" if rules else "nothing"
    use = f"{name}: {cls.__name__}.{method} may use this adapted kernel, but {known}"
    return TypeError(f"{use} is known of its class; see mora_jax.register_layer")
