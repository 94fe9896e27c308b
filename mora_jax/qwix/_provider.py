"""Adapters in models that qwix intercepts, by rules for modules."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from contextvars import ContextVar
from functools import partial, partialmethod
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from jax.experimental.xla_metadata import set_xla_metadata

from mora_jax._common import checks, trees
from mora_jax._common.axes import interleaved, stack_places
from mora_jax._common.messages import LeftOutWarning, warn
from mora_jax._common.types import Path
from mora_jax._flax.calls import errors_of
from mora_jax._layer.adapter import Adapter
from mora_jax._layer.ways import add_delta, check_product
from mora_jax._plan.settings import KernelConfig, MoRAConfig
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._tree.adapters import split
from mora_jax._tree.paths import adapters_in, named_leaves
from mora_jax._tree.plan import Plan
from mora_jax.linen._bound import running_adapter
from mora_jax.nnx import _held
from mora_jax.products import Product
from mora_jax.qwix import _private
from mora_jax.qwix._products import arguments_of, find_kernel, product_of

Specs = dict[Path, AdapterSpec]
traced: ContextVar[Specs | None] = ContextVar("traced", default=None)
"""The adapters that a `trace` finds in an NNX model; None outside of a trace."""

_NUMBERS = itertools.count()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoRARule(qwix.QuantizationRule, KernelConfig):
    """`qwix.QuantizationRule` with adapters for the modules that it matches.

    Their kernels have settings of `mora_jax.MoRAConfig` as well: rank, operator, alpha,
    scale, square_rank, multiple_of, init, dropout, param_dtype, seed.

    Example::

      >>> rule = MoRARule(module_path=".*mlp", rank=4, weight_qtype="nf4")
      >>> rule.rank, rule.operator
      (4, 'auto')
    """

    # qwix computes the products, so a rule lacks this setting.
    execution: ClassVar[str] = "auto"  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        MoRAConfig(alpha=self.alpha)  # warns of an alpha as LoRA has it
        check_rules([self])


def check_rules(rules: Any) -> None:
    """Raise unless a provider can go by these rules."""
    is_list = isinstance(rules, Sequence)
    if not is_list or not all(isinstance(r, qwix.QuantizationRule) for r in rules):
        must = "rules must be a list of qwix.QuantizationRules"
        raise TypeError(f"{must}, as in MoRAProvider([rule]), got {rules!r:.80}")
    for pattern in (rule.module_path for rule in rules):
        if not isinstance(pattern, str):
            must = f"module_path must be a regular expression, got {pattern!r}"
            raise TypeError(f"{must}; for several modules write '.*(q_proj|v_proj)'")
        checks.patterns_of("module_path", pattern)
    if not any(isinstance(rule, MoRARule) for rule in rules):
        raise ValueError(f"rules must hold a MoRARule, got {rules}")


class MoRAProvider(qwix.PtqProvider):
    r"""qwix's provider of MoRA, used as its `LoraProvider` is.

    In the modules that a rule matches each kernel stays what qwix makes it, quantized
    or not, and gets an M beside it: :math:`y = x\,Q(W) + \alpha\, D(C(x) M)`. The delta
    is computed on the inputs and never quantized. No layer class is registered: every
    `dot_general` and `einsum` of a kernel is found where it runs.

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
      >>> base, x = nnx.Linear(16, 16, rngs=nnx.Rngs(0)), jnp.ones((1, 16))
      >>> provider = mora_jax.qwix.MoRAProvider(rank=2, weight_qtype="nf4", tile_size=8)
      >>> model = qwix.apply_lora_to_model(base, provider, x, rngs=nnx.Rngs(0))
      >>> mora_jax.nnx.adapters(model)
      {'kernel_mora': Adapter(block_diagonal, float32[4, 4, 4])}
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

    def process_model_inputs(
        self, model: Any, model_args: Any, model_kwargs: Any
    ) -> Any:
        """Begin a call of a model; the first one gives an NNX model its M's."""
        if traced.get() is None and (first := _private.first_call_of(model)):
            method, rngs = first
            call, state = _held.traceable(model, method)
            _, specs = trace(call, state, model_args, model_kwargs)
            _hold_new(model, specs, rngs)
        return super().process_model_inputs(model, model_args, model_kwargs)

    def process_model_output(self, method_name: str, model_output: Any) -> Any:
        """End a call of a model, which is checked if it shows what is adapted."""
        model = _private.module_of_call()
        is_init = isinstance(model, nn.Module) and model.is_initializing()
        if is_init or traced.get() is not None:
            self._check_adapted(model)
        return super().process_model_output(method_name, model_output)

    def _check_adapted(self, model: Any) -> None:
        """Raise unless a rule adapts a kernel; warn of other kernels that it names."""
        named = _private.named_parameters(model)
        adapted = {"/".join(path) for path in traced.get() or ()}
        ms = {name for name in named if name.endswith(SUFFIX)}  # of a Linen model
        adapted |= {name.removesuffix(SUFFIX) for name in ms}
        if not adapted:
            ours = [r.module_path for r in self._rules if isinstance(r, MoRARule)]
            raise ValueError(f"no kernel is multiplied in module_path={ours}")
        left = [
            name
            for name in sorted(named.keys() - adapted - ms)
            if isinstance(self._rule_of(name), MoRARule)
            if jax.tree.leaves(named[name])[0].ndim > 1
            if "bias" not in name.rpartition("/")[2]
        ]
        if left:
            told = f"{', '.join(left)}: no product that qwix sees multiplies by it"
            remedy = "leave its module out of module_path"
            warn(f"{told}, so that it has no adapter; {remedy}", LeftOutWarning)

    def _rule_of(self, name: str) -> qwix.QuantizationRule | None:
        """The first rule that matches the module of a parameter."""
        module = name.rpartition("/")[0]
        rules = (r for r in self._rules if re.fullmatch(r.module_path, module))
        return next(rules, None)

    def _adapted(self, op: str, *args: Any, **settings: Any) -> jax.Array:
        """The output of qwix's operation `op`, with the delta if a kernel is in it."""
        # JAX 0.12.1 gives its products an argument that qwix's do not know. None is
        # the default.
        if settings.get("reduction_order", 0) is None:
            del settings["reduction_order"]
        own = partial(getattr(super(), op), *args, **settings)
        rule, _ = self._get_current_rule_and_op_id(op, only_rule=True)
        if not isinstance(rule, MoRARule):
            return own()
        module: Any = _private.module_of_call()
        given, operands = arguments_of(op, args, settings)
        kernel = find_kernel(module, operands, rule.module_path)
        is_last = kernel is not None and kernel[1] == len(operands) - 1
        # qwix would quantize an input that has a parameter's shape in its place.
        mistaken = not is_last and _private.is_taken(operands[-1])
        if mistaken or traced.get() is not None:
            plain = getattr(jnp if op == "einsum" else jax.lax, op)
            own = partial(plain, *args, **settings)
        y = own()
        if kernel is None:
            return y
        name, at = kernel
        product, x = product_of(op, operands, at, given), operands[1 - at]
        path = (*_private.path_of_call(), name)
        if (adapter := _adapter(module, path, operands[at], product, rule)) is None:
            return y
        spec, key = adapter.spec, None
        if isinstance(module, nnx.Module):
            key = _held.dropout_key(module, name, adapter)
        elif spec.dropout > 0 and module.has_rng("dropout"):
            key = module.make_rng("dropout")
        with errors_of("/".join(path)):
            check_product(spec, product)
            precision = given.get("precision")
            return add_delta(y, spec, adapter.m, x, product, key, precision)

    # The operations that qwix hands to its provider, except convolutions.
    dot_general: Any = partialmethod(_adapted, "dot_general")
    einsum: Any = partialmethod(_adapted, "einsum")


