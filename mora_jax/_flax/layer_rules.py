"""Layer classes that `linen.wrap` and `nnx.wrap` know how to adapt."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mora_jax.products import Contraction, Product

Equation = str | Product | Callable[..., str | Product]
Name = str | Callable[[Any], str]


@dataclasses.dataclass(frozen=True)
class LayerRule:
    """What one method of a layer class computes: a product with a kernel, and a bias.

    Attributes:
      equation: of input and kernel, or a function of the call that returns it.
      kernel: name of the parameter, or a function of the module that returns it.
      method: the method that computes it.
      argument: name of the input among the method's arguments; None for the first.
      dot_general: whether the method multiplies by what its attribute `dot_general`
        holds, as Flax's dense layers do.
      scale: what the method multiplies the kernel by: the name of a parameter, or a
        function of the module that returns an array.
    """

    equation: Equation
    kernel: Name
    method: str
    argument: str | None = None
    dot_general: bool = False
    scale: Name | None = None

    def read(self, module: Any, args: Any, kwargs: Any) -> tuple[Product, Any]:
        """The product of one call, and its input."""
        given, argument = self._bound(module, args, kwargs)
        x = given.arguments[argument]
        if not hasattr(x, "shape"):
            raise TypeError(
                f"{argument!r} of {type(module).__name__}.{self.method} must be the "
                f"input, an array, got {x!r}; see argument= of mora_jax.register_layer"
            )
        return self._product(jnp.ndim(x), module, *args, **kwargs), x

    def with_input(
        self, x: Any, module: Any, args: Any, kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with `x` for its input."""
        given, argument = self._bound(module, args, kwargs)
        given.arguments[argument] = x
        return given.args[1:], given.kwargs

    def _bound(
        self, module: Any, args: Any, kwargs: Any
    ) -> tuple[inspect.BoundArguments, str]:
        """The arguments of a call by name, and the name of the input."""
        signature = inspect.signature(getattr(type(module), self.method))
        given = signature.bind(module, *args, **kwargs)
        return given, self.argument or list(given.arguments)[1]

    def name(self, module: Any) -> str:
        """The name of the kernel's parameter."""
        return self.kernel if isinstance(self.kernel, str) else self.kernel(module)

    def scale_of(self, module: Any) -> Any:
        """What the module multiplies its kernel by; None for nothing."""
        if not isinstance(self.scale, str):
            return None if self.scale is None else self.scale(module)
        if isinstance(module, nn.Module):
            return nn.unbox(module.get_variable("params", self.scale))
        return getattr(module, self.scale)[...]

    def multiplies_by_dot_general(self, module: Any) -> bool:
        """Whether the product is JAX's own, and the module's attribute decides it."""
        if not self.dot_general or self.scale is not None:
            return False
        if getattr(module, "dot_general_cls", None) is not None:
            return False
        return getattr(module, "dot_general", None) in (None, jax.lax.dot_general)

    def product(self, module: Any) -> Product | None:
        """The product as far as the module alone tells; None if it takes a call."""
        # The kernel's axes do not depend on how many batch axes an input has.
        x = jax.ShapeDtypeStruct((1,) * 8, jnp.float32)
        try:
            return self._product(None, module, x)
        except Exception:  # of a user's function, which may want a real input
            return None

    def _product(self, ndim: int | None, module: Any, *args: Any, **kw: Any) -> Product:
        equation = self.equation
        if callable(equation):
            equation = equation(module, *args, **kw)
        if isinstance(equation, Product):
            return equation
        return Contraction.parse(equation, ndim)


_RULES: dict[type, dict[str, LayerRule]] = {}


