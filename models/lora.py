"""LoRA by qwix, which examples and benchmarks compare with MoRA."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict


def qwix_lora(
    model: nn.Module, rank: int, *example: Any
) -> tuple[Callable[..., Any], Callable[[jax.Array], Any]]:
    """The model with LoRA on its projections, and a function that starts adapters.

    Args:
        model: A Linen module whose projections have names that end with "_proj".
        rank: The rank of LoRA.
        *example: Inputs of the model; none for a model that takes tokens alone.

    Returns:
        (adapters, variables, *inputs) -> the model's output, and key -> adapters.
    """
    try:
        import qwix
    except ImportError as error:
        raise ImportError("the LoRA needs `pip install qwix`") from error
    rule = {"module_path": ".*_proj", "rank": rank, "alpha": float(rank)}
    adapted: Any = qwix.apply_lora_to_model(model, qwix.LoraProvider(**rule))
    example = example or (jnp.zeros((1, 8), jnp.int32),)

    @jax.jit  # so that the other parameters, which exist already, are never computed
    def init(key: jax.Array) -> dict[str, Any]:
        params = adapted.init(key, *example)["params"]
        flat = flatten_dict(params, sep="/")
        return {path: leaf for path, leaf in flat.items() if "lora" in path}

    def apply(adapters: Any, variables: Any, *inputs: Any) -> Any:
        flat = flatten_dict(variables["params"], sep="/") | adapters
        return adapted.apply({"params": unflatten_dict(flat, sep="/")}, *inputs)

    return apply, init
