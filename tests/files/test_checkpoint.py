"""Merging files gives what merging trees gives, and harms no file."""

import os
import resource
import struct

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from adapter_files import (
    DATA,
    digests,
    files_of_at_most,
    kernels,
    made,
    sharded,
    single,
)
from cases import by_kind
from safetensors.numpy import load_file, save_file

import mora_jax
from mora_jax import MoRAConfig, io
from mora_jax.io import AdapterFileError, Checkpoint, merge_checkpoint


@pytest.mark.parametrize("mora_type", [1, 2, 6])
def test_merges_the_references_adapters(tmp_path, mora_type):
    base = DATA / f"type{mora_type}" / "base_model.safetensors"
    shapes = Checkpoint(base).shapes()
    adapters, plan = io.load_peft_mora(DATA / f"type{mora_type}", shapes)
    lost = merge_checkpoint(base, adapters, plan, tmp_path / "out")
    assert len(lost) == 14 and max(lost.values()) < 1e-4
    merged = load_file(tmp_path / "out" / "base_model.safetensors")
    expected = load_file(DATA / f"type{mora_type}" / "merged_weights.safetensors")
    for name, before in load_file(base).items():
        if name in expected:
            np.testing.assert_allclose(merged.pop(name), expected[name], atol=1e-5)
        else:
            np.testing.assert_array_equal(merged.pop(name), before)
    assert not merged


def tensor_of(kernel):
    """PyTorch's name of a kernel."""
    return kernel.replace("/kernel", "/weight").replace("/", ".")


@pytest.mark.parametrize(
    "dtype",
    [
        np.float32,
        ml_dtypes.bfloat16,
        np.float64,
        pytest.param(np.float16, marks=pytest.mark.slow),
    ],
)
def test_merges_shards(tmp_path, dtype):
    base = sharded(tmp_path / "base", dtype)
    adapters, plan = kernels(base)
    before, written = digests(base), []
    lost = merge_checkpoint(
        base, adapters, plan, tmp_path / "out", progress=written.append
    )
    assert digests(base) == before
    assert sum(written) == Checkpoint(base).size
    after = digests(tmp_path / "out")
    assert after.keys() == before.keys() - {"pytorch_model.bin"}
    assert all(after[n] == before[n] for n in after if n.endswith(".json"))
    one, other = Checkpoint(base), Checkpoint(tmp_path / "out")
    assert [f.header for f in one.files] == [f.header for f in other.files]
    tensor = {spec.name: tensor_of(spec.name) for spec in plan.specs}
    flat = {
        name: np.asarray(one.place[weight][weight]).T for name, weight in tensor.items()
    }
    tree = flax.traverse_util.unflatten_dict(flat, sep="/")
    if dtype == np.float64:  # JAX has it on demand
        tree = jax.tree.map(lambda kernel: kernel.astype(np.float32), tree)
    expected = mora_jax.merge(jax.tree.map(jnp.asarray, tree), adapters, plan)
    losses = mora_jax.diagnostics.merge_loss(tree, adapters, plan)
    tolerance = 1e-6 if np.dtype(dtype).itemsize > 2 else 0
    expected = flax.traverse_util.flatten_dict(expected, sep="/")
    for name, weight in tensor.items():
        np.testing.assert_allclose(
            np.asarray(other.place[weight][weight], np.float64).T,
            np.asarray(expected[name], np.float64),
            rtol=tolerance,
            atol=tolerance,
        )
        assert abs(lost[weight] - losses[name]) < 1e-3
    for number in range(2):
        name = f"model.layers.{number}.norm.weight"
        assert list(one.place[name].chunks(name)) == list(
            other.place[name].chunks(name)
        )


@by_kind
@pytest.mark.parametrize("separator", ["/", "."])
def test_our_own_names_and_stacks(tmp_path, case, separator):
    """A Flax tree that was stored flat: kernels in their own layout."""
    shape = 2, 3, 20, 4
    plan = single(case.make(12, 20, 6), shape, ("a", "k"), axes="sioi")
    adapters = made(plan)
    kernel = np.random.default_rng(0).standard_normal(shape)
    kernel = kernel.astype(np.float32)
    save_file({f"a{separator}k": kernel}, tmp_path / "base.safetensors")
    merge_checkpoint(tmp_path / "base.safetensors", adapters, plan, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "base.safetensors")[f"a{separator}k"]
    expected = mora_jax.merge({"a": {"k": jnp.asarray(kernel)}}, adapters, plan)
    np.testing.assert_allclose(merged, expected["a"]["k"], rtol=1e-5, atol=1e-5)


