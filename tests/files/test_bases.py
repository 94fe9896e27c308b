"""An adapter knows the base that it was trained on, and another one is refused."""

import hashlib
import json
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import (
    PARAMS,
    PLAN,
    assert_same,
    config_of,
    contents,
    made,
    run,
    single,
    specs_of,
    without_digests,
)
from flax import nnx, traverse_util
from helpers import close, random_like
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

import mora_jax
from mora_jax import MoRAConfig, io, load, merge, save
from mora_jax._tree import base_digest
from mora_jax.io import AdapterFileError
from mora_jax.operators import Truncation

RNG = np.random.default_rng(0)
BASE = random_like(PARAMS, scale=1.0)
OTHER = {**BASE, "enc": {**BASE["enc"], "kernel": BASE["enc"]["kernel"].at[0].add(1)}}
ADAPTERS = made(PLAN, dtype="float32", scale=0.1)


@pytest.fixture
def saved(tmp_path):
    """A directory with adapters of `BASE`."""
    save(tmp_path / "a", ADAPTERS, params=BASE)
    return tmp_path / "a"


def bfloat16(tree):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, "bfloat16")), tree)


def test_load_takes_the_base_and_refuses_another_unless_told(saved):
    for params in (None, BASE, bfloat16(BASE), jax.tree.map(np.asarray, BASE)):
        adapters = load(saved, params)
        assert [len(s.base_digest) for s in specs_of(adapters).values()] == [3, 1, 1]
        assert_same(without_digests(adapters), ADAPTERS)
    layers = config_of(saved)["layers"]
    assert [len(layer["base_digest"]) for layer in layers] == [3, 1, 1]
    for params in (OTHER, bfloat16(OTHER), jax.tree.map(np.asarray, OTHER)):
        with pytest.raises(AdapterFileError, match="'enc/kernel'.*any_base=True"):
            load(saved, params)
        load(saved, params, any_base=True)
    load(saved, jax.eval_shape(lambda: OTHER))
    stacked = BASE["dec"]["kernel"].at[1, 9].add(1)  # one layer, one of eight rows
    with pytest.raises(AdapterFileError, match="'dec/kernel'"):
        load(saved, {**BASE, "dec": {**BASE["dec"], "kernel": stacked}})


def test_merge_refuses_another_base_unless_told(saved):
    adapters = load(saved)
    for fits in (BASE, bfloat16(BASE)):
        merge(fits, adapters)
    with pytest.raises(ValueError, match="'enc/kernel'.*any_base=True"):
        merge(OTHER, adapters)
    merge(OTHER, adapters, any_base=True)
    mora_jax.diagnostics.merge_loss(OTHER, adapters)
    traced = jax.jit(lambda params: merge(params, adapters))
    traced(OTHER)  # values that are not there yet are not compared
    close(traced(BASE), merge(BASE, ADAPTERS))


def test_files_without_digests_take_any_base(tmp_path, saved):
    """Those that were saved without params."""
    save(tmp_path / "b", ADAPTERS)
    layers = config_of(tmp_path / "b")["layers"]
    assert all(layer["base_digest"] is None for layer in layers)
    save(tmp_path / "c", load(saved))
    assert contents(tmp_path / "c") == contents(saved)
    assert_same(load(tmp_path / "b", OTHER), ADAPTERS)


def test_an_nnx_model_of_another_base_does_not_merge_unless_told(tmp_path):
    linear = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    model, kernel = nnx.Sequential(linear), linear.kernel
    params = {"layers": {"0": {"kernel": kernel[...]}}}
    plan = mora_jax.plan(params)
    save(tmp_path / "a", made(plan), params=params)
    adapters = load(tmp_path / "a", params)
    for value, fits in ((kernel[...], True), (kernel[...] + 1, False)):
        kernel[...] = value
        wrapped = mora_jax.nnx.wrap(model, plan)
        told = "layers/0/kernel.*any_base=True"
        if not fits:
            with pytest.raises(ValueError, match=told):
                mora_jax.nnx.set_adapters(wrapped, adapters)
        mora_jax.nnx.set_adapters(wrapped, adapters, any_base=not fits)
        if not fits:
            with pytest.raises(ValueError, match=told):
                mora_jax.nnx.merge_adapters(wrapped)
        mora_jax.nnx.merge_adapters(wrapped, any_base=not fits)


def test_params_that_do_not_fit_are_refused(tmp_path):
    def saving(params):
        save(tmp_path / "a", ADAPTERS, params=params)

    turned, shape = {**BASE, "enc": {"kernel": np.ones((24, 16))}}, r"\(16, 24\)"
    for params, error, match in (
        (jax.eval_shape(lambda: BASE), TypeError, "must be a concrete array"),
        ({"enc": BASE["enc"]}, ValueError, "lack the kernel 'dec/kernel'"),
        (turned, ValueError, f"enc/kernel in params must have shape {shape}"),
    ):
        with pytest.raises(error, match=match):
            saving(params)
    with pytest.raises(TypeError, match="must be a concrete array"):
        jax.jit(saving)(BASE)
    assert not (tmp_path / "a").exists()


def digests_of(directory, kernel, axes):
    """What a file says of a kernel, one digest for each index of its stack."""
    sizes = dict.fromkeys("sio", 1)
    for size, letter in zip(kernel.shape, axes, strict=True):
        sizes[letter] *= size
    operator = Truncation(sizes["i"], sizes["o"], 1)
    plan = single(operator, kernel.shape, ("k",), axes=axes)
    save(directory, made(plan), params={"k": kernel})
    (layer,) = config_of(directory)["layers"]
    return layer["base_digest"]


