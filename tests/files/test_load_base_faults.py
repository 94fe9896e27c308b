"""What does not fit a checkpoint of PyTorch is refused, and nothing is left out."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import assert_same, flatten, unflatten
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from pytorch_states import (
    BFLOAT16,
    STATES,
    WIDTH,
    in_flax,
    shapes,
    stored,
)
from safetensors.numpy import save_file

from mora_jax.io import AdapterFileError, load_base
from mora_jax.io._tensors import TensorFile

by_family = pytest.mark.parametrize("family", STATES)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.law
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
        with pytest.raises(
            AdapterFileError, match=rf"leaf '{path}' of shape .* does not fit"
        ):
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
    for skip, match in (
        ("visoin.*", "skip: 'visoin.*' matches no tensor in the base; the nearest"),
        ("(", "skip holds '\\(', which is not a regular expression"),
    ):
        with pytest.raises(ValueError, match=match):
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
    with pytest.raises(TypeError, match="dtype of .* must be a floating.* got int8"):
        load_base(file, like, dtype=np.int8)
    huge = {"norm.weight": np.full(3, 1e6, np.float32)}
    save_file(huge, file)
    like = {"norm": {"scale": jax.ShapeDtypeStruct((3,), np.float16)}}
    with pytest.raises(AdapterFileError, match="'norm.weight' overflows float16"):
        load_base(file, like, dtype="like")


@pytest.mark.parametrize(
    ("dtype", "most", "more"),
    [
        (jnp.float16, 65504, 65536),
        (jnp.float8_e4m3fn, 448, 480),
        (jnp.float8_e5m2, 57344, 65536),
        (jnp.float4_e2m1fn, 6, 8),
    ],
)
def test_no_number_is_too_large_for_its_dtype(file, dtype, most, more):
    """Some have infinity there, some NaN, and some their largest number."""
    like = {"norm": {"scale": jax.ShapeDtypeStruct((3,), dtype)}}
    for sign in (1, -1):
        save_file({"norm.weight": np.array([sign * most, 0, 1], np.float32)}, file)
        got = load_base(file, like, dtype="like")["norm"]["scale"]
        np.testing.assert_array_equal(got.astype(np.float32), [sign * most, 0, 1])
        save_file({"norm.weight": np.array([0, sign * more, 1], np.float32)}, file)
        with pytest.raises(AdapterFileError, match="'norm.weight' overflows float"):
            load_base(file, like, dtype="like")


def test_is_for_use_outside_of_transformations(file):
    save_file(TENSORS, file)
    arrays = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), LIKE)
    for transformed in (
        lambda: jax.eval_shape(lambda: load_base(file, LIKE)),
        lambda: jax.jit(lambda like: load_base(file, like))(arrays),
        lambda: jax.vjp(lambda like: load_base(file, like), arrays),
    ):
        with pytest.raises(TypeError, match="outside of jit"):
            transformed()


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
            "must be an array, got float",
        ),
        (TENSORS, ADAPTED, {}, AdapterFileError, "for the leaf 'fc/kernel_mora'"),
        (TENSORS, SQUARE, {}, AdapterFileError, "does not fit 'fc.weight' of shape"),
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
            ValueError,
            "as NamedSharding",
        ),
        (
            TENSORS,
            LIKE,
            {"sharding": NamedSharding(FOUR, P("model"))},
            ValueError,
            r"must split 'fc/kernel', of shape \(2, 4\), evenly",
        ),
        (
            TENSORS,
            LIKE,
            {"sharding": NamedSharding(FOUR.abstract_mesh, P())},
            ValueError,
            "must split 'fc/kernel', .* over devices",
        ),
        (
            {**TENSORS, "fc.bias": np.ones(4, np.float32)},
            {"fc": {**LIKE["fc"], "bias": jax.ShapeDtypeStruct((4,), np.float32)}},
            {"sharding": NamedSharding(FOUR, P(None, "model"))},
            ValueError,
            r"split 'fc/bias', of shape \(4,\), evenly .*None, 'model'.* each leaf",
        ),
        (TENSORS, LIKE, {"skip": None}, TypeError, "skip must be .* got None"),
        (TENSORS, LIKE, {"skip": 3}, TypeError, "skip must be .* got 3"),
        (TENSORS, LIKE, {"skip": [3]}, TypeError, "skip must hold .* got 3"),
        (
            {"layers.0.fc.weight": np.ones((4, 2), np.float32)},
            {"layers_0": LIKE},
            {},
            AdapterFileError,
            "'layers_0/fc/kernel'.* templates name them",
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
