"""Adapters as vLLM has them, in torch, against the oracle in NumPy."""

# pyright: reportMissingImports=false

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
from mora_jax._common.squares import digest

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
        "tower": "vision.fc must be .* of another part of the model: merge",
        "sharded": "without fully sharded LoRAs",
        "unknown": "no linear layer for text.other",
    }
    with pytest.raises(ValueError, match=reasons[fault]):
        vllm.place(manager, {asked: None})


def all_subclasses(cls):
    found = set(cls.__subclasses__())
    return found.union(*map(all_subclasses, found))


SERVED = {
    "ReplicatedLinearWithLoRA",
    "ClassificationHeadWithLoRA",
    "ColumnParallelLinearWithLoRA",
    "MergedColumnParallelLinearWithLoRA",
    "MergedColumnParallelLinearVariableSliceWithLoRA",
    "QKVParallelLinearWithLoRA",
    "MergedQKVParallelLinearWithLoRA",
    "RowParallelLinearWithLoRA",
}


def test_layer_classes_of_vllm_are_told_apart_by_their_code():
    """Sharded ones, embeddings, heads of language models and experts are refused."""
    from vllm.lora import layers

    vllm.register()
    found = all_subclasses(layers.BaseLayerWithLoRA) - {vllm.Layer}
    own = {cls for cls in found if cls.__module__.startswith("vllm.")}
    assert len(own) >= 17
    assert {cls.__name__ for cls in own if vllm.is_served(cls)} == SERVED


def a_manager(cls, **settings):
    """A manager of one layer, `fc`, of a class."""
    layer = cls.__new__(cls)
    torch.nn.Module.__init__(layer)
    layer.base_layer = torch.nn.Linear(4, 4)
    layer.output_slices = (4,)
    model = torch.nn.Module()
    model.fc = layer
    usual = {
        "lora_config": SimpleNamespace(fully_sharded_loras=False),
        "device": SimpleNamespace(type="cpu"),
        "supports_mm": False,
        "modules": {"fc": layer},
        "packed_modules": {},
        "model": model,
    }
    return SimpleNamespace(**usual | settings)


class OfAnotherMethod(vllm.Layer):
    def forward(self, x):
        return self.apply(x)

    def _apply_lora_to_output(self, x, output):
        return output


class OfAnotherWay(vllm.Layer):
    def forward(self, x):
        return self.apply(x)

    def apply(self, x, bias=None):
        return self._get_quant_method().apply(self.base_layer, x, bias)


@pytest.mark.parametrize("cls", [OfAnotherMethod, OfAnotherWay])
def test_a_class_that_goes_its_own_way_is_refused(cls):
    vllm.register()
    with pytest.raises(ValueError, match="^fc .*a OfAnother.*merge the adapter"):
        vllm.place(a_manager(cls), {"fc": None})


def test_embeddings_experts_and_heads_of_language_models_are_refused():
    from vllm.lora import layers

    vllm.register()
    for name in (
        "VocabParallelEmbeddingWithLoRA",
        "LogitsProcessorWithLoRA",
        "FusedMoEWithLoRA",
    ):
        with pytest.raises(ValueError, match=f"^fc .*a {name}.*merge the adapter"):
            vllm.place(a_manager(getattr(layers, name)), {"fc": None})


@pytest.mark.parametrize("fault", ["base in a dict", "kernel in attention"])
def test_a_layer_that_others_use_without_its_lora_is_refused(fault):
    """A pooler with the base's head, and attention that has taken the kernel over."""
    from vllm.lora import layers

    vllm.register()
    manager = a_manager(layers.ReplicatedLinearWithLoRA)
    layer = manager.modules["fc"]
    other = torch.nn.Module()
    if fault == "base in a dict":
        other.heads = {"classify": layer.base_layer}
    else:
        other.fc = layer
        other.process_weights_after_loading = None
    manager.model.other = other
    with pytest.raises(ValueError, match="^fc .*Module .*without LoRAs: merge"):
        vllm.place(manager, {"fc": None})


def test_modules_that_are_packed_in_other_slices_are_refused():
    """Their outputs are not where the slices are."""
    from vllm.lora import layers

    vllm.register()
    packed = {"fc": ["qkv", "z"]}
    manager = a_manager(
        layers.MergedColumnParallelLinearWithLoRA, packed_modules=packed
    )
    manager.modules["fc"].output_slices = (1, 1, 1, 1)
    with pytest.raises(ValueError, match="^z .*4 slices for 2 modules"):
        vllm.place(manager, {"z": None})


def test_a_head_that_scores_tokens_is_refused():
    from vllm.lora import layers

    vllm.register()
    cls = layers.ClassificationHeadWithLoRA
    manager = a_manager(cls, _pooling_task="token_classify")
    with pytest.raises(ValueError, match="^fc .*'token_classify'.*merge"):
        vllm.place(manager, {"fc": None})


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
    content = json.loads(config.read_text())
    content["mora_jax"]["sha256"] = digest(path.read_bytes(), content)
    config.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=str(directory)):
        vllm.read(directory, lambda name: name, torch.float32)


def test_layers_that_are_not_called_are_told_once(caplog):
    """As Mamba's `conv1d`, whose kernel vLLM uses without its layer."""
    adapter = vllm.Squares(1, 1, {})
    square = vllm.Square(
        shape=(4, 4),
        m=torch.eye(4)[None],
        compress=vllm.Map(torch.eye(4), None),
        decompress=vllm.Map(torch.eye(4), None),
    )
    part = vllm.Part(0, square, None, None)
    adapter.placed = {"mixer.in_proj": [part], "mixer.conv1d": [part]}
    adapter.ran, adapter.told = set(), False
    last = SimpleNamespace(index_mapping=(1, 1, 0))
    manager = SimpleNamespace(_last_mapping=None, get_adapter={1: adapter}.get)

    def next_batch():
        vllm._changed(lambda *_: None, manager, last)
        manager._last_mapping = last

    with caplog.at_level("WARNING", logger="vllm.mora_jax"):
        vllm.logger.propagate = True
        next_batch()
        next_batch()  # a batch of which nothing has run
        assert not caplog.records
        x, y = torch.ones(3, 4), torch.zeros(3, 4)
        rows = {1: torch.tensor([0, 1])}
        vllm._add(x, y, manager, "mixer.in_proj", rows)
        assert (y == torch.tensor([[1.0], [1.0], [0.0]])).all()
        next_batch()
        next_batch()
    (record,) = caplog.records
    told = record.getMessage()
    assert "mixer.conv1d" in told and "in_proj" not in told and "merge" in told
