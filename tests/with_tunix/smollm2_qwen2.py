"""SmolLM2-135M-Instruct in Tunix's Qwen2, which nobody here wrote.

Qwen2 is a Llama with biases on queries, keys and values; here they are zero. Needs
google-tunix, and what `smollm2` needs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from models import smollm2

# Tunix's paths -> smollm2's, each below its layer where it has one.
_NAMES = {
    "embedder/input_embedding": "embed_tokens/embedding",
    "final_norm/w": "norm/scale",
    "input_layernorm/w": "input_layernorm/scale",
    "post_attention_layernorm/w": "post_attention_layernorm/scale",
    "attn/q_proj/w": "self_attn/q_proj/kernel",
    "attn/k_proj/w": "self_attn/k_proj/kernel",
    "attn/v_proj/w": "self_attn/v_proj/kernel",
    "attn/o_proj/w": "self_attn/o_proj/kernel",
    "mlp/gate_proj/kernel": "mlp/gate_proj/kernel",
    "mlp/up_proj/kernel": "mlp/up_proj/kernel",
    "mlp/down_proj/kernel": "mlp/down_proj/kernel",
}


def _smollm2_name(path: tuple[Any, ...]) -> str:
    """(layers, 3, attn, q_proj, w) -> `layers_3/self_attn/q_proj/kernel`."""
    if path[0] != "layers":
        return _NAMES["/".join(path)]
    _, layer, *rest = path
    return f"layers_{layer}/{_NAMES['/'.join(rest)]}"


def load(**overrides: Any):
    """Tunix's Qwen2 with SmolLM2's weights.

    The head width is 64, so the kernels of attention are q_proj (576, 9, 64), k_proj
    and v_proj (576, 3, 64) and o_proj (9, 64, 576).

    Args:
        overrides: fields of Tunix's `ModelConfig`. Those that change a shape do not
            fit the weights, but `num_layers` may be less than 30.
    """
    # Here and not above: pytest imports this file to look for doctests, and most
    # environments are without Tunix.
    from tunix.models.qwen2 import model as qwen2  # pyright: ignore

    llama, params, _ = smollm2.load()
    flat = traverse_util.flatten_dict(params, sep="/")
    c = llama.config
    sizes: dict[str, Any] = {
        "num_layers": c.layers,
        "vocab_size": c.vocab,
        "embed_dim": c.width,
        "hidden_dim": c.hidden,
        "num_heads": c.heads,
        "head_dim": c.head_width,
        "num_kv_heads": c.kv_heads,
        "rope_theta": c.rope_base,
        "norm_eps": c.epsilon,
        "use_tied_embedding": True,
    }
    config = qwen2.ModelConfig(**(sizes | overrides))
    model = nnx.eval_shape(lambda: qwen2.Qwen2(config, rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    for path, variable in nnx.to_flat_state(state):
        if path[-1] in ("q_bias", "k_bias", "v_bias"):
            value = jnp.zeros(variable.shape, variable.dtype)
        else:
            # smollm2's kernels have heads and their features on one axis.
            value = flat[_smollm2_name(path)].reshape(variable.shape)
        variable.set_value(value.astype(variable.dtype))
    nnx.update(model, state)
    return model


def logits(model: Any, ids: jax.Array) -> jax.Array:
    """Logits of the next token, each position seeing itself and what is before it.

    Args:
        model: what `load` gave.
        ids: token ids, (batch, length) int32; pad on the right.

    Returns:
        (batch, length, vocab).
    """
    length = ids.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    return model(ids, positions, cache=None, attention_mask=mask)[0]
