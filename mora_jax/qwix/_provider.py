"""Adapters in models that qwix intercepts."""

import re
import threading
from collections.abc import Sequence
from contextvars import ContextVar
from functools import partial, partialmethod
from typing import Any

import flax.linen as nn
import jax
import qwix
from flax import nnx

from mora_jax._common.types import Path, Shape
from mora_jax._common.warnings import LeftOutWarning, warn
from mora_jax._flax.calls import errors_of
from mora_jax._jax.traces import ALIKE, DERIVED, ITSELF, fresh_shapes, relation_of
from mora_jax._layer.adapter import Adapter
from mora_jax._layer.ways import add_delta, check_product
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._tree.adapters import init_m
from mora_jax._tree.combined import split
from mora_jax._tree.paths import adapters_in, named_leaves
from mora_jax._tree.plan import Plan
from mora_jax.linen._bound import running_adapter
from mora_jax.nnx._held import dropout_key, held, hold_adapter, named_modules, traceable
from mora_jax.nnx._held import plan_of as nnx_plan_of
from mora_jax.products import Product
from mora_jax.products._operations import Operation
from mora_jax.qwix import _private
from mora_jax.qwix._rule import MoRARule, check_rules

Planned = dict[tuple[Path, Shape], tuple[MoRARule, AdapterSpec]]
"""{(path of a kernel, its shape): its rule and its adapter}."""

traced: ContextVar[Planned | None] = ContextVar("traced", default=None)
"""The adapters of the kernels that a `trace` finds; None outside of one."""