def _adapter(
    module: Any, path: Path, kernel: Any, product: Product, rule: MoRARule
) -> Adapter | None:
    """The adapter of a kernel; None in an NNX model without one for it."""
    name, place = path[-1], "/".join(path)

    def new() -> AdapterSpec:
        dtype = getattr(kernel, "dtype", None)  # a quantized one of qwix 0.1.5 lacks it
        own = rule, tuple(kernel.shape), product.axes
        return AdapterSpec.from_config(*own, kernel_dtype=dtype, name=place)

    if isinstance(module, nnx.Module):
        if (found := traced.get()) is None:
            return _held.held(module, name)
        found[path] = found.get(path) or new()
        return None
    m = module.get_variable("params", name + SUFFIX)
    if not isinstance(m, Adapter | None):
        must = f"{place}{SUFFIX} in params must be an adapter, got {type(m).__name__}"
        remedy = "plan_of(model, ...).adapters(tree) makes them of plain arrays"
        raise TypeError(f"{must}: {remedy}")
    return running_adapter(module, name, new() if m is None else m.spec)


def _hold_new(model: nnx.Module, specs: Specs, rngs: Any) -> None:
    """Put new M's beside their kernels, on the meshes of the kernels."""
    modules = dict(_held.named_modules(model))
    for path, spec in specs.items():
        module, name, place = modules[path[:-1]], path[-1], "/".join(path)
        kernel = getattr(module, name)
        if hasattr(module, name + SUFFIX):
            other = "the base or what mora_jax.qwix.merge_adapters makes"
            remedy = f"give qwix a model without adapters, such as {other}"
            raise ValueError(f"{place}: model has an M there already: {remedy}")
        whole, more = tuple(kernel.shape), kernel.ndim - len(spec.axes)
        places = stack_places(whole, spec.kernel_shape)
        if len(places) != 1:
            used = f"{place} of shape {whole} is used as {spec.kernel_shape}"
            why = "which of its axes is the stack's is not known"
            raise ValueError(f"{used}: {why}; leave it out of module_path")
        axes = "".join(interleaved("s" * more, spec.axes, places[0]))
        spec = dataclasses.replace(spec, kernel_shape=whole, axes=axes)
        key = rngs.params() if rngs and spec.init == "gaussian" else None
        _held.hold_adapter(module, name, Adapter(spec.start(path, key), spec), 0)


