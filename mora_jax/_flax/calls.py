"""Calls of a model, and of its layers with their adapters."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from mora_jax._common.checks import check_kernel
from mora_jax._common.types import ArrayLike
from mora_jax._flax.layer_rules import LayerRule
from mora_jax._jax.linear_map import static
from mora_jax._jax.tracing import intercepted
from mora_jax._layer.adapter import Adapter
from mora_jax._layer.ways import adapted_product, add_delta, check_product
from mora_jax.products import Product


@dataclasses.dataclass(frozen=True, init=False)
class Call:
    """The inputs of one call of a model, for `linen.plan` and `nnx.plan`.

    Args:
      *args, **kwargs: The inputs, arrays or shapes, as the model takes them.

    Example: a plan that holds for training and for evaluation::

      >>> import flax.linen as nn, jax, jax.numpy as jnp, mora_jax
      >>> class Model(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         x = nn.Dense(8)(x)
      ...         return nn.BatchNorm(use_running_average=not train)(x)
      >>> model, x = Model(), jnp.ones((2, 8))
      >>> variables = model.init(jax.random.key(0), x, True)
      >>> train = mora_jax.Call(x, train=True, mutable=["batch_stats"])
      >>> calls = [train, mora_jax.Call(x, train=False)]
      >>> plan = mora_jax.linen.plan(model, variables, calls=calls)
      >>> plan.traced, plan.unproven
      (True, ())
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        vars(self).update(args=args, kwargs=kwargs)


def all_calls(args: Any, kwargs: Any, calls: Any) -> tuple[Call, ...]:
    """The call with these inputs, if there are any, and the other calls of a user."""
    is_list = isinstance(calls, list | tuple)
    if not is_list or not all(isinstance(call, Call) for call in calls):
        rule = "calls must be a list, as in calls=[mora_jax.Call(*inputs)]"
        raise TypeError(f"{rule}, got {calls!r:.80}")
    if any(isinstance(given, Call) for given in (*args, *kwargs.values())):
        raise TypeError("inputs must be the model's, got a Call: write calls=[call]")
    own = (Call(*args, **kwargs),) if args or kwargs else ()
    return (*own, *calls)


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of a method that has a rule, bound to the layer `module`."""

    rule: LayerRule
    module: Any
    method: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def read(self) -> tuple[Product, Any]:
        """The product, and its input."""
        call, argument = self._bound()
        x = call.arguments[argument]
        if not hasattr(x, "shape"):
            method = f"{type(self.module).__name__}.{self.rule.method}"
            rule = f"{argument!r} of {method} must be the input, an array, got {x!r}"
            raise TypeError(f"{rule}; see argument= of mora_jax.register_layer")
        return self.rule.of_call(jnp.ndim(x), self.module, *self.args, **self.kwargs), x

    def with_input(self, x: Any) -> "LayerCall":
        """The call with `x` for its input."""
        call, argument = self._bound()
        call.arguments[argument] = x
        return dataclasses.replace(self, args=call.args[1:], kwargs=call.kwargs)

    def _bound(self) -> tuple[inspect.BoundArguments, str]:
        """The arguments by name, and the name of the input."""
        signature = inspect.signature(getattr(type(self.module), self.rule.method))
        call = signature.bind(self.module, *self.args, **self.kwargs)
        return call, self.rule.argument or list(call.arguments)[1]


@contextlib.contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Errors that are raised inside begin with the path of a kernel, `name`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def adapt_call(
    call: LayerCall, name: str, adapter: Callable[[], Adapter], key: PRNGKeyArray | None
) -> jax.Array:
    """The output of a Flax layer's method, with the adapter's delta added.

    `adapter` returns the one of the kernel `name`, a path; it is called once, after the
    layer has made its own parameters. Without a `key` nothing is dropped.
    """
    product, x = call.read()
    rule, module, method = call.rule, call.module, call.method
    precision = getattr(module, "precision", None)
    if (kernel := rule.kernel_of(module)) is not None:  # of qwix it has parts
        check_kernel(kernel, name)
    if rule.multiplies_by_dot_general(module) and not intercepted() and key is None:
        # The layer casts both operands to its dtype before it multiplies them. There a
        # replaced `dot_general` chooses how to compute; not under qwix, which replaces
        # it too, nor with dropout, where layer and adapter see different inputs.
        def dot_general(
            x: ArrayLike, kernel: Any, dimension_numbers: Any, **settings: Any
        ) -> jax.Array:
            contracted, batch = dimension_numbers  # maybe lists, which do not hash
            axes = tuple(map(tuple, contracted)), tuple(map(tuple, batch))
            multiply = static(jax.lax.dot_general, dimension_numbers=axes, **settings)
            own = adapter()
            with errors_of(name):
                return adapted_product(
                    own.spec, own.m, x, kernel, product, multiply, precision=precision
                )

        # By `object`, since both Flax APIs forbid such an assignment to a module.
        before = module.dot_general
        object.__setattr__(module, "dot_general", dot_general)
        try:
            return method(*call.args, **call.kwargs)
        finally:
            object.__setattr__(module, "dot_general", before)
    y, out_factor = method(*call.args, **call.kwargs), None
    own = adapter()
    with errors_of(name):
        check_product(own.spec, product)
        # The adapter adds to the kernel itself, which the layer scales afterwards.
        if (scale := rule.scale_of(module)) is not None:
            in_factor, out_factor = product.factors(scale)
            if in_factor is not None:
                x = jnp.asarray(x).astype(y.dtype) * in_factor.astype(y.dtype)
        return add_delta(y, own.spec, own.m, x, product, key, precision, out_factor)
