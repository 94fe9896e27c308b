"""An adapter knows the base that it was trained on, and another one is refused."""

import hashlib
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import (
    CONFIGURED,
    PARAMS,
    config_of,
    digests,
    made,
    rewrite,
    run,
    single,
    slow,
)
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

import mora_jax
from mora_jax import MoRAConfig, io, load, merge, save
from mora_jax.io import AdapterFileError
from mora_jax.operators import Truncation

RNG = np.random.default_rng(0)
BASE = jax.tree.map(
    lambda x: jnp.asarray(RNG.standard_normal(x.shape), jnp.float32), PARAMS
)
ROWS = np.array([0, 3, 6, 9, 13, 16, 19, 23])
"""Those of 24 that a digest covers."""


def plus_one(kernel, *index):
    """The kernel with another weight."""
    kernel = np.array(kernel)
    kernel[index] += 1
    return jnp.asarray(kernel)


OTHER = {**BASE, "enc": {**BASE["enc"], "kernel": plus_one(BASE["enc"]["kernel"], 0)}}
PLAN = mora_jax.plan(BASE, CONFIGURED)
ADAPTERS = made(PLAN, dtype="float32", scale=0.1)


@pytest.fixture
def saved(tmp_path):
    """A directory with adapters of `BASE`."""
    save(tmp_path / "a", ADAPTERS, PLAN, params=BASE)
    return tmp_path / "a"


def bfloat16(tree):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, "bfloat16")), tree)


def test_the_base_and_its_bfloat16_copy_are_taken(saved):
    for params in (None, BASE, bfloat16(BASE), jax.tree.map(np.asarray, BASE)):
        _, plan = load(saved, params)
        assert plan == PLAN and hash(plan) == hash(PLAN)
        assert [len(spec.base_digest) for spec in plan.specs] == [3, 1, 1]
    layers = config_of(saved)["layers"]
    assert [len(layer["base_digest"]) for layer in layers] == [3, 1, 1]


def test_load_refuses_another_base_unless_told(saved):
    for params in (OTHER, bfloat16(OTHER), jax.tree.map(np.asarray, OTHER)):
        with pytest.raises(AdapterFileError, match="'enc/kernel'.*any_base=True"):
            load(saved, params)
        load(saved, params, any_base=True)
    load(saved, jax.eval_shape(lambda: OTHER))


def test_one_layer_of_a_stack_is_told_apart(saved):
    stacked = plus_one(BASE["dec"]["kernel"], 1, ROWS[3])
    other = {**BASE, "dec": {**BASE["dec"], "kernel": stacked}}
    with pytest.raises(AdapterFileError, match="'dec/kernel'"):
        load(saved, other)


