"""A checkpoint of PyTorch becomes the params of a Flax model, in the model's layout."""

import dataclasses
import json
import tracemalloc
from types import SimpleNamespace

import cloud
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import assert_same, flatten, slow, unflatten
from base_files import DATA, llama
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
    in_flax,
    layouts,
    numbers,
    shapes,
    stored,
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


@pytest.mark.law
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
@pytest.mark.parametrize(
    "family", ["llama", pytest.param("gemma", marks=pytest.mark.slow), "gpt2", "bert"]
)
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
    """A file with the head alone, and a model with both, unless a config says no."""
    state = numbers("llama")
    table = state.pop("model.embed_tokens.weight")
    state["lm_head.weight"] = table
    save_file(state, file)
    tree = in_flax("llama", {**state, "model.embed_tokens.weight": table})
    assert_same(load_base(file, shapes(tree)), tree)
    config = file.parent / "config.json"
    for text in ({}, {"text_config": {}}):
        config.write_text(json.dumps(text))
        assert_same(load_base(file, shapes(tree)), tree)
    untied = {"tie_word_embeddings": False}
    for text in (untied, {"tie_word_embeddings": True, "text_config": untied}):
        config.write_text(json.dumps(text))
        for path in (file.parent, file):
            with pytest.raises(AdapterFileError, match="no tensors are tied"):
                load_base(path, shapes(tree))


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


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [False, True])
def test_memory_stays_near_the_result(file, mesh):
    """Of 32 kernels, NumPy holds one, its bytes in the file, and JAX's last one.

    Where an array is aligned, JAX takes it instead of a copy: it is in the result.
    """
    shape = (1024, 1024)
    save_file({f"l{k}.weight": np.ones(shape, np.float32) for k in range(32)}, file)
    like = {f"l{k}": {"kernel": jax.ShapeDtypeStruct(shape, "f4")} for k in range(32)}
    place = NamedSharding(MESH, P(("data", "fsdp"), "model")) if mesh else None
    load_base(file, like, sharding=place)  # compiles everything
    tracemalloc.start()
    try:
        params = load_base(file, like, sharding=place)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(params) == 32
    assert peak - held < 3 * 4 * 2**20 + 1_000_000


def test_scalars_alone_and_in_stacks(file):
    """Whether PyTorch has them without an axis or with one."""
    values = {f"a.{k}.gain.weight": np.full((1,) * k, k + 1, "f4") for k in range(2)}
    save_file({**values, "b.weight": np.array(3, np.float32)}, file)
    names = {"a.{n}.gain": "gains[{n}]", "b": "b"}
    expected = {"gains": np.array([1, 2], np.float32), "b": np.array(3, np.float32)}
    assert_same(load_base(file, shapes(expected), names), expected)
