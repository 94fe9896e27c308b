"""Kernels that are several modules of PyTorch: Gemma's, as Google writes them."""

import json
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import assert_same, flatten, unflatten
from cases import in_turns
from helpers import close, random, random_like
from safetensors.numpy import load_file, save_file

import mora_jax
from mora_jax import MoRAConfig
from mora_jax.io import (
    AdapterFileError,
    export,
    load,
    load_base,
    merge_checkpoint,
    save,
)

ATTENTION, MLP = "model.layers.{}.self_attn.{}_proj", "model.layers.{}.mlp.{}_proj"
LAYERS = {"tunix": "layers/{}", "gm": "layer_{}"}
NORMS = {
    "input_layernorm": "pre_attention_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "pre_ffw_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
HEADS, GROUPS, WIDTH, HEAD, HIDDEN = 4, 2, 12, 6, 20
AXES = {"q_einsum/w": "oio", "kv_einsum/w": "ooio", "qkv_einsum/w": "ooio"}
AXES |= {"attn_vec_einsum/w": "iio", "gating_einsum": "ooi"}


def torch_state(dtype, fused):
    """A Gemma of two layers as transformers has it."""
    groups, state = HEADS if fused else GROUPS, {}
    rows = {"q": HEADS * HEAD, "k": groups * HEAD, "v": groups * HEAD}
    for layer in range(2):
        for letter, outs in rows.items():
            state[ATTENTION.format(layer, letter)] = (outs, WIDTH)
        state[ATTENTION.format(layer, "o")] = (WIDTH, HEADS * HEAD)
        for name in ("gate", "up"):
            state[MLP.format(layer, name)] = (HIDDEN, WIDTH)
        state[MLP.format(layer, "down")] = (WIDTH, HIDDEN)
        for norm in NORMS:
            state[f"model.layers.{layer}.{norm}"] = (WIDTH,)
    state |= {"model.norm": (WIDTH,), "model.embed_tokens": (32, WIDTH)}
    return {
        f"{module}.weight": np.array(random(k, *shape), dtype)
        for k, (module, shape) in enumerate(state.items())
    }


def in_flax(state, names, fused):
    """The same as `names` has it, by Gemma's equations."""
    flat = {}
    for layer in range(2):
        here = LAYERS[names].format(layer)
        q, k, v, o = (state[ATTENTION.format(layer, x) + ".weight"] for x in "qkvo")
        gate, up, down = (
            state[MLP.format(layer, x) + ".weight"] for x in ("gate", "up", "down")
        )
        q, k, v = (x.reshape(-1, HEAD, WIDTH).swapaxes(1, 2) for x in (q, k, v))
        if fused:
            flat[f"{here}/attn/qkv_einsum/w"] = np.stack([q, k, v])
        else:
            flat[f"{here}/attn/q_einsum/w"] = q
            flat[f"{here}/attn/kv_einsum/w"] = np.stack([k, v])
        flat[f"{here}/attn/attn_vec_einsum/w"] = o.T.reshape(HEADS, HEAD, WIDTH)
        if names == "gm":
            flat[f"{here}/mlp/gating_einsum"] = np.stack([gate, up])
            flat[f"{here}/mlp/linear"] = down.T
        else:
            for name, weight in ("gate", gate), ("up", up), ("down", down):
                flat[f"{here}/mlp/{name}_proj/kernel"] = weight.T
        for norm, ours in NORMS.items():
            scale = state[f"model.layers.{layer}.{norm}.weight"]
            flat[f"{here}/{ours}/scale"] = scale
    flat["final_norm/scale"] = state["model.norm.weight"]
    flat["embedder/input_embedding"] = state["model.embed_tokens.weight"]
    return unflatten(flat)


def adapted(params, operator="signed_decoupling"):
    """Adapters that know their base, and are not zero."""
    names = [name for name in flatten(params) if name.endswith(tuple(AXES))]
    axes = {name: AXES[re.search("[a-z_]+(/w)?$", name)[0]] for name in names}
    config = MoRAConfig(
        rank=2,
        operator=operator,
        targets=".*(_einsum|_einsum/w|_proj/kernel|linear)",
        overrides={name: {"axes": letters} for name, letters in axes.items()},
    )
    plan = mora_jax.plan(params, config)
    adapters = random_like(mora_jax.init(plan))
    with tempfile.TemporaryDirectory() as directory:
        save(directory, adapters, params=params)
        return load(directory)


LAYOUTS = [("tunix", False), ("tunix", True), ("gm", False)]


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    return tmp_path / "base/model.safetensors"


@in_turns("layout, dtype", LAYOUTS, ["bfloat16", "float32"])
def test_merged_files_are_the_merged_model(tmp_path, base, layout, dtype):
    """Bit for bit, dither included; each way reads its base by the same names."""
    (names, fused), dtype = layout, jnp.dtype(dtype)
    state = torch_state(dtype, fused)
    save_file(state, base)
    params = in_flax(state, names, fused)
    like = jax.eval_shape(lambda: params)
    assert_same(load_base(base, like, names), params)
    adapters = adapted(params)
    merge_checkpoint(base, adapters, tmp_path / "out", names)
    merged = load_base(tmp_path / "out", like, names)
    expected = mora_jax.merge(params, adapters)
    if dtype == "float32":
        close(merged, expected)
    else:
        assert_same(merged, expected)


@pytest.mark.slow
@in_turns("layout, operator", LAYOUTS, ["sharing", "signed_decoupling"])
def test_each_module_is_a_lora_of_its_outputs(tmp_path, layout, operator):
    names, fused = layout
    params = in_flax(torch_state("float32", fused), names, fused)
    adapters = adapted(params, operator)
    rank = None if operator == "sharing" else 64
    lost = export(tmp_path / "lora", adapters, "peft", names, rank=rank).lost
    assert len(lost) == 14 and max(lost.values()) < 1e-6
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert set(config["target_modules"]) == lost.keys()
    update = {}
    for module in lost:
        a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        update[f"{module}.weight"] = b @ a
    empty = torch_state("float32", fused)
    zeros = {name: np.zeros_like(value) for name, value in empty.items()}
    base = in_flax(zeros, names, fused)
    deltas = mora_jax.merge(base, adapters, any_base=True)
    close(in_flax(zeros | update, names, fused), deltas)


def test_other_weights_are_refused(tmp_path, base):
    """In the second of the tensors that are one kernel."""
    state = torch_state("float32", fused=False)
    adapters = adapted(in_flax(state, "tunix", fused=False))
    state["model.layers.0.self_attn.v_proj.weight"] += 1
    save_file(state, base)
    with pytest.raises(AdapterFileError, match="kv_einsum/w.* other weights"):
        merge_checkpoint(base, adapters, tmp_path / "out", "tunix")
    assert not (tmp_path / "out").exists()
    merge_checkpoint(base, adapters, tmp_path / "out", "tunix", any_base=True)


def test_a_missing_module_is_named(tmp_path, base):
    state = torch_state("float32", fused=False)
    adapters = adapted(in_flax(state, "tunix", fused=False))
    for index, letter in enumerate("kv"):
        lacks, module = dict(state), f"model.layers.1.self_attn.{letter}_proj.weight"
        del lacks[module]
        save_file(lacks, base)
        match = rf"layers/1/attn/kv_einsum/w\[{index}\]', which would be '{module}'"
        with pytest.raises(AdapterFileError, match=match):
            merge_checkpoint(base, adapters, tmp_path / "out", "tunix")
    mapping = {"k{layer}": "layers/{layer}/attn/kv_einsum/w[0]"}
    with pytest.raises(ValueError, match=r"no module for the kernel"):
        export(tmp_path / "lora", adapters, "peft", mapping, rank=8)


def test_axes_that_do_not_fit_are_refused(base):
    state = torch_state("float32", fused=False)
    save_file(state, base)
    params = in_flax(state, "tunix", fused=False)
    attention = params["layers"]["0"]["attn"]
    attention["q_einsum"]["w"] = attention["q_einsum"]["w"].swapaxes(0, 1)
    with pytest.raises(AdapterFileError, match="q_einsum/w.*does not fit"):
        load_base(base, jax.eval_shape(lambda: params), "tunix")
