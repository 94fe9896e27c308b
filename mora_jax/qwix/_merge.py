"""Adapters merged into quantized kernels."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from mora_jax._common.checks import as_jax_array, check_choice, check_kernel
from mora_jax._common.suggestions import lacking
from mora_jax._layer.delta import delta_kernel
from mora_jax._layer.rounding import add_rounded, share_lost
from mora_jax._plan.plan import Plan, check_plan
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._plan.trained_arrays import refuse_trained
from mora_jax._tree.base_digest import check_base
from mora_jax._tree.merge import finite_items
from mora_jax._tree.paths import is_boxed, key_name, located_leaves, reboxed, unboxed
from mora_jax.nnx._adapters import adapters as adapters_of
from mora_jax.nnx._adapters import named_modules, plan_of
from mora_jax.nnx._classes import DROPOUT
from mora_jax.nnx._param import MoRAParam
from mora_jax.qwix import _private
from mora_jax.qwix._private import WithAux

Onto = Literal["dequantized", "requantized"]
Model = TypeVar("Model", bound=nnx.Module)


class MergeLoss(NamedTuple):
    """What of a delta is lost when a kernel is stored.

    Attributes:
      share: The share that is lost in the mean, as `diagnostics.merge_loss` has it.
      error: The norm of what the stored kernel lacks of the sum of base and delta,
        divided by the norm of the delta; 0 for a delta of zeros.
    """

    share: float | jax.Array
    error: float | jax.Array


_WHY = (
    "which is not merged into quantized models; merge into mora_jax.qwix.dequantize("
    "params) with mora_jax.merge"
)


def dequantize(params: Any) -> Any:
    """Params with an array in place of each quantized kernel.

    It is the base that adapters were trained on, for `mora_jax.save(..., params=)` and
    `mora_jax.merge`, or to compute with without qwix. Shapes give shapes.

    Args:
      params: Params that qwix quantized, without adapters: nested dicts. Or an NNX
        model, with adapters or without; a state of it does not say how its numbers are
        to be read.

    Returns:
      The params, in the same structure; for a model an `nnx.State` of its parameters
      without adapters.

    Raises:
      TypeError: `params` is a Linen model, a state of a quantized model, or no tree of
        arrays.

    Example::

      >>> import flax.linen as nn, jax, jax.numpy as jnp, mora_jax, qwix
      >>> rule = qwix.QuantizationRule(weight_qtype="int8")
      >>> model = qwix.quantize_model(nn.Dense(16), qwix.PtqProvider([rule]))
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
      >>> mora_jax.qwix.dequantize(params)["kernel"].shape
      (8, 16)
    """
    if isinstance(params, nnx.Module):
        model = nnx.clone(params)
        _dequantize_modules(model)
        return nnx.state(model, nnx.All(nnx.Param, nnx.Not(MoRAParam)))
    if not located_leaves(params) and not isinstance(params, Mapping):
        raise TypeError(
            f"params must be a tree of arrays, got {type(params).__name__}: give "
            "variables['params'], or an NNX model"
        )

    def replace(keys: Any, leaf: Any) -> Any:
        if isinstance(leaf, WithAux):
            return _private.plain(leaf, _private.dequantized(leaf))
        path = [key_name(key) for key in keys]
        if path[-2:] == ["array", "qvalue"]:
            raise TypeError(
                f"params hold parts of the quantized kernel {'/'.join(path[:-2])!r}, "
                "which do not say how it is quantized: write dequantize(model)"
            )
        return leaf

    return jax.tree_util.tree_map_with_path(replace, params, is_leaf=_is_parameter)


def merge(
    params: Any,
    adapters: Any,
    plan: Plan,
    *,
    onto: Onto = "dequantized",
    any_base: bool = False,
) -> tuple[Any, dict[str, MergeLoss]]:
    r"""The base with its deltas added: :math:`W' = Q(W) + \alpha\, C M D`.

    Args:
      params: Params that qwix quantized, without adapters: nested dicts.
      adapters: The adapters, as `mora_jax.split` takes them out of params.
      plan: Their plan, as `plan_of` gives it.
      onto: "dequantized" gives floating-point arrays, also in place of quantized
        kernels that have no adapter: params for the model that qwix never saw.
        "requantized" quantizes each sum again as its kernel was: params for
        `qwix.quantize_model(model, qwix.PtqProvider(rules))`, with the same rules.
      any_base: Whether to merge into any weights, as in `mora_jax.merge`.

    Returns:
      The merged params, and {path: what was lost there}; in `jax.jit` the losses are
      arrays. Quantizing again makes errors of the size that those of the first time
      had, which may be many times a delta.

    Raises:
      TypeError, ValueError: As `mora_jax.merge`; `onto` is unknown; params are shapes.

    Example::

      >>> import flax.linen as nn, jax, jax.numpy as jnp, mora_jax, qwix
      >>> x, settings = jnp.ones((1, 16)), dict(rank=2, weight_qtype="int8")
      >>> provider = mora_jax.qwix.MoRAProvider(module_path=".*", **settings)
      >>> model = qwix.apply_lora_to_model(nn.Dense(16), provider)
      >>> variables = model.init(jax.random.key(0), x)
      >>> base, adapters = mora_jax.split(variables["params"])
      >>> plan = mora_jax.qwix.plan_of(model, x)
      >>> merged, losses = mora_jax.qwix.merge(base, adapters, plan)
      >>> y = nn.Dense(16).apply({"params": merged}, x)
      >>> bool(jnp.allclose(y, model.apply(variables, x), atol=1e-5)), losses
      (True, {'kernel': MergeLoss(share=0.0, error=0.0)})
    """
    check_choice("onto", onto, get_args(Onto))
    refuse_trained(check_plan(plan).trained, _WHY)
    if isinstance(params, nnx.Module):
        raise TypeError(
            f"params must be a tree of arrays, got the model {type(params).__name__}: "
            "write merge_adapters(model)"
        )
    items = {spec.path: (spec, m) for spec, m in finite_items(adapters, plan)}
    losses: dict[str, MergeLoss] = {}
    paths: set[tuple[str, ...]] = set()

    def replace(keys: Any, leaf: Any) -> Any:
        path = tuple(key_name(key) for key in keys)
        paths.add(path)
        if path[-1].endswith(SUFFIX):
            raise ValueError(
                f"params hold the adapter {'/'.join(path)}: give the base alone, as "
                "mora_jax.split(params)[0]"
            )
        if path in items:
            leaf, losses["/".join(path)] = _sum(leaf, *items[path], onto, any_base)
        elif isinstance(leaf, WithAux) and onto == "dequantized":
            leaf = _private.plain(leaf, _private.dequantized(leaf))
        return leaf

    merged = jax.tree_util.tree_map_with_path(replace, params, is_leaf=_is_parameter)
    for path, (spec, _) in items.items():
        if path not in paths:
            names = ["/".join(path) for path in paths]
            raise ValueError(
                f"params lack the kernel {spec.name!r}{lacking(spec.name, names)}"
            )
    return merged, losses


def merge_adapters(
    model: Model, onto: Onto = "dequantized", *, any_base: bool = False
) -> tuple[Model, dict[str, MergeLoss]]:
    """An NNX model with its adapters merged into its kernels.

    Args:
      model: What `qwix.apply_lora_to_model` returns with a `MoRAProvider`. It stays as
        it is.
      onto: As in `merge`: "dequantized" gives a plain model that qwix never saw;
        "requantized" one that qwix intercepts as before, without adapters.
      any_base: As in `merge`.

    Returns:
      A new model, and {path: what was lost there}.

    Raises:
      TypeError: `model` is not an NNX module; for Linen's there is `merge`.
      ValueError: It has no adapters; `onto` is unknown; an M holds NaN or infinity.

    Example::

      >>> import jax.numpy as jnp, mora_jax, qwix
      >>> from flax import nnx
      >>> base, x = nnx.Linear(16, 16, rngs=nnx.Rngs(0)), jnp.ones((1, 16))
      >>> provider = mora_jax.qwix.MoRAProvider(rank=2, weight_qtype="int8")
      >>> model = qwix.apply_lora_to_model(base, provider, x, rngs=nnx.Rngs(0))
      >>> merged, losses = mora_jax.qwix.merge_adapters(model)
      >>> type(merged) is nnx.Linear, losses
      (True, {'kernel': MergeLoss(share=0.0, error=0.0)})
    """
    check_choice("onto", onto, get_args(Onto))
    plan = plan_of(model)
    refuse_trained(plan.trained, _WHY)
    items = finite_items(adapters_of(model), plan)
    model, losses = nnx.clone(model), {}
    modules = dict(named_modules(model))
    for spec, m in items:
        module, name = modules[spec.path[:-1]], spec.path[-1]
        old = getattr(module, name)
        new, losses[spec.name] = _sum(old, spec, m, onto, any_base)
        setattr(module, name, new)
        for own in (name + SUFFIX, DROPOUT):
            if hasattr(module, own):
                delattr(module, own)
    if onto == "dequantized":
        _dequantize_modules(model)
        _private.forget_call(model)
        object.__setattr__(model, "__class__", _private.plain_class(model))
    return model, losses


def _dequantize_modules(model: nnx.Module) -> None:
    """Give each module of a model arrays in place of its quantized kernels."""
    for _, module in named_modules(model):
        for name in _names(module, WithAux):
            old = getattr(module, name)
            setattr(module, name, _private.plain(old, _private.dequantized(old)))


def _sum(
    old: Any, spec: AdapterSpec, m: jax.Array, onto: Onto, any_base: bool
) -> tuple[Any, MergeLoss]:
    """A kernel with its delta, in the form and the box that it has; what was lost."""
    quantized = isinstance(old, WithAux)
    for leaf in jax.tree.leaves(old):
        as_jax_array(spec.name, leaf)
    base = _private.dequantized(old) if quantized else jnp.asarray(unboxed(old))
    check_kernel(base, spec.name)
    if tuple(base.shape) != spec.kernel_shape:
        raise ValueError(
            f"{spec.name} must have shape {spec.kernel_shape}, got {base.shape}"
        )
    if not any_base:
        check_base((spec,), {spec.name: base})
    wide = jnp.result_type(jnp.float32, base.dtype, m.dtype)
    delta = delta_kernel(spec, m.astype(wide))
    exact = base.astype(wide) + delta
    if quantized and onto == "requantized":
        new: Any = _private.requantized(old, exact)
        values = _private.dequantized(new)
    else:
        values = add_rounded(base, delta, spec.axes, base.dtype, "dither")
        new = _private.plain(old, values) if quantized else reboxed(old, values)
    return new, _loss(delta, values.astype(wide), base.astype(wide), exact)


def _loss(
    delta: jax.Array, values: jax.Array, base: jax.Array, exact: jax.Array
) -> MergeLoss:
    """What the stored `values` lack of `exact`, which is base and delta."""

    def norm(array: jax.Array) -> jax.Array:
        return jnp.linalg.norm(array.ravel())

    size = norm(delta)
    if isinstance(size, Tracer):
        scaled = delta / jnp.where(size > 0, size, 1)
        # Exact products, as in `share_lost`, which wants numbers.
        dot = functools.partial(jnp.vdot, precision=jax.lax.Precision.HIGHEST)
        change = dot(values - base, scaled) / jnp.where(size > 0, size, 1)
        share = jnp.where(size > 0, jnp.abs(1 - change), 0)
        error = norm(values - exact) / jnp.where(size > 0, size, jnp.inf)
        return MergeLoss(share, error)
    if size == 0:
        return MergeLoss(0.0, 0.0)
    error = float(norm(values - exact)) / float(size)
    return MergeLoss(share_lost(values - base, delta), error)


def _names(module: nnx.Module, kind: type) -> list[str]:
    return [name for name, value in vars(module).items() if isinstance(value, kind)]


def _is_parameter(node: Any) -> bool:
    return isinstance(node, WithAux) or is_boxed(node)
