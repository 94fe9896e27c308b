"""The models of gemma, its samplers and Kauldron's trainer; nobody here wrote them.

Run by `make test-gemma`, in an environment of its own. All models are tiny and random.
"""

import contextlib
import dataclasses
from importlib.util import find_spec

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import close, python_blocks, random_like, trained
from processes import ROOT
from safetensors.numpy import load_file
from tunix_models import IDS

import mora_jax
from examples.gemma_module import MoRA
from mora_jax import LeftOutWarning, MoRAConfig, MoRAWarning, io, linen

if find_spec("gemma") is None:
    pytest.skip("gemma is not installed", allow_module_level=True)

# What gemma imports uses old names of many packages.
pytestmark = pytest.mark.filterwarnings("ignore", "error::mora_jax.MoRAWarning")
KEY, TOKENS = jax.random.key(0), jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
CONFIG = MoRAConfig(rank=2)
SMALL = {"num_embed": 13, "embed_dim": 16, "hidden_dim": 32, "num_heads": 2}
SMALL |= {"head_dim": 8, "num_kv_heads": 1, "vision_encoder": None}
GLOBAL = {"num_global_kv_heads": 1, "global_key_size": 8}
EXPERTS = {"num_experts": 4, "expert_dim": 16, "top_k_experts": 2}
MODELS = {
    "Gemma2_2B": {},
    "Gemma3_1B": {},
    "Gemma3n_E2B": {
        "per_layer_input_dim": 8,
        "laurel_rank": 4,
        "num_altup_inputs": 2,
        "kv_cache_sharing_config": None,
    },
    "Gemma4_E2B": {
        "per_layer_input_dim": 8,
        "global_key_size": 8,
        "override_kv_shared_ffw_hidden": 64,
        "audio_encoder": None,
    },
    "Gemma4_31B": GLOBAL,
    "Gemma4_26B_A4B": GLOBAL | EXPERTS | {"moe_dense_hidden_dim": 32},
}
"""{model of gemma: what makes it tiny, beside SMALL}."""
LEFT_OUT = dict.fromkeys(MODELS, set()) | {
    "Gemma3n_E2B": {
        "embedder/per_layer_input_embedding",
        "layer_*/altup/correction_coefs",
        "layer_*/altup/modality_router/w",
        "layer_*/altup/prediction_coefs",
    },
    "Gemma4_E2B": {
        "embedder/per_layer_embeddings",
        "layer_*/attn/kv_einsum/w",  # of layers that use the keys of others
    },
    "Gemma4_26B_A4B": {
        "layer_*/mlp/gating_einsum/w",
        "layer_*/mlp/linear/w",
        "layer_*/mlp/router_logits/w",
    },
}
"""{model: what gets no adapter, beside the table of embeddings}."""


def tiny(name):
    """A model with a layer of each kind of attention, and its params."""
    from gemma import gm  # pyright: ignore

    cls = getattr(gm.nn, name)
    kinds = cls.config.attention_types[-2:]
    small = SMALL | MODELS[name] | {"attention_types": kinds}
    if name == "Gemma4_E2B":  # two more layers, with the keys and values of these
        sharing = cls.config.kv_cache_sharing_config
        half = dataclasses.replace(sharing, frac_shared_layers=0.5)
        small |= {"kv_cache_sharing_config": half, "attention_types": 2 * kinds}
    config = dataclasses.replace(cls.config, **small)
    model = cls(config=config, dtype=jnp.float32)
    shapes = jax.eval_shape(model.init, KEY, TOKENS)["params"]
    return model, random_like(shapes, 0.2)


WARNINGS = {
    "Gemma4_26B_A4B": (LeftOutWarning, "teach its class _Weight"),
}


