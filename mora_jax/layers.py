"""Layer classes that `linen.wrap` knows how to adapt."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

Equation = str | Callable[..., str]


@dataclasses.dataclass(frozen=True)
class LayerRule:
    """What a layer class computes: an einsum of its input and one kernel, and a bias.

    Attributes:
      equation: of input and kernel, or a function of the call that returns it.
      kernel: name of the parameter.
      method: the method that computes it.
    """

    equation: Equation
    kernel: str
    method: str

    def read(self, module: Any, args: Any, kwargs: Any) -> tuple[str, Any]:
        """The equation of one call, and its input: the first argument."""
        equation = self.equation
        if not isinstance(equation, str):
            equation = equation(module, *args, **kwargs)
        signature = inspect.signature(getattr(type(module), self.method))
        _, x, *_ = signature.bind(module, *args, **kwargs).arguments.values()
        return equation, x


_RULES: dict[type, LayerRule] = {}


def register_layer(
    cls: type,
    *,
    equation: Equation,
    kernel: str = "kernel",
    method: str = "__call__",
) -> None:
    """Teach `linen.wrap` and `linen.plan` a layer class.

    The class must multiply its first argument by one kernel, as in an einsum, and may
    add a bias; it is used as it is. A subclass that defines `method` anew is another
    class.

    Args:
      cls: the class.
      equation: einsum of input and kernel: "...i,io->...o" for a dense layer, or a
        function of (module, *args, **kwargs) that returns it.
      kernel: name of the kernel's parameter.
      method: the method that computes the product.

    Raises:
      TypeError: `cls` is no class, or lacks the method.

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
    if not (isinstance(equation, str) or callable(equation)):
        raise TypeError(f"equation must be a string or a function, got {equation!r}")
    if not isinstance(kernel, str):
        raise TypeError(f"kernel must be a parameter's name, got {kernel!r}")
    _RULES[cls] = LayerRule(equation, kernel, method)


def find_rule(cls: type) -> LayerRule | None:
    """The rule of `cls`; that of a base class only if `cls` computes as it does."""
    for base in cls.__mro__:
        rule = _RULES.get(base)
        if rule:
            same = _owner(cls, rule.method) is _owner(base, rule.method)
            return rule if same else None
    return None


def _owner(cls: type, method: str) -> type:
    return next(base for base in cls.__mro__ if method in vars(base))
