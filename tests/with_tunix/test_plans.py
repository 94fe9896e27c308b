"""What a plan of Tunix's models says: layers that nobody registered, scaled kernels."""

import importlib
from importlib.util import find_spec

import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import random
from tiny_qwen2 import SIZES, register

from mora_jax import LeftOutWarning, MoRAConfig, diagnostics
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
    """Other tests teach these classes."""
    known = layer_rules.registered().items()
    kept = {cls: rules for cls, rules in known if "tunix" not in cls.__module__}
    monkeypatch.setattr(layer_rules, "_RULES", kept)


def model_of(version, **settings):
    """A small model, and the class of its layers of three-axis kernels."""
    module = importlib.import_module(f"tunix.models.{version}.model")
    config = module.ModelConfig(**SIZES, **settings)
    model = getattr(module, version.capitalize())(config, rngs=nnx.Rngs(0))
    return model, module.Einsum


def test_attention_that_nobody_registered_is_named():
    model, _ = model_of("qwen2", use_tied_embedding=True)
    match = r"layers/\*/attn/q_proj/w \(2\): .* class Einsum with mora_jax.register"
    with pytest.warns(LeftOutWarning, match=match):
        plan = mora.plan(model)
    assert all("/mlp/" in path for path in plan)
    assert "layers/*/attn/o_proj/w (2)" in str(plan).split("left out:")[1]


def test_experts_that_are_bare_parameters_are_named():
    model, einsum = model_of("qwen3", num_experts=4, num_experts_per_tok=2)
    register(einsum)
    with pytest.warns(LeftOutWarning, match=r"layers/\*/mlp/down_proj \(2\)") as seen:
        plan = mora.plan(model)
    assert "attn" not in str(seen[0].message) and len(plan) == 2 * 4


def test_scaled_kernels_are_merged_into_the_kernel():
    """Gemma 4 multiplies by `w * w_scale` in some of its layers."""
    from tunix.models.gemma4 import model as gemma4  # pyright: ignore

    def make(w_scale):
        settings = {"sharding": (None, None), "rngs": nnx.Rngs(0), "w_scale": w_scale}
        settings |= {"dtype": jnp.float32, "param_dtype": jnp.float32}
        return gemma4.Einsum("btd,df->btf", (16, 8), **settings)

    x, config = random(0, 2, 3, 16), MoRAConfig(rank=2)
    register(gemma4.Einsum)
    with pytest.raises(ValueError, match=r"w: Einsum.__call__ .* `mul`.*scale="):
        mora.plan(make(0.25), config, x)
    register(gemma4.Einsum, scale=lambda layer: layer.w_scale)
    for model in (make(0.25), make(None)):
        plan = mora.plan(model, config, x)
        assert diagnostics.check(model, None, plan, x)["w"] < 1e-5