def test_conv1d_and_stacks_by_name(tmp_path):
    """GPT-2 stores (in, out); and one stacked kernel is many modules."""
    rng = np.random.default_rng(0)
    base = tmp_path / "base.safetensors"
    conv1d = rng.standard_normal((12, 12)).astype(np.float32)
    linears = rng.standard_normal((2, 12, 20)).astype(np.float32)
    tensors = {f"layers.{n}.fc.weight": linears[n].T.copy() for n in range(2)}
    save_file({"h.0.attn.c_attn.weight": conv1d, **tensors}, base)
    for names, tree, axes in (
        ("gpt2", {"h": {"0": {"attn": {"c_attn": {"kernel": conv1d}}}}}, "io"),
        ({"layers.{n}.fc": "fc/kernel[{n}]"}, {"fc": {"kernel": linears}}, "sio"),
    ):
        config = MoRAConfig(rank=1, overrides={".*": {"axes": axes}})
        plan = mora_jax.plan(tree, config)
        adapters = made(plan)
        out = tmp_path / axes
        merge_checkpoint(base, adapters, plan, out, names)
        merged = load_file(out / base.name)
        (expected,) = jax.tree.leaves(mora_jax.merge(tree, adapters, plan))
        found = (
            merged["h.0.attn.c_attn.weight"]
            if axes == "io"
            else np.stack([merged[f"layers.{n}.fc.weight"].T for n in range(2)])
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_refuses(tmp_path):
    base = sharded(tmp_path / "base")
    adapters, plan = kernels(base)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="force"):
        merge_checkpoint(base, adapters, plan, tmp_path / "there")
    for out in (base, tmp_path, base / "." / ".." / "base"):
        with pytest.raises(ValueError, match="must not be the base"):
            merge_checkpoint(base, adapters, plan, out, force=True)
    wrong = mora_jax.plan({"fc": {"kernel": jnp.ones((24, 40))}}, MoRAConfig(rank=2))
    with pytest.raises(AdapterFileError, match="no tensor for the kernel 'fc/kernel'"):
        merge_checkpoint(base, made(wrong), wrong, tmp_path / "out")
    names = {"model.layers.0.mlp.up_proj": "fc/kernel"}
    turned = mora_jax.plan({"fc": {"kernel": jnp.ones((40, 24))}}, MoRAConfig(rank=2))
    with pytest.raises(AdapterFileError, match=r"shape \(24, 40\), got \(40, 24\)"):
        merge_checkpoint(base, made(turned), turned, tmp_path / "out", names)
    huge = jax.tree.map(lambda m: m * 1e6, adapters)
    half = sharded(tmp_path / "half", np.float16)
    with pytest.raises(AdapterFileError, match="overflows float16"):
        merge_checkpoint(half, huge, plan, tmp_path / "out")
    nan = jax.tree.map(lambda m: m * jnp.nan, adapters)
    with pytest.raises(ValueError, match="NaN"):
        merge_checkpoint(base, nan, plan, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "half", "there"]
    assert not list((tmp_path / "there").iterdir())


def test_disk_full(tmp_path):
    """Nothing of the output stays, and what `force` would have replaced does."""
    base = sharded(tmp_path / "base")
    adapters, plan = kernels(base)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    with files_of_at_most(5000):
        merge_checkpoint(base, adapters, plan, tmp_path / "out", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]
    assert os.listdir(tmp_path / "out") == ["old"]


def test_replaces_by_force(tmp_path):
    base = sharded(tmp_path / "base")
    adapters, plan = kernels(base)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    merge_checkpoint(base, adapters, plan, tmp_path / "out", force=True)
    assert digests(tmp_path / "out").keys() == digests(base).keys() - {
        "pytorch_model.bin"
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


BAD_BASES = {
    "no-file": (lambda d: [p.unlink() for p in d.iterdir()], "no .*safetensors"),
    "quantised": (
        lambda d: save_file(
            {
                "model.layers.0.mlp.up_proj.weight": np.ones((40, 24), np.int8),
                "model.layers.0.mlp.down_proj.weight": np.ones((24, 40), np.int8),
            },
            d / "model-00001-of-00002.safetensors",
        ),
        "dequantise",
    ),
    "cut": (
        lambda d: os.truncate(d / "model-00002-of-00002.safetensors", 1000),
        "not a safetensors file",
    ),
    "missing": (
        lambda d: (d / "model-00002-of-00002.safetensors").unlink(),
        "there is no model-00002",
    ),
    "index": (
        lambda d: (d / "model.safetensors.index.json").write_text("{}"),
        "weight_map",
    ),
    "outside": (
        lambda d: (d / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "../../etc/passwd"}}'
        ),
        "must name files next to it",
    ),
    "twice": (
        lambda d: (d / "model-00002-of-00002.safetensors").write_bytes(
            (d / "model-00001-of-00002.safetensors").read_bytes()
        ),
        "is in .* and in",
    ),
    "header": (
        lambda d: (d / "model-00001-of-00002.safetensors").write_bytes(
            struct.pack("<Q", 2**60) + b"{}"
        ),
        "header of at most",
    ),
}


@pytest.mark.parametrize("name", BAD_BASES)
def test_refuses_bases(tmp_path, name):
    harm, match = BAD_BASES[name]
    base = sharded(tmp_path / "base")
    adapters, plan = kernels(base)
    harm(base)
    with pytest.raises(AdapterFileError, match=match):
        merge_checkpoint(base, adapters, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def resident():
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_memory_stays_near_one_tensor(tmp_path):
    """64 MB of kernels, 2 MB each."""
    kernel = np.zeros((512, 1024), np.float32)
    params = {f"layer_{k}": {"kernel": kernel + k} for k in range(32)}
    (tmp_path / "base").mkdir()
    for k in range(32):
        file = tmp_path / f"base/{k:02}.safetensors"
        save_file({f"layer_{k}.kernel": kernel + k}, file)
    plan = mora_jax.plan(params, MoRAConfig(rank=1))
    adapters, found = made(plan), []
    merge_checkpoint(
        tmp_path / "base",
        adapters,
        plan,
        tmp_path / "out",
        progress=lambda size: found.append(resident()),
    )
    assert len(found) > 32
    # Up to the eighth kernel everything is compiled, and buffers have their sizes.
    assert max(found) - found[len(found) // 4] < 12_000_000
