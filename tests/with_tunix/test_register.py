"""Every model of Tunix with all its layers adapted, once `register` was called."""

import importlib
import re
import sys
from importlib.util import find_spec

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, random_like

import mora_jax.tunix
from mora_jax import MoRAConfig, MoRAWarning, diagnostics
from mora_jax import nnx as mora

if find_spec("tunix") is None:
    pytest.skip("tunix is not installed", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tunix"),
    pytest.mark.filterwarnings(
        "ignore:'sharding' is deprecated:DeprecationWarning:flax.nnx.variablelib"
    ),
]

IDS = np.arange(16, dtype=np.int32).reshape(2, 8)
POSITIONS = jnp.broadcast_to(jnp.arange(8), (2, 8))
INPUTS = IDS, POSITIONS, None, jnp.tril(jnp.ones((2, 8, 8), bool))
SIZES = {"num_layers": 1, "embed_dim": 32, "hidden_dim": 64}
SIZES |= {"num_heads": 4, "head_dim": 8, "num_kv_heads": 2}
QWEN = {"vocab_size": 32, "norm_eps": 1e-5, "rope_theta": 10_000}
GEMMA = {"num_embed": 32, "sliding_window_size": 4}
GEMMA1 = {"final_logit_softcap": None, "use_post_attn_norm": False}
GEMMA1 |= {"use_post_ffw_norm": False}
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
    "gemma3": ("Gemma3", GEMMA | {"param_dtype": jnp.float32}, FUSED),
    "gemma4": (
        "Gemma4",
        GEMMA | FLOAT | {"per_layer_input_dim": 8},
        f"{FUSED} per_layer_input_gate/w per_layer_projection/w",
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


@pytest.mark.parametrize("name", MODELS)
def test_all_layers_are_adapted(name):
    mora_jax.tunix.register()
    model, kernels = tiny(name)
    config = MoRAConfig(rank=2, alpha=0.5, operator="sharing")
    plan = mora.plan(model, config, *INPUTS)  # and no warning
    found = {re.sub("layers/0/((attn|mlp|moe)/)?", "", path) for path in plan}
    assert found == kernels and not plan.unproven
    assert all(re.search("by its name|an embedding", x.why) for x in plan.left_out)
    adapted, base = mora.wrap(model, plan), logits(model)
    close(logits(adapted), base, 1e-6)
    mora.set_adapters(adapted, random_like(mora.adapters(adapted)), plan)
    y = logits(adapted)
    assert np.abs(y - base).max() > 0.05
    close(y, logits(mora.merge_adapters(adapted)))


@pytest.mark.parametrize("name", ["qwen2", "gemma4"])
def test_embeddings_can_be_targets(name):
    """Gemma scales what it looks up, and 4 has further tables."""
    mora_jax.tunix.register()
    model, _ = tiny(name)
    plan = mora.plan(model, MoRAConfig(rank=2, targets=".*_embedding"), *INPUTS)
    assert len(plan) == (2 if name == "gemma4" else 1)
    assert max(diagnostics.check(model, None, plan, *INPUTS).values()) < 1e-5


def test_registering_again_changes_nothing():
    """Otherwise models that are wrapped before and after would be compiled twice."""
    classes = []
    for _ in range(2):
        mora_jax.tunix.register()
        model, _ = tiny("qwen3 experts")
        adapted = mora.wrap(model, MoRAConfig(rank=2))
        layer = adapted.layers[0]
        classes.append((type(layer.mlp), type(layer.attn.q_proj)))
    assert classes[0] == classes[1]


def test_what_another_version_lacks_is_named(monkeypatch):
    from tunix.models.llama3 import model as llama3  # pyright: ignore

    monkeypatch.delattr(llama3, "Einsum")
    monkeypatch.setitem(sys.modules, "tunix.models.gemma4.moe", None)
    match = r"no tunix.models.llama3.model.Einsum and no tunix.*gemma4.moe.MoERagged"
    with pytest.warns(MoRAWarning, match=match):
        mora_jax.tunix.register()