class MoRAProvider(qwix.PtqProvider):
    r"""qwix's provider of MoRA, used as its `LoraProvider` is.

    In the modules that a rule matches each kernel stays what qwix makes it, quantized
    or not, and gets an M beside it: :math:`y = x\,Q(W) + \alpha\, D(C(x) M)`. The delta
    is computed on the inputs and never quantized. No layer class is registered: every
    `dot_general`, `einsum` and convolution of a kernel is found where it runs.

    With `dropout` a call of a Linen model drops if it is given `rngs={"dropout": key}`,
    an NNX model until `model.eval()`.

    Args:
      rules: Rules in the order of precedence. `MoRARule`s adapt, others only quantize.
      **settings: The settings of a single `MoRARule`, instead of `rules`.

    Raises:
      TypeError, ValueError: A setting that no kernel could have; `rules` together with
        `settings`. In a call: no rule adapts a kernel; or an operand may be made of a
        kernel, which is transposed, reshaped or scaled first, or has a kernel's shape.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax, qwix
      >>> from flax import nnx
      >>> base, x = nnx.Linear(16, 16, rngs=nnx.Rngs(0)), jnp.ones((1, 16))
      >>> provider = mora_jax.qwix.MoRAProvider(rank=2, weight_qtype="nf4", tile_size=8)
      >>> model = qwix.apply_lora_to_model(base, provider, x, rngs=nnx.Rngs(0))
      >>> mora_jax.nnx.adapters(model)
      {'kernel_mora': Adapter(rotation, float32[8, 8])}
      >>> type(mora_jax.qwix.merge_adapters(model)) is nnx.Linear
      True
    """

    def __init__(
        self, rules: Sequence[qwix.QuantizationRule] | None = None, **settings: Any
    ):
        if rules is None:
            rules = [MoRARule(**settings)]
        elif settings:
            raise ValueError(f"rules and settings exclude each other, got {settings}")
        check_rules(rules)
        super().__init__(rules=rules)
        # qwix makes a class for each model, whose methods may share kernels.
        self.planned: dict[type, Planned] = {}
        self.running: dict[int, Planned] = {}  # by thread

    def process_model_inputs(
        self, model: Any, model_args: Any, model_kwargs: Any
    ) -> Any:
        """Begin a call of a model; the first one gives an NNX model its M's."""
        if (planned := traced.get()) is None:
            planned = self.planned.setdefault(type(model), {})
            if first := _private.first_call_of(model):
                method, rngs = first
                call, state = traceable(model, method)
                _, specs = trace(call, state, model_args, model_kwargs)
                _hold_new(model, specs, rngs)
        self.running[threading.get_ident()] = planned
        return super().process_model_inputs(model, model_args, model_kwargs)

    def process_model_output(self, method_name: str, model_output: Any) -> Any:
        """End a call of a model, which is checked if it shows what is adapted."""
        model = _private.module_of_call()
        is_init = isinstance(model, nn.Module) and model.is_initializing()
        if is_init or traced.get() is not None:
            self._check_planned(model)
        return super().process_model_output(method_name, model_output)

    def _check_planned(self, model: Any) -> None:
        """Raise unless a rule adapts a kernel; warn of other rules, other kernels."""
        planned = self.running[threading.get_ident()]
        used = {id(rule) for rule, _ in planned.values()}  # two may be equal
        ours = [rule for rule in self._rules if isinstance(rule, MoRARule)]
        unused = [rule.module_path for rule in ours if id(rule) not in used]
        if not used:
            raise ValueError(f"no kernel is multiplied in module_path={unused}")
        if unused:
            warn(f"these rules adapt no kernel: module_path={unused}")
        left, adapted = [], {"/".join(path) for path, _ in planned}
        for name, parameter in _private.named_parameters(model).items():
            module, _, own = name.rpartition("/")
            matching = (r for r in self._rules if re.fullmatch(r.module_path, module))
            is_ours = isinstance(next(matching, None), MoRARule) and name not in adapted
            is_kernel = _private.first_array(parameter).ndim > 1 and "bias" not in own
            if is_ours and is_kernel and not own.endswith(SUFFIX):
                left.append(name)
        if left:
            warn(
                f"{', '.join(sorted(left))}: no product that qwix sees multiplies by "
                "it, so that it has no adapter; leave its module out of module_path",
                LeftOutWarning,
            )

    def _adapted(self, op: str, *args: Any, **settings: Any) -> jax.Array:
        """The output of qwix's operation `op`, with the delta if a kernel is in it."""
        own = partial(getattr(super(), op), *args, **settings)
        rule, _ = self._get_current_rule_and_op_id(op, only_rule=True)
        if not isinstance(rule, MoRARule):
            return own()
        module: Any = _private.module_of_call()
        operation = Operation(op, args, settings)
        operands = operation.operands
        kernel = _find_kernel(module, operands, rule.module_path)
        is_last = kernel is not None and kernel[1] == len(operands) - 1
        # qwix would quantize an input that has a parameter's shape in its place.
        mistaken = not is_last and _private.is_taken(operands[-1])
        y = operation() if mistaken or traced.get() is not None else own()
        if kernel is None:
            return y
        name, at = kernel
        product, x = operation.product(at), operands[1 - at]
        adapter = self._adapter(module, name, operands[at], product, rule)
        if adapter is None:
            return y
        spec, key = adapter.spec, None
        if isinstance(module, nnx.Module):
            key = dropout_key(module, name, adapter)
        elif spec.dropout > 0 and module.has_rng("dropout"):
            key = module.make_rng("dropout")
        precision = operation.arguments.get("precision")
        with errors_of("/".join((*_private.path_of_call(), name))):
            check_product(spec, product)
            return add_delta(y, spec, adapter.m, x, product, key, precision)

    # The operations that qwix hands to its provider.
    dot_general: Any = partialmethod(_adapted, "dot_general")
    einsum: Any = partialmethod(_adapted, "einsum")
    conv_general_dilated: Any = partialmethod(_adapted, "conv_general_dilated")

    def _adapter(
        self, module: Any, name: str, kernel: Any, product: Product, rule: MoRARule
    ) -> Adapter | None:
        """The adapter of a kernel; None in an NNX model without one for it."""
        path, is_nnx = (*_private.path_of_call(), name), isinstance(module, nnx.Module)
        if is_nnx and traced.get() is None:
            return held(module, name)
        # A Linen module has adapters as the first product of each kernel had it.
        planned = self.running[threading.get_ident()]
        key = path, tuple(kernel.shape)
        if key not in planned:
            settings: Any = {"name": "/".join(path), "kernel_dtype": kernel.dtype}
            own = rule.config, key[1], product.axes
            planned[key] = rule, AdapterSpec.from_config(*own, **settings)
        _, spec = planned[key]
        return None if is_nnx else running_adapter(module, name, spec)


