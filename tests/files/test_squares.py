"""Adapters as they are, for vLLM's plug-in: the file, read by NumPy."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import adapters_between, config_of
from cases import FEW_LINEAR
from safetensors.numpy import load_file

import mora_jax
from mora_jax import io
from mora_jax._common.squares import read_checked


def dense(tensors, name, ins):
    """A map of the file as a matrix, (ins, outs)."""
    weight, index = tensors[f"{name}.weight"], tensors.get(f"{name}.index")
    if index is None:
        return weight.T
    matrix = np.zeros((ins, len(weight)))
    np.add.at(matrix, (index, np.arange(len(weight))[:, None]), weight)
    return matrix


@pytest.mark.law
@pytest.mark.parametrize("sizes", [(21, 13, 4), (12, 20, 6), (300, 16, 4)], ids=str)
@pytest.mark.parametrize("case", FEW_LINEAR, ids=lambda case: case.label)
def test_maps_and_m_are_the_delta(case, sizes, tmp_path):
    op = case.make(*sizes, seed=1)
    m = np.random.default_rng(0).standard_normal(op.m_shape).astype("f")
    names = {"fc": "fc/kernel"}
    done = io.export(tmp_path, adapters_between(op, m), "vllm", names, native=True)
    assert done.lost == {"fc": 0.0} and "--max-lora-rank 1 " in done.command
    record = config_of(tmp_path)["mora_jax"]["modules"]["fc"]
    assert (record["in"], record["out"]) == sizes[:2]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    blocks = tensors["fc.m"].astype(float)
    c = dense(tensors, record["compress"], sizes[0])
    c = c.reshape(sizes[0], -1, blocks.shape[1])
    h = np.einsum(
        "inp,nps->ins", c, np.broadcast_to(blocks, (c.shape[1], *blocks.shape[1:]))
    )
    h = h.reshape(sizes[0], -1)
    delta = h @ dense(tensors, record["decompress"], h.shape[1])
    if "damped" in record:
        v = tensors[f"{record['damped']}.v"].astype(float)
        delta -= v @ (v.T @ delta)
    np.testing.assert_allclose(delta, case.delta(op, m), rtol=0, atol=2e-4)


def test_outputs_that_nothing_reaches_are_written(tmp_path):
    """Truncation leaves all but the first q outputs, here one module's, alone."""
    kernel = {"fc": {"kernel": jnp.zeros((2, 16, 8))}}
    config = mora_jax.MoRAConfig(
        square_rank=8, operator="truncation", overrides={"fc/kernel": {"axes": "oio"}}
    )
    adapters = mora_jax.init(mora_jax.plan(kernel, config))
    names = {f"{name}_proj": f"fc/kernel[{k}]" for k, name in enumerate("gu")}
    io.export(tmp_path, adapters, "vllm", names, native=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    entries = config_of(tmp_path)["mora_jax"]["modules"]
    for name, reached in ("g", True), ("u", False):
        entry = entries[f"{name}_proj"]
        assert entry["out"] == 8
        assert dense(tensors, entry["decompress"], 8).any() == reached


def test_layers_share_maps(tmp_path):
    kernels = {k: {"kernel": jnp.zeros((24, 24))} for k in ("q", "k", "v")}
    adapters = mora_jax.init(mora_jax.plan(kernels, mora_jax.MoRAConfig(rank=2)))
    names = {"{name}_proj": "{name}/kernel"}
    io.export(tmp_path, adapters, "vllm", names, native=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    shared = {f"shared.{k}.{part}" for k in range(2) for part in ("index", "weight")}
    assert tensors.keys() == shared | {"q_proj.m", "k_proj.m", "v_proj.m"}


def test_what_has_no_square_is_not_written(tmp_path):
    low_rank = mora_jax.make_operator("low_rank", 12, 8, 2)
    m = jnp.ones(low_rank.m_shape)
    with pytest.raises(ValueError, match="of a square, and not a LoRA"):
        adapters = adapters_between(low_rank, m)
        io.export(tmp_path / "one", adapters, "vllm", {"fc": "fc/kernel"}, native=True)
    op = mora_jax.make_operator("sharing", 12, 8, 2)
    out = tmp_path / "one"
    adapters, names = adapters_between(op, np.ones((2, 2), "f")), {"fc": "fc/kernel"}
    for program, rank in ("peft", None), ("vllm", 2):
        with pytest.raises(ValueError, match="'vllm' and without a rank"):
            io.export(out, adapters, program, names, rank=rank, native=True)
    with pytest.raises(ValueError, match="must be a linear layer"):
        io.export(out, adapters, "vllm", {"wte": "fc/kernel"}, native=True)
    assert not out.exists()


def _take_out(config):
    del config["mora_jax"]["modules"]["q_proj"]


def _add(config):
    modules = config["mora_jax"]["modules"]
    modules["o_proj"] = modules["q_proj"]


def _change(config):
    modules = config["mora_jax"]["modules"]
    modules["q_proj"]["compress"] = modules["q_proj"]["decompress"]


def _rename(config):
    modules = config["mora_jax"]["modules"]
    modules["o_proj"] = modules.pop("q_proj")


def _exchange(config):
    modules = config["mora_jax"]["modules"]
    modules["q_proj"], modules["k_proj"] = modules["k_proj"], modules["q_proj"]


def _change_size(config):
    config["mora_jax"]["modules"]["q_proj"]["out"] = 12


def _target_fewer(config):
    config["target_modules"].remove("q_proj")


def _drop_digest(config):
    del config["mora_jax"]["sha256"]


def _older(config):
    config["mora_jax"]["version"] = 1


CHANGES = {
    _take_out: "damaged",
    _add: "damaged",
    _change: "damaged",
    _rename: "damaged",
    _exchange: "damaged",
    _change_size: "damaged",
    _target_fewer: "damaged",
    _drop_digest: "damaged",
    _older: "version 2",
}


@pytest.fixture(scope="module")
def two_modules(tmp_path_factory):
    kernels = {
        "q": {"kernel": jnp.zeros((24, 24))},
        "k": {"kernel": jnp.zeros((24, 12))},
    }
    adapters = mora_jax.init(mora_jax.plan(kernels, mora_jax.MoRAConfig(rank=2)))
    directory = tmp_path_factory.mktemp("squares") / "one"
    names = {"{name}_proj": "{name}/kernel"}
    io.export(directory, adapters, "vllm", names, native=True)
    return directory


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_a_config_that_was_changed_is_refused(change, two_modules, tmp_path):
    """A server that took it would serve a part of an adapter, or another one."""
    content = config_of(two_modules)
    change(content)
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    tensors = (two_modules / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(tensors)
    with pytest.raises(ValueError, match=CHANGES[change]) as caught:
        read_checked(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_a_config_may_be_written_anew_with_the_same_content(two_modules, tmp_path):
    """Tools sort and indent JSON, and users move bases."""
    content = config_of(two_modules)
    content["base_model_name_or_path"] = "elsewhere"
    text = json.dumps(content, indent=4, sort_keys=True)
    (tmp_path / "adapter_config.json").write_text(text)
    tensors = (two_modules / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(tensors)
    modules, found = read_checked(str(tmp_path))
    assert modules.keys() == {"q_proj", "k_proj"} and found == tensors


def test_tensors_of_another_export_are_refused(two_modules, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config_of(two_modules)))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"others")
    with pytest.raises(ValueError, match="damaged"):
        read_checked(str(tmp_path))


def test_only_vllm_reads_it(two_modules):
    """Maps and M's of a server are no adapter that can be trained."""
    plan = mora_jax.plan({"q": {"kernel": jnp.zeros((24, 24))}}, mora_jax.MoRAConfig())
    with pytest.raises(io.AdapterFileError, match="peft_type .*'MORA'"):
        io.load_peft(two_modules, plan, {"q_proj": "q/kernel"})
    with pytest.raises(io.AdapterFileError, match="not of mora_jax"):
        mora_jax.load(two_modules)
