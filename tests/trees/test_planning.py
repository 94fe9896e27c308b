"""Which kernels are chosen, and what is refused."""

import copy
import dataclasses
import inspect
import json
import pickle
import re
import time
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict, meta

import mora_jax
from mora_jax import (
    FrozenDense,
    MoRAConfig,
    MoRAWarning,
    init,
    merge,
    plan,
    summary,
)
from mora_jax._plan.settings import AdapterSettings


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def dense(ins, outs):
    return {"kernel": shape(ins, outs), "bias": shape(outs)}


def transformer():
    """Shapes of a small language model."""
    layer = {
        "self_attn": {p: dense(64, 64) for p in ("q_proj", "k_proj", "v_proj")},
        "mlp": {"up_proj": dense(64, 256), "down_proj": dense(256, 64)},
        "norm": {"scale": shape(64)},
    }
    return {
        "embed_tokens": {"embedding": shape(1000, 64)},
        "layers": {str(k): layer for k in range(12)},
        "lm_head": dense(64, 1000),
    }


MODEL, K = transformer(), jnp.ones((8, 8))
KERNEL = {"kernel": K}


def test_default_targets_are_dense_kernels():
    chosen = plan(MODEL)
    assert len(chosen) == 12 * 5
    names = {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    assert {path.split("/")[-2] for path in chosen} == names
    total = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(MODEL))
    own = sum(spec.parameters for spec in chosen.values())
    assert (chosen.base_parameters, chosen.trainable_parameters) == (total, own)
    assert chosen.total_parameters == total + own


TARGETED = """dense/kernel kernel multi_head_attention/kernel
encoder/layer/0/attention/self/query/kernel"""
OTHERS = """lm_head/kernel head/kernel mlm_head/Dense_0/kernel head_1/kernel dense/bias
classifier/kernel Classifier/kernel patch_embedding/kernel Conv_0/kernel
moe/router/kernel moe/router_logits/kernel altup/modality_router/kernel
embed/embedding"""


def test_default_target_names():
    (pattern,) = MoRAConfig().targets
    names = f"{TARGETED} {OTHERS}".split()
    found = [name for name in names if re.fullmatch(pattern, name)]
    assert found == TARGETED.split()


def test_arrays_and_shapes_give_equal_plans():
    arrays = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), MODEL)
    config = MoRAConfig(rank=4, operator="orthogonal", seed=3)
    one, other = plan(arrays, config), plan(MODEL, config)
    assert one == other and hash(one) == hash(other) and one != plan(arrays)


def test_targets_exclude_and_overrides():
    config = MoRAConfig(
        rank=4,
        targets=(r".*/(q|v)_proj/kernel", r".*/up_proj/kernel"),
        exclude=r"layers/1?[02468]/.*",
        overrides={
            r".*/q_proj/kernel": {"rank": 16, "operator": "sharing"},
            r"layers/1/.*": {"alpha": 2.0},
            r"layers/1/self_attn/q_proj/kernel": {"square_rank": 10},
        },
    )
    chosen = plan(MODEL, config)
    assert len(chosen) == 6 * 3
    for path, name, q, alpha in (
        ("layers/1/self_attn/q_proj/kernel", "sharing", 10, 2.0),
        ("layers/3/self_attn/q_proj/kernel", "sharing", 45, 1.0),  # isqrt(128 * 16)
        ("layers/3/self_attn/v_proj/kernel", "block_diagonal", 8, 1.0),
    ):
        operator = chosen[path].operator
        assert (operator.name, operator.square_rank) == (name, q)
        assert chosen[path].alpha == alpha
    with pytest.raises(KeyError, match="no adapter at .*; the nearest are"):
        chosen["layers/3/self_attn/k_proj/kernel"]


