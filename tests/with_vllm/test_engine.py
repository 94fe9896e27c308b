"""vLLM serves M's as they are: one batch of adapters of all kinds, of a tiny Llama."""

# pyright: reportMissingImports=false

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

import mora_jax
from mora_jax import io

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not here"
)

TENSORS, STAGES = "tensor_parallel_size", "pipeline_parallel_size"
WIDTH, HIDDEN, VOCAB, LAYERS = 128, 256, 96, 2
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH // 2),
    "self_attn.v_proj": (WIDTH, WIDTH // 2),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (WIDTH, HIDDEN),
    "mlp.up_proj": (WIDTH, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDTH),
}
NAMES = {"model.layers.{n}.{block}.{name}": "layers_{n}/{block}/{name}/kernel"}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 0,
    "dtype": "float32",
}
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
RANDOM = np.random.default_rng(0)
PROMPTS = RANDOM.integers(1, VOCAB, (3, 40)).tolist()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny") / "base"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    shapes = {
        f"layers.{n}.{k}": s[::-1] for n in range(LAYERS) for k, s in SHAPES.items()
    }
    shapes |= {"embed_tokens": (VOCAB, WIDTH)}
    tensors = {
        f"model.{name}.weight": RANDOM.standard_normal(shape).astype("f") / WIDTH**0.5
        for name, shape in shapes.items()
    }
    tensors["lm_head.weight"] = RANDOM.standard_normal((VOCAB, WIDTH)).astype("f") / 5
    norms = [
        "norm",
        *(
            f"layers.{n}.{k}_layernorm"
            for n in range(LAYERS)
            for k in ("input", "post_attention")
        ),
    ]
    tensors |= {f"model.{name}.weight": np.ones(WIDTH, "f") for name in norms}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def adapters_of(case, seed):
    """Adapters of all kernels that say something else than the base."""
    params = {}
    for n in range(LAYERS):
        for path, shape in SHAPES.items():
            block, name = path.split(".")
            kernel = {"kernel": jnp.zeros(shape)}
            params.setdefault(f"layers_{n}", {}).setdefault(block, {})[name] = kernel
    random = np.random.default_rng(seed)
    config = mora_jax.MoRAConfig(rank=4, operator="sharing", scale="paper")
    plan, trees = mora_jax.plan(params, config), {}
    for path, spec in plan.items():
        op = case.make(spec.in_features, spec.out_features, 16, seed=seed)
        m = random.standard_normal(op.m_shape).astype("f")
        m *= 0.5 / np.linalg.norm(np.asarray(op.delta_weight(m)), 2)
        own = dataclasses.replace(spec, operator=op)
        trees[f"{path}_mora"] = mora_jax.Adapter(jnp.asarray(m), own)
    return unflatten_dict(trees, sep="/")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """All operators as they are, and a LoRA as one."""
    folder, trees = tmp_path_factory.mktemp("adapters"), {}
    for seed, case in enumerate(CASES):
        trees[case.label] = tree = adapters_of(case, seed)
        native = "low_rank" not in case.label
        io.export(folder / case.label, tree, "vllm", NAMES, native=native)
    return folder, trees


@pytest.fixture(scope="module")
def merged(base, exported, tmp_path_factory):
    """Bases with an adapter merged in."""
    folder = tmp_path_factory.mktemp("merged")
    for name, tree in exported[1].items():
        io.merge_checkpoint(base, tree, folder / name, NAMES)
        (folder / name / "config.json").write_text(json.dumps(CONFIG))
    return folder


