"""A checkpoint of PyTorch becomes the params of a Flax model, in the model's layout."""

import dataclasses
import json
import os
import re
from types import SimpleNamespace

import cloud
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import assert_same, flatten, slow, unflatten
from base_files import DATA, llama, resident
from flax import nnx
from flax.linen import spmd
from helpers import close
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import assert_shardings, make_mesh, placed
from pytorch_states import (
    BFLOAT16,
    HEAD,
    STATES,
    WIDTH,
    beside,
    in_flax,
    numbers,
    shapes,
)
from safetensors.numpy import load_file, save_file

from models import llama as scanned_llama
from models import smollm2, smollm2_nnx
from mora_jax.io import AdapterFileError, load_base
from mora_jax.io._tensors import TensorFile

by_family = pytest.mark.parametrize("family", STATES)
DIFFERENT = "llama", "gemma3", "gpt2", "bert"
by_layout = pytest.mark.parametrize(
    ("family", "layout"),
    [
        (family, layout) if family in DIFFERENT else slow(family, layout)
        for family in STATES
        for layout in ("heads", "stacked")
    ],
)


def stored(path, family, dtype=np.float32, change=lambda tensors: None):
    """A family's file, and the numbers in it."""
    state = numbers(family, dtype)
    tensors = {**state, **beside(family, state)}
    change(tensors)
    save_file(tensors, path)
    return state


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


@by_family
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_each_leaf_is_its_tensor(file, family, dtype):
    expected = in_flax(family, stored(file, family, dtype))
    like = shapes(expected)
    for names in (None, family):
        assert_same(load_base(file, like, names), expected)


def with_heads(tree):
    """The same with an axis for heads, where attention has them."""
    flat = flatten(tree)
    for path, leaf in flat.items():
        if re.search("self_attn/[qkv]_proj", path):
            flat[path] = leaf.reshape(*leaf.shape[:-1], -1, HEAD)
        elif "o_proj" in path:
            flat[path] = leaf.reshape(-1, HEAD, leaf.shape[-1])
    return unflatten(flat)


def stacked(family, tree):
    """The same with stacked layers, and the templates for it."""
    flat, names = {}, {}
    for path, leaf in flatten(tree).items():
        if number := re.search(r"/(\d+)/", path):
            path = path.replace(number[0], "/")
            flat.setdefault(path, []).append(leaf)
        else:
            flat[path] = leaf
    for name, shape in STATES[family].items():
        if re.search(r"\.0\..*(weight|gamma)$", name):
            module = name.rpartition(".")[0]
            path = ("transformer/" if family == "gpt2" else "") + module
            ends = ("kernel",) if len(shape) == 2 else ("weight", "scale")
            for last in ends:
                path = module.replace(".0.", "/").replace(".", "/") + f"/{last}"
                path = f"transformer/{path}" if family == "gpt2" else path
                if path in flat:
                    names[module.replace(".0.", ".{n}.")] = f"{path}[{{n}}]"
    both = {k: np.stack(v) if isinstance(v, list) else v for k, v in flat.items()}
    return unflatten(both), names


def layouts(family, state):
    """{layout: (the expected tree, names)}."""
    tree = in_flax(family, state)
    heads = with_heads(tree)
    return {"heads": (heads, family), "stacked": stacked(family, heads)}


@by_layout
def test_layouts_are_those_of_the_model(file, family, layout):
    expected, names = layouts(family, stored(file, family))[layout]
    assert_same(load_base(file, shapes(expected), names), expected)


MESH = make_mesh(data=2, fsdp=2, model=2)


def split(tree):
    """Shardings that split each axis of even size over axes of the mesh."""

    def place(leaf):
        halves = zip(("data", "fsdp", "model"), leaf.shape, strict=False)
        return NamedSharding(MESH, P(*(n if k % 2 == 0 else None for n, k in halves)))

    return jax.tree.map(place, tree)


