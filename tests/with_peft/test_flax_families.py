"""transformers' models of all families in Flax: plan, train, load, export and merge.

No test says how a tensor is called. PyTorch's own models write the files, and compute
what is expected.
"""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import made
from helpers import largest
from processes import ROOT

import mora_jax
from mora_jax import MoRAConfig, io

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [
    # transformers announces the end of its Flax models, and uses old names of JAX.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

RANDOM = np.random.default_rng(0)
IDS = RANDOM.integers(5, 50, (2, 8))
IMAGES = RANDOM.normal(size=(2, 3, 16, 16)).astype(np.float32)
MELS = RANDOM.normal(size=(2, 4, 16)).astype(np.float32)

WORDS = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
TWO_TEXTS = {"input_ids": IDS, "decoder_input_ids": IDS[:, ::-1].copy()}

TEXT = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 4, "intermediate_size": 48}
TEXT |= {"max_position_embeddings": 40}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
GPT = {"vocab_size": 50, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 40}
NEO = {"vocab_size": 50, "hidden_size": 32, "num_layers": 1, "num_heads": 4}
NEO |= {"attention_types": [[["global"], 1]], "intermediate_size": 48}
PAIR = {"vocab_size": 50, "d_model": 32, "max_position_embeddings": 40}
PAIR |= {f"{k}coder_{what}": n for k in ("en", "de") for what, n in
         {"layers": 1, "attention_heads": 4, "ffn_dim": 48}.items()}  # fmt: skip
PAIR |= {"pad_token_id": 1, "decoder_start_token_id": 2, "eos_token_id": 2}
PAIR |= {"bos_token_id": 0, "forced_eos_token_id": 2}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1}
T5 |= {"num_heads": 4, "decoder_start_token_id": 0}
VIEW = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
VIEW |= {"intermediate_size": 48, "image_size": 16, "patch_size": 8}
DISTIL = {"vocab_size": 50, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48}
MEL = PAIR | {"max_source_positions": 8, "max_target_positions": 16, "num_mel_bins": 4}
XGLM = {"vocab_size": 50, "d_model": 32, "ffn_dim": 48, "num_layers": 1}
XGLM |= {"attention_heads": 4, "max_position_embeddings": 40}
SORTED = np.sort(IDS)  # CLIP takes what is at the largest
BOTH = {
    "input_ids": SORTED,
    "pixel_values": IMAGES,
    "attention_mask": np.ones_like(IDS),
}


def of_two(config, joined, *parts):
    """A function from nothing to the config of a model that is made of two."""

    def make():
        two = [getattr(transformers, f"{name}Config")(**own) for name, own in parts]
        return getattr(getattr(transformers, f"{config}Config"), joined)(*two)

    return make


CODER = "from_encoder_decoder_configs"
CROSS = {"is_decoder": True, "add_cross_attention": True}

