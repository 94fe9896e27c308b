"""LoRAs of Hugging Face PEFT come in as they are, train on, and go out bit for bit.

The files are made by hand, as PEFT writes them; `tests/with_peft` has PEFT's own.
"""

import json
import math
import sys
import types
from importlib.machinery import ModuleSpec

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from adapter_files import assert_same, config_of, flatten, run, specs_of
from helpers import close, random
from safetensors.numpy import load_file, save_file

import mora_jax
from mora_jax import MoRAConfig, TrainedArray, io
from mora_jax.io import AdapterFileError
from mora_jax.io._files import CONFIG, TENSORS

HOME = "base_model.model."
Q, DOWN, NORM = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", ""
SIZES = {Q: (8, 12), DOWN: (16, 8)}
SETTINGS = {
    "peft_type": "LORA",
    "base_model_name_or_path": "somebody/model",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 6,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": ["q_proj", "down_proj"],
    "lora_dropout": 0.0,
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
}


def tensors_of(sizes=SIZES, ranks=None, dtype=np.float32):
    """{tensor: its numbers} of a LoRA on modules of the given (in, out)."""
    tensors = {}
    for k, (module, (ins, outs)) in enumerate(sizes.items()):
        rank = (ranks or {}).get(module, 4)
        tensors[f"{HOME}{module}.lora_A.weight"] = random(k, rank, ins).astype(dtype)
        tensors[f"{HOME}{module}.lora_B.weight"] = random(9 + k, outs, rank).astype(
            dtype
        )
    return tensors


def write(directory, tensors, **changes):
    directory.mkdir()
    settings = {k: v for k, v in (SETTINGS | changes).items() if v != "leave out"}
    (directory / CONFIG).write_text(json.dumps(settings))
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(arrays, directory / TENSORS)
    return directory


def params_of(sizes=SIZES):
    tree = {}
    for k, (module, shape) in enumerate(sizes.items()):
        node = tree
        for name in module.split("."):
            node = node.setdefault(name, {})
        node["kernel"] = random(20 + k, *shape)
    return tree


def exact(tensors, module, factor):
    """The delta of a module, by the definition, (in, out)."""
    a, b = (np.float64(tensors[f"{HOME}{module}.lora_{x}.weight"]) for x in "AB")
    return factor * (b @ a).T


def delta_at(adapters, module):
    node = mora_jax.delta_weight(adapters)
    for name in (*module.split("."), "kernel"):
        node = node[name]
    return node


FACTORS = {
    "plain": ({}, {}, {Q: 6 / 4, DOWN: 6 / 4}),
    "rslora": ({"use_rslora": True}, {}, {Q: 6 / 2, DOWN: 6 / 2}),
    "patterns": (
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"mlp.down_proj": 5.0}},
        {Q: 2},
        {Q: 6 / 2, DOWN: 5 / 4},
    ),
    "rslora and ranks": (
        {"use_rslora": True, "rank_pattern": {Q: 2}},
        {Q: 2},
        {Q: 6 / math.sqrt(2), DOWN: 6 / 2},
    ),
    "an old config": ({"use_rslora": "leave out", "use_dora": "leave out"}, {}, None),
}


def test_names_that_say_which_kernel_a_module_is_are_obeyed(tmp_path):
    """Although a kernel has the module's own name, another one was named."""
    params, names = params_of(), {Q: "model/layers/0/self_attn/query/kernel"}
    directory = write(tmp_path / "a", tensors_of({Q: SIZES[Q]}))
    with pytest.raises(AdapterFileError, match="self_attn/query/kernel.* lacks this"):
        io.load_peft(directory, params, names)
    params["model"]["layers"]["0"]["self_attn"]["query"] = {"kernel": random(3, 8, 12)}
    found = io.load_peft(directory, params, names)["model"]["layers"]["0"]["self_attn"]
    assert list(found) == ["query"]


