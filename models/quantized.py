"""SmolLM2 with kernels that qwix quantizes, and adapters beside them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import mora_jax
from models.smollm2 import Llama

TYPES = ("int8", "int4", "nf4", "float8_e4m3fn")
TILE = 32  # inputs that have a scale in common; int8 has one for each output


class Quantized(NamedTuple):
    """A model on a quantized base.

    Attributes:
        apply: (adapters, variables, *inputs) -> logits.
        variables: The quantized base.
        plan: The plan of the adapters.
    """

    apply: Callable[..., jax.Array]
    variables: dict[str, Any]
    plan: mora_jax.Plan

    def merged(self, adapters: Any) -> dict[str, Any]:
        """Variables of the model that qwix never saw, with the adapters in them."""
        from mora_jax.qwix import dequantize

        base = dequantize(self.variables["params"])
        return {"params": mora_jax.merge(base, adapters)}


def quantized(model: Llama, params: Any, types: str, **settings: Any) -> Quantized:
    """The projections of `model` in one of `TYPES`, with adapters of these settings."""
    try:
        import qwix

        from mora_jax.qwix import MoRAProvider, plan_of
    except ImportError as error:
        raise ImportError("a quantized base needs `pip install qwix`") from error
    tiles = {} if types == "int8" else {"tile_size": TILE}
    rule = {"module_path": ".*_proj", "weight_qtype": types, **tiles, **settings}
    adapted: Any = qwix.apply_lora_to_model(model, MoRAProvider(**rule))
    ids = jnp.zeros((1, 8), jnp.int32)
    shapes = jax.eval_shape(adapted.init, jax.random.key(0), ids)["params"]
    base, _ = mora_jax.split(shapes)
    variables = {"params": qwix.quantize_params(params, base)}

    def apply(adapters: Any, variables: Any, *inputs: Any) -> jax.Array:
        params = mora_jax.combine(variables["params"], adapters)
        return adapted.apply({"params": params}, *inputs)

    return Quantized(apply, variables, plan_of(adapted, ids))


def megabytes(tree: Any) -> float:
    """The memory of arrays, where 4 bits are stored as such."""

    def bits(leaf: jax.Array) -> int:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        kind = jnp.finfo(leaf.dtype) if is_float else jnp.iinfo(leaf.dtype)
        return leaf.size * kind.bits

    return sum(map(bits, jax.tree.leaves(tree))) / 8e6