def planned(name, model, params):
    expected = contextlib.nullcontext()
    if name in WARNINGS:
        category, told = WARNINGS[name]
        expected = pytest.warns(category, match=told)
    with expected:
        return linen.plan(model, {"params": params}, CONFIG, TOKENS)


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_has_an_adapter_and_merging_is_exact(name):
    model, params = tiny(name)
    plan = planned(name, model, params)
    left_out = {kind.pattern for kind in plan.left_out}
    assert left_out == LEFT_OUT[name] | {"embedder/input_embedding"}
    apply, adapters = linen.wrap(model, plan), trained(plan)

    @jax.jit
    def gradient(adapters, params):
        def loss(adapters):
            logits = apply(adapters, {"params": params}, TOKENS).logits
            return jnp.mean(jax.nn.log_softmax(logits)[..., 0]), logits

        return jax.grad(loss, has_aux=True)(adapters)

    grads, logits = gradient(adapters, params)
    assert all(grad.m.any() for grad in flatten_dict(grads).values())
    assert not plan.unproven
    merged = mora_jax.merge(params, adapters)
    close(model.apply({"params": merged}, TOKENS).logits, logits, 1e-4)


@pytest.mark.parametrize("name", ["Gemma3_1B", "Gemma4_31B"])
def test_embeddings_may_be_adapted(name):
    """They are scaled where they are looked up, and not in the head."""
    model, params = tiny(name)
    config = MoRAConfig(rank=2, targets="embedder/input_embedding")
    plan = linen.plan(model, {"params": params}, config, TOKENS)
    assert not plan.unproven
    adapters = trained(plan)
    merged = mora_jax.merge(params, adapters)
    expected = model.apply({"params": merged}, TOKENS).logits
    got = linen.wrap(model, plan)(adapters, {"params": params}, TOKENS).logits
    close(got, expected, 1e-4)


def test_checkpoints_of_transformers_are_read_and_merged_into(tmp_path):
    """A tiny Gemma 3, whose logits are those of transformers and of Tunix."""
    from gemma import gm  # pyright: ignore

    data = ROOT / "tests/data/tunix"
    sizes = {"num_embed": 32, "embed_dim": 32, "hidden_dim": 64, "num_heads": 4}
    sizes |= {"num_kv_heads": 2, "sliding_window_size": 4, "vision_encoder": None}
    kinds = gm.nn.Gemma3_1B.config.attention_types[:1]
    config = dataclasses.replace(
        gm.nn.Gemma3_1B.config, head_dim=8, attention_types=kinds, **sizes
    )
    model = gm.nn.Gemma3_1B(config=config, dtype=jnp.float32)
    ids = IDS[1:]  # the first row has a 0, which gemma takes for padding
    shapes = jax.eval_shape(model.init, KEY, ids)["params"]
    params = io.load_base(data / "gemma3", shapes, "gm")
    expected = load_file(data / "gemma3_logits.safetensors")
    close(model.apply({"params": params}, ids).logits, expected["base"][1:])
    plan = linen.plan(model, {"params": params}, CONFIG, ids)
    adapters, merged = trained(plan), tmp_path / "merged"
    io.merge_checkpoint(data / "gemma3", adapters, merged, "gm")
    loaded = io.load_base(merged, shapes, "gm")
    close(loaded, mora_jax.merge(params, adapters))
    lost = io.export(tmp_path / "lora", adapters, "peft", "gm", rank=32).lost
    assert len(lost) == 7 and max(lost.values()) < 1e-5


def tokens_of(model, params):
    """What a sampler of gemma takes for the likeliest."""
    from gemma import gm  # pyright: ignore

    tokenizer = gm.testing.DummyTokenizer()
    settings = {"tokenizer": tokenizer, "cache_length": 32, "max_out_length": 8}
    sampler = gm.text.Sampler(model=model, params=params, pad_length=8, **settings)
    prompts = ["hello world", "My name is"]
    sampled = sampler.sample(prompts, return_state=True)
    return np.asarray(sampled.state.predicted_tokens)