@pytest.mark.parametrize("model", ["params", "plan", "shapes of the file"])
@pytest.mark.parametrize("how", FACTORS)
def test_the_delta_is_pefts(tmp_path, how, model):
    changes, ranks, factors = FACTORS[how]
    tensors = tensors_of(ranks=ranks)
    directory = write(tmp_path / "a", tensors, **changes)
    params = params_of()
    given = {
        "params": params,
        "plan": mora_jax.plan(params, MoRAConfig(rank=1)),
        "shapes of the file": None,
    }[model]
    adapters = io.load_peft(directory, given)
    for module, factor in (factors or FACTORS["plain"][2]).items():
        spec = specs_of(adapters)[f"{module.replace('.', '/')}/kernel"]
        assert spec.operator.name == "low_rank"
        assert spec.operator.square_rank == ranks.get(module, 4)
        assert spec.alpha == factor and spec.scale == 1
        close(delta_at(adapters, module), exact(tensors, module, factor))
    merged = mora_jax.merge(params, adapters)
    close(
        merged["model"]["layers"]["0"]["mlp"]["down_proj"]["kernel"],
        params["model"]["layers"]["0"]["mlp"]["down_proj"]["kernel"]
        + delta_at(adapters, DOWN),
    )


@pytest.mark.law
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("how", FACTORS)
def test_saved_again_the_tensors_are_the_same_bits(tmp_path, how, dtype):
    changes, ranks, _ = FACTORS[how]
    tensors = tensors_of(ranks=ranks, dtype=dtype)
    adapters = io.load_peft(write(tmp_path / "a", tensors, **changes))
    io.export(tmp_path / "b", adapters, "peft")
    again = load_file(tmp_path / "b" / TENSORS)
    assert_same(again, tensors)
    back = io.load_peft(tmp_path / "b")
    assert_same(back, adapters)
    for name, spec in specs_of(adapters).items():
        assert specs_of(back)[name].operator == spec.operator
        assert specs_of(back)[name].alpha == pytest.approx(spec.alpha, rel=1e-15)
    mora_jax.save(tmp_path / "c", adapters)
    loaded = mora_jax.load(tmp_path / "c")
    assert_same(loaded, adapters)


def test_it_trains_on(tmp_path):
    """From where it was, by both factors."""
    params = params_of({Q: (8, 12)})
    tensors = tensors_of({Q: (8, 12)})
    adapters = io.load_peft(write(tmp_path / "a", tensors), params)
    kernel, x = (
        params["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"],
        random(5, 3, 8),
    )

    def loss(adapters):
        folded = mora_jax.fold(params, adapters)
        node = folded["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"]
        return jnp.sum((x @ node) ** 2)

    (gradient,) = jax.tree.leaves(jax.grad(loss)(adapters))
    a, b = (np.float64(tensors[f"{HOME}{Q}.lora_{n}.weight"]).T for n in "AB")
    by_kernel = 2 * x.T @ (x @ (kernel + 1.5 * a @ b))
    close(gradient, 1.5 * np.concatenate([by_kernel @ b.T, by_kernel.T @ a]), 1e-4)


def test_what_was_trained_whole(tmp_path):
    """`modules_to_save`, and biases: they come in as arrays that the plan trains."""
    params = params_of() | {"lm_head": {"kernel": random(1, 8, 30)}}
    params["model"]["norm"] = {"scale": random(2, 8)}
    whole = {"lm_head.weight": random(3, 30, 8), "model.norm.weight": random(4, 8)}
    tensors = tensors_of() | {f"{HOME}{name}": array for name, array in whole.items()}
    changes = {"modules_to_save": ["lm_head", "norm"]}
    directory = write(tmp_path / "a", tensors, **changes)
    adapters = io.load_peft(directory, params)
    specs = specs_of(adapters).items()
    whole_paths = [path for path, spec in specs if isinstance(spec, TrainedArray)]
    assert whole_paths == ["lm_head/kernel", "model/norm/scale"]
    np.testing.assert_array_equal(
        adapters["lm_head"]["kernel"].m, whole["lm_head.weight"].T
    )
    merged = mora_jax.merge(params, adapters)
    np.testing.assert_array_equal(
        merged["model"]["norm"]["scale"], whole["model.norm.weight"]
    )
    io.export(tmp_path / "b", adapters, "peft")
    assert_same(load_file(tmp_path / "b" / TENSORS), tensors)
    assert config_of(tmp_path / "b")["modules_to_save"] == ["lm_head", "model.norm"]
    config = MoRAConfig(rank=1, train=("lm_head/kernel", ".*scale"))
    planned = mora_jax.plan(params, config)  # a plan knows its own
    assert_same(io.load_peft(directory, planned), adapters)
    for model in (None, params_of()):
        with pytest.raises(AdapterFileError, match="trained whole.*params, or a plan"):
            io.load_peft(directory, model)


