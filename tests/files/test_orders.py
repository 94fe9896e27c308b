"""The order of a square kernel is told by a source, or the kernel is refused.

PyTorch's Linear has weights (out, in) and GPT-2's Conv1D (in, out); nn.Dense has
kernels (in, out) and transformers' FlaxConv1D (out, in).
"""

import json

import numpy as np
import pytest
from adapter_files import config_of, made, run, unflatten
from helpers import close, random
from safetensors.numpy import load_file, save_file

import mora_jax
from mora_jax import MoRAConfig, io
from mora_jax.io import AdapterFileError, Checkpoint
from mora_jax.io._files import CONFIG, TENSORS

SQUARE = "transformer.h.0.attn.c_proj"
WIDENING = SQUARE.replace("c_proj", "c_attn")
LINEAR = [
    "transformer.h.0.attn.q_proj",  # GPT-J
    "transformer.h.0.self_attention.dense",  # Bloom
    "transformer.h.0.attn.attention.out_proj",  # GPT-Neo
]
WEIGHTS = {"io": (8, 24), "oi": (24, 8)}
"""{order: the shape of GPT-2's c_attn}."""


def path_of(module):
    return module.replace(".", "/") + "/kernel"


def adapter_of(module, axes, shape=(8, 8)):
    """An adapter of one kernel, by a plan that knows its axes."""
    tree = unflatten({path_of(module): np.zeros(shape, np.float32)})
    config = MoRAConfig(rank=2, targets=".*", overrides={".*": {"axes": axes}})
    return made(mora_jax.plan(tree, config))


def merged(folder, adapters, module, names=None, model_type=None, **others):
    """What a merge adds to the weight of a module, in a base with other weights."""
    base, weight = folder / "base", random(0, 8, 8)
    base.mkdir()
    if model_type is not None:
        (base / "config.json").write_text(json.dumps({"model_type": model_type}))
    shapes = {f"{name}.weight": shape for name, shape in others.items()}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    tensors[f"{module}.weight"] = np.asarray(weight)
    save_file(tensors, base / "model.safetensors")
    io.merge_checkpoint(base, adapters, folder / "out", names)
    after = load_file(folder / "out/model.safetensors")[f"{module}.weight"]
    return after - weight


def assert_in_order(added, adapters, axes, order):
    """The delta is in a weight of an order, of a kernel with axes."""
    (delta,) = mora_jax.delta_weight(adapters)["transformer"]["h"]["0"].values()
    while isinstance(delta, dict):
        (delta,) = delta.values()
    close(added, delta if axes == order else delta.T, 1e-5)


@pytest.mark.parametrize("module", LINEAR)
@pytest.mark.parametrize("beside", [{}, {WIDENING: WEIGHTS["io"]}])
def test_only_gpt2_s_names_may_be_conv1d(tmp_path, module, beside):
    adapters = adapter_of(module, "io")
    added = merged(tmp_path, adapters, module, **beside)
    assert_in_order(added, adapters, "io", "oi")


