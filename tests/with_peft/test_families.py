"""PEFT and transformers load what we export and merge, of every family and operator."""

import jax
import numpy as np
import pytest
from adapter_files import assert_same, flatten, made
from flax import traverse_util
from pytorch_states import in_flax, shapes

import mora_jax
from mora_jax import MoRAConfig, io
from mora_jax._common.axes import may_be_conv1d
from mora_jax.io._names import FAMILIES, bijection
from mora_jax.operators import OPERATORS

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [
    # transformers announces the end of its Flax models, and uses old names of JAX.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "intermediate_size": 48}
DECODER = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4}
NEO = {"vocab_size": 50, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
NEO |= {"attention_types": [[["global", "local"], 1]], "intermediate_size": 48}
MODELS = {
    "llama": ("Llama", "ForCausalLM", DECODER),
    "gemma": ("Gemma", "ForCausalLM", DECODER),
    "qwen": ("Qwen2", "ForCausalLM", DECODER),
    "gpt2": ("GPT2", "LMHeadModel", GPT2),
    "gptj": ("GPTJ", "ForCausalLM", GPT2 | {"rotary_dim": 4}),
    "gpt_neo": ("GPTNeo", "ForCausalLM", NEO),
    "bloom": ("Bloom", "ForCausalLM", SIZES | {"n_layer": 2, "n_head": 4}),
    "bert": ("Bert", "ForMaskedLM", SIZES),
}
assert MODELS.keys() == FAMILIES.keys()
IDS = np.random.default_rng(0).integers(0, 50, (2, 7))


def model_of(family, prefix="", **settings):
    """A tiny model of random weights."""
    torch.manual_seed(0)
    name, head, sizes = MODELS[family]
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{prefix}{name}{head}")(config, **settings)


def weights(model):
    """{module: shape of its weight} of all matrices inside the layers."""
    return {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if tensor.ndim == 2 and any(word.isdigit() for word in name.split("."))
    }


@pytest.mark.parametrize("family", MODELS)
def test_names_are_those_of_the_flax_model(family):
    """Each matrix inside the layers has a kernel, and each kernel a matrix."""
    modules, layout = weights(model_of(family)), "io" if family == "gpt2" else "oi"
    for names in (bijection(family), bijection(None)):
        for module in modules:
            for name in (module, module.partition(".")[2]):  # with a head and without
                kernel = name.replace(".", "/") + "/kernel"
                pair = next(names.of_module(name))
                assert pair[:2] == (name, kernel)
                assert pair.axes == layout or may_be_conv1d(name)
                assert pair == next(names.of_kernel(kernel))
        assert not any(names.of_module("lm_head"))
    if family == "qwen":
        return  # transformers has no such model in Flax
    tree = flatten(model_of(family, "Flax", _do_init=False).params_shape_tree)
    expected = {
        path.removesuffix("/kernel").replace("/", "."): sorted(leaf.shape)
        for path, leaf in tree.items()
        if path.endswith("/kernel") and any(map(str.isdigit, path.split("/")))
    }
    assert expected == {module: sorted(shape) for module, shape in modules.items()}


CASES = [(family, "sharing") for family in MODELS]
CASES += [("llama", operator) for operator in OPERATORS if operator != "sharing"]


@pytest.mark.parametrize(("family", "operator"), CASES)
def test_merged_is_the_lora(tmp_path, family, operator):
    """What PEFT makes of our LoRA is what transformers makes of our merged weights."""
    model, base, lora = model_of(family).eval(), tmp_path / "base", tmp_path / "lora"
    model.save_pretrained(base)
    config = MoRAConfig(rank=2, operator=operator, alpha=0.5, targets=".*/kernel")
    plan = mora_jax.plan(io.Checkpoint(base).shapes(family), config)
    assert len(plan) == len(weights(model))
    assert plan == mora_jax.plan(io.Checkpoint(base).shapes(), config)
    adapters = made(plan, scale=0.1)
    io.merge_checkpoint(base, adapters, tmp_path / "merged")
    rank = 32 if OPERATORS[operator].block else None  # all of it
    lost = io.export(lora, adapters, "peft", rank=rank, task_type=None).lost
    assert len(lost) == len(plan) and max(lost.values()) < 1e-5
    ids = torch.tensor(IDS)
    with torch.no_grad():
        before = model(ids).logits
        merged = type(model).from_pretrained(tmp_path / "merged").eval()(ids).logits
        adapted = peft.PeftModel.from_pretrained(model, lora)(ids).logits
    np.testing.assert_allclose(adapted.numpy(), merged.numpy(), atol=1e-4)
    assert float((merged - before).abs().max()) > 1e-2


@pytest.mark.parametrize("operator", ["sharing", "rotation"])
def test_kernels_of_tunix(tmp_path, operator):
    """Its kernels have heads on an axis of their own."""
    model, base = model_of("qwen").eval(), tmp_path / "base"
    model.save_pretrained(base)
    width, heads, kv_heads, head = 32, 4, 2, 8
    kernels = {
        "attn/q_proj/w": (width, heads, head),
        "attn/k_proj/w": (width, kv_heads, head),
        "attn/v_proj/w": (width, kv_heads, head),
        "attn/o_proj/w": (heads, head, width),
        "mlp/gate_proj/kernel": (width, 48),
        "mlp/up_proj/kernel": (width, 48),
        "mlp/down_proj/kernel": (48, width),
    }
    leaves = {
        f"layers/{n}/{path}": jax.ShapeDtypeStruct(shape, np.float32)
        for n in range(2)
        for path, shape in kernels.items()
    }
    axes = {".*/[qkv]_proj/w": {"axes": "ioo"}, ".*/o_proj/w": {"axes": "iio"}}
    config = MoRAConfig(rank=2, operator=operator, targets=".*", overrides=axes)
    plan = mora_jax.plan(traverse_util.unflatten_dict(leaves, sep="/"), config)
    adapters = made(plan, scale=0.1)
    io.merge_checkpoint(base, adapters, tmp_path / "merged", "tunix")
    lora, rank = tmp_path / "lora", 32 if operator == "rotation" else None
    io.export(lora, adapters, "peft", "tunix", task_type=None, rank=rank)
    ids = torch.tensor(IDS)
    with torch.no_grad():
        before = model(ids).logits
        merged = type(model).from_pretrained(tmp_path / "merged").eval()(ids).logits
        adapted = peft.PeftModel.from_pretrained(model, lora)(ids).logits
    np.testing.assert_allclose(adapted.numpy(), merged.numpy(), atol=1e-4)
    assert float((merged - before).abs().max()) > 1e-2


LIKE_LLAMA = [("qwen2", "Qwen2"), ("qwen3", "Qwen3"), ("gemma3", "Gemma3")]


@pytest.mark.parametrize("family", [name for name in MODELS if name != "qwen"])
def test_flax_models_start_from_pytorchs_files(tmp_path, family):
    model, flax = model_of(family).eval(), model_of(family, "Flax", _do_init=False)
    model.save_pretrained(tmp_path)
    params = io.load_base(tmp_path, flax.params_shape_tree, family)
    with torch.no_grad():
        expected = model(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(flax(IDS, params=params)[0], expected, atol=1e-4)


SQUARE = {"gpt2": "attn.c_proj", "gptj": "attn.q_proj", "bloom": "self_attention.dense"}


@pytest.mark.parametrize("family", SQUARE)
def test_a_lora_of_square_weights_in_a_flax_model_and_in_files(tmp_path, family):
    """No shape tells which way round they are."""
    model, flax = model_of(family).eval(), model_of(family, "Flax", _do_init=False)
    model.save_pretrained(tmp_path / "base")
    params = io.load_base(tmp_path / "base", flax.params_shape_tree)
    settings = {"r": 2, "init_lora_weights": False, "target_modules": [SQUARE[family]]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    adapted.save_pretrained(tmp_path / "lora")
    with torch.no_grad():
        expected = adapted(torch.tensor(IDS)).logits.numpy()
    for given in (params, mora_jax.plan(params), None):
        adapters = io.load_peft(tmp_path / "lora", given)
        merged = mora_jax.merge(params, adapters)
        np.testing.assert_allclose(flax(IDS, params=merged)[0], expected, atol=1e-4)
        io.merge_checkpoint(tmp_path / "base", adapters, tmp_path / "out", force=True)
        read = io.load_base(tmp_path / "out", flax.params_shape_tree)
        np.testing.assert_allclose(flax(IDS, params=read)[0], expected, atol=1e-4)


@pytest.mark.parametrize(("family", "name"), LIKE_LLAMA)
def test_each_tensor_of_pytorchs_files_has_its_leaf(tmp_path, family, name):
    """Of models that transformers does not have in Flax."""
    config = "Gemma3TextConfig" if family == "gemma3" else f"{name}Config"
    config = getattr(transformers, config)(**DECODER)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    state = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    expected = in_flax(family, state)
    assert_same(io.load_base(tmp_path, shapes(expected), family), expected)