def test_a_plan_has_the_rank_of_the_file(tmp_path):
    """The budget of the plan that says where its kernels are was for other adapters."""
    wide = mora_jax.plan(params_of(), MoRAConfig(rank=8, operator="low_rank"))
    adapters = io.load_peft(write(tmp_path / "a", tensors_of()), wide)
    specs = specs_of(adapters).values()
    assert [spec.asked_square_rank for spec in specs] == [None] * len(SIZES)


def test_an_embedding(tmp_path):
    table = "model.embed_tokens"
    a, b = random(0, 3, 30), random(1, 8, 3)
    names = {f"{HOME}{table}.lora_embedding_{x}": m for x, m in (("A", a), ("B", b))}
    directory = write(tmp_path / "a", names, r=3)
    params = {"model": {"embed_tokens": {"embedding": random(2, 30, 8)}}}
    model = mora_jax.plan(params, MoRAConfig(targets=".*embedding", rank=1))
    with pytest.warns(mora_jax.MoRAWarning, match="a head that is tied"):
        adapters = io.load_peft(directory, model)
    delta = mora_jax.delta_weight(adapters)["model"]["embed_tokens"]["embedding"]
    close(delta, 2 * (b @ a).T)
    with pytest.warns(mora_jax.MoRAWarning, match="a head that is tied"):
        io.export(tmp_path / "b", adapters, "peft")
    assert_same(load_file(tmp_path / "b" / TENSORS), names)


def test_a_conv1d_of_gpt2(tmp_path):
    """Its weight is stored the other way round, its LoRA is not."""
    module = "transformer.h.0.attn.c_attn"
    tensors = tensors_of({module: (8, 24)})
    directory = write(tmp_path / "a", tensors, fan_in_fan_out=True)
    kernel = {"kernel": random(0, 24, 8)}
    params = {"transformer": {"h": {"0": {"attn": {"c_attn": kernel}}}}}
    overrides = {".*": {"axes": "oi"}}  # as FlaxConv1D has it
    model = mora_jax.plan(params, MoRAConfig(rank=1, overrides=overrides))
    adapters = io.load_peft(directory, model)
    (delta,) = jax.tree.leaves(mora_jax.delta_weight(adapters))
    close(delta, exact(tensors, module, 1.5).T)
    io.export(tmp_path / "b", adapters, "peft")
    assert_same(load_file(tmp_path / "b" / TENSORS), tensors)
    assert config_of(tmp_path / "b")["fan_in_fan_out"] is True


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_stack_of_layers(tmp_path, axis):
    """Of different ranks and alphas: padded, and scaled by B."""
    modules = [f"model.layers.{k}.mlp.up_proj" for k in range(3)]
    sizes, ranks = dict.fromkeys(modules, (8, 16)), {modules[1]: 2}
    tensors = tensors_of(sizes, ranks)
    changes = {"rank_pattern": {"layers.1.mlp.up_proj": 2}}
    directory = write(tmp_path / "a", tensors, **changes)
    names = {"model.layers.{n}.mlp.{p}": "layers/{p}/kernel[{n}]"}
    kernel = np.moveaxis(random(0, 3, 8, 16), 0, axis)
    params = {"layers": {"up_proj": {"kernel": kernel}}}
    axes = {0: "sio", 1: "iso", -1: "ios"}[axis]
    config = MoRAConfig(rank=1, overrides={".*": {"axes": axes}})
    model = mora_jax.plan(params, config)
    adapters = io.load_peft(directory, model, names)
    (delta,) = jax.tree.leaves(mora_jax.delta_weight(adapters))
    for layer, module in enumerate(modules):
        factor = 6 / ranks.get(module, 4)
        close(np.moveaxis(delta, axis, 0)[layer], exact(tensors, module, factor))


