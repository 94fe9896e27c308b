"""transformers and PEFT compute what Tunix did, from files that we write for them."""

import pytest
from helpers import close
from processes import ROOT
from safetensors.numpy import load_file
from tunix_models import IDS

from mora_jax import io

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DATA = ROOT / "tests/data/tunix"


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS, dtype=torch.long)).logits.numpy()


def loaded(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_logits_are_those_of_tunix(tmp_path, name):
    """Of the base, of the base merged, and of the base with a LoRA."""
    base = DATA / name
    adapters = io.load(base / "adapter")
    expected = load_file(DATA / f"{name}_logits.safetensors")
    close(logits(loaded(base)), expected["base"], 1e-5)
    io.merge_checkpoint(base, adapters, tmp_path / "merged", "tunix")
    merged = logits(loaded(tmp_path / "merged"))
    close(merged, expected["adapted"], 1e-5)
    io.export(tmp_path / "lora", adapters, "peft", "tunix", rank=32)
    model = peft.PeftModel.from_pretrained(loaded(base), tmp_path / "lora")
    close(logits(model), expected["adapted"], 1e-5)
