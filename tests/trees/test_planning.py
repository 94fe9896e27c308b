"""Which kernels are chosen, and what is refused."""

import copy
import dataclasses
import inspect
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
    AdapterSpec,
    FrozenDense,
    MoRAConfig,
    MoRADense,
    MoRAWarning,
    combine,
    init,
    merge,
    plan,
    summary,
)
from mora_jax.nnx import MoRALinear


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


def test_default_targets_are_dense_kernels():
    chosen = plan(transformer())
    assert len(chosen) == 12 * 5
    assert {spec.name.split("/")[-2] for spec in chosen.specs} == {
        *("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
    }
    total = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(transformer()))
    assert chosen.base_parameters == total
    assert chosen.trainable_parameters == sum(s.parameters for s in chosen.specs)
    assert chosen.total_parameters == total + chosen.trainable_parameters


TARGETED = """
dense/kernel kernel multi_head_attention/kernel
encoder/layer/0/attention/self/query/kernel
""".split()
OTHERS = """
lm_head/kernel head/kernel mlm_head/Dense_0/kernel head_1/kernel classifier/kernel
Classifier/kernel patch_embedding/kernel Conv_0/kernel moe/router/kernel dense/bias
embed/embedding
""".split()


@pytest.mark.parametrize("name", TARGETED + OTHERS)
def test_default_target_names(name):
    (pattern,) = MoRAConfig().targets
    assert bool(re.fullmatch(pattern, name)) == (name in TARGETED)


def test_arrays_and_shapes_give_equal_plans():
    arrays = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), transformer())
    config = MoRAConfig(rank=4, operator="orthogonal", seed=3)
    assert plan(arrays, config) == plan(transformer(), config)
    assert hash(plan(arrays, config)) == hash(plan(transformer(), config))
    assert plan(arrays, config) != plan(arrays)


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
    chosen = plan(transformer(), config)
    assert len(chosen) == 6 * 3
    spec = chosen["layers/1/self_attn/q_proj/kernel"]
    assert (spec.operator.name, spec.operator.square_rank, spec.alpha) == (
        "sharing",
        10,
        2.0,
    )
    spec = chosen["layers/3/self_attn/q_proj/kernel"]
    assert (spec.operator.square_rank, spec.alpha) == (45, 1.0)  # isqrt(128 * 16)
    spec = chosen["layers/3/self_attn/v_proj/kernel"]
    assert (spec.operator.name, spec.operator.square_rank) == ("rotation", 22)
    with pytest.raises(KeyError, match="no adapter at .*; the nearest are"):
        chosen["layers/3/self_attn/k_proj/kernel"]


def test_a_plan_is_a_mapping_of_paths():
    params = {"enc": {"kernel": shape(8, 8)}, "dec": {"kernel": shape(8, 8)}}
    chosen = plan(params)
    assert isinstance(chosen, Mapping)
    assert "enc/kernel" in chosen and "nowhere" not in chosen and 3 not in chosen
    assert list(chosen) == list(chosen.keys()) == ["dec/kernel", "enc/kernel"]
    assert tuple(chosen.values()) == chosen.specs
    assert dict(chosen)["enc/kernel"] is chosen["enc/kernel"]
    assert chosen.get("nowhere") is None and len(chosen) == 2


def test_axes():
    params = {
        "attn": {
            **{
                name: {"kernel": shape(64, 4, 16)} for name in ("query", "key", "value")
            },
            "out": {"kernel": shape(4, 16, 64)},
        },
        "scanned": {"kernel": shape(12, 64, 32)},
    }
    config = MoRAConfig(rank=2, overrides={"scanned/kernel": {"axes": "sio"}})
    chosen = plan(params, config)
    assert {spec.name: spec.axes for spec in chosen.specs} == {
        "attn/key/kernel": "ioo",
        "attn/out/kernel": "iio",
        "attn/query/kernel": "ioo",
        "attn/value/kernel": "ioo",
        "scanned/kernel": "sio",
    }
    assert chosen["scanned/kernel"].shape == (12, 12, 12)  # rotation: even
    adapters = init(chosen)
    assert adapters["scanned"]["kernel_mora"].shape == (12, 12, 12)
    with pytest.raises(ValueError, match="scanned/kernel: .*linen.plan.*'axes'"):
        plan(params)


