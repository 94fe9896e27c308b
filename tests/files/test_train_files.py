"""Arrays that train themselves in files, checkpoints and on the command line."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import (
    assert_same,
    config_of,
    contents,
    flatten,
    rewrite,
    run,
    specs_of,
    unflatten,
    without_digests,
)
from helpers import random, random_like
from pytorch_states import in_flax, layouts, stored
from safetensors.numpy import load_file, save_file

from mora_jax import (
    Adapter,
    MoRAConfig,
    TrainedArray,
    init,
    io,
    load,
    merge,
    plan,
    save,
)
from mora_jax.io import AdapterFileError
from mora_jax.io._files import TENSORS

TRAIN = ".*norm.*", ".*q_proj/bias", "lm_head/kernel", "model/embed_tokens/.*"
CONFIG = MoRAConfig(rank=2, operator="sharing", targets=".*q_proj/kernel", train=TRAIN)


def llama(dtype=np.float32):
    """Params as transformers names them in Flax."""
    layer = {
        "self_attn": {"q_proj": {"kernel": (8, 12), "bias": (12,)}},
        "input_layernorm": {"weight": (8,)},
    }
    shapes = {
        "model": {
            "layers": {"0": layer, "1": layer},
            "norm": {"weight": (8,)},
            "embed_tokens": {"embedding": (20, 8)},
        },
        "lm_head": {"kernel": (8, 20)},
    }
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    arrays = [random(k, *shape, dtype=dtype) for k, shape in enumerate(leaves)]
    return jax.tree.unflatten(tree, arrays)


def torch(params, tied=False):
    """The same as PyTorch's tensors, by hand."""
    params = jax.tree.map(np.asarray, params)
    tensors = {
        "model.norm.weight": params["model"]["norm"]["weight"],
        "model.embed_tokens.weight": params["model"]["embed_tokens"]["embedding"],
        "lm_head.weight": params["lm_head"]["kernel"].T,
    }
    for k, layer in params["model"]["layers"].items():
        start, q = f"model.layers.{k}", layer["self_attn"]["q_proj"]
        tensors[f"{start}.self_attn.q_proj.weight"] = q["kernel"].T
        tensors[f"{start}.self_attn.q_proj.bias"] = q["bias"]
        tensors[f"{start}.input_layernorm.weight"] = layer["input_layernorm"]["weight"]
    if tied:
        del tensors["lm_head.weight"]
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


PARAMS = llama()
PLAN = plan(PARAMS, CONFIG)
ADAPTERS = random_like(init(PLAN, params=PARAMS))


def test_files_give_them_back_bit_for_bit(tmp_path):
    save(tmp_path, ADAPTERS, params=PARAMS)
    adapters = load(tmp_path, PARAMS)
    assert_same(without_digests(adapters), ADAPTERS)
    for path, spec in specs_of(adapters).items():
        assert spec == PLAN.trained[path] if path in PLAN.trained else spec.base_digest
    assert config_of(tmp_path)["format_version"] == 1
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), ADAPTERS)
    save(tmp_path, narrow)
    assert_same(load(tmp_path), narrow)


def test_files_and_plans_without_them_say_so(tmp_path):
    without = plan(PARAMS, dataclasses.replace(CONFIG, train=()))
    save(tmp_path, init(without))
    config = config_of(tmp_path)
    for content in (config, json.loads(io.plan_to_json(without))):
        assert (content["format_version"], content["trained"]) == (1, [])
    save(tmp_path, ADAPTERS)
    assert config_of(tmp_path).keys() == config.keys()


def test_a_plan_as_json_has_them():
    text = io.plan_to_json(PLAN)
    assert io.plan_from_json(text) == io.plan_from_json(text, like=PLAN) == PLAN
    fewer = plan(PARAMS, dataclasses.replace(CONFIG, train=TRAIN[1:]))
    with pytest.raises(AdapterFileError, match="an array .* the plan nothing"):
        io.plan_from_json(text, like=fewer)
    with pytest.raises(AdapterFileError, match="at 'model/layers/0/input_layer"):
        io.plan_from_json(io.plan_to_json(fewer), like=PLAN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("trained"), "lacks 'trained'"),
        (lambda c: c.update(trained=[]), "holds .* knows nothing"),
        (lambda c: c.update(trained=c["trained"][1:]), "holds .* knows nothing"),
        (lambda c: c["trained"].append(c["trained"][0]), "is there twice"),
        (lambda c: c["trained"][0].pop("shape"), "trained.0. of .* lacks 'shape'"),
        (lambda c: c["trained"][0].update(path=["a", ".."]), "must have a path"),
        (lambda c: c["trained"][0].update(path=["a"]), "lacks a"),
        (lambda c: c["trained"][0].update(shape=[3]), r"must have shape \(3,\)"),
        (lambda c: c["trained"][0].update(shape=[-1]), "shape must be integers"),
        (lambda c: c["trained"][0].update(dtype="int8"), "must be a floating-point"),
        (
            lambda c: c["trained"][0].update(dtype="f4"),
            "dtype must be .float32., got .f4.",
        ),
        (lambda c: c.update(trained={}), "trained of .* must be of type list"),
    ],
)
def test_what_is_wrong_in_a_file_is_refused(tmp_path, change, message):
    save(tmp_path, ADAPTERS)
    rewrite(tmp_path, change)
    with pytest.raises(AdapterFileError, match=message):
        load(tmp_path)


