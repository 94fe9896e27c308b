"""Tiny models of Tunix, by the names that their versions have."""

import importlib

import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import random_like

IDS = np.arange(16, dtype=np.int32).reshape(2, 8)
POSITIONS = jnp.broadcast_to(jnp.arange(8), (2, 8))
INPUTS = IDS, POSITIONS, None, jnp.tril(jnp.ones((2, 8, 8), bool))
SIZES = {"num_layers": 1, "embed_dim": 32, "hidden_dim": 64}
SIZES |= {"num_heads": 4, "head_dim": 8, "num_kv_heads": 2}
QWEN = {"vocab_size": 32, "norm_eps": 1e-5, "rope_theta": 10_000}
GEMMA = {"num_embed": 32, "sliding_window_size": 4}
GEMMA1 = {"final_logit_softcap": None, "use_post_attn_norm": False}
GEMMA1 |= {"use_post_ffw_norm": False}
GEMMA2 = {"final_logit_softcap": 30.0, "use_post_attn_norm": True}
GEMMA2 |= {"use_post_ffw_norm": True}
FLOAT = {"dtype": jnp.float32, "param_dtype": jnp.float32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
DENSE = "q_proj/w k_proj/w v_proj/w o_proj/w"
MLP = "gate_proj/kernel up_proj/kernel down_proj/kernel"
FUSED = f"q_einsum/w kv_einsum/w attn_vec_einsum/w {MLP}"
MODELS = {
    "qwen2": ("Qwen2", QWEN | {"use_tied_embedding": True}, f"{DENSE} {MLP}"),
    "qwen3": ("Qwen3", QWEN, f"{DENSE} {MLP}"),
    "qwen3 experts": ("Qwen3", QWEN | EXPERTS, f"{DENSE} gate_proj up_proj down_proj"),
    "llama3": ("Llama3", QWEN, f"{DENSE} {MLP}"),
    "gemma": ("Gemma", GEMMA | GEMMA1, FUSED),
    "gemma one query": (
        "Gemma",
        GEMMA | GEMMA1 | {"num_kv_heads": 4},
        f"qkv_einsum/w attn_vec_einsum/w {MLP}",
    ),
    "gemma 2": ("Gemma", GEMMA | GEMMA2, FUSED),
    "gemma3": ("Gemma3", GEMMA | {"param_dtype": jnp.float32}, FUSED),
    "gemma4": (
        "Gemma4",
        GEMMA | FLOAT | {"per_layer_input_dim": 8},
        f"{FUSED} per_layer_input_gate/w per_layer_projection/w "
        "embedder/per_layer_model_projection/w",
    ),
    "gemma4 experts": (
        "Gemma4",
        GEMMA | FLOAT | EXPERTS | {"enable_moe": True, "expert_dim": 16},
        f"{FUSED} gating_einsum linear",
    ),
}


def tiny(name):
    """A model of one layer with random weights, and the ends of its kernels' paths."""
    cls, settings, kernels = MODELS[name]
    module = importlib.import_module(f"tunix.models.{name.split()[0]}.model")
    if cls == "Gemma":
        settings = settings | {"attention_types": [module.AttentionType.GLOBAL]}
    config = module.ModelConfig(**(SIZES | settings))
    model = nnx.eval_shape(lambda: getattr(module, cls)(config, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graph, random_like(params, 0.2), rest), set(kernels.split())


@nnx.jit
def logits(model):
    return model(*INPUTS)[0]


def qwen_as_transformers(model):
    """The weights of Qwen2 or Qwen3 as transformers names and shapes them."""
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value, (*scope, last) = np.asarray(variable[...]), map(str, path)
        name = ".".join([*scope, last] if last.endswith("_proj") else scope)
        name = name.replace(".attn", ".self_attn").replace("router", "gate")
        name = name.replace("embedder", "model.embed_tokens")
        name = name.replace("final_norm", "model.norm")
        name = name if scope == ["lm_head"] or "model." in name else f"model.{name}"
        if last.endswith("_bias"):
            letter, _, _ = last.partition("_")
            tensors[f"{name}.{letter}_proj.bias"] = value.reshape(-1)
        elif last.endswith("_proj"):  # experts
            for number, expert in enumerate(value):
                expert_name = name.replace("mlp.", f"mlp.experts.{number}.")
                tensors[f"{expert_name}.weight"] = expert.T
        elif last == "input_embedding" or value.ndim == 1:
            tensors[f"{name}.weight"] = value
        else:
            ins = value.shape[:2] if scope[-1] == "o_proj" else value.shape[:1]
            tensors[f"{name}.weight"] = value.reshape(np.prod(ins), -1).T
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


NORMS = {
    "pre_attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_attn_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "_query_norm": "self_attn.q_norm",
    "_key_norm": "self_attn.k_norm",
}


def gemma_as_transformers(model, one=False):
    """The weights of a Gemma as transformers names and shapes them."""
    tensors = {}
    norms = NORMS | ({"pre_ffw_norm": "post_attention_layernorm"} if one else {})
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value, (*scope, last) = np.asarray(variable[...]), map(str, path)
        layer = f"model.layers.{scope[1]}" if scope[0] == "layers" else "model"
        weights = {scope[-1]: value}
        if scope[-1] == "qkv_einsum":
            weights = dict(zip("qkv", value, strict=True))
        elif scope[-1] == "kv_einsum":
            weights = dict(zip("kv", value, strict=True))
        for name, weight in weights.items():
            if name in ("q", "k", "v", "q_einsum"):
                name = f"self_attn.{name[0]}_proj"
                weight = weight.swapaxes(1, 2).reshape(-1, weight.shape[1])
            elif name == "attn_vec_einsum":
                name, weight = "self_attn.o_proj", weight.reshape(-1, weight.shape[2]).T
            elif last == "kernel":
                name, weight = f"mlp.{name}", weight.T
            elif last == "scale":
                name = "norm" if name == "final_norm" else norms[name]
            else:
                name = "embed_tokens"
            tensors[f"{layer}.{name}.weight"] = np.ascontiguousarray(weight)
    return tensors