SOURCES = {
    "another weight": lambda order: {WIDENING: WEIGHTS[order]},
    "without a root": lambda order: {WIDENING.partition(".")[2]: WEIGHTS[order]},
    "the config": lambda order: {
        "model_type": {"io": "gpt2", "oi": "gpt_bigcode"}[order]
    },
    "templates": lambda order: {
        "names": {"transformer.h.{n}.attn.{m}": "transformer/h/{n}/attn/{m}/kernel"},
        WIDENING: WEIGHTS[order],
    },
    "names": lambda order: {"names": {"io": "gpt2", "oi": "gpt_neo"}[order]},
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("order", WEIGHTS)
@pytest.mark.parametrize("axes", ["io", "oi"])
def test_a_base_tells_the_order_of_its_weights(tmp_path, axes, order, source):
    """And the plan that of the kernel: a Dense of the user's own, or FlaxConv1D."""
    adapters = adapter_of(SQUARE, axes)
    added = merged(tmp_path, adapters, SQUARE, **SOURCES[source](order))
    assert_in_order(added, adapters, axes, order)


@pytest.mark.parametrize("model_type", [None, "mine"])
@pytest.mark.parametrize("axes", ["io", "oi"])
def test_an_order_that_no_source_tells_is_refused(tmp_path, axes, model_type):
    adapters = adapter_of(SQUARE, axes)
    match = f"names must tell if '{SQUARE}.weight'.* 'gpt2' or 'gpt_neo', since"
    with pytest.raises(AdapterFileError, match=match):
        merged(tmp_path, adapters, SQUARE, model_type=model_type)
    assert not (tmp_path / "out").exists()
    mora_jax.save(tmp_path / "a", adapters)
    merge = "merge", tmp_path / "base", tmp_path / "a", tmp_path / "out"
    assert "by 'gpt2' or 'gpt_neo'" in run(*merge, code=1)
    run(*merge, "--names", "gpt2")


def test_what_is_not_square_tells_its_own_order(tmp_path):
    """GPT-Neo's c_fc in a base without a config."""
    module, base = "transformer.h.0.mlp.c_fc", tmp_path / "base.safetensors"
    for axes, shape in (("io", (8, 32)), ("oi", (32, 8))):
        adapters = adapter_of(module, axes, shape)
        for order, there in (("io", (8, 32)), ("oi", (32, 8))):
            save_file({f"{module}.weight": np.zeros(there, np.float32)}, base)
            io.merge_checkpoint(base, adapters, tmp_path / "out", force=True)
            added = load_file(tmp_path / "out" / base.name)[f"{module}.weight"]
            assert_in_order(added, adapters, axes, order)
    with pytest.raises(AdapterFileError, match=f"names must tell .*{module}"):
        Checkpoint(base).shapes()


@pytest.mark.parametrize("order", WEIGHTS)
def test_shapes_are_those_of_features(tmp_path, order):
    base = tmp_path / "base.safetensors"
    save_file({f"{WIDENING}.weight": np.zeros(WEIGHTS[order], np.float32)}, base)
    leaf = Checkpoint(base).shapes()
    for key in path_of(WIDENING).split("/"):
        leaf = leaf[key]
    assert leaf.shape == (8, 24)


def lora(folder, module=SQUARE, outs=8, fan_in_fan_out=True):
    """PEFT's directory of a LoRA on one module, and its delta (in, out)."""
    folder.mkdir()
    a, b = random(0, 2, 8), random(1, outs, 2)
    home = f"base_model.model.{module}.lora"
    arrays = {f"{home}_A.weight": np.asarray(a), f"{home}_B.weight": np.asarray(b)}
    save_file(arrays, folder / TENSORS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    config |= {"fan_in_fan_out": fan_in_fan_out}
    (folder / CONFIG).write_text(json.dumps(config))
    return (b @ a).T


def params_of(**shapes):
    return unflatten({path_of(m): np.zeros(s, np.float32) for m, s in shapes.items()})


NAMES = [
    None,
    "gpt2",
    {"transformer.h.{n}.attn.{m}": "transformer/h/{n}/attn/{m}/kernel"},
]


@pytest.mark.parametrize("names", NAMES, ids=["none", "family", "templates"])
@pytest.mark.parametrize("axes", ["io", "oi"])
@pytest.mark.parametrize("module", [SQUARE, WIDENING])
def test_params_tell_the_order_of_kernels(tmp_path, module, axes, names):
    outs = 8 if module == SQUARE else 24
    delta = lora(tmp_path / "a", module, outs)
    params = params_of(**{SQUARE: (8, 8), WIDENING: WEIGHTS[axes]})
    adapters = io.load_peft(tmp_path / "a", params, names)
    assert_in_order(delta, adapters, axes, "io")
    found = mora_jax.merge(params, adapters)["transformer"]["h"]["0"]["attn"]
    kernel = found[module.rpartition(".")[2]]["kernel"]
    close(kernel, delta if axes == "io" else delta.T, 1e-5)


@pytest.mark.parametrize("axes", ["io", "oi"])
def test_a_plan_of_names_and_shapes_knows_the_order(axes):
    params = params_of(**{SQUARE: (8, 8), WIDENING: WEIGHTS[axes], LINEAR[0]: (8, 8)})
    plan = mora_jax.plan(params, MoRAConfig(rank=1))
    expected = {SQUARE: axes, WIDENING: axes, LINEAR[0]: "io"}
    assert {path_of(m): a for m, a in expected.items()} == {
        path: spec.axes for path, spec in plan.items()
    }


@pytest.mark.parametrize("names", NAMES, ids=["none", "family", "templates"])
def test_params_that_do_not_tell_are_refused(tmp_path, names):
    delta = lora(tmp_path / "a")
    params = params_of(**{SQUARE: (8, 8)})
    match = f"not known which of its axes.*linen.plan or .*nnx.plan.*{path_of(SQUARE)}"
    with pytest.raises(AdapterFileError, match=match):
        io.load_peft(tmp_path / "a", params, names)
    with pytest.raises(ValueError, match=match):
        mora_jax.plan(params)
    for axes in ("io", "oi"):
        config = MoRAConfig(rank=1, overrides={".*": {"axes": axes}})
        plan = mora_jax.plan(params, config)
        adapters = io.load_peft(tmp_path / "a", plan, names)
        assert_in_order(delta, adapters, axes, "io")


@pytest.mark.parametrize("is_conv1d", [True, False])
def test_without_a_model_peft_tells_the_order(tmp_path, is_conv1d):
    """A Conv1D is a FlaxConv1D here; and all the same is merged from file to file."""
    delta = lora(tmp_path / "a", fan_in_fan_out=is_conv1d)
    adapters = io.load_peft(tmp_path / "a")
    assert_in_order(delta, adapters, "oi" if is_conv1d else "io", "io")
    order = "io" if is_conv1d else "oi"
    added = merged(tmp_path, adapters, SQUARE, **{WIDENING: WEIGHTS[order]})
    close(added, delta if is_conv1d else delta.T, 1e-5)
    io.export(tmp_path / "b", adapters, "peft")
    assert config_of(tmp_path / "b")["fan_in_fan_out"] is is_conv1d


def test_the_command_merges_a_lora_of_gpt2(tmp_path):
    base, delta = tmp_path / "base.safetensors", lora(tmp_path / "a")
    shapes = {SQUARE: (8, 8), WIDENING: WEIGHTS["io"]}
    save_file({f"{m}.weight": np.zeros(s, "f4") for m, s in shapes.items()}, base)
    run("merge", base, tmp_path / "a", tmp_path / "out")
    added = load_file(tmp_path / "out" / base.name)[f"{SQUARE}.weight"]
    close(added, delta, 1e-5)


def test_an_export_of_both_kinds_of_names(tmp_path):
    """GPT-Neo's feed-forward layers have GPT-2's names, and are Linear."""
    modules = LINEAR[2], "transformer.h.0.mlp.c_fc"
    plan = mora_jax.plan(
        params_of(**dict.fromkeys(modules, (8, 12))), MoRAConfig(rank=2)
    )
    io.export(tmp_path / "a", made(plan), "peft", max_error=1)
    assert config_of(tmp_path / "a")["fan_in_fan_out"] is False