def test_a_plan_is_a_mapping_of_paths():
    params = {"enc": {"kernel": shape(8, 8)}, "dec": {"kernel": shape(8, 8)}}
    chosen = plan(params)
    assert isinstance(chosen, Mapping) and len(chosen) == 2
    assert "enc/kernel" in chosen and "nowhere" not in chosen and 3 not in chosen
    assert list(chosen) == list(chosen.keys()) == ["dec/kernel", "enc/kernel"]
    assert tuple(chosen.values()) == tuple(chosen.specs.values())
    assert ["/".join(path) for path in chosen.specs] == list(chosen)
    assert dict(chosen)["enc/kernel"] is chosen["enc/kernel"]
    assert chosen.get("nowhere") is None


def test_axes():
    projection = {"kernel": shape(64, 4, 16)}
    params = {
        "attn": {"query": projection, "out": {"kernel": shape(4, 16, 64)}},
        "scanned": {"kernel": shape(12, 64, 32)},
    }
    config = MoRAConfig(rank=2, overrides={"scanned/kernel": {"axes": "sio"}})
    chosen = plan(params, config)
    axes = {path: spec.axes for path, spec in chosen.items()}
    assert axes.pop("scanned/kernel") == "sio"
    assert axes == {"attn/out/kernel": "iio", "attn/query/kernel": "ioo"}
    assert chosen["scanned/kernel"].shape == (12, 16, 4, 2)
    with pytest.raises(ValueError, match="scanned/kernel: .*linen.plan.*'axes'"):
        plan(params)


def test_any_container():
    """Lists, FrozenDicts, boxed parameters, names with slashes, a tied table."""
    tied = {"embed": {"embedding": K}, "lm_head": KERNEL, "dense": {"kernel": K + 1}}
    trees = {
        "layers/1/kernel": {"layers": [KERNEL, {"kernel": K + 1}]},
        "mlp/~/linear/kernel": {"mlp/~/linear": KERNEL},
        "a/kernel": FrozenDict({"a": KERNEL}),
        "b/kernel": {"b": {"kernel": meta.Partitioned(K, names=("x", "y"))}},
        "3/kernel": {3: KERNEL},
        "dense/kernel": tied,
    }
    for name, tree in trees.items():
        chosen = plan(tree, MoRAConfig(targets=re.escape(name)))
        adapters = jax.tree.map(lambda m: m + 1, init(chosen))
        merged = merge(tree, adapters)
        assert jax.tree.structure(merged) == jax.tree.structure(tree)
        if "layers" in tree:
            with pytest.raises(TypeError, match="got a list at 'layers': .* own tree"):
                mora_jax.combine(tree, adapters)
            continue
        both = mora_jax.combine(tree, adapters)
        assert len(jax.tree.leaves(both)) == len(jax.tree.leaves(tree)) + 1


def test_summary():
    small, whole = plan(MODEL, MoRAConfig(rank=4)), plan(MODEL)
    rows = summary(small).splitlines()
    assert len(rows) == 1 + 5 + 1  # layers collapse
    row = (
        "layers/*/mlp/down_proj/kernel (12) 256 -> 64 block_diagonal 3.2 16 x 16 x 4 8"
        " 12,288 1.82%"
    )
    assert rows[1].split() == row.split()
    assert rows[-1].startswith("60 adapters: ")
    assert str(whole).startswith(summary(whole))
    assert len(summary(whole, collapse=False).splitlines()) == 62
    config = MoRAConfig(overrides={"layers/0/.*": {"alpha": 2.0}})
    assert len(summary(plan(MODEL, config)).splitlines()) == 1 + 2 * 5 + 1


def test_planning_is_fast():
    params = {f"l{k}": {"kernel": shape(4096, 4096 + k % 5)} for k in range(2_000)}
    start = time.process_time()  # which other processes do not lengthen much
    assert len(plan(params)) == 2_000
    assert time.process_time() - start < 1.5  # about a third of it


COMPLEX = K.astype(jnp.complex64)
TWICE = {"a": KERNEL, "b": KERNEL}
SAME_PATH = {"a/b": KERNEL, "a": {"b": {"kernel": K + 1}}}
NO_TARGET = "'.*/qproj/kernel' matches no path .* 'layers/0/self_attn/q_proj/kernel'"
NOT_ADAPTED = "overrides: 'lm_head/kernel' matches no path that is adapted"

