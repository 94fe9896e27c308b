"""Adapters written by hand, which other methods are compared with."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict


def adapted_by_hand(
    model: nn.Module, delta: Callable[[Any, jax.Array, int], jax.Array]
) -> Callable[..., jax.Array]:
    """(adapters, params, ids) -> logits, with `delta` added to Dense layers.

    A layer is adapted if `adapters` has an entry "adapter" next to its kernel; then
    `delta(adapter, x, out_features)` is added to its output. Layers may be scanned.
    """

    def add(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        y, layer = call(*args, **kwargs), context.module
        is_dense = isinstance(layer, nn.Dense)
        if not is_dense or not layer.has_variable("params", "adapter"):
            return y
        return y + delta(layer.get_variable("params", "adapter"), args[0], y.shape[-1])

    def apply(adapters: Any, params: Any, *inputs: jax.Array) -> Any:
        both = unflatten_dict(flatten_dict(params) | flatten_dict(adapters))
        with nn.intercept_methods(add):
            return model.apply({"params": both}, *inputs)

    return apply


def lora_by_hand(
    adapter: tuple[jax.Array, jax.Array], x: jax.Array, out_features: int
) -> jax.Array:
    """LoRA without its factor: x A B."""
    a, b = (factor.astype(x.dtype) for factor in adapter)
    return (x @ a) @ b