def test_any_container():
    """Lists, FrozenDicts, boxed parameters and names with slashes."""
    kernel = jnp.ones((8, 8))
    trees = {
        "layers/1/kernel": {"layers": [{"kernel": kernel}, {"kernel": kernel + 1}]},
        "mlp/~/linear/kernel": {"mlp/~/linear": {"kernel": kernel}},
        "a/kernel": FrozenDict({"a": {"kernel": kernel}}),
        "b/kernel": {"b": {"kernel": meta.Partitioned(kernel, names=("x", "y"))}},
        "3/kernel": {3: {"kernel": kernel}},
    }
    for name, tree in trees.items():
        chosen = plan(tree, MoRAConfig(targets=re.escape(name)))
        adapters = jax.tree.map(lambda m: m + 1, init(chosen))
        both = combine(tree, adapters)
        assert jax.tree.structure(merge(tree, adapters, chosen)) == (
            jax.tree.structure(tree)
        )
        assert len(jax.tree.leaves(both)) == len(jax.tree.leaves(tree)) + 1


def test_summary():
    text = summary(plan(transformer(), MoRAConfig(rank=4)))
    rows = text.splitlines()
    assert len(rows) == 1 + 5 + 1  # layers collapse
    assert rows[1].split() == [
        *("layers/*/mlp/down_proj/kernel", "(12)", "256", "->", "64", "rotation"),
        *("3.6", "34", "13,872", "2.05%"),
    ]
    assert rows[-1].startswith("60 adapters: ")
    assert str(plan(transformer())).startswith(summary(plan(transformer())))
    assert len(summary(plan(transformer()), collapse=False).splitlines()) == 62


def test_planning_is_fast():
    params = {f"l{k}": {"kernel": shape(4096, 4096 + k % 5)} for k in range(2_000)}
    start = time.process_time()  # which other processes do not lengthen much
    assert len(plan(params)) == 2_000
    assert time.process_time() - start < 1.5  # about a third of it


K = jnp.ones((8, 8))


BAD_PLANS = {
    ValueError: [
        ({}, {}, "holds no array"),
        ({"a": {}}, {}, "holds no array"),
        ({"bias": jnp.ones(8)}, {}, "targets: the default matches no path"),
        (
            transformer(),
            {"targets": ".*/qproj/kernel"},
            "'.*/qproj/kernel' matches no path .* 'layers/0/self_attn/q_proj/kernel'",
        ),
        (transformer(), {"targets": ".*/bias"}, "can be adapted .two or more axes"),
        (transformer(), {"targets": "q_proj"}, "'q_proj' matches no path"),
        (transformer(), {"exclude": "layers/12/.*"}, "exclude: .* matches no path"),
        (transformer(), {"exclude": ".*"}, "exclude leaves no kernel"),
        (
            transformer(),
            {"overrides": {"lm_head/kernel": {"rank": 4}}},
            "overrides: 'lm_head/kernel' matches no path that is adapted",
        ),
        ({"a": {"kernel": K}, "b": {"kernel": K}}, {}, "is shared with 'b"),
        (
            {"a/b": {"kernel": K}, "a": {"b": {"kernel": K + 1}}},
            {},
            "two leaves of the path 'a/b/kernel'",
        ),
        ({"kernel": jnp.ones((8, 0))}, {}, "none of them empty"),
        ({"kernel": K}, {"square_rank": 9}, "kernel: square_rank must be at"),
        ({"kernel": K}, {"square_rank": 3}, "kernel: .* multiple of 2"),
        (
            {"kernel": K},
            {"overrides": {"kernel": {"axes": "oo"}}},
            "kernel: axes must hold at least one i",
        ),
    ],
    TypeError: [
        ({"kernel": K.astype(int)}, {}, "kernel must have a floating-point"),
        ({"kernel": K, "name": "x"}, {}, "arrays only, got str at 'name'"),
    ],
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("error", "params", "config", "message"),
    [(error, *row) for error, rows in BAD_PLANS.items() for row in rows],
)
def test_bad_plans(params, config, error, message):
    with pytest.raises(error, match=message):
        plan(params, MoRAConfig(**config))