BAD_PLANS = {
    ValueError: [
        ({}, {}, "holds no array"),
        ({"a": {}}, {}, "holds no array"),
        ({"bias": jnp.ones(8)}, {}, "targets: the default matches no path"),
        ({"mlp/~/linear": {"w": K}}, {}, "called 'kernel' .* 'mlp/~/linear/w'; name"),
        (MODEL, {"targets": ".*/qproj/kernel"}, NO_TARGET),
        (MODEL, {"targets": ".*/bias"}, "can be adapted .two or more axes"),
        (MODEL, {"targets": "q_proj"}, "'q_proj' matches no path"),
        (MODEL, {"exclude": "layers/12/.*"}, "exclude: .* matches no path"),
        (MODEL, {"exclude": ".*"}, "exclude leaves no kernel"),
        (MODEL, {"overrides": {"lm_head/kernel": {"rank": 4}}}, NOT_ADAPTED),
        (TWICE, {}, "is shared: .* 'a.* also as 'b"),
        (SAME_PATH, {}, "two leaves of the path 'a/b/kernel'"),
        ({"kernel": jnp.ones((8, 0))}, {}, "none of them empty"),
        (
            KERNEL,
            {"square_rank": 9, "operator": "sharing"},
            "kernel: square_rank must be at",
        ),
        (
            KERNEL,
            {"square_rank": 3, "operator": "rotation"},
            "kernel: .* multiple of 2",
        ),
        (KERNEL, {"overrides": {"kernel": {"axes": "oo"}}}, "kernel: axes .* one i"),
    ],
    TypeError: [
        ({"kernel": K.astype(int)}, {}, "kernel must have .*, got int32; dequantise"),
        ({"kernel": COMPLEX}, {}, "complex64; only real numbers .* exclude"),
        ({**KERNEL, "a": COMPLEX}, {"train": "a"}, "complex64; only real .* of train"),
        ({"kernel": K, "name": "x"}, {}, "arrays only, got str at 'name'"),
    ],
}