def test_merge_refuses_another_base_unless_told(saved):
    adapters, plan = load(saved)
    expected = merge(BASE, adapters, PLAN)
    for fits in (BASE, bfloat16(BASE)):
        merge(fits, adapters, plan)
    with pytest.raises(ValueError, match="'enc/kernel'.*any_base=True"):
        merge(OTHER, adapters, plan)
    merge(OTHER, adapters, plan, any_base=True)
    mora_jax.diagnostics.merge_loss(OTHER, adapters, plan)
    traced = jax.jit(lambda params: merge(params, adapters, plan))
    traced(OTHER)  # values that are not there yet are not compared
    for one, other in zip(
        jax.tree.leaves(traced(BASE)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_files_of_version_1_are_read(saved):
    """They hold no digests, so any base will do."""

    def older(config):
        config["format_version"] = 1
        for layer in config["layers"]:
            del layer["base_digest"]

    rewrite(saved, older)
    _, plan = load(saved, OTHER)
    assert plan == PLAN and all(spec.base_digest is None for spec in plan.specs)


def test_without_params_files_say_what_the_plan_knows(tmp_path, saved):
    save(tmp_path / "b", ADAPTERS, PLAN)
    layers = config_of(tmp_path / "b")["layers"]
    assert all(layer["base_digest"] is None for layer in layers)
    load(tmp_path / "b", OTHER)
    save(tmp_path / "c", *load(saved))
    assert digests(tmp_path / "c") == digests(saved)


def test_an_nnx_model_of_another_base_does_not_merge_unless_told(tmp_path):
    model = nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
    layer = model.layers[0]
    assert isinstance(layer, nnx.Linear)
    kernel = layer.kernel
    params = {"layers": {"0": {"kernel": kernel[...]}}}
    plan = mora_jax.plan(params)
    save(tmp_path / "a", made(plan), plan, params=params)
    adapters, plan = load(tmp_path / "a", params)
    for value, fits in ((kernel[...], True), (kernel[...] + 1, False)):
        kernel[...] = value
        wrapped = mora_jax.nnx.wrap(model, plan)
        mora_jax.nnx.set_adapters(wrapped, adapters)
        if not fits:
            with pytest.raises(ValueError, match="layers/0/kernel.*any_base=True"):
                mora_jax.nnx.merge_adapters(wrapped)
        mora_jax.nnx.merge_adapters(wrapped, any_base=not fits)


BAD_DIGESTS = ["x", [], ["x"], ["0" * 64] * 2, [1], 3, ["G" * 64]]


@pytest.mark.parametrize("value", BAD_DIGESTS)
def test_damaged_digests_are_refused(saved, value):
    rewrite(saved, lambda config: config["layers"][2].update(base_digest=value))
    with pytest.raises(AdapterFileError, match="enc/kernel.*base_digest"):
        load(saved)


def test_params_that_do_not_fit_are_refused(tmp_path):
    for params, error, match in (
        (jax.eval_shape(lambda: BASE), TypeError, "concrete arrays"),
        ({"enc": BASE["enc"]}, ValueError, "lack the kernel 'dec/kernel'"),
        (
            {**BASE, "enc": {"kernel": jnp.ones((24, 16))}},
            ValueError,
            r"enc/kernel in params must have shape \(16, 24\)",
        ),
    ):
        with pytest.raises(error, match=match):
            save(tmp_path / "a", ADAPTERS, PLAN, params=params)
    with pytest.raises(TypeError, match="concrete arrays"):
        jax.jit(lambda params: save(tmp_path / "a", ADAPTERS, PLAN, params=params))(
            BASE
        )
    assert not (tmp_path / "a").exists()


def digests_of(directory, kernel, axes):
    """What a file says of a kernel, one digest for each index of its stack."""
    sizes = dict.fromkeys("sio", 1)
    for size, letter in zip(kernel.shape, axes, strict=True):
        sizes[letter] *= size
    operator = Truncation(sizes["i"], sizes["o"], 1)
    plan = single(operator, kernel.shape, ("k",), axes=axes)
    save(directory, made(plan), plan, params={"k": kernel})
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
    ins = int(np.prod([n for n, kind in zip(shape, axes, strict=True) if kind == "i"]))
    outs = int(np.prod([n for n, kind in zip(shape, axes, strict=True) if kind == "o"]))
    expected = by_definition(kernel.transpose(order).reshape(-1, ins, outs))
    for params in (kernel, jnp.asarray(kernel)):
        assert digests_of(tmp_path, params, axes) == expected


SPLITS = [("a", "b"), (("a", "b"), None), (None, None), ("b", None), (None, "a")]


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        *(("Auto", parts) for parts in SPLITS[:3]),
        *(slow("Auto", parts) for parts in SPLITS[3:]),
        ("Explicit", ("b", None)),
        *(slow("Explicit", parts) for parts in SPLITS if parts != ("b", None)),
    ],
)
def test_sharded_kernels_have_the_same_digest(tmp_path, kind, parts):
    kernel = RNG.standard_normal((3, 16, 24)).astype(np.float32)
    placed = jax.device_put(kernel, on_mesh(kind, None, *parts))
    assert digests_of(tmp_path, placed, "sio") == by_definition(kernel)