def test_tied_but_not_adapted_is_fine():
    table = jnp.ones((8, 8))
    params = {"embed": {"embedding": table}, "lm_head": {"kernel": table}}
    params["dense"] = {"kernel": K}
    assert list(plan(params)) == ["dense/kernel"]


BAD_CONFIGS = {
    ValueError: [
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"rank": -1}, "rank"),
        ({"square_rank": 0}, "square_rank"),
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
        (
            {"overrides": {"a": {"rank": 4, "square_rank": 8}}},
            "must hold rank or square_rank, got both",
        ),
        ({"overrides": {"a": {"alpha": 0}}}, "alpha must not be 0"),
        ({"alpha": 0}, "alpha must not be 0"),
        ({"alpha": float("nan")}, "alpha must be finite"),
        (
            {"rank": 4, "square_rank": 16},
            "exclude each other, got rank=4 and square_rank=16",
        ),
    ],
    TypeError: [
        ({"rank": 1.5}, "rank must be a positive integer, got 1.5"),
        ({"rank": True}, "rank"),
        ({"operator": None}, "operator must be a name"),
        ({"alpha": "1"}, "alpha must be a number"),
        ({"param_dtype": int}, "param_dtype must be a floating-point"),
        ({"targets": [3]}, "targets must hold regular expressions, got 3"),
        ({"overrides": ["a"]}, "overrides must map patterns"),
        ({"overrides": {"a": 3}}, "must be a mapping, got 3"),
        ({"alpha": jnp.float32(2)}, r"got a JAX array; write float\(alpha\)"),
        ({"dropout": jnp.zeros(())}, r"write float\(dropout\)"),
        ({"alpha": np.ones(3)}, "alpha must be a number"),
        ({"targets": None}, "got None; leave it out for the default"),
        ({"targets": 3}, "targets must be regular expressions, got 3"),
        ({"exclude": None}, "exclude must be .* leave it out"),
        ({"r": 8}, "no setting 'r': here that is rank"),
        ({"lora_alpha": 8}, "here that is alpha, which multiplies"),
        ({"target_modules": ["q"]}, "here that is targets, regular expr"),
        ({"lora_dropout": 0.1}, "here that is dropout"),
        ({"exclude_modules": "a"}, "here that is exclude"),
        ({"rank_pattern": {}}, "here that is overrides, as in"),
        ({"alpha_pattern": {}}, "here that is overrides, as in"),
        ({"init_lora_weights": True}, "here that is init"),
        ({"drop_out": 0.1}, "no setting 'drop_out'; the nearest is 'dropou"),
    ],
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("error", "settings", "message"),
    [(error, *row) for error, rows in BAD_CONFIGS.items() for row in rows],
)
def test_bad_configs(settings, error, message):
    with pytest.raises(error, match=message):
        MoRAConfig(**settings)


def test_without_a_param_dtype_m_has_that_of_its_kernel():
    params = {
        "a": {"kernel": shape(8, 8, dtype=jnp.bfloat16)},
        "b": {"kernel": shape(8, 8, dtype=jnp.float16)},
        "c": {"kernel": shape(8, 8, dtype=jnp.bfloat16)},
    }
    for config in (
        MoRAConfig(
            param_dtype=None, overrides={"c/kernel": {"param_dtype": jnp.float32}}
        ),
        MoRAConfig(overrides={"[ab]/kernel": {"param_dtype": None}}),
    ):
        dtypes = [m.dtype.name for m in jax.tree.leaves(init(plan(params, config)))]
        assert dtypes == ["bfloat16", "float16", "float32"]