BOTH = {"rank": 4, "square_rank": 16}
BAD_CONFIGS = {
    ValueError: [
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"square_rank": 0}, "square_rank"),
        ({"targets": "all-linear"}, "got 'all-linear': leave targets out"),
        ({"operator": "lora"}, "operator must be one of"),
        ({"alpha": float("inf")}, "alpha must be finite"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "dropout"),
        ({"init": "ones"}, "init must be one of"),
        ({"seed": -1}, "seed"),
        ({"targets": ()}, "targets must hold at least one"),
        ({"targets": "*"}, "which is not a regular expression"),
        ({"exclude": "("}, "not a regular expression"),
        ({"overrides": {"a": {"ranks": 3}}}, "got .'ranks'"),
        ({"overrides": {"a": {"rank": 0}}}, "rank must be a positive"),
        ({"overrides": {"a": {"r": 3}}}, "got .'r'.: here that is rank"),
        ({"overrides": {"a": BOTH}}, "overrides.*'a'.*rank=4 and square_rank=16"),
        ({"overrides": {"a": BOTH | {"rank": 8}}}, "rank=8 and square_rank=16"),
        ({"overrides": {"a": {"alpha": 0}}}, "alpha must be above 0, got 0"),
        ({"overrides": {"a": {"alpha": -8}}}, "alpha must be above 0, got -8"),
        ({"alpha": 0}, "alpha must be above 0, got 0"),
        ({"alpha": -0.5}, "alpha must be above 0, got -0.5"),
        ({"scale": "best"}, r"scale must be one of \('paper', 'fine-tuning'\), got"),
        ({"alpha": float("nan")}, "alpha must be finite"),
        (BOTH, "rank=4 and square_rank=16"),
        (BOTH | {"rank": 8}, "rank=8 and square_rank=16"),
        ({"execution": "fast"}, "execution must be one of .* got 'fast'"),
        ({"operator": "damped"}, r"'damped'.* mora_jax.input_damping\("),
        ({"operator": {"name": "damped"}}, r"'damped'.* mora_jax.input_damping\("),
        ({"operator": "subspace"}, r"'subspace'.* mora_jax.directions\("),
        ({"overrides": {"a": {"operator": "subspace"}}}, r"mora_jax.directions\("),
        ({"overrides": {"a": {"input_damping": 8}}}, r"mora_jax.input_damping\("),
        ({"init": "gradient"}, r"'gradient'.* mora_jax.gradient_start\("),
        ({"overrides": {"a": {"axes": ""}}}, "'a'.*axes must be .*, got ''"),
        ({"overrides": {"a": {"axes": ["i", "o"]}}}, r"axes must be .*, got \['i', "),
        ({"init": np.ones(3)}, r"init must be one of .*, got array\("),
        ({"execution": ["fold"]}, r"execution must be one of .*, got \['fold'\]"),
        ({"operator": {"name": ["rotation"]}}, r"operator must be .*\['rotation'\]"),
        (
            {"operator": {"name": "sharing", "compress_groups": ["strided"]}},
            r"'compress_groups' .*\['strided'\]",
        ),
    ],
    TypeError: [
        ({"rank": 1.5}, "rank must be a positive integer, got 1.5"),
        ({"rank": True}, "rank"),
        ({"squares": 2}, "no setting 'squares'; did you mean 'square_rank'"),
        ({"operator": None}, "operator must be a name"),
        ({"alpha": "1"}, "alpha must be a number"),
        ({"param_dtype": int}, "param_dtype must be a floating-point"),
        ({"param_dtype": "float8_e4m3fn"}, "param_dtype must .*16 bits, got float8_e"),
        ({"targets": [3]}, "targets must hold regular expressions, got 3"),
        ({"overrides": ["a"]}, "overrides must map patterns"),
        ({"overrides": {"a": 3}}, "must be a mapping, got 3"),
        ({"alpha": jnp.float32(2)}, r"got Array\(2.*; write float\(alpha\)"),
        ({"dropout": jnp.zeros(())}, r"write float\(dropout\)"),
        ({"alpha": np.ones(3)}, "alpha must be a number"),
        ({"targets": None}, "got None; leave it out for the default"),
        ({"targets": 3}, "targets must be regular expressions, got 3"),
        ({"exclude": None}, "exclude must be .* leave it out"),
        ({"r": 8}, "no setting 'r': here that is rank"),
        ({"lora_alpha": 8}, "here that is alpha, which multiplies"),
        ({"target_modules": ["q"]}, "here that is targets, regular expr"),
        ({"lora_dropout": 0.1}, "here that is dropout"),
        ({"use_dora": True}, "nothing: a DoRA's delta"),
        ({"use_rslora": True}, "lora_alpha / sqrt.r."),
        ({"bias": "all"}, "train, .* such as '...bias'"),
        ({"module_path": "a"}, "targets, regular .*MoRARule"),
        ({"weight_qtype": "nf4"}, "qwix.MoRARule"),
        ({"layers_to_transform": [1]}, "targets, as in"),
        ({"trainable_token_indices": [1]}, "train, for all rows"),
        ({"target_parameters": ["w"]}, "targets, regular"),
        ({"task_type": "CAUSAL_LM"}, "io.export"),
        ({"exclude_modules": "a"}, "here that is exclude"),
        ({"rank_pattern": {}}, "here that is overrides, as in"),
        ({"alpha_pattern": {}}, "here that is overrides, as in"),
        ({"init_lora_weights": True}, "here that is init"),
        ({"drop_out": 0.1}, "no setting 'drop_out'; .* 'dropou"),
        ({"input_damping": 16}, r"here that is .* mora_jax.input_damping\("),
        ({"directions": 16}, r"here that is .* mora_jax.directions\("),
        ({"gradient_bases": 16}, r"here that is .* mora_jax.gradient_bases\("),
        ({"gradient_start": True}, r"here that is .* mora_jax.gradient_start\("),
    ],
}


def rows(table):
    return [(error, *row) for error, rows in table.items() for row in rows]


@pytest.mark.parametrize(("error", "params", "config", "message"), rows(BAD_PLANS))
def test_bad_plans(params, config, error, message, unchecked):
    with pytest.raises(error, match=message):
        plan(params, MoRAConfig(**config))


