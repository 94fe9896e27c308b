"""Adapters in models that qwix intercepts."""

import functools
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import qwix
from flax import nnx

from mora_jax._layer.adapted import add_delta, check_product
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax.nnx._state import named_modules
from mora_jax.products import Product
from mora_jax.qwix import _private
from mora_jax.qwix._first_call import check_used, repeat, tracing_anew
from mora_jax.qwix._kernels import Kernel, Run, find_kernel, root_of
from mora_jax.qwix._matrix import dropout_key, m_of, spec_of
from mora_jax.qwix._products import of_convolution, of_dot_general, of_einsum
from mora_jax.qwix._rule import MoRARule, check_rules
from mora_jax.qwix._tracers import current_trace

running: ContextVar[list[Run] | None] = ContextVar("running", default=None)
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
        check_rules(rules)
        # Versions before 0.1.8 have no such argument.
        more: dict[str, Any] = {"disable_jit": True} if disable_jit else {}
        super().__init__(rules=rules, **more)
        self.specs: dict[type, dict[tuple[str, tuple[int, ...]], AdapterSpec]] = {}
        self.runs: dict[int, Run] = {}

    @property
    def run(self) -> Run:
        """The call of a model in this thread."""
        return self.runs[threading.get_ident()]

    def process_model_inputs(
        self, model: Any, model_args: Any, model_kwargs: Any
    ) -> Any:
        """Begin a call of a model."""
        run = self._begin(model)
        if run.first and not tracing_anew.get():
            parts = nnx.split(model) if isinstance(model, nnx.Module) else None
            run.given = parts, model_args, model_kwargs
        if (noted := running.get()) is not None:
            noted.append(run)
        return super().process_model_inputs(model, model_args, model_kwargs)

    def _begin(self, model: Any) -> Run:
        """The record of a call: a new one, or that of another method of the model."""
        cls, thread = type(model), threading.get_ident()
        if thread in self.runs and self.runs[thread].is_of(model):
            self.runs[thread].level = current_trace()
            return self.runs[thread]
        if isinstance(model, nn.Module):
            first = model.is_initializing()
        else:
            first = _private.is_first_call(model)
        if first or cls not in self.specs:
            self.specs[cls] = {}
        self.runs[thread] = Run(cls, self.specs[cls], first, root_of(model))
        return self.runs[thread]

    def process_model_output(self, method_name: str, model_output: Any) -> Any:
        """Look in the first call of a model whether each rule adapted a kernel."""
        model, run = _private.module_of_call(), self.run
        if run.first and isinstance(model, nnx.Module):
            for path, module in named_modules(model):
                for name, value in _private.parameters_of(module).items():
                    self._see((*path, name), value)
        if run.first and not self._repeated(model, method_name):
            check_used(run, _private.rules_of(self))
        run.end()
        return super().process_model_output(method_name, model_output)

    def _repeated(self, model: Any, method_name: str) -> bool:
        """Whether a first call was repeated, which has checked it."""
        run = self.run
        try:
            return repeat(run, model, method_name)
        finally:  # the repeated one was another
            self.runs[threading.get_ident()] = run

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
            self.run.seen.add("/".join(path))

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

        more = dimension_numbers, precision, *args
        own = super().dot_general

        def call(lhs: Any, rhs: Any) -> jax.Array:
            return own(lhs, rhs, *more, **settings)

        def plain(lhs: Any, rhs: Any) -> jax.Array:
            return jax.lax.dot_general(lhs, rhs, *more, **settings)

        return self._adapted("dot_general", call, plain, (lhs, rhs), product, precision)

    def einsum(self, equation: str, *operands: Any, **settings: Any) -> jax.Array:
        """The einsum of qwix, with the delta added if one operand is a kernel."""

        def product(kernel_first: bool) -> Product:
            return of_einsum(equation, operands[kernel_first].ndim, kernel_first)

        call = functools.partial(super().einsum, equation, **settings)
        plain = functools.partial(jnp.einsum, equation, **settings)
        precision = settings.get("precision")
        return self._adapted("einsum", call, plain, operands, product, precision)

    def conv_general_dilated(
        self, lhs: Any, rhs: Any, *args: Any, **settings: Any
    ) -> jax.Array:
        """The convolution of qwix, with the delta added."""

        def product(kernel_first: bool) -> Product:
            return of_convolution(lhs, rhs, *args, **settings)

        own = super().conv_general_dilated

        def call(lhs: Any, rhs: Any) -> jax.Array:
            return own(lhs, rhs, *args, **settings)

        def plain(lhs: Any, rhs: Any) -> jax.Array:
            return jax.lax.conv_general_dilated(lhs, rhs, *args, **settings)

        precision = settings.get("precision")
        op = "conv_general_dilated"
        return self._adapted(op, call, plain, (lhs, rhs), product, precision)

    def _adapted(
        self,
        op: str,
        call: Callable[..., jax.Array],
        plain: Callable[..., jax.Array],
        operands: Sequence[Any],
        product_of: Callable[[bool], Product],
        precision: Any,
    ) -> jax.Array:
        """The output of `call(*operands)`, with the delta of the kernel among them.

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
            return call(*operands)
        module, run = _private.module_of_call(), self.run
        kernel = find_kernel(module, operands, run)
        if kernel is not None and kernel.link == "perhaps made of it":
            if run.first:
                run.doubtful.add("/".join((*_private.path_of(module), kernel.name)))
            kernel = None
        if kernel is None or kernel.at != len(operands) - 1:
            # qwix would quantize an input that has a parameter's shape in its place.
            call = plain if _is_mistaken(operands[-1]) else call
        if kernel is None:
            return call(*operands)
        path = (*_private.path_of(module), kernel.name)
        place = "/".join(path)
        _check_kernel(place, kernel, len(operands), rule)
        operands, before = list(operands), _private.parameters_of(module)[kernel.name]
        raw = not _private.is_quantized(operands[kernel.at])
        if raw and _private.is_quantized(before):  # this call did that
            dtype = _private.dtype_of(operands[kernel.at])
            operands[kernel.at] = _private.quantized(module, kernel.name, dtype)
        y = call(*operands)  # which quantizes the kernel, if it is the first one
        now = _private.parameters_of(module)[kernel.name]
        if _private.is_quantized(now) and not _private.is_quantized(before):
            run.note_replaced(place, _private.first_array(before))
        product, x = product_of(kernel.at == 0), operands[1 - kernel.at]
        spec = self._spec(module, path, operands[kernel.at], product, rule)
        run.used.add(id(rule))
        m = m_of(module, kernel.name, spec, place in run.asked)
        run.asked.add(place)
        if m is not None:
            key = dropout_key(module, kernel.name, spec, m)
            y = add_delta(y, spec, m, x, product, key, precision)
        run.note_output(y)
        return y

    def _spec(
        self,
        module: Any,
        path: tuple[str, ...],
        kernel: Any,
        product: Product,
        rule: MoRARule,
    ) -> AdapterSpec:
        """The adapter of a kernel; as its first product has it, if it has several."""
        run, key = self.run, ("/".join(path), tuple(kernel.shape))
        spec = spec_of(module, path) if isinstance(module, nnx.Module) else None
        if spec is None and key not in run.specs:
            run.specs[key] = AdapterSpec.from_config(
                rule.config,
                key[1],
                product.axes,
                path,
                kernel_dtype=_private.dtype_of(kernel),
            )
        spec = spec or run.specs[key]
        check_product(spec, product)
        return spec


def _is_mistaken(operand: Any) -> bool:
    """Whether qwix takes an operand that is no kernel for one."""
    return not _private.is_quantized(operand) and _private.is_taken(operand)


def _check_kernel(place: str, kernel: Kernel, operands: int, rule: MoRARule) -> None:
    """Raise unless what is multiplied is a kernel that M can be beside."""
    if operands != 2:
        why = f"an einsum with {operands} operands has no adapter"
    elif kernel.link == "made of it":
        why = "its module multiplies by what it makes of the kernel, not by itself"
    elif kernel.link == "unknown":
        why = (
            "its module multiplies in a function that JAX compiles for itself, as "
            "x @ kernel is, where nothing tells whether it is this kernel: use "
            "jnp.dot or jnp.einsum"
        )
    else:
        return
    raise ValueError(
        f"{place}: {why}; or leave it out of module_path={rule.module_path!r}"
    )