def test_layers_without_a_param_dtype_for_m_have_their_own():
    config, half = MoRAConfig(rank=2, param_dtype=None), jnp.bfloat16
    frozen = FrozenDense.from_config(jnp.ones((8, 8), half), config=config)
    assert init(frozen)["kernel_mora"].dtype == half
    dense = MoRADense(8, config=config, param_dtype=half)
    params = dense.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(half)}
    settings = {"config": config, "param_dtype": half, "rngs": nnx.Rngs(0)}
    assert MoRALinear(8, 8, **settings).kernel_mora.dtype == half


def test_a_spec_has_a_param_dtype(unchecked):
    spec = plan({"kernel": shape(8, 8)})["kernel"]
    with pytest.raises(TypeError, match="floating-point dtype, got None"):
        dataclasses.replace(spec, param_dtype=None)
    with pytest.raises(TypeError, match="floating-point dtype, got None"):
        AdapterSpec.from_config(MoRAConfig(param_dtype=None), (8, 8))


def test_config_is_hashable():
    config = MoRAConfig(
        operator={"name": "sharing", "compress_groups": "contiguous"},
        overrides={"a": {"rank": 2, "operator": {"name": "rotation"}}},
        targets=["a", "b"],
    )
    assert hash(config) == hash(
        MoRAConfig(
            **{
                "operator": {"compress_groups": "contiguous", "name": "sharing"},
                "overrides": {"a": {"operator": {"name": "rotation"}, "rank": 2}},
                "targets": ("a", "b"),
            }
        )
    )


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_numpy_are_python_numbers():
    config = MoRAConfig(
        rank=np.int64(4), alpha=np.float32(2), dropout=np.float32(0.5), seed=np.int32(3)
    )
    assert config == MoRAConfig(rank=4, alpha=2.0, dropout=0.5, seed=3)
    values = config.rank, config.alpha, config.dropout, config.seed
    assert [type(value) for value in values] == [int, float, float, int]
    (spec,) = plan({"kernel": K}, config).specs
    assert type(spec.alpha) is float


def test_configs_are_copied():
    config = MoRAConfig(rank=4, overrides={"a": {"rank": 16}}, alpha=2.0)
    copies = copy.copy(config), copy.deepcopy(config), dataclasses.replace(config)
    for other in (*copies, pickle.loads(pickle.dumps(config))):
        assert other == config and hash(other) == hash(config)
    assert dataclasses.replace(config, rank=5).rank == 5
    names = list(inspect.signature(MoRAConfig).parameters)
    assert names == [field.name for field in dataclasses.fields(config)]


def test_of_rank_and_square_rank_the_nearer_one_is_taken():
    by_q = MoRAConfig(square_rank=8, overrides={"a": {"rank": 2}})
    config = by_q.settings("a")[0]
    assert (config.rank, config.square_rank) == (2, None)
    by_rank = MoRAConfig(
        rank=4,
        overrides={
            "a|b|c": {"square_rank": 8},
            "b|c": {"rank": 2},
            "c": {"square_rank": 6},
        },
    )
    found = {path: by_rank.settings(path)[0] for path in "abcd"}
    assert [found[path].square_rank for path in "abcd"] == [8, None, 6, None]
    assert [found[path].rank for path in "abcd"] == [8, 2, 8, 4]


def test_alphas_as_of_lora_warn_once():
    with pytest.warns(
        MoRAWarning, match="alpha=16 multiplies .*=lora_alpha / r"
    ) as seen:
        config = MoRAConfig(alpha=16.0, overrides={".*q_proj.*": {"rank": 4}})
        chosen = plan(transformer(), config)
    assert len(seen) == 1
    with pytest.warns(MoRAWarning, match="alpha=-8") as seen:
        MoRAConfig(overrides={"a": {"alpha": -8}})
    assert len(seen) == 1
    MoRAConfig(alpha=4.0)
    # A spec, which may come from a file, is what it is.
    dataclasses.replace(chosen.specs[0], alpha=100.0)