@pytest.mark.parametrize(("error", "settings", "message"), rows(BAD_CONFIGS))
def test_bad_configs(settings, error, message, unchecked):
    with pytest.raises(error, match=message):
        MoRAConfig(**settings)


def test_without_a_param_dtype_m_has_that_of_its_kernel(unchecked):
    half, own = jnp.bfloat16, MoRAConfig(rank=2, param_dtype=None)
    params = {
        "a": {"kernel": shape(8, 8, dtype=half)},
        "b": {"kernel": shape(8, 8, dtype=jnp.float16)},
        "c": {"kernel": shape(8, 8, dtype=half)},
    }
    wide_c = {"c/kernel": {"param_dtype": jnp.float32}}
    for config in (
        dataclasses.replace(own, overrides=wide_c),
        MoRAConfig(overrides={"[ab]/kernel": {"param_dtype": None}}),
    ):
        dtypes = [m.dtype.name for m in jax.tree.leaves(init(plan(params, config)))]
        assert dtypes == ["bfloat16", "float16", "float32"]
    # So have layers.
    frozen = FrozenDense.from_config(K.astype(half), config=own)
    assert init(frozen)["kernel_mora"].m.dtype == half
    dense = mora_jax.MoRADense(8, config=own, param_dtype=half)
    params = dense.init(jax.random.key(0), K)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(half)}
    settings = {"config": own, "param_dtype": half, "rngs": nnx.Rngs(0)}
    assert mora_jax.nnx.MoRALinear(8, 8, **settings).kernel_mora.dtype == half
    # But a spec without a kernel's dtype must have its own.
    spec = plan(KERNEL)["kernel"]
    with pytest.raises(TypeError, match="floating-point dtype, got None"):
        dataclasses.replace(spec, param_dtype=None)
    with pytest.raises(TypeError, match="floating-point dtype, got None"):
        mora_jax.AdapterSpec.from_config(own, (8, 8))


@pytest.mark.usefixtures("unchecked")
def test_a_config_is_a_value():
    """It hashes by its content, is copied, and holds Python's own numbers."""
    config = MoRAConfig(
        operator={"name": "sharing", "compress_groups": "contiguous"},
        overrides={"a": {"rank": 2, "operator": {"name": "rotation"}}},
        targets=["a", "b"],
    )
    same = MoRAConfig(
        operator={"compress_groups": "contiguous", "name": "sharing"},
        overrides={"a": {"operator": {"name": "rotation"}, "rank": 2}},
        targets=("a", "b"),
    )
    copies = copy.copy(config), copy.deepcopy(config), dataclasses.replace(config)
    for other in (same, *copies, pickle.loads(pickle.dumps(config))):
        assert other == config and hash(other) == hash(config)
    assert dataclasses.replace(config, rank=5).rank == 5
    names = list(inspect.signature(MoRAConfig).parameters)
    assert names == [field.name for field in dataclasses.fields(config)]
    numbers = {"rank": 4, "alpha": 2.0, "dropout": 0.5, "seed": 3}
    alpha, dropout, seed = np.float32(2), np.float32(0.5), np.int32(3)
    config = MoRAConfig(rank=np.int64(4), alpha=alpha, dropout=dropout, seed=seed)
    assert config == MoRAConfig(**numbers)
    for name, number in numbers.items():
        assert type(getattr(config, name)) is type(number)
    assert type(plan(KERNEL, config)["kernel"].alpha) is float


