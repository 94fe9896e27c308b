"""LoRA by qwix on SmolLM2, which examples and benchmarks compare with MoRA."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from models.smollm2 import Llama


def qwix_lora(model: Llama, rank: int) -> tuple[Callable[..., jax.Array], Any]:
    """(adapters, variables, *inputs) -> logits with LoRA, and adapters to train."""
    try:
        import qwix
    except ImportError as error:
        raise ImportError("the LoRA needs `pip install qwix`") from error
    rule = {"module_path": ".*_proj", "rank": rank, "alpha": float(rank)}
    adapted: Any = qwix.apply_lora_to_model(model, qwix.LoraProvider(**rule))

    @jax.jit  # so that the other parameters, which exist already, are never computed
    def init(key: jax.Array) -> dict[str, Any]:
        params = adapted.init(key, jnp.zeros((1, 8), jnp.int32))["params"]
        flat = flatten_dict(params, sep="/")
        return {path: leaf for path, leaf in flat.items() if "lora" in path}

    def apply(adapters: Any, variables: Any, *inputs: Any) -> jax.Array:
        flat = flatten_dict(variables["params"], sep="/") | adapters
        return adapted.apply({"params": unflatten_dict(flat, sep="/")}, *inputs)

    return apply, init(jax.random.key(0))
