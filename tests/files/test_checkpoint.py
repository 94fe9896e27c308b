"""Merging files gives what merging trees gives, and harms no file."""

import math
import multiprocessing
import os
import shutil
import struct
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from adapter_files import contents, flatten, made, single, slow, specs_of, unflatten
from base_files import files_of_at_most, kernels, resident, sharded
from cases import by_kind
from helpers import close, random, wide
from safetensors.numpy import load_file, save_file

import mora_jax
from mora_jax import MoRAConfig, make_operator
from mora_jax.io import AdapterFileError, Checkpoint, merge_checkpoint
from mora_jax.io._files import CONFIG


@pytest.fixture
def base(tmp_path):
    return sharded(tmp_path / "base")


DTYPES = [np.float32, ml_dtypes.bfloat16, np.float64, slow(np.float16)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_merges_shards(tmp_path, dtype):
    base, out, written = sharded(tmp_path / "base", dtype), tmp_path / "out", []
    adapters = kernels(base)
    before = contents(base)
    lost = merge_checkpoint(base, adapters, out, progress=written.append)
    assert contents(base) == before
    assert sum(written) == sum(file.size for file in Checkpoint(base).files)
    after = contents(out)
    assert after.keys() == before.keys() - {"pytorch_model.bin"}
    assert all(after[n] == before[n] for n in after if n.endswith(".json"))
    one, other = Checkpoint(base), Checkpoint(out)
    assert [f.header for f in one.files] == [f.header for f in other.files]
    paths = specs_of(adapters)
    weights = {path: path.replace("/", ".")[:-6] + "weight" for path in paths}

    def read(checkpoint, name):
        return np.asarray(checkpoint.place[name][name])

    tree = unflatten({name: read(one, weight).T for name, weight in weights.items()})
    if dtype == np.float64:  # JAX has it on demand
        tree = jax.tree.map(lambda kernel: kernel.astype(np.float32), tree)
    expected = mora_jax.merge(jax.tree.map(jnp.asarray, tree), adapters)
    losses = mora_jax.diagnostics.merge_loss(tree, adapters)
    tolerance = 1e-6 if np.dtype(dtype).itemsize > 2 else 0
    for name, kernel in flatten(expected).items():
        found = wide(read(other, weights[name]).T)
        np.testing.assert_allclose(found, wide(kernel), tolerance, tolerance)
        assert abs(lost[weights[name]] - losses[name]) < 1e-3
    others = one.place.keys() - weights.values()
    assert len(others) == 4
    for name in others:
        before, after = (list(c.place[name].chunks(name)) for c in (one, other))
        assert before == after


@by_kind
@pytest.mark.parametrize("separator", ["/", "."])
def test_our_own_names_and_stacks(tmp_path, case, separator):
    """A Flax tree that was stored flat: kernels in their own layout."""
    base, name, shape = tmp_path / "base.safetensors", f"a{separator}k", (2, 3, 20, 4)
    plan = single(case.make(12, 20, 6), shape, ("a", "k"), axes="sioi")
    adapters = made(plan)
    kernel = np.random.default_rng(0).standard_normal(shape, np.float32)
    save_file({name: kernel}, base)
    merge_checkpoint(base, adapters, tmp_path / "out")
    merged = load_file(tmp_path / "out" / base.name)[name]
    expected = mora_jax.merge({"a": {"k": jnp.asarray(kernel)}}, adapters)
    np.testing.assert_allclose(merged, expected["a"]["k"], rtol=1e-5, atol=1e-5)


def test_conv1d_and_stacks_by_name(tmp_path):
    """GPT-2 stores (in, out); and one stacked kernel is many modules."""
    rng = np.random.default_rng(0)
    base = tmp_path / "base.safetensors"
    conv1d = rng.standard_normal((12, 12), np.float32)
    linears = rng.standard_normal((2, 12, 20), np.float32)
    tensors = {f"layers.{n}.fc.weight": linears[n].T.copy() for n in range(2)}
    save_file({"h.0.attn.c_attn.weight": conv1d, **tensors}, base)
    for names, tree, axes in (
        ("gpt2", {"h": {"0": {"attn": {"c_attn": {"kernel": conv1d}}}}}, "io"),
        ({"layers.{n}.fc": "fc/kernel[{n}]"}, {"fc": {"kernel": linears}}, "sio"),
    ):
        config = MoRAConfig(rank=1, overrides={".*": {"axes": axes}})
        plan = mora_jax.plan(tree, config)
        merge_checkpoint(base, made(plan), tmp_path / axes, names)
        (expected,) = jax.tree.leaves(mora_jax.merge(tree, made(plan)))
        merged = load_file(tmp_path / axes / base.name)
        found = merged["h.0.attn.c_attn.weight"]
        if axes == "sio":
            found = np.stack([merged[name].T for name in tensors])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


AXES = ["iso", "sooi", "ooi"]
AXES += map(slow, ["oi", "ioo", "iio", "ioi", "sio", "osi", "ssoi", "soioi"])


@pytest.mark.parametrize("axes", AXES)
def test_any_axes_by_name(tmp_path, axes):
    """A tensor (out, in) for each index of the stack and, by name, of an axis "oo"."""
    kinds = {"i": [4, 3, 2], "o": [2, 6, 2], "s": [2, 3]}
    shape = tuple(kinds[kind][axes[:k].count(kind)] for k, kind in enumerate(axes))
    order = [k for kind in "soi" for k, other in enumerate(axes) if other == kind]
    kernel = random(0, *shape, dtype=ml_dtypes.bfloat16)
    turned = np.asarray(kernel).transpose(order)
    depth, tensors = axes.count("s"), {}
    depth += axes.strip("s").startswith("o") and axes.count("o") > 1
    for index in np.ndindex(turned.shape[:depth]):
        outs = turned.shape[depth : axes.count("s") + axes.count("o")]
        weight = turned[index].reshape(math.prod(outs), -1)
        tensors[".".join(map(str, ("m", *index))) + ".weight"] = weight.copy()
    base, fields = tmp_path / "base.safetensors", ["{a}", "{b}", "{c}"][:depth]
    save_file(tensors, base)
    params = {"fc": {"kernel": kernel}}
    config = MoRAConfig(rank=1, targets=".*", overrides={".*": {"axes": axes}})
    adapters = made(mora_jax.plan(params, config), scale=0.01)
    mora_jax.save(tmp_path / "a", adapters, params=params)
    names = {
        ".".join(["m", *fields]): f"fc/kernel[{','.join(fields)}]".replace("[]", "")
    }
    merge_checkpoint(base, mora_jax.load(tmp_path / "a"), tmp_path / "out", names)
    found, merged = load_file(tmp_path / "out" / base.name), np.empty_like(turned)
    for index in np.ndindex(turned.shape[:depth]):
        name = ".".join(map(str, ("m", *index))) + ".weight"
        merged[index] = found[name].reshape(merged[index].shape)
    expected = np.asarray(mora_jax.merge(params, adapters)["fc"]["kernel"])
    assert merged.transpose(np.argsort(order)).tobytes() == expected.tobytes()
    assert expected.tobytes() != np.asarray(kernel).tobytes()


TABLES = [
    (names, f"{path}/embedding", path.replace("/", "."))
    for names, path in (
        ("llama", "model/embed_tokens"),
        (None, "embed_tokens"),
        ("gpt2", "transformer/wpe"),
        ("bert", "bert/embeddings/word_embeddings"),
    )
]
TABLES += [
    (names, "embedder/input_embedding", "model.embed_tokens")
    for names in ("tunix", "gm")
]
TABLES += [
    ({module: path}, path, module)
    for module, path in (("model.embed_tokens", "table/w"), ("rows", "t/embedding"))
]


def test_tables_are_as_they_are_in_pytorch(tmp_path):
    """Weights of layers are transposed there; a square table would fit, too."""
    base, out = tmp_path / "base.safetensors", tmp_path / "out"
    for names, path, module in TABLES:
        for axes, widths in (("io", (24, 24)), ("oi", (24, 24)), ("io", (40, 24))):
            ins, outs = (widths[axes.index(letter)] for letter in "io")
            operator = make_operator("decoupling", ins, outs, 6)
            place = tuple(path.split("/"))
            plan = single(operator, widths, place, axes=axes, alpha=0.5)
            adapters = made(plan)
            (m,) = jax.tree.leaves(adapters)
            delta = 0.5 * oracle.delta(*oracle.decoupling(operator), m)
            table = np.asarray(random(0, *widths))
            save_file({f"{module}.weight": table, "lm_head.weight": table + 1}, base)
            merge_checkpoint(base, adapters, out, names, force=True)
            found = load_file(out / base.name)
            merged = table + (delta if axes == "io" else delta.T)
            close(found[f"{module}.weight"], merged)
            np.testing.assert_array_equal(found["lm_head.weight"], table + 1)
            assert flatten(Checkpoint(base).shapes(names))[path].shape == widths


@pytest.mark.parametrize("trained_on", [0, 1])
def test_rows_of_a_table_round_and_know_their_base(tmp_path, trained_on):
    """Bit for bit as `merge` has it, dither included."""
    base, out = tmp_path / "base.safetensors", tmp_path / "out"
    table = random(0, 40, 24, dtype=ml_dtypes.bfloat16)
    params = {"embed_tokens": {"embedding": table}}
    config = MoRAConfig(rank=2, targets=".*", operator="signed_sharing")
    plan = mora_jax.plan(params, config)
    others = jax.tree.map(lambda table: table + trained_on, params)
    mora_jax.save(tmp_path / "a", made(plan, scale=0.01), params=others)
    adapters = mora_jax.load(tmp_path / "a")
    save_file({"model.embed_tokens.weight": np.asarray(table)}, base)
    args = base, adapters, out, {"model.embed_tokens": "embed_tokens/embedding"}
    if trained_on:
        with pytest.raises(AdapterFileError, match="other weights"):
            merge_checkpoint(*args)
        return
    merge_checkpoint(*args)
    found = load_file(out / base.name)["model.embed_tokens.weight"]
    expected = mora_jax.merge(params, adapters)["embed_tokens"]["embedding"]
    assert found.tobytes() == np.asarray(expected).tobytes()
    assert found.tobytes() != np.asarray(table).tobytes()


def test_refuses(tmp_path, base):
    adapters = kernels(base)
    half, there = sharded(tmp_path / "half", np.float16), tmp_path / "there"
    there.mkdir()
    (there / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="force"):
        merge_checkpoint(base, adapters, there)
    for out in (base, tmp_path, base / "." / ".." / "base"):
        with pytest.raises(ValueError, match="must not be the base"):
            merge_checkpoint(base, adapters, out, force=True)

    def fc(*shape):
        tree = {"fc": {"kernel": np.ones(shape)}}
        return made(mora_jax.plan(tree, MoRAConfig(rank=2)))

    huge = jax.tree.map(lambda m: m * 1e6, adapters)
    nan = jax.tree.map(lambda m: m * jnp.nan, adapters)
    named = {"model.layers.0.mlp.up_proj": "fc/kernel"}
    other = tmp_path / "half" / "other.safetensors"
    save_file({"fc.kernel": np.ones((24, 41), np.float32)}, other)
    for source, adapted, names, error, match in (
        (other, fc(24, 40), None, AdapterFileError, r"another shape, \(24, 41\)"),
        (base, fc(24, 40), None, AdapterFileError, "no tensor for .* 'fc/kernel'"),
        (base, fc(40, 24), named, AdapterFileError, "does not fit .* transposed"),
        (half, huge, None, AdapterFileError, "overflows float16"),
        (base, nan, None, ValueError, "NaN"),
    ):
        with pytest.raises(error, match=match):
            merge_checkpoint(source, adapted, tmp_path / "out", names)
    assert sorted(os.listdir(tmp_path)) == ["base", "half", "there"]
    assert os.listdir(there) == ["notes.txt"]


def test_force_replaces_the_output_unless_the_disk_is_full(tmp_path, base):
    adapters = kernels(base)
    out = tmp_path / "out"
    out.mkdir()
    (out / ONE).write_text("")
    merge_checkpoint(base, adapters, tmp_path / "other")  # its programs are kept
    shutil.rmtree(tmp_path / "other")
    with files_of_at_most(5000):
        merge_checkpoint(base, adapters, out, force=True)
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]
    assert os.listdir(out) == [ONE]
    merge_checkpoint(base, adapters, out, force=True)
    assert contents(out).keys() == contents(base).keys() - {"pytorch_model.bin"}
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]


