"""Hugging Face PEFT loads our exported LoRAs, and computes what MoRA does."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import made
from base_files import DATA, NAMES, base, llama

from mora_jax import MoRAConfig, MoRAWarning, io, linen
from mora_jax.operators import OPERATORS

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

IDS = np.random.default_rng(0).integers(0, 97, (2, 9), np.int32)


BASE = DATA / "type1" / "base_model.safetensors"


def torch_llama(file=BASE):
    """The same Llama in PyTorch."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = json.loads((DATA / "llama.json").read_text())
    model = LlamaForCausalLM(LlamaConfig(**settings))
    state = load_file(file)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # it is tied
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS, dtype=torch.long)).logits.numpy()


MODEL, PARAMS = llama(), base(1)
TABLE = {"model.embed_tokens": "embed_tokens/embedding"}
BLOCKS = {name for name, operator in OPERATORS.items() if operator.block}


@pytest.mark.parametrize("operator", OPERATORS)
def test_logits(tmp_path, operator):
    config = MoRAConfig(rank=4, operator=operator, alpha=0.5)
    variables = {"params": PARAMS}
    plan = linen.plan(MODEL, variables, config, IDS)
    adapters = made(plan, scale=0.1)
    expected = linen.wrap(MODEL, plan)(adapters, variables, IDS)
    rank = 64 if operator in BLOCKS else None  # all of it
    lost = io.save_peft_lora(tmp_path / "a", adapters, plan, NAMES, rank=rank)
    assert len(lost) == 14 and max(lost.values()) < 1e-5
    model = peft.PeftModel.from_pretrained(torch_llama(), tmp_path / "a")
    np.testing.assert_allclose(logits(model), expected, atol=1e-4)
    base_logits = MODEL.apply(variables, IDS)
    assert float(jnp.abs(expected - base_logits).max()) > 0.1


def test_logits_of_an_adapted_embedding(tmp_path):
    """The head is tied to it: merged, both change; a LoRA changes what is looked up."""
    config = MoRAConfig(
        rank=4, operator="sharing", targets=(".*q_proj/kernel", ".*embedding")
    )
    variables = {"params": PARAMS}
    plan = linen.plan(MODEL, variables, config, IDS)
    adapters = made(plan, scale=0.1)
    expected = linen.wrap(MODEL, plan)(adapters, variables, IDS)
    with pytest.warns(MoRAWarning, match="tied"):
        io.save_peft_lora(tmp_path / "a", adapters, plan, NAMES | TABLE)
    io.merge_checkpoint(BASE, adapters, plan, tmp_path / "merged", NAMES | TABLE)
    merged = torch_llama(tmp_path / "merged" / BASE.name)
    np.testing.assert_allclose(logits(merged), expected, atol=1e-4)
    merged.lm_head.weight = torch_llama().lm_head.weight
    expected = logits(merged)
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
        model = peft.PeftModel.from_pretrained(torch_llama(), tmp_path / "a")
    np.testing.assert_allclose(logits(model), expected, atol=1e-4)
