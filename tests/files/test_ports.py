"""Models that have PyTorch's names with slashes, of no family: nobody gives names."""

import ast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import assert_same, flatten, unflatten
from safetensors.numpy import load_file, save_file

import mora_jax
from mora_jax import MoRAConfig, io

FC1, OUT = "model/decoder/layers/0/fc1/kernel", "model/encoder/block/1/out/kernel"
SHAPES = {
    FC1: (12, 20),
    "model/decoder/layers/0/fc1/bias": (20,),
    OUT: (12, 12),  # no shape tells which way round it is
    "model/decoder/norm/scale": (12,),
    "shared/embedding": (30, 12),
    "conv1/kernel": (3, 4, 6),
    "patches/projection/kernel": (2, 5, 3, 6),
    "final_logits_bias": (1, 30),
    "temperature": (),
}
LAST = {"kernel": "weight", "embedding": "weight", "scale": "weight"}


def in_pytorch(path, array):
    """The name and the numbers of a leaf there."""
    *module, last = path.split("/")
    if last == "kernel":  # (out, in, *window)
        array = np.moveaxis(array, (-1, -2), (0, 1))
    name = ".".join([*module, LAST.get(last, last)])
    return name, np.array(array, order="C")


@pytest.fixture
def port(tmp_path):
    """The directory of a checkpoint, and the params that it holds."""
    rng = np.random.default_rng(0)
    arrays = {p: rng.normal(size=s).astype(np.float32) for p, s in SHAPES.items()}
    (tmp_path / "base").mkdir()
    tensors = dict(in_pytorch(*item) for item in arrays.items())
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base", unflatten(arrays)


def adapters_of(params, **settings):
    config = MoRAConfig(rank=1, operator="sharing", **settings)
    adapters = mora_jax.init(mora_jax.plan(params, config), params=params)
    return jax.tree.map(
        lambda m: jnp.sin(jnp.arange(m.size, dtype=m.dtype)).reshape(m.shape), adapters
    )


def test_all_leaves_are_read(port):
    base, params = port
    assert_same(io.load_base(base, params), params)


def test_kernels_are_merged(port, tmp_path):
    base, params = port
    adapters = adapters_of(params, targets=(FC1, OUT), train="final.*|conv1.*")
    io.merge_checkpoint(base, adapters, tmp_path / "out")
    merged = mora_jax.merge(params, adapters)
    found = io.load_base(tmp_path / "out", params)
    for path, array in flatten(merged).items():
        np.testing.assert_allclose(flatten(found)[path], array, atol=1e-6)
    names = [name for name, _ in (in_pytorch(p, np.ones(s)) for p, s in SHAPES.items())]
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == {*names}


def test_a_lora_goes_out_and_comes_in(port, tmp_path):
    base, params = port
    adapters = adapters_of(params, targets=(FC1, OUT))
    done = io.export(tmp_path / "lora", adapters, "peft", base_model=str(base))
    assert [*done.lost] == [p.replace("/", ".")[: -len(".kernel")] for p in (FC1, OUT)]
    read = mora_jax.merge(params, io.load_peft(tmp_path / "lora", params))
    merged = mora_jax.merge(params, adapters)
    for path, array in flatten(merged).items():
        np.testing.assert_allclose(flatten(read)[path], array, atol=1e-6)
    with pytest.raises(
        io.AdapterFileError, match="names have no kernel for the module"
    ):
        io.load_peft(tmp_path / "lora")  # without a model no path is known


def test_names_are_not_guessed_without_the_base(port, tmp_path):
    """The error has templates of all that is missing, and these are right here."""
    _, params = port
    adapters = adapters_of(params, targets=(FC1, OUT))
    with pytest.raises(ValueError, match="base_model=.*templates name them") as caught:
        io.export(tmp_path / "lora", adapters, "peft")
    text = str(caught.value)
    names = ast.literal_eval(text[text.index("{") : text.rindex("}") + 1])
    assert names == {
        "model.decoder.layers.{n}.fc1": "model/decoder/layers/{n}/fc1/kernel",
        "model.encoder.block.{n}.out": "model/encoder/block/{n}/out/kernel",
    }
    done = io.export(tmp_path / "lora", adapters, "peft", names)
    assert len(done.lost) == 2


def test_templates_of_a_stack():
    paths = ["layers/attn/q/kernel[3]", "layers/fc1/kernel[0,2]", "h_0/c/kernel"]
    text = io._names.templates(paths)
    assert "'layers.{n}.attn.q': 'layers/attn/q/kernel[{n}]'" in text
    assert "'layers.{n}.{n1}.fc1': 'layers/fc1/kernel[{n},{n1}]'" in text
    assert "'h.{n}.c': 'h_{n}/c/kernel'" in text


def test_a_tensor_of_another_shape_is_no_evidence(port, tmp_path):
    base, params = port
    adapters = adapters_of({"model": {"fc9": {"kernel": jnp.ones((12, 20))}}})
    with pytest.raises(ValueError, match="no module for the kernel 'model/fc9/kernel'"):
        io.export(tmp_path / "a", adapters, "peft", base_model=str(base))
    wider = unflatten({FC1: jnp.ones((16, 20))})
    with pytest.raises(io.AdapterFileError, match="does not fit"):
        io.export(tmp_path / "a", adapters_of(wider), "peft", base_model=str(base))
    with pytest.raises(io.AdapterFileError, match="does not fit"):
        io.merge_checkpoint(base, adapters_of(wider), tmp_path / "b")


def test_an_adapted_convolution_is_merged_in_memory(port, tmp_path):
    base, params = port
    path = "patches/projection/kernel"
    axes = {path: {"axes": "iiio"}}
    adapters = adapters_of(params, targets=path, overrides=axes)
    with pytest.raises(io.AdapterFileError, match="two axes.*merges it in memory"):
        io.merge_checkpoint(base, adapters, tmp_path / "out")
    assert not (tmp_path / "out").exists()
