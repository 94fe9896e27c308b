"""The time that `plan` and `init` take for trees of many kernels."""

import time
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

import mora_jax


def kernels(count: int) -> Any:
    """The shapes of `count` kernels, seven in each layer."""
    sizes = {f"self_attn/{p}_proj": (64, 64) for p in "qkvo"}
    sizes |= {f"mlp/{p}_proj": (64, 192) for p in ("gate", "up")}
    sizes |= {"mlp/down_proj": (192, 64)}
    flat, layer = {}, [*sizes.items()]
    for k in range(count):
        name, size = layer[k % 7]
        shape = jax.ShapeDtypeStruct(size, jnp.float32)
        flat[f"model/layers/{k // 7}/{name}/kernel"] = shape
    return unflatten_dict(flat, sep="/")


def plan_seconds(shapes: Any) -> tuple[float, float, float]:
    """Seconds of this process for `plan`, for `init`, and for both."""
    start = time.process_time()
    plan = mora_jax.plan(shapes)
    middle = time.process_time()
    jax.block_until_ready(mora_jax.init(plan))
    end = time.process_time()
    return middle - start, end - middle, end - start
