"""Adapters in models that qwix intercepts."""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import qwix
from flax import nnx

from mora_jax._common.warnings import LeftOutWarning, warn
from mora_jax._layer.adapted import check_product
from mora_jax._layer.delta import add_delta
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax.nnx import _held
from mora_jax.products import Product
from mora_jax.qwix import _private
from mora_jax.qwix._kernels import find_kernel
from mora_jax.qwix._matrix import attach, dropout_key, m_of
from mora_jax.qwix._products import (
    convolution_settings,
    of_convolution,
    of_dot_general,
    of_einsum,
)
from mora_jax.qwix._rule import MoRARule, check_rules
from mora_jax.qwix._traced_plan import trace_nnx, traced_specs

PLAIN = {
    "dot_general": jax.lax.dot_general,
    "einsum": jnp.einsum,
    "conv_general_dilated": jax.lax.conv_general_dilated,
}
"""JAX's own functions for the operations of qwix."""

Planned = dict[tuple[str, tuple[int, ...]], tuple[MoRARule, AdapterSpec]]
"""{(path of a kernel, its shape): its rule and its adapter}."""


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
        check_rules(rules)
        # Versions before 0.1.8 have no such argument.
        more: dict[str, Any] = {"disable_jit": True} if disable_jit else {}
        super().__init__(rules=rules, **more)
        self.planned: dict[type, Planned] = {}  # qwix makes a class for each model
        self.running: dict[int, type] = {}  # by thread

    def process_model_inputs(
        self, model: Any, model_args: Any, model_kwargs: Any
    ) -> Any:
        """Begin a call of a model; the first one gives an NNX model its M's."""
        is_nnx = isinstance(model, nnx.Module)
        if is_nnx and _private.is_first_call(model) and traced_specs.get() is None:
            method = _private.method_of(model)
            specs = trace_nnx(model, method, model_args, model_kwargs)
            for spec in specs.values():
                attach(model, spec)
        self.planned.setdefault(type(model), {})
        self.running[threading.get_ident()] = type(model)
        return super().process_model_inputs(model, model_args, model_kwargs)

    def process_model_output(self, method_name: str, model_output: Any) -> Any:
        """End a call of a model, which is checked if it shows what is adapted."""
        model = _private.module_of_call()
        is_init = isinstance(model, nn.Module) and model.is_initializing()
        if is_init or traced_specs.get() is not None:
            self._check_planned(model)
        return super().process_model_output(method_name, model_output)

    def _check_planned(self, model: Any) -> None:
        """Look whether each rule adapts a kernel, and each kernel has an adapter.

        Raises:
          ValueError: No rule adapts anything.
        """
        planned = self.planned[type(model)]
        used = {id(rule) for rule, _ in planned.values()}
        unused = [
            rule.module_path
            for rule in _private.rules_of(self)
            if isinstance(rule, MoRARule) and id(rule) not in used
        ]
        if not used:
            raise ValueError(
                f"no kernel is multiplied in a module that module_path={unused} matches"
            )
        if unused:
            warn(f"these rules adapt no kernel: module_path={unused}")
        names = {name for name, _ in planned}
        left = []
        for path, parameter in _private.parameters_by_path(model).items():
            rule = _private.rule_of_module(self, "/".join(path[:-1]))
            is_kernel = _private.first_array(parameter).ndim > 1
            is_kernel &= "bias" not in path[-1] and not path[-1].endswith(SUFFIX)
            if isinstance(rule, MoRARule) and is_kernel and "/".join(path) not in names:
                left.append("/".join(path))
        if left:
            warn(
                f"{', '.join(sorted(left))}: no product that qwix sees multiplies by "
                "it, so that it has no adapter; leave its module out of module_path",
                LeftOutWarning,
            )

    def dot_general(
        self,
        lhs: Any,
        rhs: Any,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        **settings: Any,
    ) -> jax.Array:
        """The product of qwix, with the delta added if one operand is a kernel."""
        settings |= {
            "dimension_numbers": dimension_numbers,
            "precision": precision,
            "preferred_element_type": preferred_element_type,
        }

        def product(kernel_first: bool) -> Product:
            return of_dot_general(lhs.ndim, rhs.ndim, dimension_numbers, kernel_first)

        own = functools.partial(super().dot_general, **settings)
        return self._adapted("dot_general", own, (lhs, rhs), product)

    def einsum(self, equation: str, *operands: Any, **settings: Any) -> jax.Array:
        """The einsum of qwix, with the delta added if one operand is a kernel."""

        def product(kernel_first: bool) -> Product:
            return of_einsum(equation, operands[kernel_first].ndim, kernel_first)

        own = functools.partial(super().einsum, equation, **settings)
        return self._adapted("einsum", own, operands, product)

    def conv_general_dilated(
        self, lhs: Any, rhs: Any, *args: Any, **settings: Any
    ) -> jax.Array:
        """The convolution of qwix, with the delta added."""
        settings = convolution_settings(*args, **settings)

        def product(kernel_first: bool) -> Product:
            return of_convolution(lhs, rhs, settings)

        own = functools.partial(super().conv_general_dilated, **settings)
        return self._adapted("conv_general_dilated", own, (lhs, rhs), product)

    def _adapted(
        self,
        op: str,
        own: functools.partial[jax.Array],
        operands: Sequence[Any],
        product_of: Callable[[bool], Product],
    ) -> jax.Array:
        """The output of `own(*operands)`, with the delta of the kernel among them.

        Args:
          op: qwix's name of the operation.
          own: The product of qwix.
          operands: The input and the kernel, in any order, or other arrays.
          product_of: A function of True if the kernel is the first operand.
        """
        rule = _private.rule_of_call(self, op)
        if not isinstance(rule, MoRARule):
            return own(*operands)
        module = _private.module_of_call()
        kernel = find_kernel(module, operands, rule.module_path)
        is_last = kernel is not None and kernel.at == len(operands) - 1
        # qwix would quantize an input that has a parameter's shape in its place.
        mistaken = not is_last and _private.is_taken(operands[-1])
        if mistaken or traced_specs.get() is not None:
            own = functools.partial(PLAIN[op], *own.args, **own.keywords)
        y = own(*operands)
        if kernel is None:
            return y
        product, x = product_of(kernel.at == 0), operands[1 - kernel.at]
        spec = self._spec(module, kernel.name, operands[kernel.at], product, rule)
        m = m_of(module, spec)
        if m is None:
            return y
        key = dropout_key(module, spec, m)
        return add_delta(y, spec, m, x, product, key, own.keywords.get("precision"))

    def _spec(
        self, module: Any, name: str, kernel: Any, product: Product, rule: MoRARule
    ) -> AdapterSpec:
        """The adapter of a kernel; as its first product has it, if it has several."""
        path, shape = (*_private.path_of(module), name), tuple(kernel.shape)
        planned = self.planned[self.running[threading.get_ident()]]
        place = "/".join(path), shape
        held = _held.held(module, path) if isinstance(module, nnx.Module) else None
        if held:
            planned[place] = rule, held[0]
        elif place not in planned:
            settings = {"kernel_dtype": kernel.dtype}
            config, axes = rule.config, product.axes
            spec = AdapterSpec.from_config(config, shape, axes, path, **settings)
            planned[place] = rule, spec
        _, spec = planned[place]
        if (specs := traced_specs.get()) is not None:
            specs[spec.name] = spec
        check_product(spec, product)
        return spec
