"""Quantized kernels as arrays, which `mora_jax.merge` merges adapters into."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from mora_jax._common.trees import located_leaves
from mora_jax._tree.merge import merge
from mora_jax.nnx._held import Model, MoRAParam, detached
from mora_jax.nnx._held import adapters as nnx_adapters
from mora_jax.qwix import _private


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
      >>> provider = mora_jax.qwix.MoRAProvider(rank=2, weight_qtype="int8")
      >>> model = qwix.apply_lora_to_model(nn.Dense(16), provider)
      >>> variables = model.init(jax.random.key(0), x := jnp.ones((1, 16)))
      >>> params, adapters = mora_jax.split(variables["params"])
      >>> merged = mora_jax.merge(mora_jax.qwix.dequantize(params), adapters)
      >>> y = nn.Dense(16).apply({"params": merged}, x)
      >>> bool(jnp.allclose(y, model.apply(variables, x), atol=1e-5))
      True
    """
    if isinstance(params, nnx.Module):
        _private.forget(model := nnx.clone(params))
        return nnx.state(model, nnx.All(nnx.Param, nnx.Not(MoRAParam)))
    if not located_leaves(params) and not isinstance(params, Mapping):
        rule = f"params must be a tree of arrays, got {type(params).__name__}"
        raise TypeError(f"{rule}: give variables['params'], or an NNX model")
    named, structure = _private.parameters_in(params)
    for name in named:
        if name.endswith("/array/qvalue"):
            parts = f"parts of the quantized kernel {name[:-13]!r}"
            why = "which do not say how it is quantized"
            raise TypeError(f"params hold {parts}, {why}: write dequantize(model)")
    return structure.unflatten(map(_private.dequantized, named.values()))


def merge_adapters(model: Model, *, any_base: bool = False) -> Model:
    """An NNX model with its adapters merged into its kernels, which qwix never saw.

    `model`, as a `MoRAProvider` makes it (see its example), stays as it is. `any_base`
    is as in `mora_jax.merge`.

    Returns:
      A new model of floating-point kernels, of the class that the base has.

    Raises:
      TypeError, ValueError: As `mora_jax.merge`; `model` is not of NNX, or lacks
        adapters.
    """
    _private.forget(plain := detached(model))
    params, adapters = nnx.state(plain, nnx.Param), nnx_adapters(model)
    nnx.update(plain, merge(params, adapters, any_base=any_base))
    return plain