def test_force_replaces_nothing_but_a_checkpoint(tmp_path, base):
    """Notes, a card, an adapter and a folder are not ours to remove."""
    (base / "README.md").write_text("of the base, not of the merged model")
    (base / CONFIG).write_text("{}")  # with which the merged model is adapted twice
    args = base, kernels(base), tmp_path / "out"
    for force in (False, True):
        merge_checkpoint(*args, force=force)
    whole = contents(args[-1])
    assert "README.md" not in whole and CONFIG not in whole
    for name in ("notes.txt", "README.md", CONFIG, "pytorch_model.bin", "my/own"):
        out = shutil.copytree(args[-1], tmp_path / name.replace("/", "-"))
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        with pytest.raises(FileExistsError, match=name.partition("/")[0]):
            merge_checkpoint(*args[:-1], out, force=True)
        assert (out / name).read_text() == "mine"
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(base / "config.json", alone)
    with pytest.raises(FileExistsError, match=r"config.json.* holds a \*.safetensors"):
        merge_checkpoint(*args[:-1], alone, force=True)
    assert os.listdir(alone) == ["config.json"]


INDEX = "model.safetensors.index.json"
ONE, TWO = (f"model-0000{k}-of-00002.safetensors" for k in (1, 2))
HEADER = struct.pack("<Q", 2**60) + b"{}"
OUTSIDE = '{"weight_map": {"a": "../../etc/passwd"}}'
INTEGERS = {
    "model.layers.0.mlp.up_proj.weight": np.ones((40, 24), np.int8),
    "model.layers.0.mlp.down_proj.weight": np.ones((24, 40), np.int8),
}