def _hold_new(model: nnx.Module, specs: dict[Path, AdapterSpec], rngs: Any) -> None:
    """Put new M's beside their kernels, on the meshes of the kernels."""
    modules = dict(named_modules(model))
    for path, spec in specs.items():
        module, name, place = modules[path[:-1]], path[-1], "/".join(path)
        kernel = getattr(module, name)
        if hasattr(module, name + SUFFIX):
            raise ValueError(
                f"{place}: model has an M there already: give qwix a model without "
                "adapters, such as the base or what mora_jax.qwix.merge_adapters makes"
            )
        if tuple(kernel.shape) != spec.kernel_shape:
            raise ValueError(
                f"{place} of shape {kernel.shape} is used as {spec.kernel_shape}: "
                "qwix knows no nnx.scan and nnx.vmap; leave it out of module_path"
            )
        key = rngs.params() if rngs and spec.init == "gaussian" else None
        hold_adapter(module, name, Adapter(init_m(spec, path, key), spec), 0)


def _find_kernel(module: Any, operands: Any, pattern: str) -> tuple[str, int] | None:
    """The name of the kernel that is an operand, and the position of the operand."""
    # qwix's own `find_param` also takes an operand for a parameter if operations of one
    # input make it of that, or if it has the same shape. This is a guess: an input has
    # a kernel's shape if it has as many rows as features, and a delta of the wrong
    # product would go unseen. So an operand counts as a kernel here only if it is the
    # unchanged kernel, perhaps in another dtype; what may be made of one is an error.
    found: list[tuple[int, int, str]] = []
    for name, parameter in _private.parameters_of(module).items():
        is_quantized = _private.is_quantized(parameter)
        for at, operand in enumerate(operands):
            if is_quantized != _private.is_quantized(operand):
                continue
            relation = relation_of(*map(_private.first_array, (parameter, operand)))
            if relation is None or (relation == ALIKE and operand.ndim == 1):
                continue  # as are biases
            if is_quantized:  # a module can read it, and make nothing else of it
                relation = min(relation, ITSELF)
            found.append((relation, at, name))
    if not found:
        return None
    relation, at, name = max(found)  # the last operand, if all else is equal
    if len(operands) != 2:
        why = f"an einsum with {len(operands)} operands has no adapter"
    elif relation == ITSELF:
        return name, at
    elif relation == DERIVED:
        why = "its module multiplies by what it makes of the kernel, not by itself"
    else:
        why = (
            "its module multiplies by an array of this shape that is not the kernel "
            "itself and may be what it makes of the kernel; in a function that JAX "
            "compiles for itself, as x @ kernel is, nothing tells: use jnp.dot or "
            "jnp.einsum of the kernel"
        )
    place = "/".join((*_private.path_of_call(), name))
    raise ValueError(f"{place}: {why}; or leave it out of module_path={pattern!r}")


def trace(
    function: Any, *args: Any, **kwargs: Any
) -> tuple[Any, dict[Path, AdapterSpec]]:
    """The shapes that a call returns, and the adapters of the kernels it multiplies."""
    # In the trace nothing is quantized, and each operand is known by what made it.
    planned: Planned = {}
    token = traced.set(planned)
    try:
        shapes = fresh_shapes(function, *args, **kwargs)
    finally:
        traced.reset(token)
    return shapes, {path: spec for (path, _), (_, spec) in planned.items()}


def plan_of(model: Any, *args: Any, **kwargs: Any) -> Plan:
    """The plan that a model with a `MoRAProvider` follows.

    Args:
      model: A model of `qwix.apply_lora_to_model`, of either Flax API.
      *args: The inputs of a call for a Linen model: arrays or shapes, and static
        arguments such as `train`. An NNX model has its adapters and needs none.
      **kwargs: Further inputs, by name.

    Raises:
      TypeError: `model` is not a Flax module.
      ValueError: It lacks adapters; or it multiplies by what it makes of a kernel.

    Example: see `merge`.
    """
    if isinstance(model, nnx.Module):
        return nnx_plan_of(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Flax module, got {type(model).__name__}")
    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
    shapes, found = trace(model.init, rngs, *args, **kwargs)
    if not found:
        raise ValueError("model has no adapters: give qwix a MoRAProvider")
    # The trace saw one layer, and nn.scan stacks M's: their shapes tell.
    base, adapters = split(shapes["params"])
    specs = adapters_in(adapters).kernels.specs
    size = sum(leaf.size for _, leaf in named_leaves(base).values())
    return Plan(dict(sorted(specs.items())), size, traced=True)
