"""The reference's adapters are read as meant; ours are written as plain LoRAs."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import (
    UP_PROJ,
    assert_same,
    config_of,
    flatten,
    made,
    single,
    slow,
    specs_of,
    unflatten,
)
from base_files import DATA, NAMES, base, llama, write_reference
from cases import FEW_CASES, SIZES, in_turns
from safetensors.numpy import load_file, save_file

import mora_jax
from mora_jax import MoRAConfig, Plan, io, linen
from mora_jax.io import AdapterFileError
from mora_jax.io._files import CONFIG, TENSORS
from mora_jax.io.peft._read import reference_operator
from mora_jax.operators import make_operator

MODEL = llama()
APPLY = jax.jit(MODEL.apply)


@pytest.mark.parametrize("mora_type", [slow(1), slow(2), 6])
def test_logits_and_merged_weights_are_the_references(tmp_path, mora_type):
    params, directory = base(mora_type), DATA / f"type{mora_type}"
    adapters = io.load_peft(directory, params, NAMES)
    assert len(specs := specs_of(adapters)) == 14
    expected = load_file(directory / "logits.safetensors")
    ids = expected["input_ids"].astype(np.int32)
    variables = {"params": params}
    plan = linen.plan(MODEL, variables, MoRAConfig(rank=1), ids)
    y = jax.jit(linen.wrap(MODEL, plan))(adapters, variables, ids)
    np.testing.assert_allclose(y, expected["adapter_logits"], atol=1e-4)
    y = APPLY(variables, ids)
    np.testing.assert_allclose(y, expected["base_logits"], atol=1e-4)
    merged = mora_jax.merge(params, adapters)
    y = APPLY({"params": merged}, ids)
    np.testing.assert_allclose(y, expected["merged_logits"], atol=1e-4)
    merged, file = flatten(merged), directory / "base_model.safetensors"
    io.merge_checkpoint(file, adapters, tmp_path / "out", NAMES)
    in_file = load_file(tmp_path / "out" / file.name)
    weights = load_file(directory / "merged_weights.safetensors")
    assert len(weights) == len(specs)
    for name, weight in weights.items():
        path = re.sub(r"model\.layers\.(\d+)", r"layers_\1", name).replace(".", "/")
        kernel = merged[path.replace("/weight", "/kernel")]
        np.testing.assert_allclose(kernel.T, weight, atol=1e-5)
        np.testing.assert_allclose(in_file[name], weight, atol=1e-5)


def layers(*operators):
    """A plan of a layer for each operator."""
    parts = {}
    for number, operator in enumerate(operators):
        path = "model", "layers", str(number), "mlp", "up_proj", "kernel"
        parts |= single(operator, path=path).parts
    return Plan(parts)


@pytest.mark.parametrize("mora_type", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("rank", [1, 4])
def test_all_types_and_layouts(tmp_path, mora_type, rank):
    """Three layers of other sizes and ranks, so that rank_pattern is needed."""
    sizes = (24, 24, rank), (24, 40, 2), (40, 24, 3)
    plan = layers(*(reference_operator(mora_type, *size) for size in sizes))
    adapters = made(plan)
    ms = map(np.asarray, jax.tree.leaves(adapters))
    squares = {
        f"model.layers.{k}.mlp.up_proj": (m, size[2])
        for k, (m, size) in enumerate(zip(ms, sizes, strict=True))
    }
    write_reference(tmp_path / "a", mora_type, squares)
    assert_same(io.load_peft(tmp_path / "a", plan, "llama"), adapters)


def delta_of(case, adapters):
    """Of the only kernel, by the oracle."""
    ((spec,), (m,)) = specs_of(adapters).values(), jax.tree.leaves(adapters)
    return spec.alpha * case.delta(spec.operator, m)


@pytest.mark.law
@in_turns(
    "case, size",
    FEW_CASES,
    [*map(slow, SIZES[:4]), SIZES[4], *map(slow, SIZES[5:-1]), SIZES[-1]],
)
def test_lora_is_the_update(tmp_path, case, size):
    """Exactly, where the delta has rank q; otherwise what singular values leave."""
    operator = case.make(*size)
    plan = single(operator, path=UP_PROJ, alpha=0.5)
    adapters = made(plan)
    delta = delta_of(case, adapters)
    for rank in (2, 1000) if operator.block else (None, 2, 1000):
        target = tmp_path / str(rank)
        done = io.export(target, adapters, "peft", rank=rank, max_error=1)
        (lost,) = done.lost.values()
        tensors = load_file(target / TENSORS)
        config = config_of(target)
        name = "base_model.model.model.layers.0.mlp.up_proj"
        a, b = (tensors.pop(f"{name}.lora_{x}.weight").astype(np.float64) for x in "AB")
        assert not tensors and len(a) == config["r"] == done.rank
        kept = config["lora_alpha"] / config["r"] * (b @ a).T
        assert operator.name == "low_rank" or config["lora_alpha"] == config["r"]
        error = np.linalg.norm(kept - delta) / np.linalg.norm(delta)
        assert abs(error - lost) < 1e-5
        if rank == 2:
            values = np.linalg.svd(delta, compute_uv=False)
            best = np.linalg.norm(values[2:]) / np.linalg.norm(values)
            assert abs(lost - best) < 1e-5
        else:
            assert lost < 1e-5


@pytest.mark.parametrize("operator", ["sharing", "rotation"])
def test_embeddings_have_names_of_their_own(tmp_path, operator):
    """PEFT looks up rows of A and multiplies them by B; B.weight it would not read."""
    path = "model", "embed_tokens", "embedding"
    plan = single(make_operator(operator, 24, 10, 4), path=path, alpha=0.5)
    adapters, names = made(plan), {"model.embed_tokens": "/".join(path)}
    with pytest.warns(mora_jax.MoRAWarning, match="not a head that is tied to it"):
        lost = io.export(tmp_path / "a", adapters, "peft", names).lost
    tensors = load_file(tmp_path / "a" / TENSORS)
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    assert sorted(tensors) == [f"{name}A", f"{name}B"]
    update = tensors[f"{name}A"].T @ tensors[f"{name}B"].T
    (delta,) = jax.tree.leaves(mora_jax.delta_weight(adapters))
    error = np.linalg.norm(update - delta) / np.linalg.norm(delta)
    assert abs(error - lost["model.embed_tokens"]) < 1e-5 and error <= 0.1
    assert config_of(tmp_path / "a")["target_modules"] == ["model.embed_tokens"]


def test_tables_that_are_stored_with_their_rows_as_outputs(tmp_path):
    path = "model", "embed_tokens", "embedding"
    operator = make_operator("sharing", 10, 24, 4)
    plan = single(operator, (24, 10), path, axes="oi")
    adapters = made(plan)
    with pytest.warns(mora_jax.MoRAWarning, match="tied"):
        io.export(tmp_path / "a", adapters, "peft")
    tensors = load_file(tmp_path / "a" / TENSORS)
    a, b = (tensors[name] for name in sorted(tensors))
    (delta,) = jax.tree.leaves(mora_jax.delta_weight(adapters))
    np.testing.assert_allclose(a.T @ b.T, delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "axes", "shape"),
    [
        ("stem/kernel", "iiio", (3, 3, 4, 16)),
        ("stem/kernel", "siiio", (2, 3, 3, 4, 16)),
        ("up/kernel", "iioi", (3, 3, 16, 4)),
        ("blocks_0/Conv_1/kernel", "iio", (3, 4, 16)),
        ("conv_up/kernel", "ioi", (3, 16, 4)),
    ],
)
def test_convolutions_are_refused_by_name(tmp_path, path, axes, shape):
    """Of them PEFT has arrays of four axes. A dense layer over heads is one of two."""
    plan = mora_jax.plan(
        unflatten({path: jax.ShapeDtypeStruct(shape, jnp.float32)}),
        MoRAConfig(rank=1, targets=".*", overrides={".*": {"axes": axes}}),
    )
    names = {"conv{n}": path.replace("/k", "{n}/k")}
    for program in ("peft", "vllm"):
        with pytest.raises(ValueError, match=f"{path}: .* of a convolution"):
            io.export(tmp_path / "a", made(plan), program, names)
    assert not (tmp_path / "a").exists()


def test_dense_layers_over_several_axes_are_linear(tmp_path):
    tree = {"o_proj": {"kernel": (4, 6, 16)}, "q_proj": {"kernel": (16, 4, 6)}}
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    axes = {"o.*": {"axes": "iio"}, "q.*": {"axes": "ioo"}}
    config = MoRAConfig(rank=1, operator="sharing", overrides=axes)
    plan = mora_jax.plan(shapes, config)
    names = {"{name}_proj": "{name}_proj/kernel"}
    lost = io.export(tmp_path, made(plan), "peft", names).lost
    assert lost == {"o_proj": 0, "q_proj": 0}


def test_a_lora_that_loses_too_much_is_refused(tmp_path):
    """The message names the worst module, and the least rank that does for all."""
    plan = layers(*(make_operator("rotation", 24, width, 8) for width in (24, 40)))
    adapters, target = made(plan), tmp_path / "a"
    write = functools.partial(io.export, adapters=adapters, program="peft")
    with pytest.raises(ValueError, match="max_error=0.1;") as told:
        write(target, rank=4)
    (rank,) = re.findall(r"rank=(\d+)", str(told.value))
    assert write(tmp_path / "fewest").rank == int(rank)
    lost = write(tmp_path / "4", rank=4, max_error=1).lost
    worst = max(lost, key=lost.__getitem__)
    assert f"{worst} would lose {lost[worst]:.1%}" in str(told.value)
    with pytest.raises(ValueError, match="would lose"):
        write(target, rank=int(rank) - 1)
    assert not target.exists()
    lost = write(target, rank=int(rank)).lost
    assert 0 < max(lost.values()) <= 0.1
    for value, error in ((-0.1, ValueError), (1.5, ValueError), (True, TypeError)):
        with pytest.raises(error, match="max_error"):
            write(tmp_path / "x", rank=4, max_error=value)
    exact = layers(make_operator("sharing", 24, 40, 11))
    done = io.export(tmp_path / "s", made(exact), "peft", max_error=0)
    assert not any(done.lost.values())


def test_r_is_the_largest_rank(tmp_path):
    """Servers make room for that many; each module still is scaled by 1."""
    sharing = functools.partial(make_operator, "sharing", 24)
    plan = layers(*[sharing(24, 4)] * 3, sharing(40, 11))
    io.export(tmp_path / "a", made(plan), "peft")
    config = config_of(tmp_path / "a")
    assert config["r"] == config["lora_alpha"] == 11
    small = {f"model.layers.{k}.mlp.up_proj": 4 for k in range(3)}
    assert config["rank_pattern"] == config["alpha_pattern"] == small


def test_force_replaces_nothing_but_an_adapter(tmp_path):
    plan, target = layers(make_operator("sharing", 24, 40, 11)), tmp_path / "a"
    write, args = io.export, (target, made(plan), "peft")
    for _ in range(2):
        write(*args, force=True)
    with pytest.raises(FileExistsError, match="new or empty"):
        write(*args)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.txt"):
        write(*args, force=True)
    assert len(list(target.iterdir())) == 3
    (target / CONFIG).unlink()
    with pytest.raises(FileExistsError, match="nothing but what this writes"):
        write(*args, force=True)


def as_lora(directory, adapters):
    return io.export(directory, adapters, "peft")


@pytest.mark.parametrize("write", [mora_jax.save, as_lora])
def test_what_cannot_be_written(tmp_path, write):
    with pytest.raises(ValueError, match="adapters hold no adapter"):
        write(tmp_path / "a", {})
    plan = mora_jax.plan({"fc": {"kernel": jnp.ones((8, 8))}}, MoRAConfig(rank=1))
    if write is not mora_jax.save:
        with pytest.raises(ValueError, match="no module for the kernel 'fc/kernel'"):
            write(tmp_path / "a", made(plan))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("axes", ["sio", "iso", "ios"])
def test_stacked_kernels(tmp_path, axes):
    """One module for each place in a stack, wherever its axis is."""
    operator, path = reference_operator(1, 24, 40, 2), ("layers", "up", "kernel")
    shape = tuple({"s": 3, "i": 24, "o": 40}[letter] for letter in axes)
    plan = single(operator, shape, path, axes=axes)
    names = {"model.layers.{n}.mlp.{name}_proj": "layers/{name}/kernel[{n}]"}
    adapters = made(plan)
    (m,) = jax.tree.leaves(adapters)
    modules = {f"model.layers.{n}.mlp.up_proj": (np.asarray(m[n]), 2) for n in range(3)}
    write_reference(tmp_path / "a", 1, modules)
    assert_same(io.load_peft(tmp_path / "a", plan, names), adapters)
    lost = io.export(tmp_path / "b", adapters, "peft", names).lost
    assert lost == dict.fromkeys(modules, 0)
    del modules["model.layers.1.mlp.up_proj"]
    write_reference(tmp_path / "c", 1, modules)
    with pytest.raises(AdapterFileError, match="stacked"):
        io.load_peft(tmp_path / "c", plan, names)


def test_names_that_do_not_fit():
    def read(names):
        return io.load_peft(DATA / "type1", base(), names)

    for names, match in (
        ("lama", "must be one of"),
        ({"a.{n}": "a/{m}"}, "same {fields}"),
        ({"a.{n}.{n}": "a/{n}/{n}"}, "once each"),
        ({"a{": "fc/kernel"}, "braces around the names of fields alone.*'a{'"),
        ({"fc": "fc}/kernel"}, "braces around .*'fc}/kernel'"),
        ({"a{0}": "fc{0}/kernel"}, r"braces around .*'a\{0\}'"),
        ({"a{}": "fc{}/kernel"}, "braces around .*'a{}'"),
        ({"a{n.x}": "fc{n.x}/kernel"}, "braces around .*'a{n.x}'"),
    ):
        with pytest.raises(ValueError, match=match):
            read(names)
    with pytest.raises(AdapterFileError, match="the model lacks this kernel"):
        read("llama")
    missing = "names have no kernel for the module"
    with pytest.raises(AdapterFileError, match=f"{missing}.*templates name them"):
        read("bert")


BAD_CONFIGS = [
    ({"peft_type": "IA3"}, "must be 'LORA'"),
    ({"use_mora": False}, "lora_A and lora_B of .* must be of shape"),
    ({"mora_type": 5}, "must be 1, 2, 3, 4 or 6"),
    ({"mora_type": "1"}, "must be 1, 2, 3, 4 or 6"),
    ({"mora_type": None}, "must be 1, 2, 3, 4 or 6"),
    ({"r": 0}, "positive integer"),
    ({"r": 10**9}, "layers_0"),
    ({"r": 5}, "must be of shape"),
    ({"rank_pattern": {"(a+)+$": 3}}, "names of modules"),
    ({"lora_dropout": 1}, "lora_dropout"),
    ({"use_dora": True}, "use_dora"),
    ({"bias": "all"}, "bias"),
]


@pytest.mark.parametrize("changes, match", BAD_CONFIGS)
def test_refuses_configs(tmp_path, changes, match):
    config = config_of(DATA / "type6")
    (tmp_path / CONFIG).write_text(json.dumps(config | changes))
    (tmp_path / TENSORS).write_bytes((DATA / "type6" / TENSORS).read_bytes())
    with pytest.raises(AdapterFileError, match=match):
        io.load_peft(tmp_path, base(), NAMES)


def test_refuses_tensors(tmp_path):
    (tmp_path / CONFIG).write_bytes((DATA / "type6" / CONFIG).read_bytes())
    tensors = load_file(DATA / "type6" / TENSORS)
    a = next(name for name in tensors if "lora_A" in name)
    b = a.replace("lora_A", "lora_B")
    a7, b7 = (name.replace("layers.0", "layers.7") for name in (a, b))
    for changes, match in (
        ({b: tensors[b] + 1}, "must be the same M"),
        ({a: tensors[a] * np.nan, b: tensors[b] * np.nan}, "the same M|NaN"),
        ({"model.x": tensors[a]}, "must be like"),
        ({a7: tensors[a]}, "lora_A and lora_B"),
        ({a7: tensors[a], b7: tensors[b]}, "the model lacks this kernel"),
    ):
        save_file({**tensors, **changes}, tmp_path / TENSORS)
        with pytest.raises(AdapterFileError, match=match):
            io.load_peft(tmp_path, base(), NAMES)