CASES = {
    "albert": ("AlbertForMaskedLM", TEXT | {"embedding_size": 16}, WORDS),
    "bart": ("BartForConditionalGeneration", PAIR, TWO_TEXTS),
    "beit": ("BeitForImageClassification", VIEW, {"pixel_values": IMAGES}),
    "bert": ("BertForSequenceClassification", TEXT, WORDS),
    "big_bird": (
        "BigBirdForMaskedLM",
        TEXT | {"attention_type": "original_full"},
        WORDS,
    ),
    "blenderbot": ("BlenderbotForConditionalGeneration", PAIR, TWO_TEXTS),
    "blenderbot_small": ("BlenderbotSmallForConditionalGeneration", PAIR, TWO_TEXTS),
    "bloom": ("BloomForCausalLM", TEXT | {"n_layer": 1, "n_head": 4}, WORDS),
    "clip": (
        "CLIPModel",
        {"text_config": TEXT | {"eos_token_id": 2}, "vision_config": VIEW},
        BOTH,
    ),
    "dinov2": (
        "Dinov2ForImageClassification",
        VIEW | {"mlp_ratio": 2},
        {"pixel_values": IMAGES},
    ),
    "distilbert": ("DistilBertForQuestionAnswering", DISTIL, WORDS),
    "electra": (  # in Flax its default type of a token is another one
        "ElectraForMaskedLM",
        TEXT | {"embedding_size": 16},
        WORDS | {"token_type_ids": np.zeros_like(IDS)},
    ),
    "encoder_decoder": (
        "EncoderDecoderModel",
        of_two("EncoderDecoder", CODER, ("Bert", TEXT), ("Bert", TEXT | CROSS)),
        TWO_TEXTS,
    ),
    "gemma": ("GemmaForCausalLM", GROUPED, WORDS),
    "gpt2": ("GPT2LMHeadModel", GPT, WORDS),
    "gpt_neo": ("GPTNeoForCausalLM", NEO, WORDS),
    "gptj": ("GPTJForCausalLM", GPT | {"rotary_dim": 4}, WORDS),
    "llama": ("LlamaForCausalLM", GROUPED, WORDS),
    "longt5": ("LongT5ForConditionalGeneration", T5, TWO_TEXTS),
    "marian": ("MarianMTModel", PAIR, TWO_TEXTS),
    "mbart": ("MBartForConditionalGeneration", PAIR, TWO_TEXTS),
    "mistral": ("MistralForCausalLM", GROUPED, WORDS),
    "mt5": ("MT5ForConditionalGeneration", T5, TWO_TEXTS),
    "opt": (
        "OPTForCausalLM",
        TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 16},
        WORDS,
    ),
    "pegasus": ("PegasusForConditionalGeneration", PAIR, TWO_TEXTS),
    "roberta": ("RobertaForTokenClassification", TEXT, WORDS),
    "roberta_prelayernorm": ("RobertaPreLayerNormForMaskedLM", TEXT, WORDS),
    "roformer": ("RoFormerForMaskedLM", TEXT, WORDS),
    "t5": ("T5ForConditionalGeneration", T5, TWO_TEXTS),
    "vision_encoder_decoder": (
        "VisionEncoderDecoderModel",
        of_two("VisionEncoderDecoder", CODER, ("ViT", VIEW), ("GPT2", GPT | CROSS)),
        {"pixel_values": IMAGES, "decoder_input_ids": IDS},
    ),
    "vision_text_dual_encoder": (
        "VisionTextDualEncoderModel",
        of_two(
            "VisionTextDualEncoder",
            "from_vision_text_configs",
            ("ViT", VIEW),
            ("Bert", TEXT),
        ),
        BOTH,
    ),
    "vit": ("ViTForImageClassification", VIEW, {"pixel_values": IMAGES}),
    "whisper": (
        "WhisperForConditionalGeneration",
        MEL,
        {"input_features": MELS, "decoder_input_ids": IDS},
    ),
    "xglm": ("XGLMForCausalLM", XGLM, WORDS),
    "xlm_roberta": ("XLMRobertaForMaskedLM", TEXT, WORDS),
}
"""{family: PyTorch's class, the settings of its config, a call}."""

SKIPPED = {
    "big_bird": r"bert\.pooler\..*",
    "pegasus": r".*\.embed_positions\.weight",
    "roformer": r".*\.embed_positions\.weight",
}
"""Tensors that the model in Flax has no use for, or computes."""


def tables():
    """The rows of the page's table: {family: its cells}."""
    page = (ROOT / "docs" / "transformers.md").read_text()
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (.*) \|$", page, re.MULTILINE)
    return {name: cells for names, cells in rows for name in re.findall(r"\w+", names)}


def pair_of(family):
    """A tiny model of random weights in PyTorch, and its twin in Flax with shapes."""
    name, settings, call = CASES[family]
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    config = settings() if callable(settings) else cls.config_class(**settings)
    model = cls(config=config).eval()
    with torch.no_grad():  # what starts as zero would not tell where it is
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape))
    flax = getattr(transformers, f"Flax{name}")
    if callable(settings):
        flax = flax(model.config)
        return model, flax, flax.params, call
    flax = flax(model.config, _do_init=False)
    return model, flax, flax.params_shape_tree, call


def outputs(model, call):
    """The first output of PyTorch's model, an array."""
    with torch.no_grad():
        return model(**{k: torch.tensor(v) for k, v in call.items()})[0].numpy()


def called(flax, params, call):
    """(output, variables, arguments) of the module inside a Flax model."""
    found = []
    apply = type(flax.module).apply

    def recorded(module, variables, *args, **kwargs):
        found.append((variables, args, kwargs))
        return apply(module, variables, *args, **kwargs)

    with mock.patch.object(type(flax.module), "apply", recorded):
        output = flax(**call, params=params)[0]
    return output, *found[-1]


