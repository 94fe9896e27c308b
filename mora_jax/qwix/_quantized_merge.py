"""Adapters merged into quantized kernels."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp
from flax import nnx

from mora_jax._common.checks import check_choice
from mora_jax._common.suggestions import lacking
from mora_jax._layer.adapter import delta_of
from mora_jax._layer.rounding import MergeLoss
from mora_jax._plan.spec import SUFFIX
from mora_jax._tree.adapters import checked_adapters, refuse_trained
from mora_jax._tree.merge import merged_kernel, with_kernels
from mora_jax._tree.paths import Found, located_leaves, reboxed, unboxed
from mora_jax.nnx._held import Model, MoRAParam, detached
from mora_jax.nnx._held import adapters as nnx_adapters
from mora_jax.qwix import _private

Onto = Literal["dequantized", "requantized"]


def dequantize(params: Any) -> Any:
    """Params with an array instead of each quantized kernel.

    It is the base that adapters were trained on, for `mora_jax.save(..., params=)` and
    `mora_jax.merge`, or to compute with without qwix. Shapes give shapes.

    Args:
      params: Nested dicts that qwix quantized, without adapters; or an NNX model, with
        adapters or without. A state of it does not say how its numbers are to be read.

    Returns:
      The params, in the same structure; for a model their `nnx.State` without adapters.

    Raises:
      TypeError: A Linen model, a state of a quantized model, or not a tree of arrays.

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
        _private.set_parameters(model, dequantize(_private.named_parameters(model)))
        return nnx.state(model, nnx.All(nnx.Param, nnx.Not(MoRAParam)))
    if not located_leaves(params) and not isinstance(params, Mapping):
        raise TypeError(
            f"params must be a tree of arrays, got {type(params).__name__}: give "
            "variables['params'], or an NNX model"
        )
    named, structure = _private.parameters_in(params)
    for name in named:
        if name.endswith("/array/qvalue"):
            raise TypeError(
                f"params hold parts of the quantized kernel {name[:-13]!r}, which do "
                "not say how it is quantized: write dequantize(model)"
            )
    return structure.unflatten(map(_private.dequantized, named.values()))


def merge(
    params: Any,
    adapters: Any,
    *,
    onto: Onto = "dequantized",
    any_base: bool = False,
) -> tuple[Any, dict[str, MergeLoss]]:
    r"""The base with its deltas added: :math:`W' = Q(W) + \alpha\, C M D`.

    Args:
      params: Params that qwix quantized, without adapters: nested dicts.
      adapters: The adapters, as `mora_jax.split` takes them out of params.
      onto: "dequantized" gives floating-point arrays, also instead of quantized kernels
        without adapters: params for the model that qwix never saw. "requantized"
        quantizes each sum again as its kernel was, for a model of `qwix.quantize_model`
        with the same rules. Its errors may be many times a delta.
      any_base: As in `mora_jax.merge`.

    Returns:
      The merged params, and {path: what was lost there}: arrays in `jax.jit`.

    Raises:
      TypeError, ValueError: As `mora_jax.merge`; `onto` is unknown; params are shapes.

    Example::

      >>> import flax.linen as nn, jax, jax.numpy as jnp, mora_jax, qwix
      >>> provider = mora_jax.qwix.MoRAProvider(rank=2, weight_qtype="int8")
      >>> model = qwix.apply_lora_to_model(nn.Dense(16), provider)
      >>> variables = model.init(jax.random.key(0), x := jnp.ones((1, 16)))
      >>> base, adapters = mora_jax.split(variables["params"])
      >>> merged, losses = mora_jax.qwix.merge(base, adapters)
      >>> y = nn.Dense(16).apply({"params": merged}, x)
      >>> bool(jnp.allclose(y, model.apply(variables, x), atol=1e-5)), losses
      (True, {'kernel': MergeLoss(share=0.0, error=0.0)})
    """
    check_choice("onto", onto, get_args(Onto))
    found = checked_adapters(adapters)
    refuse_trained(
        found,
        "which is not merged into quantized models; merge into mora_jax.qwix.dequantize"
        "(params) with mora_jax.merge",
    )
    if isinstance(params, nnx.Module):
        kind = f"a tree of arrays, got the model {type(params).__name__}"
        raise TypeError(f"params must be {kind}: write merge_adapters(model)")
    named, structure = _private.parameters_in(params)
    for name in named:
        if name.endswith(SUFFIX):
            rule = "give the base alone, as split(params)[0]"
            raise ValueError(f"params hold the adapter {name}: {rule}")
    losses = {}
    for path, adapter in found.items():
        name = "/".join(path)
        if name not in named:
            raise ValueError(f"params lack the kernel {name!r}{lacking(name, named)}")
        base = _private.dequantized(named[name])
        one = Found({path: adapter})
        kernel = with_kernels({name: base}, one, any_base=any_base)[0][-1]
        total = reboxed(base, merged_kernel(adapter, kernel, rounding="dither"))
        if onto == "requantized":
            total = _private.requantized(named[name], total)
        named[name], delta = total, delta_of(adapter, kernel.dtype)
        stored = jnp.asarray(unboxed(_private.dequantized(total)), delta.dtype)
        losses[name] = MergeLoss.of(stored - kernel.astype(delta.dtype), delta)
    merged = structure.unflatten(named.values())
    return dequantize(merged) if onto == "dequantized" else merged, losses


def merge_adapters(
    model: Model, onto: Onto = "dequantized", *, any_base: bool = False
) -> tuple[Model, dict[str, MergeLoss]]:
    """An NNX model with its adapters merged into its kernels.

    Args:
      model: A model of `qwix.apply_lora_to_model` with a `MoRAProvider`, unchanged.
      onto: "dequantized" gives a plain model that qwix never saw, "requantized" one
        that qwix intercepts as before, without adapters; see `merge`.
      any_base: As in `merge`.

    Returns:
      A new model, and {path: what was lost there}.

    Raises:
      TypeError, ValueError: As `merge`; `model` is not of NNX, or lacks adapters.

    Example: see `MoRAProvider`.
    """
    params = _private.named_parameters(model)
    settings: Any = {"onto": onto, "any_base": any_base}
    params, losses = merge(params, nnx_adapters(model), **settings)
    model = detached(model)
    _private.set_parameters(model, params)
    if onto == "dequantized":
        _private.forget(model)
    return model, losses