def test_of_rank_and_square_rank_the_nearer_one_is_taken():
    by_q = MoRAConfig(
        operator="signed_decoupling", square_rank=8, overrides={"a": {"rank": 2}}
    )
    config = by_q.settings("a")[0]
    assert (config.rank, config.square_rank) == (2, None)
    overrides = {"a|b|c": {"square_rank": 8}, "b|c": {"rank": 2}}
    overrides["c"] = {"square_rank": 6}
    by_rank = MoRAConfig(rank=4, overrides=overrides)
    found = {path: by_rank.settings(path)[0] for path in "abcd"}
    assert [found[path].square_rank for path in "abcd"] == [8, None, 6, None]
    assert [found[path].rank for path in "abcd"] == [None, 2, None, 4]
    by_eight = MoRAConfig(rank=8, overrides={"a": {"square_rank": 6}})
    assert by_eight.settings("a")[0].square_rank == 6
    # None says nothing, as if it were left out.
    by_q = MoRAConfig(
        operator="signed_decoupling", square_rank=8, overrides={"a": {"rank": None}}
    )
    assert by_q.settings("a")[0].square_rank == 8


def test_alphas_as_of_lora_warn_once():
    message = "alpha=16 multiplies .*=lora_alpha / r"
    with pytest.warns(MoRAWarning, match=message) as seen:
        config = MoRAConfig(alpha=16.0, overrides={".*q_proj.*": {"rank": 4}})
        chosen = plan(MODEL, config)
    assert len(seen) == 1
    with pytest.warns(MoRAWarning, match="alpha=8") as seen:
        MoRAConfig(overrides={"a": {"alpha": 8}})
    assert [warning.filename for warning in seen] == [__file__]
    MoRAConfig(alpha=4.0)
    # A spec, which may come from a file, is what it is.
    for alpha in (100.0, -1.0):
        dataclasses.replace(chosen["layers/0/mlp/up_proj/kernel"], alpha=alpha)


def test_a_rank_that_a_kernel_is_too_narrow_for_is_told():
    """Once for all kernels of a kind, if somebody has asked for it."""
    params = {
        f"l{k}": {"thin": dense(4, 4096), "wide": dense(2048, 2048)} for k in (0, 1)
    }
    message = r"l\*/thin/kernel: rank=800 asks for q = 1811, and 4 is the widest"
    with pytest.warns(MoRAWarning, match=message) as seen:
        chosen = plan(params, MoRAConfig(rank=800))
    assert {str(warning.message) for warning in seen} == {str(seen[0].message)}
    assert "4 of 1811" in str(chosen)
    thin = {".*/thin/kernel": {"square_rank": 4, "operator": "sharing"}}
    for quiet in (MoRAConfig(), MoRAConfig(rank=800, overrides=thin)):
        plan(params, quiet)
    square = {"operator": "orthogonal"}
    plan(params, MoRAConfig(**square))  # nobody asked for its rank of 8
    with pytest.warns(MoRAWarning, match="rank=8 asks for q = 181, and 4"):
        plan(params, MoRAConfig(rank=8, **square))
    config = MoRAConfig(rank=800)
    for make in (
        lambda: FrozenDense.from_config(K, config=config),
        lambda: mora_jax.MoRADense(8, config=config).init(jax.random.key(0), K),
        lambda: mora_jax.nnx.MoRALinear(8, 8, config=config, rngs=nnx.Rngs(0)),
    ):
        with pytest.warns(MoRAWarning, match="kernel: rank=800 asks for q = 113, and"):
            make()


def test_settings_are_a_record_that_json_holds():
    settings = AdapterSettings(alpha=2, dropout=0.5, param_dtype="bfloat16")
    content = json.loads(json.dumps(settings.to_json()))
    assert AdapterSettings(**content) == settings
    spec, frozen = plan(KERNEL)["kernel"], FrozenDense.from_config(K)
    assert (
        spec.to_json() == frozen.to_json() and frozen.spec.to_json() == spec.to_json()
    )


def test_a_plan_ends_with_the_parameters_of_loras_of_its_ranks():
    params = {"a": dense(30, 50), "b": dense(64, 64)}  # blocks of "a" are rounded down
    overrides = {"b/kernel": {"rank": 4}}
    text = str(plan(params, MoRAConfig(rank=8, overrides=overrides)))
    loras = 8 * (30 + 50) + 4 * (64 + 64)
    assert f"; LoRAs of the same rank have {loras:,}" in text
    lora = plan(params, MoRAConfig(rank=8, operator="low_rank", overrides=overrides))
    assert lora.trainable_parameters == loras and f"rank have {loras:,}" in str(lora)
    # Where q itself was given nobody named a rank to compare with.
    for settings in (
        {"square_rank": 8, "operator": "sharing"},
        {
            "rank": 8,
            "overrides": {"b/kernel": {"square_rank": 8, "operator": "sharing"}},
        },
    ):
        assert "of the same rank" not in str(plan(params, MoRAConfig(**settings)))