def test_a_name_asks_for_no_memory(tmp_path):
    """Without a model, the names in a file alone say how deep a stack is."""
    tensors = tensors_of({f"model.layers.{10**12}.mlp.up_proj": (8, 16)})
    names = {"model.layers.{n}.mlp.{p}": "layers/{p}/kernel[{n}]"}
    with pytest.raises(AdapterFileError, match="stacked .* got modules for"):
        io.load_peft(write(tmp_path / "a", tensors), names=names)


def test_two_modules_that_are_one_kernel(tmp_path):
    """Gemma's keys and values: each has columns of A and rows of B of its own."""
    k, v = (f"model.layers.0.self_attn.{name}_proj" for name in "kv")
    tensors = tensors_of({k: (8, 12), v: (8, 12)}, {v: 2})
    changes = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    directory = write(tmp_path / "a", tensors, **changes)
    params = {"layer_0": {"attn": {"kv_einsum": {"w": random(0, 2, 3, 8, 4)}}}}
    overrides = {".*": {"axes": "ooio"}}
    config = MoRAConfig(rank=1, targets=".*/w", overrides=overrides)
    model = mora_jax.plan(params, config)
    adapters = io.load_peft(directory, model, "gm")
    (spec,) = specs_of(adapters).values()
    assert spec.operator.square_rank == 6
    (delta,) = jax.tree.leaves(mora_jax.delta_weight(adapters))
    for part, module in enumerate((k, v)):  # (heads, in, width)
        rows = np.transpose(delta[part], (1, 0, 2)).reshape(8, 12)
        close(rows, exact(tensors, module, 1.5))
    io.export(tmp_path / "b", adapters, "peft", "gm")
    assert_same(load_file(tmp_path / "b" / TENSORS), tensors)


def test_a_message_does_not_grow_with_a_stranger_s_names(tmp_path):
    modules = {f"odd{k}.{'x' * 300}": (8, 12) for k in range(200)}
    directory = write(tmp_path / "a", tensors_of(modules))
    with pytest.raises(io.AdapterFileError, match="templates name them") as caught:
        io.load_peft(directory, {"fc": {"kernel": jnp.ones((8, 12))}})
    assert len(str(caught.value)) < 40_000


class Hub(types.ModuleType):
    """The Hub, which has one adapter."""

    def __init__(self, adapter):
        super().__init__("huggingface_hub")
        self.__spec__ = ModuleSpec("huggingface_hub", None)  # it is installed
        self.adapter = adapter

    def snapshot_download(self, name, allow_patterns):
        assert allow_patterns == ["adapter_config.json", TENSORS]
        if name != "user/adapter":
            raise OSError(f"{name} is not a repository\nhttps://...")
        return str(self.adapter)


def test_a_lora_of_the_hub(tmp_path, monkeypatch):
    module = "model.layers.0.mlp.up_proj"
    directory = write(tmp_path / "a", tensors_of({module: (8, 12)}))
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(directory))
    assert_same(io.load_peft("user/adapter"), io.load_peft(directory))
    told = "no directory 'user/other', and none from the Hub: OSError: user/other is"
    with pytest.raises(io.AdapterFileError, match=f"{told} not a repository$"):
        io.load_peft("user/other")
    for name in ("user/adapter/deeper", "./adapter", str(tmp_path / "b")):
        with pytest.raises(io.AdapterFileError, match="there is no directory"):
            io.load_peft(name)