def trace(function: Any, *args: Any, **kwargs: Any) -> tuple[Any, Specs]:
    """The shapes that a call returns, and the adapters that an NNX model is to have."""
    # In the trace nothing is quantized, and each operand is known by what made it.
    arrays, join = trees.split_static((args, kwargs))
    found: Specs = {}

    def call(arrays: list[Any]) -> Any:
        args, kwargs = join(arrays)
        return function(*args, **kwargs)

    token = traced.set(found)
    try:
        # JAX keeps traces of inner functions that it compiles, such as `x @ y`, by the
        # context, which includes the metadata of operations: a new value, new traces.
        with set_xla_metadata(mora_jax_trace=str(next(_NUMBERS))):
            return jax.eval_shape(call, arrays), found
    finally:
        traced.reset(token)


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

    Example::

      >>> import flax.linen as nn, jax.numpy as jnp, mora_jax, qwix
      >>> provider = mora_jax.qwix.MoRAProvider(rank=2, weight_qtype="int8")
      >>> model = qwix.apply_lora_to_model(nn.Dense(16), provider)
      >>> mora_jax.qwix.plan_of(model, jnp.ones((1, 16)))["kernel"].shape
      (4, 4, 4)
    """
    if isinstance(model, nnx.Module):
        return _held.plan_of(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Flax module, got {type(model).__name__}")
    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
    shapes, _ = trace(model.init, rngs, *args, **kwargs)
    # The trace saw one layer, and nn.scan stacks M's: their shapes tell.
    base, adapters = split(shapes["params"])
    if not adapters:
        raise ValueError("model has no adapters: give qwix a MoRAProvider")
    specs = adapters_in(adapters).kernels.specs
    size = sum(leaf.size for _, leaf in named_leaves(base).values())
    return Plan(dict(sorted(specs.items())), size, traced=True)