@pytest.mark.parametrize("name", ["Gemma3_1B", "Gemma4_E2B"])
def test_the_sampler_gives_the_tokens_of_the_merged_model(name, monkeypatch):
    model, params = tiny(name)
    # The tokenizer of these tests has no version.
    info = dataclasses.replace(model.INFO, tokenizer_version=None)
    monkeypatch.setattr(type(model), "INFO", info)
    plan = planned(name, model, params)
    adapters = trained(plan)
    merged = mora_jax.merge(params, adapters)
    adapted = MoRA(model=model, plan=plan)
    got = tokens_of(adapted, {"base": params, "mora": adapters})
    np.testing.assert_array_equal(got, tokens_of(model, merged))
    assert (got != tokens_of(model, params)).any()


class Net(nn.Module):
    """A model with statistics, intermediates and a random stream of its own."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(16)(x)
        self.sow("intermediates", "hidden", x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        if self.has_rng("noise"):
            x += jax.random.normal(self.make_rng("noise"), x.shape)
        return x


def test_one_module_has_all_collections_and_streams_of_the_model():
    """As `gm.nn.LoRA` has them."""
    model, x = Net(), jax.random.normal(KEY, (4, 16))
    variables = model.init(KEY, x)
    plan = linen.plan(model, variables, CONFIG, x)
    adapters = trained(plan)
    adapted = MoRA(model=model, plan=plan)
    made = adapted.init(KEY, x)
    assert set(made) == {"params", "batch_stats"}
    close(made["batch_stats"], variables["batch_stats"], 0)
    assert set(made["params"]) == {"base", "mora"}
    params = {"base": variables["params"], "mora": adapters}
    both = {**variables, "params": params}
    merged = mora_jax.merge(variables["params"], adapters)
    merged = {**variables, "params": merged}
    close(adapted.apply(both, x), model.apply(merged, x))
    settings = {"train": True, "mutable": ["batch_stats", "intermediates"]}
    with pytest.warns(MoRAWarning, match="the call updates batch_stats"):
        y, updated = adapted.apply(both, x, **settings)
    expected, known = model.apply(merged, x, **settings)
    close(y, expected)
    assert set(updated) == {"batch_stats", "intermediates"}
    close(updated, known)
    one, again, two = (
        adapted.apply(both, x, rngs={"noise": jax.random.key(k)}) for k in (1, 1, 2)
    )
    assert (one == again).all() and not np.allclose(one, two)
    _, updated = adapted.apply(both, x, mutable=["params", "intermediates"])
    assert set(updated) == {"params", "intermediates"}
    close(updated["params"], params, 0)


def test_params_of_one_module_that_lack_a_part():
    model, x = nn.Dense(16), jnp.ones((1, 16))
    params = model.init(KEY, x)["params"]
    config = MoRAConfig(rank=2, targets="kernel")
    plan = linen.plan(model, {"params": params}, config, x)
    adapted = MoRA(model=model, plan=plan)
    for given in ({"params": {"base": params}}, {"params": params}, {}):
        with pytest.raises(ValueError, match="params must be {'base': .*, got"):
            adapted.apply(given, x)


def test_a_dense_layer_beside_gemma():
    """Whose modules make params by a method that demands their shape."""
    tiny("Gemma2_2B")  # from here on nn.Module.param is gemma's
    layer, x = mora_jax.MoRADense(16, config=CONFIG), jnp.ones((1, 16))
    params = layer.init(KEY, x)["params"]
    assert params["kernel_mora"].m.shape == (4, 4, 4)
    close(layer.apply({"params": params}, x), x @ params["kernel"])


def test_the_code_of_the_page_trains_the_adapters_alone(tmp_path):
    page = {"directory": str(tmp_path)}
    for block in python_blocks(ROOT / "docs/gemma.md"):
        exec(block, page)
    params, state = page["params"], page["state"]
    close(state.params["base"], params, 0)
    assert all(m.any() for m in jax.tree.leaves(page["adapters"]))
    numbers = sum(array.size for array in jax.tree.leaves(state.opt_state))
    assert numbers == 2 * page["plan"].trainable_parameters + 1  # Adam's, and its count