def test_params_that_do_not_fit_are_refused(tmp_path):
    save(tmp_path, ADAPTERS)
    for params, message in (
        ({**PARAMS, "lm_head": {}}, "params lack 'lm_head/kernel', which is trained"),
        ({**PARAMS, "lm_head": {"kernel": jnp.ones((3, 8))}}, "must have shape"),
    ):
        with pytest.raises(AdapterFileError, match=message):
            load(tmp_path, params)
    before = contents(tmp_path)
    own = ADAPTERS["lm_head"]["kernel"]
    lm_head = {"kernel": own.replace(m=jnp.full((8, 20), jnp.inf))}
    with pytest.raises(ValueError, match="lm_head/kernel holds NaN or infinity"):
        save(tmp_path, {**ADAPTERS, "lm_head": lm_head})
    assert contents(tmp_path) == before


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_checkpoint_of_pytorch_gets_them_by_name(tmp_path, dtype):
    params = llama(dtype)
    save_file(torch(params), tmp_path / "base.safetensors")
    save(tmp_path / "adapter", ADAPTERS, params=params)
    args = (tmp_path / name for name in ("base.safetensors", "adapter", "out"))
    said = run("merge", *args)
    assert "2 kernels merged, 7 trained arrays put in" in said.replace("\n", " ")
    expected = torch(merge(params, ADAPTERS))
    got = load_file(tmp_path / "out" / "base.safetensors")
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype
        if "q_proj.weight" in name:
            tensor, other = tensor.astype(np.float32), expected[name].astype(np.float32)
            np.testing.assert_allclose(tensor, other, rtol=2e-2, atol=1e-5)
        else:
            np.testing.assert_array_equal(tensor, expected[name])


SUPERFLUOUS = r"inv_freq$|attn\.(masked_)?bias$|position_ids$|predictions\.decoder"
"""Tensors that no leaf has, since they are computed or tied."""