def check(directory, answers):
    """Transformers says the same tokens, with the same log-probabilities."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens, numbers = np.moveaxis(np.array(answers), -1, 0)
    tokens = tokens.astype(int)
    ids = torch.tensor(np.concatenate([PROMPTS, tokens], 1))
    with torch.no_grad():
        logits = model(ids).logits.log_softmax(-1).numpy()[:, len(PROMPTS[0]) - 1 : -1]
    found = np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(numbers, found, rtol=0, atol=1e-4)
    assert (found >= logits.max(-1) - 1e-4).all()


def served(base, adapters, out, compiled=None, prompts=PROMPTS, **settings):
    asked = {
        "compile": compiled,
        "base": str(base),
        "prompts": prompts,
        "adapters": {name: str(path) for name, path in adapters.items()},
        "settings": {"max_lora_rank": 16, "max_loras": 8} | settings,
    }
    own = {}
    if settings.keys() & {TENSORS, STAGES}:
        own["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    if compiled:  # in one process, which is told to compile
        own["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "engine.py", out],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=ENVIRONMENT | own,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "as by default"])
def test_all_operators_in_one_batch(eager, base, exported, merged, tmp_path):
    """With a LoRA and the base; what is damaged or of another base is refused.

    Then two of them are replaced under their names while the engine runs.
    """
    folder, trees = exported
    paths = {name: folder / name for name in trees}
    paths |= bad_ones(folder / "block_diagonal", tmp_path)
    said = served(base, paths, tmp_path / "out", enforce_eager=eager, max_loras=32)
    reasons = {
        "damaged": "damaged",
        "fewer": "damaged",
        "wider": "of another base",
        "newer": "version 2",
    }
    assert said["refused"].keys() == reasons.keys() | {"head"}
    assert all(text in said["refused"][name] for name, text in reasons.items())
    assert "lm_head" in said["refused"]["head"]
    check(base, said["found"][""])
    for name in trees:
        check(merged / name, said["found"][name])
        assert said["found"][name] != said["found"][""]
    for (one, answers), other in zip(
        said["exchanged"].items(), reversed(said["exchanged"]), strict=True
    ):
        assert one != other
        check(merged / other, answers)


def test_two_devices_say_the_same(base, exported, merged, tmp_path):
    """With two slots for four adapters, which make room for each other."""
    names = "rotation", "block_diagonal", "damped-orthogonal", "signed_sharing"
    paths = {name: exported[0] / name for name in names}
    two = {TENSORS: 2, "enforce_eager": True, "max_loras": 2}
    said = served(base, paths, tmp_path / "out", **two)
    assert said["refused"] == {}
    for name in names:
        check(merged / name, said["found"][name])


def test_stages_take_their_own_layers(base, exported, tmp_path):
    """Asked they are not: vLLM 0.32 fails with stages on CPUs, adapters or not."""
    paths = {name: exported[0] / name for name in ("rotation", "damped-orthogonal")}
    two = {STAGES: 2, "enforce_eager": True, "prompts": []}
    said = served(base, paths, tmp_path / "out", **two)
    assert said["refused"] == {}
    assert said["found"].keys() == {"", *paths}


@pytest.mark.parametrize("mode", ["DYNAMO_TRACE_ONCE", "VLLM_COMPILE"])
def test_a_compiled_model_says_the_same(mode, base, exported, merged, tmp_path):
    """Adapters come after torch.compile; vLLM compiles so on GPUs alone."""
    # No LoRA: what vLLM has for it on CPUs is traced as if there were none.
    names = "rotation", "block_diagonal", "damped-orthogonal"
    paths = {name: exported[0] / name for name in names}
    said = served(base, paths, tmp_path / "out", mode)
    assert said["refused"] == {}
    # With graphs they are cut where M's are added.
    cut = "mora_jax::add_squares" in said["cut"]
    assert cut == (mode == "VLLM_COMPILE")
    check(base, said["found"][""])
    for name in names:
        check(merged / name, said["found"][name])


def bad_ones(good, folder):
    """{name: directory} of adapters that are refused."""

    def copy(name, change=lambda config: None):
        shutil.copytree(good, folder / name)
        path = folder / name / "adapter_config.json"
        config = json.loads(path.read_text())
        change(config["mora_jax"])
        path.write_text(json.dumps(config))
        return folder / name

    with (copy("damaged") / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"1234")
    copy("fewer", lambda record: record["modules"].popitem())
    copy("newer", lambda record: record.update(version=3))
    for name, module in ("wider", "model.layers.0.mlp.up_proj"), ("head", "lm_head"):
        kernel = {"fc": {"kernel": jnp.zeros((WIDTH, WIDTH))}}
        adapters = mora_jax.init(mora_jax.plan(kernel, mora_jax.MoRAConfig(rank=1)))
        names = {module: "fc/kernel"}
        io.export(folder / name, adapters, "vllm", names, native=True)
    bad = "damaged", "fewer", "newer", "wider", "head"
    return {name: folder / name for name in bad}