def test_summary_shows_what_is_not_usual():
    params = {"small": dense(64, 64), "wide": dense(512, 512)}
    settings = {"operator": "rotation", "scale": "paper"}
    text = summary(plan(params, MoRAConfig(rank=64, **settings)))
    shown = [line.split()[6:-2] for line in text.splitlines()[1:3]]
    assert shown == [["64", "of", "90"], ["256"]]
    assert not any(name in text for name in ("alpha", "scale", "dropout"))
    assert "scale" in summary(plan(params))
    assert " of 90" not in summary(
        plan(params, MoRAConfig(operator="signed_decoupling", square_rank=64))
    )
    assert "of" not in summary(plan(params, MoRAConfig(rank=7))).splitlines()[1]
    overrides = {"small/kernel": {"alpha": 0.5, "dropout": 0.1}}
    config = MoRAConfig(rank=8, overrides=overrides, **settings)
    text = str(plan(params, config))
    cells = [line.split()[6:] for line in text.splitlines()[:3]]
    assert cells[0][:3] == ["q", "alpha", "dropout"]
    assert cells[1][:3] == ["32", "0.5", "0.1"]
    assert cells[2][:5] == ["64", "of", "90", "1", "0"]


def test_scale_is_a_factor_of_each_kernel():
    """A plan says which; it multiplies as alpha does, which stays what it was."""
    params = {"a": dense(64, 64), "b": dense(64, 16)}
    settings = dict(operator="decoupling", alpha=0.5)
    found = plan(params, MoRAConfig(square_rank=8, **settings))
    # 8 blocks of 8 each have outputs of their own, or share them in fours.
    scales = [spec.scale for spec in found.values()]
    assert scales == pytest.approx([8**0.75, 8**0.75 / 2])
    assert [spec.factor for spec in found.values()] == [scale / 2 for scale in scales]
    heads, *rows = [line.split() for line in summary(found).splitlines()[:3]]
    assert heads[-5:-2] == ["alpha", "scale", "parameters"]
    assert [row[-4:-2] for row in rows] == [["0.5", "4.76"], ["0.5", "2.38"]]
    ones = {"kernel_mora": np.ones((8, 8), np.float32)}
    delta = mora_jax.delta_weight(found.adapters({"a": ones, "b": ones}))
    np.testing.assert_allclose(
        delta["a"]["kernel"][:9, 0], [8**0.75 / 2] * 8 + [0.0], 1e-6
    )
    ends = [8**0.75 / 4, 0.0, 8**0.75 / 4]
    np.testing.assert_allclose(delta["b"]["kernel"][:17:8, 0], ends, 1e-6)
    with pytest.raises(ValueError, match="scale must be above 0, got -1"):
        dataclasses.replace(found["a/kernel"], scale=-1.0)


SETTINGS = dict(rank=2, operator="orthogonal", seed=1)
TRAINING = dict(dropout=0.5, execution="fold")
ORIGINS = dict(init="gaussian", param_dtype=jnp.bfloat16)
GROUPS = {"name": "sharing", "compress_groups": "contiguous"}
TOLD = [
    *({"seed": 2}, {"alpha": 0.5}, {"rank": 3}, {"exclude": "b/kernel"}),
    {"scale": "paper"},
    *({"operator": "hadamard"}, {"operator": GROUPS}),
    {"overrides": {"a/kernel": {"axes": "oi"}}},
]