@pytest.mark.parametrize("layout", ["plain", "heads", "stacked"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert"])
def test_every_layout_that_a_base_is_read_into_is_written_back(
    tmp_path, family, layout
):
    file = tmp_path / "base.safetensors"
    state = stored(file, family)
    trees = {"plain": (in_flax(family, state), family)} | layouts(family, state)
    tree, names = trees[layout]
    trained = {
        path: Adapter(2 * leaf, TrainedArray.of(path, leaf, None))
        for path, leaf in flatten(tree).items()
    }
    io.merge_checkpoint(file, unflatten(trained), tmp_path / "out", names)
    merged = load_file(tmp_path / "out" / file.name)
    for name, tensor in load_file(file).items():
        if re.search(SUPERFLUOUS, name) and np.array_equal(merged[name], tensor):
            continue
        np.testing.assert_array_equal(merged[name], 2 * tensor, strict=True)


def test_a_checkpoint_with_the_paths_as_names_gets_them(tmp_path):
    flat = {
        "layers/norm/scale": random(0, 2, 8),
        "layers/fc/kernel": random(1, 2, 8, 8),
        "gain": random(2),
    }
    params = {
        "layers": {
            "norm": {"scale": flat["layers/norm/scale"]},
            "fc": {"kernel": flat["layers/fc/kernel"]},
        },
        "gain": flat["gain"],
    }
    overrides = {"layers/fc/kernel": {"axes": "sio"}}
    made = plan(
        params, MoRAConfig(rank=1, train=".*(norm/scale|gain)", overrides=overrides)
    )
    adapters = random_like(init(made, params=params))
    save_file(
        {k: np.asarray(v) for k, v in flat.items()}, tmp_path / "base.safetensors"
    )
    io.merge_checkpoint(tmp_path / "base.safetensors", adapters, tmp_path / "out")
    got = load_file(tmp_path / "out" / "base.safetensors")
    merged = merge(params, adapters)
    np.testing.assert_array_equal(got["gain"], merged["gain"])
    scale = merged["layers"]["norm"]["scale"]
    np.testing.assert_array_equal(got["layers/norm/scale"], scale)


def test_a_stack_of_layers_goes_into_their_tensors(tmp_path):
    params = {
        "layers": {"norm": {"scale": random(0, 2, 8)}},
        "fc": {"kernel": random(1, 8, 8)},
    }
    made = plan(params, MoRAConfig(rank=1, train=".*scale"))
    adapters = random_like(init(made, params=params))
    base = {f"model.layers.{k}.norm.weight": np.ones(8, np.float16) for k in range(2)}
    save_file(
        base | {"fc.weight": np.ones((8, 8), np.float16)}, tmp_path / "b.safetensors"
    )
    names = {"model.layers.{n}.norm": "layers/norm/scale[{n}]", "fc": "fc/kernel"}
    args = tmp_path / "b.safetensors", adapters
    io.merge_checkpoint(*args, tmp_path / "out", names)
    got = load_file(tmp_path / "out" / "b.safetensors")
    for k in range(2):
        expected = np.asarray(adapters["layers"]["norm"]["scale"].m[k], np.float16)
        np.testing.assert_array_equal(got[f"model.layers.{k}.norm.weight"], expected)
    scale = adapters["layers"]["norm"]["scale"].replace(m=jnp.full((2, 8), 1e6))
    large = {**adapters, "layers": {"norm": {"scale": scale}}}
    with pytest.raises(AdapterFileError, match="layers/norm/scale.* overflows float16"):
        io.merge_checkpoint(args[0], large, tmp_path / "large", names)
    assert not (tmp_path / "large").exists()


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_servers_are_refused_a_lora_that_lacks_them(tmp_path, server):
    with pytest.raises(ValueError, match="kernel trains itself.*io.merge_checkpoint"):
        io.export(tmp_path / "out", ADAPTERS, server)
    assert not (tmp_path / "out").exists()


def test_what_a_checkpoint_has_not_is_refused(tmp_path):
    file = tmp_path / "base.safetensors"
    merging = file, ADAPTERS, tmp_path / "out"
    save_file(torch(PARAMS, tied=True), file)
    with pytest.raises(
        AdapterFileError, match="'lm_head/kernel', or has it only as an"
    ):
        io.merge_checkpoint(*merging)
    tensors = torch(PARAMS)
    tensors["model.norm.weight"] = np.ones(9, np.float32)
    save_file(tensors, file)
    with pytest.raises(
        AdapterFileError, match=r"'model/norm/weight' of shape \(8,\) do"
    ):
        io.merge_checkpoint(*merging)
    tensors["model.norm.weight"] = np.ones(8, np.int8)
    save_file(tensors, file)
    with pytest.raises(AdapterFileError, match="model.norm.weight.*dequantise"):
        io.merge_checkpoint(*merging)
    assert not (tmp_path / "out").exists()


def test_inspect_shows_them(tmp_path):
    save(tmp_path / "a", ADAPTERS)
    text = run("inspect", tmp_path / "a")
    (row,) = [line for line in text.splitlines() if line.startswith("lm_head/kernel")]
    assert "8 x 20" in row and "trained" in row and "160" in row


def test_export_keeps_them(tmp_path):
    save(tmp_path / "a", ADAPTERS)
    run("export", tmp_path / "a", tmp_path / "b", "--for", "mora")
    for name in ("a", "b"):
        assert (tmp_path / name / TENSORS).read_bytes()
    assert_same(load(tmp_path / "b"), ADAPTERS)
    io.export(tmp_path / "c", ADAPTERS, "peft")
    whole = load_file(tmp_path / "c" / TENSORS)
    merged = torch(merge(PARAMS, ADAPTERS))
    names = {name: name for name in merged if "q_proj.weight" not in name}
    # PEFT has a layer with an adapter inside its own.
    names |= {
        name: f"{name[:-5]}.base_layer.bias" for name in names if "q_proj" in name
    }
    assert len(names) == 7 and [*names] != [*names.values()]
    assert_same(
        [whole.pop(f"base_model.model.{there}") for there in names.values()],
        [merged[name] for name in names],
    )
    assert all(".lora_" in name for name in whole)
