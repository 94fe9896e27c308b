"""What a plan of Tunix's models says: layers that nobody registered, scaled kernels."""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mora_jax import LeftOutWarning, MoRAConfig, diagnostics, layers, register_layer
from mora_jax import nnx as mora

if find_spec("tunix") is None:
    pytest.skip("tunix is not installed", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tunix"),
    pytest.mark.filterwarnings(
        "ignore:'sharding' is deprecated:DeprecationWarning:flax.nnx.variablelib"
    ),
]

SIZES = {
    "num_layers": 2,
    "vocab_size": 64,
    "embed_dim": 32,
    "hidden_dim": 64,
    "num_heads": 2,
    "head_dim": 16,
    "num_kv_heads": 2,
    "rope_theta": 10_000,
    "norm_eps": 1e-5,
}


def qwen2():
    from tunix.models.qwen2 import model as qwen2  # pyright: ignore

    config = qwen2.ModelConfig(**SIZES, use_tied_embedding=True)
    return qwen2.Qwen2(config, rngs=nnx.Rngs(0)), qwen2.Einsum


def qwen3(**experts):
    from tunix.models.qwen3 import model as qwen3  # pyright: ignore

    config = qwen3.ModelConfig(**SIZES, **experts)
    return qwen3.Qwen3(config, rngs=nnx.Rngs(0)), qwen3.Einsum


@pytest.fixture
def unregistered(monkeypatch):
    """Other tests teach these classes."""
    kept = {
        cls: rules
        for cls, rules in layers.registered().items()
        if not cls.__module__.startswith("tunix")
    }
    monkeypatch.setattr(layers, "_RULES", kept)


def test_attention_that_nobody_registered_is_named(unregistered):
    model, _ = qwen2()
    match = r"layers/\*/attn/q_proj/w \(2\): .* class Einsum with mora_jax.register"
    with pytest.warns(LeftOutWarning, match=match):
        plan = mora.plan(model)
    assert all("/mlp/" in path for path in plan)
    assert "layers/*/attn/o_proj/w (2)" in str(plan).split("left out:")[1]


def test_experts_that_are_bare_parameters_are_named(unregistered):
    model, einsum = qwen3(num_experts=4, num_experts_per_tok=2)
    equation = lambda layer, x: layer.einsum_str  # noqa: E731
    register_layer(einsum, equation=equation, kernel="w")
    with pytest.warns(LeftOutWarning, match=r"layers/\*/mlp/down_proj \(2\)") as seen:
        plan = mora.plan(model)
    assert "attn" not in str(seen[0].message) and len(plan) == 2 * 4


def test_scaled_kernels_are_merged_into_the_kernel(unregistered):
    """Gemma 4 multiplies by `w * w_scale` in some of its layers."""
    from tunix.models.gemma4 import model as gemma4  # pyright: ignore

    def make(w_scale):
        return gemma4.Einsum(
            "btd,df->btf",
            (16, 8),
            rngs=nnx.Rngs(0),
            sharding=(None, None),
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            w_scale=w_scale,
        )

    x, config = jax.random.normal(jax.random.key(0), (2, 3, 16)), MoRAConfig(rank=2)
    equation = lambda layer, x: layer.einsum_str  # noqa: E731
    register_layer(gemma4.Einsum, equation=equation, kernel="w")
    with pytest.raises(ValueError, match=r"w: Einsum.__call__ .* `mul`.*scale="):
        mora.plan(make(0.25), config, x)
    scale = lambda layer: layer.w_scale  # noqa: E731
    register_layer(gemma4.Einsum, equation=equation, kernel="w", scale=scale)
    for model in (make(0.25), make(None)):
        plan = mora.plan(model, config, x)
        assert diagnostics.check(model, None, plan, x)["w"] < 1e-5