def test_summary_shows_what_is_not_usual():
    params = {"small": dense(64, 64), "wide": dense(512, 512)}
    config = MoRAConfig(rank=64)
    text = summary(plan(params, config))
    assert [line.split()[6:-2] for line in text.splitlines()[1:3]] == [
        ["64", "of", "90"],
        ["256"],
    ]
    assert "alpha" not in text and "dropout" not in text
    assert " of 90" not in summary(plan(params, MoRAConfig(square_rank=64)))
    assert "of" not in summary(plan(params, MoRAConfig(rank=7))).splitlines()[1]
    overrides = {"small/kernel": {"alpha": 0.5, "dropout": 0.1}}
    rows = str(plan(params, MoRAConfig(rank=8, overrides=overrides))).splitlines()
    assert rows[0].split()[6:9] == ["q", "alpha", "dropout"]
    assert rows[1].split()[6:9] == ["32", "0.5", "0.1"]
    assert rows[2].split()[6:9] == ["88", "1", "0"]


def test_layers_of_other_settings_have_rows_of_their_own():
    config = MoRAConfig(overrides={"layers/0/.*": {"alpha": 2.0}})
    rows = summary(plan(transformer(), config)).splitlines()
    assert len(rows) == 1 + 2 * 5 + 1


def test_a_digest_says_what_an_m_stands_for():
    params = {"a": dense(64, 64), "b": dense(64, 32)}
    settings = dict(rank=2, operator="orthogonal", seed=1)
    digest = plan(params, MoRAConfig(**settings)).digest()
    assert re.fullmatch("[0-9a-f]{64}", digest)
    same = [
        {"dropout": 0.5},
        {"init": "gaussian"},
        {"execution": "fold"},
        {"param_dtype": jnp.bfloat16},
    ]
    for change in same:
        assert plan(params, MoRAConfig(**settings | change)).digest() == digest
    other = [
        {"seed": 2},
        {"alpha": 0.5},
        {"rank": 3},
        {"operator": "hadamard"},
        {"operator": {"name": "sharing", "compress_groups": "contiguous"}},
        {"exclude": "b/kernel"},
        {"overrides": {"a/kernel": {"axes": "oi"}}},
    ]
    digests = {plan(params, MoRAConfig(**settings | one)).digest() for one in other}
    assert len(digests | {digest}) == len(other) + 1
    moved = {"a": dense(64, 64), "c": dense(64, 32)}
    assert plan(moved, MoRAConfig(**settings)).digest() != digest


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
    variables = module.init(jax.random.key(0), jnp.ones((2, 8)))
    calls = [
        lambda: plan(variables["params"], config),
        lambda: mora_jax.linen.plan(module, variables, config),
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


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [8, None, MoRAConfig(), "rotation", {}])
def test_what_is_no_plan_is_told(wrong):
    params = {"kernel": K}
    adapters = init(plan(params))
    calls = [
        lambda: merge(params, adapters, wrong),
        lambda: mora_jax.fold(params, adapters, wrong),
        lambda: mora_jax.unmerge(params, adapters, wrong),
        lambda: mora_jax.delta_weight(adapters, wrong),
        lambda: mora_jax.diagnostics.spectrum(adapters, wrong),
        lambda: mora_jax.diagnostics.merge_loss(params, adapters, wrong),
        lambda: mora_jax.diagnostics.relative_norm(params, adapters, wrong),
        lambda: mora_jax.save("never", adapters, wrong),
        lambda: mora_jax.io.plan_to_json(wrong),
        lambda: mora_jax.linen.wrap(nn.Dense(8), wrong),
        lambda: summary(wrong),
        lambda: init(wrong),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="must be a Plan, got .*: make one with"):
            call()