def by_definition(kernels):
    """Of kernels (stack, in, out): SHA-256 of eight rows of each in bfloat16."""
    rows = np.linspace(0, kernels.shape[1] - 1, min(8, kernels.shape[1])).astype(int)
    rows = kernels[:, rows].astype("bfloat16")
    return [hashlib.sha256(one.tobytes()).hexdigest() for one in rows]


AXES = ["io", "oi", "ioo", "iio", "sio", "sioo", "iso", "osi", "ioi", "ssoi"]


@pytest.mark.parametrize("axes", AXES)
def test_any_axes_give_the_rows_of_the_kernel(tmp_path, axes):
    """As the plain definition: transposed to (stack, in, out), then some rows."""
    sizes = {"i": [5, 3], "o": [4, 2], "s": [2, 3]}
    shape = tuple(sizes[kind][axes[:k].count(kind)] for k, kind in enumerate(axes))
    kernel = RNG.standard_normal(shape).astype(np.float32)
    order = [k for kind in "sio" for k, other in enumerate(axes) if other == kind]
    ins, outs = (np.prod(sizes[kind][: axes.count(kind)]) for kind in "io")
    expected = by_definition(kernel.transpose(order).reshape(-1, ins, outs))
    for params in (kernel, jnp.asarray(kernel)):
        assert digests_of(tmp_path, params, axes) == expected


def on_mesh(kernel, kind, *parts):
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((2, 2), ("a", "b"), types, devices=jax.devices()[:4])
    return jax.device_put(kernel, NamedSharding(mesh, PartitionSpec(*parts)))


NONE = PartitionSpec()
SPLITS = [("a", "b"), (("a", "b"), None), (None, None), (None, "a")]


@pytest.mark.parametrize(
    ("kind", "parts"), [*(("Auto", s) for s in SPLITS), ("Explicit", ("b", None))]
)
def test_sharded_kernels_have_the_same_digest(tmp_path, kind, parts):
    kernel = RNG.standard_normal((3, 16, 24)).astype(np.float32)
    placed = on_mesh(kernel, kind, None, *parts)
    assert digests_of(tmp_path, placed, "sio") == by_definition(kernel)


def test_a_digest_makes_no_copy_of_a_kernel_on_its_devices():
    """The rows are read as integers, as which XLA reads them where they are."""
    kernel = on_mesh(np.ones((2048, 1024), np.float32), "Auto", "a", "b")
    places, there = (
        np.zeros((1, 8), np.int32),
        NamedSharding(kernel.sharding.mesh, NONE),
    )
    program = base_digest._row_bits.lower(kernel, places, "io", there).compile()
    memory: Any = program.memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < kernel.nbytes / 16


def test_only_the_rows_come_to_the_host(tmp_path):
    """Of a kernel of 16 MB, which is on four devices, 64 kB."""
    kernel = on_mesh(np.zeros((2048, 2048), np.float32), "Auto", "a", "b")
    tracemalloc.start()
    try:
        digests_of(tmp_path, kernel, "io")
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_merging_pytorchs_files_refuses_another_base(tmp_path):
    """A scanned model's base as PyTorch keeps it: a tensor a layer, (out, in)."""
    kernel = RNG.standard_normal((3, 24, 40)).astype(np.float32)
    params = {"layers": {"up": {"kernel": kernel}}}
    config = MoRAConfig(rank=2, overrides={".*": {"axes": "sio"}})
    plan = mora_jax.plan(params, config)
    save(tmp_path / "a", made(plan, scale=0.1), params=params)
    names = {"model.layers.{n}.mlp.up_proj": "layers/up/kernel[{n}]"}
    adapters = load(tmp_path / "a")
    base, out = tmp_path / "base.safetensors", tmp_path / "out"

    def write(dtype):
        name = "model.layers.{}.mlp.up_proj.weight"
        tensors = {name.format(n): kernel[n].T.astype(dtype, "C") for n in range(3)}
        save_file(tensors, base)

    for dtype in ("float32", "bfloat16"):
        write(dtype)
        io.merge_checkpoint(base, adapters, tmp_path / dtype, names)
    kernel[2] += np.eye(24, 40)  # the last layer, also at rows that the digest covers
    write("float32")
    with pytest.raises(AdapterFileError, match="'layers/up/kernel'.*any_base=True"):
        io.merge_checkpoint(base, adapters, out, names)
    args = ["merge", base, tmp_path / "a", out, "--names", json.dumps(names)]
    told = run(*args, code=1)
    assert "any_base=True" in told
    assert not out.exists()
    run(*args, "--any-base")
    io.merge_checkpoint(base, adapters, tmp_path / "x", names, any_base=True)
    assert contents(tmp_path / "x") == contents(out)


def test_a_base_in_flax_layout_is_compared(tmp_path, saved):
    base, out = tmp_path / "base.safetensors", tmp_path / "out"
    flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, BASE), sep=".")
    save_file(flat, base)
    adapters = load(saved)
    io.merge_checkpoint(base, adapters, tmp_path / "x")
    for path in PLAN:
        name = path.replace("/", ".")
        save_file({**flat, name: np.flip(flat[name]).copy()}, base)
        with pytest.raises(AdapterFileError, match=path):
            io.merge_checkpoint(base, adapters, out)
    assert not out.exists()
