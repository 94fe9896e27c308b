"""What a plan of Tunix's models says: layers that nobody registered, scaled kernels."""

import importlib
from importlib.util import find_spec

import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import random
from merged import merge_errors

from mora_jax import LeftOutWarning, MoRAConfig, register_layer
from mora_jax import nnx as mora
from mora_jax._flax import layer_rules

if find_spec("tunix") is None:
    pytest.skip("tunix is not installed", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tunix"),
    pytest.mark.filterwarnings(
        "ignore:'sharding' is deprecated:DeprecationWarning:flax.nnx.variablelib"
    ),
]


@pytest.fixture(autouse=True)
def unregistered(monkeypatch):
    """Each test registers what it needs, and no other test sees it.

    Nor are layers known by their names, as those of a package that is new to us.
    """
    classes = [cls for cls in layer_rules.RULES if isinstance(cls, type)]
    flax = {c: layer_rules.RULES[c] for c in classes if "flax" in c.__module__}
    monkeypatch.setattr(layer_rules, "RULES", flax)
    layer_rules._registered.cache_clear()
    yield
    layer_rules._registered.cache_clear()


def tunix_model(name, **settings):
    """A tiny model, and the class of its attention's layers."""
    module = importlib.import_module(f"tunix.models.{name.lower()}.model")
    sizes = {"num_layers": 2, "vocab_size": 64, "embed_dim": 32, "hidden_dim": 64}
    sizes |= {"num_heads": 2, "head_dim": 16, "num_kv_heads": 2, "norm_eps": 1e-5}
    config = module.ModelConfig(**sizes, rope_theta=10_000, **settings)
    return getattr(module, name)(config, rngs=nnx.Rngs(0)), module.Einsum


def test_attention_that_nobody_registered_is_named():
    model, _ = tunix_model("Llama3")
    match = r"layers/\*/attn/q_proj/w \(2\): .* class Einsum with mora_jax.register"
    with pytest.warns(LeftOutWarning, match=match):
        plan = mora.plan(model)
    assert all("/mlp/" in path for path in plan)
    assert "layers/*/attn/o_proj/w (2)" in str(plan).split("left out:")[1]


def test_experts_that_are_bare_parameters_are_named():
    model, einsum = tunix_model("Qwen3", num_experts=4, num_experts_per_tok=2)
    register_layer(einsum, equation=lambda layer, x: layer.einsum_str, kernel="w")
    with pytest.warns(LeftOutWarning, match=r"layers/\*/mlp/down_proj \(2\)") as seen:
        plan = mora.plan(model)
    assert "attn" not in str(seen[0].message) and len(plan) == 2 * 4


def test_scaled_kernels_are_merged_into_the_kernel():
    """Gemma 4 multiplies by `w * w_scale` in some of its layers."""
    from tunix.models.gemma4 import model as gemma4  # pyright: ignore

    def make(w_scale):
        settings = {"rngs": nnx.Rngs(0), "sharding": (None, None), "w_scale": w_scale}
        settings |= {"dtype": jnp.float32, "param_dtype": jnp.float32}
        return gemma4.Einsum("btd,df->btf", (16, 8), **settings)

    x, config = random(0, 2, 3, 16), MoRAConfig(rank=2)
    rule = {"equation": lambda layer, x: layer.einsum_str, "kernel": "w"}
    register_layer(gemma4.Einsum, **rule)
    with pytest.raises(ValueError, match=r"w: Einsum.__call__ .* `mul`.*scale="):
        mora.plan(make(0.25), config, x)
    register_layer(gemma4.Einsum, **rule, scale=lambda layer: layer.w_scale)
    for model in (make(0.25), make(None)):
        plan = mora.plan(model, config, x)
        assert merge_errors(model, None, plan, x)["w"] < 1e-5