def on_mesh(kind, *parts):
    kind = getattr(jax.sharding.AxisType, kind)
    devices = jax.devices()[:4]
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind,) * 2, devices=devices)
    return NamedSharding(mesh, PartitionSpec(*parts))


def test_only_the_rows_come_to_the_host(tmp_path):
    """Of a kernel of 16 MB, which is on four devices, 64 kB."""
    kernel = np.zeros((2048, 2048), np.float32)
    kernel = jax.device_put(kernel, on_mesh("Auto", "a", "b"))
    tracemalloc.start()
    try:
        digests_of(tmp_path, kernel, "io")
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.fixture
def torch_base(tmp_path):
    """A scanned model's base as PyTorch keeps it: a tensor a layer, (out, in)."""
    kernel = RNG.standard_normal((3, 24, 40)).astype(np.float32)
    params = {"layers": {"up": {"kernel": jnp.asarray(kernel)}}}
    config = MoRAConfig(rank=2, overrides={".*": {"axes": "sio"}})
    plan = mora_jax.plan(params, config)
    save(tmp_path / "a", made(plan, scale=0.1), plan, params=params)
    names = {"model.layers.{n}.mlp.up_proj": "layers/up/kernel[{n}]"}

    def write(name, change=lambda weights: weights, dtype=jnp.float32):
        weights = {
            f"model.layers.{n}.mlp.up_proj.weight": np.asarray(
                kernel[n].T, dtype, order="C"
            )
            for n in range(3)
        }
        save_file(change(weights), tmp_path / name)
        return tmp_path / name

    return write, names


def changed(weights):
    """The last layer's, at a row of its kernel that the digest covers."""
    name = "model.layers.2.mlp.up_proj.weight"
    return {**weights, name: weights[name] + np.eye(40, 24, dtype=np.float32)}


def test_merging_files_refuses_another_base(tmp_path, torch_base):
    write, names = torch_base
    adapters, plan = load(tmp_path / "a")
    for dtype in (jnp.float32, jnp.bfloat16):
        fits = write("fits.safetensors", dtype=dtype)
        io.merge_checkpoint(fits, adapters, plan, tmp_path / f"{dtype.__name__}", names)
    other = write("other.safetensors", changed)
    with pytest.raises(AdapterFileError, match="'layers/up/kernel'.*any_base=True"):
        io.merge_checkpoint(other, adapters, plan, tmp_path / "out", names)
    assert not (tmp_path / "out").exists()
    io.merge_checkpoint(other, adapters, plan, tmp_path / "out", names, any_base=True)


def test_a_base_in_flax_layout_is_compared(tmp_path, saved):
    flat = {
        "enc.kernel": np.asarray(BASE["enc"]["kernel"]),
        "dec.kernel": np.asarray(BASE["dec"]["kernel"]),
        "dec.out.kernel": np.asarray(BASE["dec"]["out"]["kernel"]),
    }
    save_file(flat, tmp_path / "base.safetensors")
    adapters, plan = load(saved)
    io.merge_checkpoint(tmp_path / "base.safetensors", adapters, plan, tmp_path / "x")
    for name in flat:
        other = {**flat, name: np.flip(flat[name]).copy()}
        save_file(other, tmp_path / "other.safetensors")
        with pytest.raises(AdapterFileError, match=name.replace(".", "/")):
            io.merge_checkpoint(
                tmp_path / "other.safetensors", adapters, plan, tmp_path / "y"
            )
    assert not (tmp_path / "y").exists()


def test_the_command_line_merges_into_another_base_if_told(tmp_path, torch_base):
    write, names = torch_base
    other = write("other.safetensors", changed)
    args = ["merge", "--base", other, "--adapter", tmp_path / "a"]
    args += ["--out", tmp_path / "out", "--names", json.dumps(names)]
    told = run(*args, code=1)
    assert "--any-base" in told and "any_base" not in told and "True" not in told
    assert not (tmp_path / "out").exists()
    run(*args, "--any-base")
    run("convert", tmp_path / "a", tmp_path / "copy", "--to", "mora")
    assert digests(tmp_path / "copy") == digests(tmp_path / "a")
