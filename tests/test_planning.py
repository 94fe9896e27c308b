"""Which kernels are chosen, and what is refused."""

import dataclasses
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict, meta

from mora_jax import (
    FrozenDense,
    MoRAConfig,
    MoRADense,
    combine,
    init,
    merge,
    plan,
    summary,
)
from mora_jax.nnx import MoRALinear
from mora_jax.spec import AdapterSpec


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


@pytest.mark.parametrize(
    ("name", "targeted"),
    [
        ("dense/kernel", True),
        ("kernel", True),
        ("encoder/layer/0/attention/self/query/kernel", True),
        ("multi_head_attention/kernel", True),
        ("lm_head/kernel", False),
        ("head/kernel", False),
        ("mlm_head/Dense_0/kernel", False),
        ("head_1/kernel", False),
        ("classifier/kernel", False),
        ("Classifier/kernel", False),
        ("patch_embedding/kernel", False),
        ("Conv_0/kernel", False),
        ("moe/router/kernel", False),
        ("dense/bias", False),
        ("embed/embedding", False),
    ],
)
def test_default_target_names(name, targeted):
    (pattern,) = MoRAConfig().targets
    assert bool(re.fullmatch(pattern, name)) == targeted


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
    assert str(plan(transformer())) == summary(plan(transformer()))
    assert len(summary(plan(transformer()), collapse=False).splitlines()) == 62


def test_planning_is_fast():
    import time

    params = {f"l{k}": {"kernel": shape(4096, 4096 + k % 5)} for k in range(10_000)}
    start = time.process_time()  # which other processes do not lengthen much
    assert len(plan(params)) == 10_000
    assert time.process_time() - start < 5  # about one second


K = jnp.ones((8, 8))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("params", "config", "error", "message"),
    [
        ({}, {}, ValueError, "holds no array"),
        ({"a": {}}, {}, ValueError, "holds no array"),
        ({"bias": jnp.ones(8)}, {}, ValueError, "targets: the default matches no path"),
        (
            transformer(),
            {"targets": ".*/qproj/kernel"},
            ValueError,
            "'.*/qproj/kernel' matches no path .* 'layers/0/self_attn/q_proj/kernel'",
        ),
        (
            transformer(),
            {"targets": ".*/bias"},
            ValueError,
            "can be adapted .two or more axes",
        ),
        (transformer(), {"targets": "q_proj"}, ValueError, "'q_proj' matches no path"),
        (
            transformer(),
            {"exclude": "layers/12/.*"},
            ValueError,
            "exclude: .* matches no path",
        ),
        (transformer(), {"exclude": ".*"}, ValueError, "exclude leaves no kernel"),
        (
            transformer(),
            {"overrides": {"lm_head/kernel": {"rank": 4}}},
            ValueError,
            "overrides: 'lm_head/kernel' matches no path that is adapted",
        ),
        ({"a": {"kernel": K}, "b": {"kernel": K}}, {}, ValueError, "is shared with 'b"),
        (
            {"a/b": {"kernel": K}, "a": {"b": {"kernel": K + 1}}},
            {},
            ValueError,
            "two leaves of the path 'a/b/kernel'",
        ),
        ({"kernel": K.astype(int)}, {}, TypeError, "kernel must have a floating-point"),
        ({"kernel": K, "name": "x"}, {}, TypeError, "arrays only, got str at 'name'"),
        ({"kernel": jnp.ones((8, 0))}, {}, ValueError, "none of them empty"),
        (
            {"kernel": K},
            {"square_rank": 9},
            ValueError,
            "kernel: square_rank must be at",
        ),
        ({"kernel": K}, {"square_rank": 3}, ValueError, "kernel: .* multiple of 2"),
        (
            {"kernel": K},
            {"overrides": {"kernel": {"axes": "oo"}}},
            ValueError,
            "kernel: axes must hold at least one i",
        ),
    ],
)
def test_bad_plans(params, config, error, message):
    with pytest.raises(error, match=message):
        plan(params, MoRAConfig(**config))


def test_tied_but_not_adapted_is_fine():
    table = jnp.ones((8, 8))
    params = {"embed": {"embedding": table}, "lm_head": {"kernel": table}}
    params["dense"] = {"kernel": K}
    assert list(plan(params)) == ["dense/kernel"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be a positive integer, got 0"),
        ({"rank": -1}, ValueError, "rank"),
        ({"rank": 1.5}, TypeError, "rank must be a positive integer, got 1.5"),
        ({"rank": True}, TypeError, "rank"),
        ({"square_rank": 0}, ValueError, "square_rank"),
        ({"operator": "lora"}, ValueError, "operator must be one of"),
        ({"operator": None}, TypeError, "operator must be a name"),
        ({"alpha": "1"}, TypeError, "alpha must be a number"),
        ({"alpha": float("inf")}, ValueError, "alpha must be finite"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout"),
        ({"init": "ones"}, ValueError, "init must be one of"),
        ({"param_dtype": int}, TypeError, "param_dtype must be a floating-point"),
        ({"seed": -1}, ValueError, "seed"),
        ({"targets": ()}, ValueError, "targets must hold at least one"),
        ({"targets": "*"}, ValueError, "which is no regular expression"),
        ({"targets": [3]}, TypeError, "targets must hold regular expressions, got 3"),
        ({"exclude": "("}, ValueError, "no regular expression"),
        ({"overrides": ["a"]}, TypeError, "overrides must map patterns"),
        ({"overrides": {"a": 3}}, TypeError, "must be a mapping, got 3"),
        ({"overrides": {"a": {"ranks": 3}}}, ValueError, "got .'ranks'"),
        ({"overrides": {"a": {"rank": 0}}}, ValueError, "rank must be a positive"),
    ],
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