@pytest.mark.parametrize("family", CASES)
def test_a_family(tmp_path, monkeypatch, family):
    # T5 calls it by names that JAX no longer has.
    clip = jnp.clip
    monkeypatch.setattr(
        jnp, "clip", lambda x, a_min=None, a_max=None: clip(x, a_min, a_max)
    )
    model, flax, like, call = pair_of(family)
    base, lora, out = (tmp_path / name for name in ("base", "lora", "merged"))
    model.save_pretrained(base)
    before = outputs(model, call)
    # Load, by no names.
    params = io.load_base(base, like, skip=SKIPPED.get(family, ()))
    output, variables, args, kwargs = called(flax, params, call)
    np.testing.assert_allclose(output, before, atol=2e-4)
    # Plan: all projections, and no head.
    config = MoRAConfig(rank=2, operator="sharing")
    plan = mora_jax.linen.plan(flax.module, variables, config, *args, **kwargs)
    assert len(plan) and not plan.unproven
    # Train.
    apply, adapters = mora_jax.linen.wrap(flax.module, plan), made(plan, scale=0.1)

    def squared(own):
        return jnp.sum(jnp.square(apply(own, variables, *args, **kwargs)[0]))

    grads = jax.grad(squared)(adapters)
    assert all(float(jnp.abs(m).max()) > 0 for m in jax.tree.leaves(grads))
    adapted = apply(adapters, variables, *args, **kwargs)[0]
    assert largest(np.asarray(adapted) - before) > 1e-3
    # Merge.
    io.merge_checkpoint(base, adapters, out)
    merged = type(model).from_pretrained(out).eval()
    np.testing.assert_allclose(outputs(merged, call), adapted, atol=5e-4)
    # Export, and load again.
    done = io.export(lora, adapters, "peft", base_model=str(base))
    assert len(done.lost) == len(plan)
    # Names and shapes do not tell the axes of all of GPT-2's kernels.
    read = io.load_peft(
        lora, plan if {"gpt2", "vision_encoder_decoder"} & {family} else params
    )
    np.testing.assert_allclose(
        apply(read, variables, *args, **kwargs)[0], adapted, atol=5e-4
    )
    loaded = peft.PeftModel.from_pretrained(model, lora)
    np.testing.assert_allclose(outputs(loaded, call), adapted, atol=5e-4)


SOUND = {"vocab_size": 20, **TEXT, "num_feat_extract_layers": 2, "conv_dim": [8, 8]}
SOUND |= {"conv_stride": [2, 2], "conv_kernel": [4, 4], "feat_extract_norm": "layer"}
SOUND |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
SOUND |= {"do_stable_layer_norm": True, "hidden_dropout": 0.0}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
VALUES = RANDOM.normal(size=(2, 400)).astype(np.float32)
IN_MEMORY = {
    "resnet": ("ResNetForImageClassification", STAGES, {"pixel_values": IMAGES}),
    "regnet": (
        "RegNetForImageClassification",
        STAGES | {"groups_width": 8},
        {"pixel_values": IMAGES},
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", SOUND, {"input_values": VALUES}),
}
"""Families whose files have names, or arrays, that Flax's model does not have."""


@pytest.mark.parametrize("family", IN_MEMORY)
def test_a_family_in_memory(family):
    name, settings, call = IN_MEMORY[family]
    cls = getattr(transformers, f"Flax{name}")
    flax = cls(cls.config_class(**settings))
    output, variables, args, kwargs = called(flax, flax.params, call)
    targets = {} if family == "wav2vec2" else {"targets": ".*convolution/kernel"}
    config = MoRAConfig(rank=1, operator="sharing", **targets)
    plan = mora_jax.linen.plan(flax.module, variables, config, *args, **kwargs)
    assert len(plan) > 3 and not plan.unproven
    apply, adapters = mora_jax.linen.wrap(flax.module, plan), made(plan, scale=0.1)

    def first(own):
        found = apply(own, variables, *args, **kwargs)
        return jax.tree.leaves(found)[0] if kwargs.get("mutable") else found[0]

    grads = jax.grad(lambda own: jnp.sum(jnp.square(first(own))))(adapters)
    assert all(float(jnp.abs(m).max()) > 0 for m in jax.tree.leaves(grads))
    merged = {**variables, "params": mora_jax.merge(variables["params"], adapters)}
    found = flax.module.apply(merged, *args, **kwargs)
    expected = jax.tree.leaves(found)[0] if kwargs.get("mutable") else found[0]
    adapted = first(adapters)
    np.testing.assert_allclose(adapted, expected, atol=5e-4)
    assert largest(np.asarray(adapted) - np.asarray(output)) > 1e-3


def test_the_page_has_all_families():
    assert tables().keys() == CASES.keys() | IN_MEMORY.keys()
    assert all("in memory" in tables()[family] for family in IN_MEMORY)
    for family, pattern in SKIPPED.items():
        assert pattern in tables()[family]