def test_a_meaning_is_what_an_m_stands_for_and_specs_tell_programs_apart():
    """How it is trained is no part of its meaning, but is one of its program."""

    def planned(b="b", **settings):
        params = {"a": dense(64, 64), b: dense(64, 32)}
        return plan(params, MoRAConfig(**SETTINGS | settings))

    def meaning(chosen):
        return json.dumps({path: spec.meaning for path, spec in chosen.items()})

    first = planned()
    training = [planned(**{name: TRAINING[name]}) for name in TRAINING]
    origins = [planned(**{name: ORIGINS[name]}) for name in ORIGINS]
    assert {meaning(chosen) for chosen in training + origins} == {meaning(first)}
    assert set(origins) == {first}
    told = [first, planned("c"), *(planned(**settings) for settings in TOLD)]
    assert len({meaning(chosen) for chosen in told}) == len(told)
    assert len({*told, *training}) == len(told) + len(training)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (jnp.ones((2, 8)), r"got an array of shape \(2, 8\): the call is .*config"),
        ({"rank": 8}, r"got dict: write MoRAConfig\(rank=8\)"),
        ({"r": 8}, r"got dict: write MoRAConfig\(r=8\)"),
        ({"ids": jnp.ones(2)}, "got dict: the call is .*config"),
        (8, r"got int: write MoRAConfig\(rank=8\)"),
        ("rotation", "got str: the call is .*config"),
        (MoRAConfig, "got type: the call is"),
    ],
)
def test_what_is_no_config_is_told(config, message):
    message = f"config must be a MoRAConfig, {message}"
    module, layer = nn.Dense(8), nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    variables = module.init(jax.random.key(0), K)
    calls = [
        lambda: plan(variables["params"], config),
        lambda: mora_jax.linen.plan(module, variables, config),
        lambda: mora_jax.linen.wrap(module, config, variables),
        lambda: mora_jax.linen.wrap(module, config),
        lambda: mora_jax.nnx.plan(layer, config),
        lambda: mora_jax.nnx.wrap(layer, config),
        lambda: FrozenDense.from_config(K, config=config),
        lambda: mora_jax.nnx.MoRALinear(8, 8, config=config, rngs=nnx.Rngs(0)),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=message.split(": the call")[0]):
            call()
    with pytest.raises(TypeError, match=message):
        calls[0]()
    with pytest.raises(TypeError, match="variables must be given with a config"):
        mora_jax.linen.wrap(module, MoRAConfig())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [8, None, MoRAConfig(), "rotation", {}])
def test_what_is_no_plan_is_told(wrong):
    calls = [
        lambda: mora_jax.io.plan_to_json(wrong),
        lambda: mora_jax.gradient_bases(KERNEL, wrong),
        lambda: mora_jax.from_lora(KERNEL, wrong, 1),
        lambda: init(wrong),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="must be a Plan, got .*: make one with"):
            call()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [8, None, MoRAConfig(), "rotation", {}, plan(KERNEL)])
def test_what_are_no_adapters_is_told(wrong):
    """A plan, too, where adapters are wanted."""
    is_plan = isinstance(wrong, mora_jax.Plan)
    calls = [
        lambda: merge(KERNEL, wrong),
        lambda: mora_jax.fold(KERNEL, wrong),
        lambda: mora_jax.unmerge(KERNEL, wrong),
        lambda: mora_jax.delta_weight(wrong),
        lambda: mora_jax.diagnostics.spectrum(wrong),
        lambda: mora_jax.diagnostics.merge_loss(KERNEL, wrong),
        lambda: mora_jax.diagnostics.relative_norm(KERNEL, wrong),
        lambda: mora_jax.save("never", wrong),
        lambda: mora_jax.serving.stack([wrong]),
        lambda: mora_jax.gradient_start(lambda _: 0.0, wrong),
    ]
    calls += [] if is_plan else [lambda: summary(wrong)]
    told = r"adapters are init\(plan\)" if is_plan else "adapters (must be|hold no)"
    for call in calls:
        with pytest.raises((TypeError, ValueError), match=told):
            call()


def test_a_summary_of_adapters_is_that_of_their_plan_without_the_base():
    chosen = plan(MODEL, MoRAConfig(rank=2))
    without = dataclasses.replace(chosen, base_parameters=0)
    assert summary(init(chosen)) == summary(without) != summary(chosen)
