"""Adapters in models that qwix intercepts."""

import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import qwix

from mora_jax._compute.adapted import check_product
from mora_jax._compute.delta import add_delta
from mora_jax._spec import SUFFIX, AdapterSpec
from mora_jax._warnings import LeftOutWarning, warn
from mora_jax.nnx._adapters import named_modules
from mora_jax.products import Product
from mora_jax.qwix import _private
from mora_jax.qwix._matrix import dropout_key, m_of
from mora_jax.qwix._products import of_convolution, of_dot_general, of_einsum
from mora_jax.qwix._rule import MoRARule

running: ContextVar[list["MoRAProvider"] | None] = ContextVar("running", default=None)
"""Where providers note that a model runs with them, if anywhere."""


class MoRAProvider(qwix.PtqProvider):
    r"""qwix's provider of MoRA, used as its `LoraProvider` is.

    In the modules that a rule matches each kernel stays what qwix makes it, quantized
    or not, and gets an M beside it. What the module multiplies the kernel with gets the
    delta as well,

    .. math:: y = x\,Q(W) + \alpha\, D(C(x) M),

    which is computed on the inputs and never quantized. There is nothing to register:
    every `dot_general`, `einsum` and convolution of a kernel is found where it runs.

    With `dropout` a call of a Linen model drops if it is given `rngs={"dropout": key}`,
    an NNX model until `model.eval()`.

    Args:
      rules: Rules in the order of precedence. `MoRARule`s adapt, others only quantize.
      disable_jit: As for other providers of qwix.
      **settings: The settings of a single `MoRARule`, in place of `rules`.

    Raises:
      TypeError, ValueError: A setting that no kernel could have; `rules` together with
        `settings`. In the first call: no rule adapts a kernel; an operand that is not a
        plain kernel, or one that is transposed or reshaped first.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax, qwix
      >>> from flax import nnx
      >>> base, x = nnx.Linear(16, 16, rngs=nnx.Rngs(0)), jnp.ones((1, 16))
      >>> settings = dict(rank=2, weight_qtype="nf4", tile_size=8)
      >>> provider = mora_jax.qwix.MoRAProvider(module_path=".*", **settings)
      >>> model = qwix.apply_lora_to_model(base, provider, x, rngs=nnx.Rngs(0))
      >>> jax.tree.map(jnp.shape, mora_jax.nnx.adapters(model))
      {'kernel_mora': (8, 8)}
    """

    def __init__(
        self,
        rules: Sequence[qwix.QuantizationRule] | None = None,
        *,
        disable_jit: bool = False,
        **settings: Any,
    ):
        if rules is None:
            rules = [MoRARule(**settings)]
        elif settings:
            raise ValueError(
                f"rules and settings exclude each other, got both: {sorted(settings)}"
            )
        if not any(isinstance(rule, MoRARule) for rule in rules):
            raise ValueError(f"rules must hold a MoRARule, got {rules}")
        # Versions before 0.1.8 have no such argument.
        more: dict[str, Any] = {"disable_jit": True} if disable_jit else {}
        super().__init__(rules=rules, **more)
        self.specs: dict[tuple[str, tuple[int, ...]], AdapterSpec] = {}
        self.used: set[int] = set()
        self.checked: set[str] = set()
        self.seen: set[str] = set()

    def process_model_inputs(
        self, model: Any, model_args: Any, model_kwargs: Any
    ) -> Any:
        """Note that a model runs with this provider."""
        if (noted := running.get()) is not None:
            noted.append(self)
        return super().process_model_inputs(model, model_args, model_kwargs)

    def process_model_output(self, method_name: str, model_output: Any) -> Any:
        """Look in the first call of a model whether each rule adapted a kernel."""
        model = _private.module_of_call()
        if isinstance(model, nn.Module):
            first = model.is_initializing()
        elif first := _private.is_first_call(model):
            for path, module in named_modules(model):
                for name, value in _private.parameters_of(module).items():
                    self._see((*path, name), value)
        if first:
            self._check_used()
        return super().process_model_output(method_name, model_output)

    def _check_used(self) -> None:
        unused = [
            rule.module_path
            for rule in _private.rules_of(self)
            if isinstance(rule, MoRARule) and id(rule) not in self.used
        ]
        if not self.used:
            raise ValueError(
                f"no kernel is multiplied in a module that module_path={unused} matches"
            )
        if unused:
            warn(f"these rules adapt no kernel: module_path={unused}")
        left = sorted(self.seen - {place for place, _ in self.specs})
        if left:
            warn(
                f"{', '.join(left)}: no product of the model multiplies by it, so that "
                "it has no adapter; leave its module out of module_path",
                LeftOutWarning,
            )

    def nn_param(self, module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
        """A parameter of a Linen module, which is seen."""
        value = super().nn_param(module, name, *args, **kwargs)
        self._see((*_private.path_of(module), name), value)
        return value

    def _see(self, path: tuple[str, ...], value: Any) -> None:
        """Note an array that a rule asks to adapt, if it may be a kernel."""
        rule = _private.rule_of_module(self, "/".join(path[:-1]))
        others = "bias" in path[-1] or path[-1].endswith(SUFFIX)
        is_kernel = not others and getattr(value, "ndim", 0) > 1
        if isinstance(rule, MoRARule) and is_kernel:
            self.seen.add("/".join(path))

    def dot_general(
        self,
        lhs: Any,
        rhs: Any,
        dimension_numbers: Any,
        precision: Any = None,
        *args: Any,
        **settings: Any,
    ) -> jax.Array:
        """The product of qwix, with the delta added if one operand is a kernel."""

        def product(kernel_first: bool) -> Product:
            return of_dot_general(lhs.ndim, rhs.ndim, dimension_numbers, kernel_first)

        operands = lhs, rhs, dimension_numbers, precision, *args
        call = functools.partial(super().dot_general, *operands, **settings)
        plain = functools.partial(jax.lax.dot_general, *operands, **settings)
        return self._adapted("dot_general", call, plain, (lhs, rhs), product, precision)

    def einsum(self, equation: str, *operands: Any, **settings: Any) -> jax.Array:
        """The einsum of qwix, with the delta added if one operand is a kernel."""

        def product(kernel_first: bool) -> Product:
            return of_einsum(equation, operands[kernel_first].ndim, kernel_first)

        call = functools.partial(super().einsum, equation, *operands, **settings)
        plain = functools.partial(jnp.einsum, equation, *operands, **settings)
        precision = settings.get("precision")
        return self._adapted("einsum", call, plain, operands, product, precision)

    def conv_general_dilated(
        self, lhs: Any, rhs: Any, *args: Any, **settings: Any
    ) -> jax.Array:
        """The convolution of qwix, with the delta added."""

        def product(kernel_first: bool) -> Product:
            return of_convolution(lhs, rhs, *args, **settings)

        operands = lhs, rhs, *args
        call = functools.partial(super().conv_general_dilated, *operands, **settings)
        plain = functools.partial(jax.lax.conv_general_dilated, *operands, **settings)
        precision = settings.get("precision")
        op = "conv_general_dilated"
        return self._adapted(op, call, plain, (lhs, rhs), product, precision)

    def _adapted(
        self,
        op: str,
        call: Callable[[], jax.Array],
        plain: Callable[[], jax.Array],
        operands: Sequence[Any],
        product_of: Callable[[bool], Product],
        precision: Any,
    ) -> jax.Array:
        """The output of `call()`, with the delta of the kernel among `operands`.

        Args:
          op: qwix's name of the operation.
          call: What qwix computes.
          plain: What JAX computes.
          operands: What is multiplied.
          product_of: A function of whether the kernel comes first to the product.
          precision: The precision of the product.
        """
        rule = _private.rule_of_call(self, op)
        if not isinstance(rule, MoRARule):
            return call()
        module = _private.module_of_call()
        kernel = _kernel_among(module, operands)
        # qwix would quantize an input of q x q numbers in place of M.
        call = plain if _private.is_mistaken(operands[-1]) else call
        if kernel is None:
            return call()
        at, name, link = kernel
        path = (*_private.path_of(module), name)
        self._check_kernel("/".join(path), link, len(operands), rule)
        y = call()  # which quantizes the kernel, if it is the first one
        product, x = product_of(at == 0), operands[1 - at]
        spec = self._spec(module, path, operands[at], product, rule)
        self.used.add(id(rule))
        m = m_of(module, name, spec)
        if m is None:
            return y
        key = dropout_key(module, name, spec, m)
        return add_delta(y, spec, m, x, product, key, precision)

    def _check_kernel(
        self, place: str, link: _private.Link, operands: int, rule: MoRARule
    ) -> None:
        """Raise unless what is multiplied is a kernel that M can be beside."""
        if operands != 2:
            why = f"an einsum with {operands} operands has no adapter"
        elif link == "made of it":
            why = "its module multiplies by what it makes of the kernel, not by itself"
        elif link == "unknown" and place not in self.checked:
            why = (
                "its module multiplies in a function that JAX compiles for itself, as "
                "x @ kernel is, where nothing tells whether it is this kernel: use "
                "jnp.dot or jnp.einsum"
            )
        else:
            self.checked.add(place)
            return
        raise ValueError(
            f"{place}: {why}; or leave it out of module_path={rule.module_path!r}"
        )

    def _spec(
        self,
        module: Any,
        path: tuple[str, ...],
        kernel: Any,
        product: Product,
        rule: MoRARule,
    ) -> AdapterSpec:
        """The adapter of a kernel; as its first product has it, if it has several."""
        place, shape = "/".join(path), tuple(kernel.shape)
        if (place, shape) not in self.specs:
            made = AdapterSpec.from_config(
                rule.config, shape, product.axes, path, kernel_dtype=kernel.dtype
            )
            self.specs[place, shape] = made
        spec = self.specs[place, shape]
        check_product(spec, product)
        return spec


def _kernel_among(
    module: Any, operands: Sequence[Any]
) -> tuple[int, str, _private.Link] | None:
    """The position of the kernel among operands, its name, and its link to that.

    An input may have a kernel's shape. A kernel is the parameter itself, or comes last.
    """
    found = []
    for at, operand in enumerate(operands):
        name = _private.name_of(module, operand)
        if name is not None:
            link = _private.link(module, name, operand)
            if link != "another":
                found.append((link == "itself", at, name, link))
    return max(found)[1:] if found else None