@by_layout
def test_each_device_gets_its_part(file, family, layout):
    expected, names = layouts(family, stored(file, family))[layout]
    places, like = split(expected), shapes(expected)
    for got in (
        load_base(file, placed(like, places), names),
        load_base(file, like, names, sharding=places),
    ):
        assert_same(got, expected)
        assert_shardings(got, places)
    everywhere = NamedSharding(MESH, P())
    got = load_base(file, like, names, sharding=everywhere)
    assert_shardings(got, jax.tree.map(lambda _: everywhere, got))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "bert"])
def test_transformers_converts_to_the_same(file, family):
    """Its own Flax models, and its own reading of PyTorch's tensors."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_flax_pytorch_utils import (
        convert_pytorch_state_dict_to_flax,
    )

    heads = {"num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 50}
    sizes = {**heads, "hidden_size": WIDTH, "intermediate_size": 40}
    decoder = {**sizes, "num_key_value_heads": 2, "head_dim": HEAD}
    name, head, config = {
        "llama": ("Llama", "ForCausalLM", decoder),
        "gemma": ("Gemma", "ForCausalLM", decoder),
        "gpt2": ("GPT2", "LMHeadModel", {"n_embd": WIDTH, "n_layer": 2, "n_head": 4}),
        "bert": ("Bert", "ForMaskedLM", {**sizes, "max_position_embeddings": 32}),
    }[family]
    if family == "gpt2":
        config |= {"vocab_size": 50, "n_positions": 32}
    config = getattr(transformers, f"{name}Config")(**config)
    cls = getattr(transformers, f"Flax{name}{head}")
    like = cls(config, _do_init=False).params_shape_tree
    state = stored(file, family)
    model = SimpleNamespace(base_model_prefix=cls.base_model_prefix, params=like)
    expected = flatten(convert_pytorch_state_dict_to_flax(dict(state), model))
    expected = unflatten({name: expected[name] for name in flatten(like)})
    assert_same(load_base(file, like, family), expected)


def test_logits_are_pytorchs():
    """Those of a Llama that PyTorch has written, in Linen, NNX and scanned Linen."""
    logits = load_file(DATA / "type1" / "logits.safetensors")
    ids, path = logits["input_ids"], DATA / "type1" / "base_model.safetensors"
    model = llama()
    like = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    params = load_base(path, like, smollm2.NAMES)
    close(jax.jit(model.apply)({"params": params}, ids), logits["base_logits"], 1e-4)

    net = nnx.eval_shape(lambda: smollm2_nnx.Llama(model.config, rngs=nnx.Rngs(0)))
    state = load_base(path, nnx.state(net, nnx.Param), smollm2.NAMES)
    assert isinstance(state, nnx.State)
    nnx.update(net, state)
    close(nnx.jit(lambda net, ids: net(ids))(net, ids), logits["base_logits"], 1e-4)


def test_scanned_layers_and_a_tied_head():
    """On a mesh, where the model's logical axes say where each leaf is."""
    path, ids = DATA / "type1" / "base_model.safetensors", np.arange(6)[None] * 13
    model = llama()
    config = dataclasses.replace(
        model.config, rope_base=scanned_llama.ROPE_BASE, epsilon=1e-5
    )
    model = smollm2.Llama(config)
    like = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    plain = load_base(path, like, smollm2.NAMES)
    expected = jax.jit(model.apply)({"params": plain}, ids)

    sizes = scanned_llama.Shape(2, 64, 160, 4, 2, 97, head_width=16)
    model = scanned_llama.Llama(sizes, dtype=jnp.float32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    mesh = make_mesh(data=1, fsdp=4, model=1)  # 97 tokens cannot be split
    specs = nn.get_partition_spec(boxed)
    places = spmd.logical_to_mesh_sharding(specs, mesh, scanned_llama.RULES)
    params = load_base(path, boxed, scanned_llama.NAMES, sharding=places)
    assert jax.tree.structure(params) == jax.tree.structure(boxed)
    assert_shardings(params, places)
    close(jax.jit(model.apply)({"params": params}, ids), expected, 1e-4)
    kernel = params["layers"]["up_proj"]["kernel"]
    assert isinstance(kernel, nn.LogicallyPartitioned)
    assert kernel.value.addressable_shards[0].data.shape == (2, 16, 160)


def test_one_head_for_both(file):
    """A file with the head alone, and a model with both."""
    state = numbers("llama")
    table = state.pop("model.embed_tokens.weight")
    state["lm_head.weight"] = table
    save_file(state, file)
    tree = in_flax("llama", {**state, "model.embed_tokens.weight": table})
    assert_same(load_base(file, shapes(tree)), tree)
    config = file.parent / "config.json"
    config.write_text(json.dumps({"tie_word_embeddings": False}))
    with pytest.raises(AdapterFileError, match="no tensors are tied"):
        load_base(file.parent, shapes(tree))


@by_family
def test_nothing_is_left_out_silently(file, family):
    """Neither a leaf without a tensor nor a tensor without a leaf."""
    state = stored(file, family)
    like = shapes(in_flax(family, state))
    flat = flatten(like)
    for path in list(flat)[:: max(1, len(flat) // 6)]:
        rest = {name: leaf for name, leaf in flat.items() if name != path}
        with pytest.raises(AdapterFileError, match="like has no leaf for"):
            load_base(file, unflatten(rest), family)
        wrong = jax.ShapeDtypeStruct((*flat[path].shape, 2), np.float32)
        with pytest.raises(AdapterFileError, match=rf"'{path}' in like has shape"):
            load_base(file, unflatten({**flat, path: wrong}), family)
        other = jax.ShapeDtypeStruct((3,), np.float32)
        with pytest.raises(AdapterFileError, match=r"no tensor for .*'new/scale'"):
            load_base(file, unflatten({**flat, "new/scale": other}), family)
    tied = ("lm_head.weight", "embed_tokens.weight", "word_embeddings.weight")
    for name in list(state)[:: max(1, len(state) // 6)]:
        if not name.endswith(tied) and name != "cls.predictions.bias":
            stored(file, family, change=lambda tensors, name=name: tensors.pop(name))
            with pytest.raises(AdapterFileError, match="the base has no tensor"):
                load_base(file, like, family)


def test_what_may_be_left_out(file):
    def add(tensors):
        tensors["vision.patch.weight"] = tensors["vision.norm"] = np.ones(3, np.float32)

    state = stored(file, "gemma", change=add)
    tree = in_flax("gemma", state)
    like = shapes(tree)
    with pytest.raises(AdapterFileError, match=r"vision\..* and 1 more .*skip="):
        load_base(file, like)
    assert_same(load_base(file, like, skip=r"vision\..*"), tree)
    assert_same(load_base(file, like, skip=[".*norm", "vision.patch.*"]), tree)
    for skip in "visoin.*", "(":
        with pytest.raises(ValueError, match="skip must match names of tensors"):
            load_base(file, like, skip=[skip])

    def untie(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1

    stored(file, "gemma", change=untie)
    with pytest.raises(AdapterFileError, match="no leaf for 'lm_head.weight'"):
        load_base(file, like)


def test_dtypes_are_as_asked(file, float64):
    state = stored(file, "llama", BFLOAT16)
    tree = in_flax("llama", state)
    like = shapes(tree, np.float32)
    norm = like["model"]["norm"]
    norm["weight"] = jax.ShapeDtypeStruct((WIDTH,), BFLOAT16)
    with pytest.raises(AdapterFileError, match="bfloat16, and .* is float32: dtype="):
        load_base(file, like)
    got = load_base(file, like, dtype="like")
    assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, like)
    assert_same(jax.tree.map(lambda a: np.asarray(a, BFLOAT16), got), tree)
    for dtype in (np.float64, BFLOAT16):
        got = load_base(file, like, dtype=dtype)
        assert_same(got, jax.tree.map(lambda a, d=dtype: a.astype(d), tree))
    jax.config.update("jax_enable_x64", False)
    with pytest.raises(AdapterFileError, match="set jax_enable_x64"):
        load_base(file, like, dtype=np.float64)
    with pytest.raises(TypeError, match="dtype must be 'like' or a floating"):
        load_base(file, like, dtype=np.int8)
    huge = {"norm.weight": np.full(3, 1e6, np.float32)}
    save_file(huge, file)
    like = {"norm": {"scale": jax.ShapeDtypeStruct((3,), np.float16)}}
    with pytest.raises(AdapterFileError, match="'norm.weight' overflows float16"):
        load_base(file, like, dtype="like")


LIKE = {"fc": {"kernel": jax.ShapeDtypeStruct((2, 4), np.float32)}}
TENSORS = {"fc.weight": np.ones((4, 2), np.float32)}
INTEGERS = {"fc.weight": np.ones((4, 2), np.int8)}
TWICE = {**TENSORS, "model.fc.weight": np.ones((4, 2), np.float32)}
ADAPTED = {"fc": {**LIKE["fc"], "kernel_mora": jax.ShapeDtypeStruct((2, 2), "f4")}}
FOUR = make_mesh(model=4)
SQUARE = {"fc": {"weight": jax.ShapeDtypeStruct((4, 2), np.float32)}}


@pytest.mark.parametrize(
    ("tensors", "like", "settings", "error", "match"),
    [
        (TENSORS, LIKE, {"names": "mistral"}, ValueError, "must be one of .*'llama'"),
        (TENSORS, LIKE, {"names": "lama3"}, ValueError, "did you mean 'llama'"),
        (TENSORS, {"params": LIKE}, {}, ValueError, "variables\\['params'\\]"),
        (TENSORS, nnx.Linear(2, 4, rngs=nnx.Rngs(0)), {}, TypeError, "nnx.state"),
        (
            TENSORS,
            {"fc": {"kernel": 3.0}},
            {},
            TypeError,
            "must hold arrays, got float",
        ),
        (TENSORS, ADAPTED, {}, ValueError, "without adapters, got 'fc/kernel_mora'"),
        (TENSORS, SQUARE, {}, AdapterFileError, "'fc.weight' of shape .* does not fit"),
        (INTEGERS, LIKE, {}, AdapterFileError, "got I8: dequantise"),
        (TWICE, LIKE, {}, AdapterFileError, "no leaf for 'model.fc.weight'"),
        (
            TENSORS,
            LIKE,
            {"sharding": {"fc": {"bias": P()}}},
            ValueError,
            "sharding lacks .*'fc/kernel'",
        ),
        (
            TENSORS,
            LIKE,
            {"sharding": {"fc": {"kernel": P()}}},
            TypeError,
            "such as NamedSharding",
        ),
        (
            TENSORS,
            LIKE,
            {"sharding": NamedSharding(FOUR, P("model"))},
            ValueError,
            "must split 'fc/kernel' evenly",
        ),
        (
            TENSORS,
            LIKE,
            {"sharding": NamedSharding(FOUR.abstract_mesh, P())},
            ValueError,
            "must name devices",
        ),
        (
            {"layers.0.fc.weight": np.ones((4, 2), np.float32)},
            {"layers_0": LIKE},
            {},
            AdapterFileError,
            r'names=..layers.{n}.{name}": "layers_{n}/{name}/kernel"',
        ),
    ],
)
def test_refuses(file, unchecked, tensors, like, settings, error, match):
    save_file(tensors, file)
    with pytest.raises(error, match=match):
        load_base(file, like, **settings)


def test_templates_of_tensors(file):
    """A bias with a name of its own, one beside its kernel, and fields at the end."""
    tensors = {f"{module}.0.bias": np.ones(4, np.float32) for module in "xyz"}
    tensors["y.0.weight"] = np.eye(4, dtype=np.float32)
    save_file(tensors, file)
    names = {"x.{n}.bias": "x_bias_{n}", "y.{n}": "y/w[{n}]", "z.{n}.{k}": "z_{n}/{k}"}
    like = {"x_bias_0": tensors["x.0.bias"], "z_0": {"bias": tensors["z.0.bias"]}}
    like["y"] = {"w": tensors["y.0.weight"][None], "bias": tensors["y.0.bias"][None]}
    assert_same(load_base(file, like, names), like)


def test_two_leaves_of_one_tensor(file):
    save_file(TENSORS, file)
    leaf = LIKE["fc"]["kernel"]
    like = {"fc": {"kernel": leaf}, "model": {"fc": {"kernel": leaf}}}
    with pytest.raises(AdapterFileError, match="are both 'fc.weight'"):
        load_base(file, like)


def test_damaged_files(tmp_path, file):
    like = shapes(in_flax("llama", stored(file, "llama")))
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(AdapterFileError, match="not a safetensors file"):
        load_base(file, like)
    file.unlink()
    (tmp_path / "pytorch_model.bin").write_text("a pickle")
    with pytest.raises(AdapterFileError, match="no .*safetensors"):
        load_base(tmp_path, like)


def test_a_file_that_shrinks_while_it_is_read(file, monkeypatch):
    like = shapes(in_flax("llama", stored(file, "llama")))
    rows = TensorFile.rows

    def cut_off(self, *args):
        os.truncate(file, 5000)
        return rows(self, *args)

    monkeypatch.setattr(TensorFile, "rows", cut_off)
    with pytest.raises(AdapterFileError, match="was cut off while read"):
        load_base(file, like)


def test_shards_and_urls(tmp_path, file):
    """Two files and an index, and the same in an object store."""
    state = numbers("qwen3")
    expected, weights = in_flax("qwen3", state), {}
    for number, part in enumerate((list(state)[::2], list(state)[1::2])):
        name = f"model-{number}.safetensors"
        save_file({tensor: state[tensor] for tensor in part}, tmp_path / name)
        weights |= dict.fromkeys(part, name)
    index = json.dumps({"weight_map": weights})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert_same(load_base(str(tmp_path), shapes(expected)), expected)
    cloud.restore({})
    cloud.upload(tmp_path, "mem://bucket/base")
    assert_same(load_base("mem://bucket/base", shapes(expected)), expected)
    cloud.restore({})


def test_a_device_reads_its_rows_alone(file, monkeypatch):
    """Columns of a kernel are rows of a file. Replicas are read once."""
    weight, read = np.arange(64 * 32, dtype=np.float32).reshape(64, 32), []
    save_file({"fc.weight": weight}, file)
    monkeypatch.setattr("mora_jax.io._tensors.CHUNK", 1000)
    rows = TensorFile.rows

    def counted(self, *args):
        for piece in rows(self, *args):
            read.append(piece.nbytes)
            yield piece

    monkeypatch.setattr(TensorFile, "rows", counted)
    for spec, times in ((P(None, "model"), 1), (P(), 1), (P("fsdp", "model"), 2)):
        place, like = NamedSharding(MESH, spec), jax.ShapeDtypeStruct((32, 64), "f4")
        read.clear()
        got = load_base(file, {"fc": {"kernel": like}}, sharding=place)["fc"]["kernel"]
        np.testing.assert_array_equal(got, weight.T)
        assert got.sharding == place
        assert sum(read) == times * weight.nbytes and max(read) <= 1000


@pytest.mark.parametrize("mesh", [False, True])
def test_memory_stays_near_the_result(file, monkeypatch, mesh):
    """128 MB of kernels, 4 MB each; allocators keep up to 30 MB more."""
    shape = (1024, 1024)
    save_file({f"l{k}.weight": np.ones(shape, np.float32) for k in range(32)}, file)
    like = {f"l{k}": {"kernel": jax.ShapeDtypeStruct(shape, "f4")} for k in range(32)}
    place = NamedSharding(MESH, P(("data", "fsdp"), "model")) if mesh else None
    load_base(file, like, sharding=place)
    found, rows = [], TensorFile.rows

    def measured(self, *args):
        found.append(resident())
        return rows(self, *args)

    monkeypatch.setattr(TensorFile, "rows", measured)
    before = resident()
    params = load_base(file, like, sharding=place)
    assert len(found) == (256 if mesh else 32)
    assert max(*found, resident()) - before < 128 * 2**20 + 30_000_000
    assert len(params) == 32
