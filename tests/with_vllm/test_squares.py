"""Adapters as vLLM has them, in torch, against the oracle in NumPy."""

import hashlib
import importlib.util
import json
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from adapter_files import adapters_between
from cases import LINEAR, SIZES
from safetensors.numpy import load_file, save_file

import mora_jax
from mora_jax import io

torch = pytest.importorskip("torch")
if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not here", allow_module_level=True)

with warnings.catch_warnings(action="ignore"):
    from mora_jax import vllm


def written(op, m, directory):
    io.export(
        directory, adapters_between(op, m), "vllm", {"fc": "fc/kernel"}, native=True
    )
    return vllm.read(directory, lambda name: name, torch.float32)["fc"]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.label)
def test_numbers_are_the_oracles(case, sizes, tmp_path):
    op = case.make(*sizes, seed=1)
    random = np.random.default_rng(0)
    m = random.standard_normal(op.m_shape).astype("f")
    square = written(op, m, tmp_path / "one")
    assert square.shape == sizes[:2]
    x = torch.tensor(random.standard_normal((5, sizes[0])).astype("f"))
    expected = x.numpy() @ case.delta(op, m)
    np.testing.assert_allclose(square(x), expected, rtol=0, atol=1e-4)
    # Of two devices each has half of the inputs, and half of the outputs.
    ins, outs = (torch.arange(n).split(-(-n // 2)) for n in sizes[:2])
    parts = [
        sum(vllm.Part(0, square, i, o)(x[:, i]) for i in ins).numpy() for o in outs
    ]
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fault", ["tpu", "tower", "sharded", "unknown"])
def test_what_would_be_passed_by_is_refused(fault):
    """A device, a tower that vLLM calls without a context, and layers that lack."""
    layer = vllm.Layer.__new__(vllm.Layer)
    name = "vision.fc" if fault == "tower" else "text.fc"
    language = SimpleNamespace(language_model=["text"])
    manager = SimpleNamespace(
        lora_config=SimpleNamespace(fully_sharded_loras=fault == "sharded"),
        device=SimpleNamespace(type="tpu" if fault == "tpu" else "cpu"),
        supports_mm=True,
        mm_mapping=language,
        modules={name: layer},
        packed_modules={},
        model=torch.nn.Module(),
    )
    asked = "text.other" if fault == "unknown" else name
    reasons = {
        "tpu": "CPUs and GPUs, got tpu",
        "tower": "vision.fc must be a linear layer of a text model",
        "sharded": "without fully sharded LoRAs",
        "unknown": "no linear layer for text.other",
    }
    with pytest.raises(ValueError, match=reasons[fault]):
        vllm.place(manager, {asked: None})


def test_no_jax_is_imported():
    """A server has vLLM, torch and etils."""
    code = "import sys, mora_jax.vllm; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize("fault", ["index", "nan", "blocks", "lacks"])
def test_a_file_whose_numbers_do_not_fit_is_refused(fault, tmp_path):
    op = mora_jax.make_operator("block_diagonal", 12, 8, 4)
    directory = tmp_path / "one"
    written(op, np.ones(op.m_shape, "f"), directory)
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    if fault == "index":
        tensors["shared.0.index"][3] = 12
    elif fault == "nan":
        tensors["fc.m"][0, 0, 0] = np.nan
    elif fault == "blocks":
        tensors["fc.m"] = tensors["fc.m"][:3]
    else:
        del tensors["shared.1.weight"]
    save_file(tensors, path)
    config = directory / "adapter_config.json"
    record = json.loads(config.read_text())
    record["mora_jax"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    config.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=str(directory)):
        vllm.read(directory, lambda name: name, torch.float32)