@pytest.mark.parametrize("family", ["gm", "tunix"])
def test_of_several_kernels_it_is_the_one_of_the_model(tmp_path, family):
    """A Gemma may have queries, keys and values in one array, or apart."""
    modules = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    directory = write(
        tmp_path / "a", tensors := tensors_of(dict.fromkeys(modules, (8, 12)))
    )
    at = "layers/0" if family == "tunix" else "layer_0"
    joined, alone = (f"{at}/attn/{name}/w" for name in ("qkv_einsum", "q_einsum"))
    apart = f"{at}/attn/kv_einsum/w"
    for kernels in ({joined: (3, 3, 8, 4)}, {alone: (3, 8, 4), apart: (2, 3, 8, 4)}):
        tree = {}
        for path, shape in kernels.items():
            node = tree
            for key in path.split("/")[:-1]:
                node = node.setdefault(key, {})
            node["w"] = random(0, *shape)
        overrides = {".*": {"axes": "ooio"}, ".*/q_einsum/w": {"axes": "oio"}}
        overrides = {
            k: v for k, v in overrides.items() if alone in kernels or k == ".*"
        }
        config = MoRAConfig(rank=1, targets=".*/w", overrides=overrides)
        adapters = io.load_peft(directory, mora_jax.plan(tree, config), family)
        assert set(specs_of(adapters)) == set(kernels)
        deltas = jax.tree.leaves(mora_jax.delta_weight(adapters))
        rows = [np.transpose(d.reshape(-1, 3, 8, 4), (0, 2, 1, 3)) for d in deltas]
        parts = np.concatenate(rows).reshape(3, 8, 12)
        order = modules if joined in kernels else [*modules[1:], modules[0]]
        for part, module in zip(parts, order, strict=True):
            close(part, exact(tensors, module, 1.5))