@pytest.mark.parametrize(
    ("harm", "match"),
    [
        (lambda d: [path.unlink() for path in d.iterdir()], "no .*safetensors"),
        (lambda d: save_file(INTEGERS, d / ONE), "dequantise"),
        (lambda d: os.truncate(d / TWO, 1000), "not a safetensors file"),
        (lambda d: (d / TWO).unlink(), "there is no model-00002"),
        (lambda d: (d / INDEX).write_text("{}"), "weight_map"),
        (lambda d: (d / INDEX).write_text(OUTSIDE), "must name files next to it"),
        (lambda d: (d / TWO).write_bytes((d / ONE).read_bytes()), "is in .* and in"),
        (lambda d: (d / ONE).write_bytes(HEADER), "header of at most"),
    ],
)
def test_refuses_bases(tmp_path, base, harm, match):
    adapters = kernels(base)
    harm(base)
    with pytest.raises(AdapterFileError, match=match):
        merge_checkpoint(base, adapters, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def memory_of_a_merge(folder):
    """Bytes that merging 192 MB of kernels, 2 MB each, takes, and its progress."""
    base, found = folder / "base", []
    base.mkdir()
    params = {f"l{k}": {"kernel": np.ones((512, 1024), np.float32)} for k in range(96)}
    for name, layer in params.items():
        save_file({f"{name}.kernel": layer["kernel"]}, base / f"{name}.safetensors")
    plan = mora_jax.plan(params, MoRAConfig(rank=1))

    def measure(size):
        found.append(resident())

    one = mora_jax.plan({"l0": params["l0"]}, MoRAConfig(rank=1))
    merge_checkpoint(base, made(one), folder / "first")  # compiles everything
    adapters, before = made(plan), resident()
    merge_checkpoint(base, adapters, folder / "out", progress=measure)
    return max(found) - before, len(found)


@pytest.mark.slow
def test_memory_stays_near_one_tensor(tmp_path):
    """A quarter of the kernels; allocators keep up to 30 MB more."""
    # In a process of its own: what other tests have left decides what is allocated.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        memory, calls = pool.submit(memory_of_a_merge, tmp_path).result()
    assert calls > 96 and memory < 48_000_000
