"""vLLM serves an M on a classifier's head: the scores of the merged model."""

# pyright: reportMissingImports=false

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import mora_jax
from mora_jax import io

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not here"
)

WIDTH, HIDDEN, VOCAB, LABELS = 128, 256, 96, 5
SHAPES = {
    "model.layers.0.self_attn.q_proj": (WIDTH, WIDTH),
    "model.layers.0.self_attn.k_proj": (WIDTH, WIDTH),
    "model.layers.0.self_attn.v_proj": (WIDTH, WIDTH),
    "model.layers.0.self_attn.o_proj": (WIDTH, WIDTH),
    "model.layers.0.mlp.gate_proj": (WIDTH, HIDDEN),
    "model.layers.0.mlp.up_proj": (WIDTH, HIDDEN),
    "model.layers.0.mlp.down_proj": (HIDDEN, WIDTH),
    "score": (WIDTH, LABELS),
}
ADAPTED = {
    "head": ["score"],
    "body": ["model.layers.0.self_attn.q_proj"],
    "both": ["score", "model.layers.0.mlp.up_proj"],
}
CONFIG = {
    "architectures": ["LlamaForSequenceClassification"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "num_hidden_layers": 1,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "num_labels": LABELS,
    "dtype": "float32",
}
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def write_base(directory, random):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    shapes = {name: shape[::-1] for name, shape in SHAPES.items()}
    shapes["model.embed_tokens"] = VOCAB, WIDTH
    tensors = {
        f"{name}.weight": random.standard_normal(shape).astype("f") / WIDTH**0.5
        for name, shape in shapes.items()
    }
    norms = "input_layernorm", "post_attention_layernorm"
    for name in ("model.norm", *(f"model.layers.0.{norm}" for norm in norms)):
        tensors[f"{name}.weight"] = np.ones(WIDTH, "f")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def adapters_of(modules, random):
    """Adapters that change the scores, and the names of their modules."""
    params = {f"m{k}": {"kernel": jnp.zeros(SHAPES[m])} for k, m in enumerate(modules)}
    config = mora_jax.MoRAConfig(rank=2)
    adapters = mora_jax.init(mora_jax.plan(params, config))
    for name in params:
        adapter = adapters[name]["kernel_mora"]
        m = random.standard_normal(adapter.m.shape).astype("f")
        adapters[name]["kernel_mora"] = mora_jax.Adapter(jnp.asarray(m), adapter.spec)
    return adapters, {m: f"m{k}/kernel" for k, m in enumerate(modules)}


def scores_of(directory, prompts):
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32
    )
    with torch.no_grad():
        return np.concatenate([model(torch.tensor([p])).logits for p in prompts])


def test_scores_are_the_merged_models(tmp_path):
    """Prompts of different lengths, adapters and the base share a batch."""
    random = np.random.default_rng(0)
    base = tmp_path / "base"
    write_base(base, random)
    prompts = [random.integers(1, VOCAB, n).tolist() for n in (9, 4, 17)]
    expected = {"": scores_of(base, prompts)}
    directories = {}
    for name, modules in ADAPTED.items():
        adapters, names = adapters_of(modules, random)
        directories[name] = str(tmp_path / name)
        io.export(directories[name], adapters, "vllm", names, native=True)
        merged = tmp_path / f"{name}-merged"
        io.merge_checkpoint(base, adapters, merged, names)
        (merged / "config.json").write_text(json.dumps(CONFIG))
        expected[name] = scores_of(merged, prompts)
        assert np.abs(expected[name] - expected[""]).max() > 0.1
    asked = {"base": str(base), "prompts": prompts, "adapters": directories}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("classifier.py"), tmp_path / "out"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    found = json.loads((tmp_path / "out").read_text())
    assert found.keys() == expected.keys()
    for name, scores in expected.items():
        np.testing.assert_allclose(found[name], scores, rtol=0, atol=1e-3, err_msg=name)