REFUSED = {
    "IA3": ({"peft_type": "IA3"}, "peft_type .* must be 'LORA', got 'IA3'"),
    "DoRA": ({"use_dora": True}, "use_dora .* must be false: DoRA is another method"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights.*save_pretr"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "init_lora_weights.*the base as it is"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens .* not known"),
    "bias of B": ({"lora_bias": True}, "lora_bias .* not known"),
    "more layers": ({"layer_replication": [[0, 1]]}, "layer_replication .* not known"),
    "something new": ({"use_quantum": True}, "use_quantum .* not known"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices .* not"),
    "r": ({"r": 0}, "r .* must be a positive integer"),
    "another r": ({"r": 5}, r"lora_B of .* must be of shape \(5, 16\)"),
    "alpha": ({"lora_alpha": "6"}, "lora_alpha .* must be a number"),
    "no alpha": ({"lora_alpha": "leave out"}, "lora_alpha .* must be a number"),
    "alpha of zero": ({"lora_alpha": 0}, "lora_alpha .* other than 0, got 0"),
    "alphas of zero": (
        {"alpha_pattern": {"q_proj": 0.0}},
        "alpha_pattern .*0.0",
    ),
    "endless alpha": ({"lora_alpha": math.inf}, "number"),
    "patterns": ({"alpha_pattern": {"(a+)+": 1}}, "alpha_pattern .* names of modules"),
    "biases": ({"bias": "vera_only"}, "bias .* must be one of"),
    "dropout": ({"lora_dropout": 1}, r"lora_dropout .* in \[0, 1\)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_another_method_is_refused_by_name(tmp_path, what):
    changes, match = REFUSED[what]
    directory = write(tmp_path / "a", tensors_of(), **changes)
    with pytest.raises(AdapterFileError, match=match):
        io.load_peft(directory, params_of())


def test_damaged_tensors_are_refused(tmp_path):
    tensors = tensors_of()
    a, b = (f"{HOME}{Q}.lora_{x}.weight" for x in "AB")
    cases = [
        ({b: None}, "must have lora_A and lora_B of .*q_proj"),
        ({a: tensors[a] * np.nan}, "NaN"),
        ({a: tensors[a][:, :-1].copy()}, "must be of shape"),
        ({a: tensors[a][0]}, "two matrices"),
        ({f"{HOME}{Q}.lora_magnitude_vector": tensors[a]}, "tensors in .* must be"),
        ({f"{HOME}model.odd.lora_A.weight": tensors[a],
          f"{HOME}model.odd.lora_B.weight": tensors[b]}, "names have no kernel"),
        ({f"{HOME}model.odd.weight": tensors[a]}, "trained whole"),
        ({"x": tensors[a]}, "tensors in .* must be"),
    ]  # fmt: skip
    for k, (changes, match) in enumerate(cases):
        new = {n: t for n, t in (tensors | changes).items() if t is not None}
        directory = write(tmp_path / str(k), new)
        with pytest.raises(AdapterFileError, match=match):
            io.load_peft(directory, params_of())


def test_a_server_has_one_alpha(tmp_path):
    """vLLM takes `lora_alpha / r` of the whole file for each module."""
    changes, ranks, factors = FACTORS["patterns"]
    tensors = tensors_of(ranks=ranks)
    adapters = io.load_peft(write(tmp_path / "a", tensors, **changes))
    io.export(tmp_path / "b", adapters, "vllm")
    config, served = config_of(tmp_path / "b"), load_file(tmp_path / "b" / TENSORS)
    assert config["lora_alpha"] == config["r"] == 4
    for module, factor in factors.items():
        close(exact(served, module, 1), exact(tensors, module, factor))
    plain = io.load_peft(write(tmp_path / "c", tensors_of()))
    exported = io.export(tmp_path / "d", plain, "vllm")
    assert exported.rank == 4 and "--max-lora-rank 8" in exported.command
    assert_same(load_file(tmp_path / "d" / TENSORS), tensors_of())
    assert config_of(tmp_path / "d")["lora_alpha"] == 6


def test_the_command_line(tmp_path):
    directory = write(tmp_path / "a", tensors := tensors_of())
    told = run("inspect", directory)
    assert "peft-lora" in told and "low_rank" in told
    run("export", directory, tmp_path / "ours", "--for", "mora")
    run("export", tmp_path / "ours", tmp_path / "back", "--for", "peft")
    assert_same(load_file(tmp_path / "back" / TENSORS), tensors)
    assert "full" not in run("export", directory, tmp_path / "e", "--for", "sglang")
    modules = enumerate(SIZES.items())
    weights = {
        f"{m}.weight": np.asarray(random(k, *shape[::-1])) for k, (m, shape) in modules
    }
    save_file(weights, tmp_path / "base.safetensors")
    run("merge", tmp_path / "base.safetensors", directory, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "base.safetensors")
    for module in SIZES:
        expected = weights[f"{module}.weight"] + exact(tensors, module, 1.5).T
        close(merged[f"{module}.weight"], expected)


BIASES = {f"{Q}.bias": "lora_only", "lm_head.bias": "all"}
"""{the bias of a module whose weight is not trained: PEFT's word for such}."""


@pytest.mark.parametrize("beside", [(), ("model.norm",)])
@pytest.mark.parametrize("number", range(1, 3))
def test_biases_without_their_weights(tmp_path, number, beside):
    """PEFT has them as its `bias`, and takes whole modules alone to save."""
    arrays = {name: random(k, 12) for k, name in enumerate([*BIASES][:number])}
    arrays |= {f"{m}.{x}": random(5, 8) for m in beside for x in ("weight", "bias")}
    params = params_of({**SIZES, "lm_head": (8, 12), "model.norm": (8, 8)})
    params["model"]["norm"] = {"scale": random(2, 8), "bias": random(3, 8)}
    params["model"]["layers"]["0"]["self_attn"]["q_proj"]["bias"] = random(4, 12)
    params["lm_head"]["bias"] = random(5, 12)
    inner = {name: name.replace("proj.bias", "proj.base_layer.bias") for name in arrays}
    tensors = tensors_of() | {f"{HOME}{inner[n]}": a for n, a in arrays.items()}
    changes = {"bias": BIASES[[*BIASES][number - 1]], "modules_to_save": [*beside]}
    directory = write(tmp_path / "a", tensors, **changes)
    adapters = io.load_peft(directory, params)
    flat = flatten(mora_jax.merge(params, adapters))
    for name, array in arrays.items():
        path = name.replace(".", "/").replace("/weight", "/scale")
        np.testing.assert_array_equal(flat[path], array)
    io.export(tmp_path / "b", adapters, "peft")
    assert_same(load_file(tmp_path / "b" / TENSORS), tensors)
    config = config_of(tmp_path / "b")
    assert config["bias"] == changes["bias"]
    assert config.get("modules_to_save", []) == [*beside]