def register_layer(
    cls: type,
    *,
    equation: Equation,
    kernel: Name = "kernel",
    method: str = "__call__",
    argument: str | None = None,
    dot_general: bool = False,
    scale: Name | None = None,
) -> None:
    """Teach `linen.wrap` and `nnx.wrap` a layer class.

    The method must multiply its input by one kernel, and may add a bias; the class is
    used as it is. A kernel that several methods use has a rule for each, the
    first one registered being the one that plans go by. A subclass that defines
    `method` anew is another class.

    Args:
      cls: the class, of either Flax API.
      equation: einsum of input and kernel, "...i,io->...o" for a dense layer; one of
        `mora_jax.products`, such as `Lookup()` for an embedding; or a function of
        (module, *args, **kwargs) that returns one of these.
      kernel: name of the kernel's parameter, or a function of the module that returns
        it.
      method: the method that computes the product.
      argument: name of the method's argument that is the input; by default its first.
      dot_general: the method multiplies input and kernel, both of the same dtype, by
        `self.dot_general(input, kernel, dimension_numbers, ...)`, so that the update
        can be folded into the kernel. The attribute holds `jax.lax.dot_general` or
        None, else nothing is folded.
      scale: what the method multiplies the kernel by before an einsum: the name of a
        parameter, or a function of the module that returns an array, a number or None.
        It broadcasts against the kernel and varies along its input features or its
        output features, not along both. The update is multiplied by the same, so that
        it is still the kernel into which it is merged.

    Raises:
      TypeError: `cls` is no class, or lacks the method, or that the argument.

    Example: a layer that stores its kernel as (out, in)::

      >>> import flax.linen as nn
      >>> from mora_jax import register_layer
      >>> class Transposed(nn.Module):
      ...     features: int
      ...
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         init = nn.initializers.lecun_normal(1, 0)
      ...         return x @ self.param("w", init, (self.features, x.shape[-1])).T
      >>> register_layer(Transposed, equation="...i,oi->...o", kernel="w")
    """
    if not isinstance(cls, type):
        raise TypeError(f"cls must be a class, got {cls!r}")
    if not callable(getattr(cls, method, None)):
        raise TypeError(f"method must name a method of {cls.__name__}, got {method!r}")
    if not (isinstance(equation, str | Product) or callable(equation)):
        raise TypeError(
            f"equation must be a string, a Product or a function, got {equation!r}"
        )
    if not (isinstance(kernel, str) or callable(kernel)):
        raise TypeError(
            f"kernel must be a parameter's name or a function, got {kernel!r}"
        )
    names = list(inspect.signature(getattr(cls, method)).parameters)
    if argument is not None and argument not in names[1:]:
        raise TypeError(
            f"argument must be one of {names[1:]} of {cls.__name__}.{method}, "
            f"got {argument!r}"
        )
    if not (scale is None or isinstance(scale, str) or callable(scale)):
        raise TypeError(
            f"scale must be a parameter's name or a function, got {scale!r}"
        )
    rule = LayerRule(equation, kernel, method, argument, dot_general, scale)
    _RULES[cls] = {**_RULES.get(cls, {}), method: rule}


def rules_of(cls: type) -> Mapping[str, LayerRule]:
    """{method: rule} of `cls`; those of a base class if `cls` computes as it does."""
    cls = vars(cls).get("plain_class", cls)  # what it was made from, see mora_jax.nnx
    for base in cls.__mro__:
        if base in _RULES:
            return {
                method: rule
                for method, rule in _RULES[base].items()
                if _owner(cls, method) is _owner(base, method)
            }
    return {}


def planning_rules(module: Any) -> Mapping[str, LayerRule]:
    """{kernel: the rule that plans go by} of a module."""
    first: dict[str, LayerRule] = {}
    for rule in rules_of(type(module)).values():
        first.setdefault(rule.name(module), rule)
    return first


def registered() -> Mapping[type, Mapping[str, LayerRule]]:
    """All classes that are known, with their rules."""
    return dict(_RULES)


def unknown_use(name: str, cls: type, method: str) -> TypeError:
    """The error for an adapted kernel that a method may use in a way not known."""
    known = [f"{r.kernel!r} in {r.method!r}" for r in rules_of(cls).values()]
    return TypeError(
        f"{name}: {cls.__name__}.{method} may use this adapted kernel, but of that "
        f"class {' and '.join(known) or 'nothing'} is known; "
        "see mora_jax.register_layer"
    )


def _owner(cls: type, method: str) -> type:
    return next(base for base in cls.__mro__ if method in vars(base))
