"""Families of names, on transformers' own models in PyTorch and in Flax."""

import numpy as np
import pytest
from adapter_files import flatten, made

import mora_jax
from mora_jax import MoRAConfig, io
from mora_jax.io._names import FAMILIES, pairs, to_kernel, to_module

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
MODELS = {
    "llama": ("Llama", "ForCausalLM", DECODER),
    "gemma": ("Gemma", "ForCausalLM", DECODER),
    "qwen": ("Qwen2", "ForCausalLM", DECODER),
    "gpt2": ("GPT2", "LMHeadModel", GPT2),
    "bert": ("Bert", "ForMaskedLM", SIZES),
}
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


assert MODELS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", [name for name in MODELS if name != "qwen"])
def test_names_are_those_of_the_flax_model(family):
    """Each matrix inside the layers has a kernel, and each kernel a matrix."""
    tree = flatten(model_of(family, "Flax", _do_init=False).params_shape_tree)
    expected = {
        path: leaf.shape
        for path, leaf in tree.items()
        if path.endswith("/kernel") and any(map(str.isdigit, path.split("/")))
    }
    found = set()
    for module, shape in weights(model_of(family)).items():
        kernel, axes = to_kernel(module, pairs(family)) or ("", "")
        assert to_module(kernel, pairs(family)) == (module, axes)
        assert sorted(expected[kernel]) == sorted(shape)
        found.add(kernel)
    assert found == expected.keys()


@pytest.mark.parametrize("family", MODELS)
def test_merged_is_the_lora(tmp_path, family):
    """What PEFT makes of our LoRA is what transformers makes of our merged weights."""
    model, base = model_of(family).eval(), tmp_path / "base"
    model.save_pretrained(base)
    config = MoRAConfig(rank=2, operator="sharing", targets=".*/kernel")
    plan = mora_jax.plan(io.Checkpoint(base).shapes(family), config)
    assert len(plan) == len(weights(model))
    adapters = made(plan, scale=0.1)
    io.merge_checkpoint(base, adapters, plan, tmp_path / "merged", family)
    io.save_peft_lora(tmp_path / "lora", adapters, plan, family, task_type=None)
    ids = torch.tensor(IDS)
    with torch.no_grad():
        before = model(ids).logits
        merged = type(model).from_pretrained(tmp_path / "merged").eval()(ids).logits
        lora = peft.PeftModel.from_pretrained(model, tmp_path / "lora")(ids).logits
    np.testing.assert_allclose(lora.numpy(), merged.numpy(), atol=1e-4)
    assert float((merged - before).abs().max()) > 1e-2
