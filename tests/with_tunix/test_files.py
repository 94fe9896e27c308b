"""Models of Tunix in transformers' files: bases in, adapters and merged models out.

What tests/data/tunix holds, transformers and PEFT read in tests/with_peft. There a
model of Tunix and its adapters are a checkpoint, an adapter as `io.save` writes it, and
the logits of the two in Tunix. `python tests/with_tunix/test_files.py` writes it.
"""

import importlib
import json
from importlib.util import find_spec

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, random_like
from processes import ROOT
from safetensors.numpy import load_file, save_file
from tunix_models import (
    gemma_as_transformers,
    logits,
    qwen_as_transformers,
    tiny,
)

from mora_jax import MoRAConfig, io
from mora_jax import nnx as mora

if find_spec("tunix") is None:
    pytest.skip("tunix is not installed", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # what Tunix uses is deprecated

DATA = ROOT / "tests/data/tunix"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SIZES |= {"vocab_size": 32, "tie_word_embeddings": True}
CONFIGS = {
    "qwen2": {"model_type": "qwen2", "rms_norm_eps": 1e-5, "rope_theta": 1e4},
    "gemma3": {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention"],
        "sliding_window": 4,
    },
}
ADAPTERS = MoRAConfig(rank=2, alpha=0.3)


def as_transformers(name, model):
    if name == "qwen2":
        return qwen_as_transformers(model)
    return gemma_as_transformers(model, one=name in ("gemma", "gemma one query"))


def read_into(model, file):
    params = nnx.state(model, nnx.Param)
    like = jax.eval_shape(lambda: params)
    nnx.update(model, io.load_base(file, like, "tunix"))
    return model


def write_data():
    """Write the files of tests/data/tunix."""
    for name, config in CONFIGS.items():
        folder, (base, _) = DATA / name, tiny(name)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(as_transformers(name, base), folder / "model.safetensors")
        text = json.dumps(SIZES | config, indent=1)
        (folder / "config.json").write_text(text + "\n")
        found = {"base": np.asarray(logits(base))}
        adapted = mora.wrap(base, ADAPTERS)
        mora.set_adapters(adapted, random_like(mora.adapters(adapted)))
        io.save(folder / "adapter", mora.adapters(adapted))
        found["adapted"] = np.asarray(logits(adapted))
        save_file(found, DATA / f"{name}_logits.safetensors")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_data_is_what_tunix_computes(name):
    model, _ = tiny(name)
    nnx.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    base = read_into(model, DATA / name)
    expected = load_file(DATA / f"{name}_logits.safetensors")
    close(logits(base), expected["base"])
    adapters = io.load(DATA / name / "adapter", nnx.state(base, nnx.Param))
    adapted = mora.wrap(base, ADAPTERS)
    mora.set_adapters(adapted, adapters)
    close(logits(adapted), expected["adapted"])
    assert np.abs(expected["adapted"] - expected["base"]).max() > 0.05


@pytest.mark.parametrize("name", ["gemma", "gemma one query", "gemma 2", "gemma3"])
def test_merged_files_are_the_adapted_model(tmp_path, name):
    """Tunix's own loader, which has no Gemma 1, reads them as ours does."""
    base, _ = tiny(name)
    tensors = as_transformers(name, base)
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base/model.safetensors")
    params = nnx.state(base, nnx.Param)
    like = jax.eval_shape(lambda: params)
    found = io.load_base(tmp_path / "base", like, "tunix")
    chex.assert_trees_all_equal(found, params)
    adapted = mora.wrap(base, ADAPTERS)
    mora.set_adapters(adapted, random_like(mora.adapters(adapted)))
    adapters, merged = mora.adapters(adapted), tmp_path / "merged"
    io.merge_checkpoint(tmp_path / "base", adapters, merged, "tunix")
    library = importlib.import_module(
        f"tunix.models.{name.split()[0]}.params_safetensors"
    )
    for folder, expected in ("base", base), ("merged", adapted):
        close(logits(read_into(tiny(name)[0], tmp_path / folder)), logits(expected))
        if name in ("gemma 2", "gemma3"):
            loaded = library.create_model_from_safe_tensors(
                str(tmp_path / folder), base.config, dtype=jnp.float32
            )
            close(logits(loaded), logits(expected))
    assert np.abs(logits(adapted) - logits(base)).max() > 0.05
    lost = io.export(tmp_path / "lora", adapters, "peft", "tunix", rank=32).lost
    assert {f"{module}.weight" for module in lost} == {
        name for name in tensors if name.endswith("_proj.weight")
    }


if __name__ == "__main__":
    write_data()
