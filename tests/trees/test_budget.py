"""Blocks of a plan share its budget: nearly all of it is used, and never more."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import unflatten_dict

import mora_jax
from mora_jax import MoRAConfig

LAYERS = 4
DENSE = {"q_proj": "qq", "k_proj": "qk", "v_proj": "qk", "o_proj": "qq"}
GATED = {**DENSE, "gate_proj": "qm", "up_proj": "qm", "down_proj": "mq"}
GPT2 = {"c_attn": "qk", "c_proj": "qq", "fc": "qm", "out": "mq"}
MODELS = {  # widths of hidden features (q), of keys and values (k), within the MLP (m)
    "SmolLM2-135M": (GATED, 576, 192, 1536),
    "SmolLM2-360M": (GATED, 960, 320, 2560),
    "SmolLM2-1.7B": (GATED, 2048, 2048, 8192),
    "Llama-3.2-1B": (GATED, 2048, 512, 8192),
    "Llama-3.2-3B": (GATED, 3072, 1024, 8192),
    "Llama-3-8B": (GATED, 4096, 1024, 14336),
    "Llama-3-70B": (GATED, 8192, 1024, 28672),
    "Qwen2.5-0.5B": (GATED, 896, 128, 4864),
    "Qwen2.5-7B": (GATED, 3584, 512, 18944),
    "Qwen3-4B": (GATED, 2560, 1024, 9728),
    "gemma-2b": (GATED, 2048, 256, 16384),
    "gemma-3-1b": (GATED, 1152, 256, 6912),
    "GPT-2": (GPT2, 768, 2304, 3072),
}
by_model = pytest.mark.parametrize("model", MODELS)


def shapes_of(model, *, stacked=False):
    """The shapes of a model's kernels, a layer each or as stacks of all layers."""
    kinds, *sizes = MODELS[model]
    widths = dict(zip("qkm", sizes, strict=True))
    found = {}
    for name, (ins, outs) in kinds.items():
        shape = widths[ins], widths[outs]
        if stacked:
            shape = LAYERS, *shape
        for layer in ["layers"] if stacked else range(LAYERS):
            leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
            found[f"layer_{layer}", name, "kernel"] = leaf
    return unflatten_dict(found)


def budget(spec, rank):
    """The parameters of a LoRA."""
    ins, outs = spec.in_features, spec.out_features
    return rank * (ins + outs) * math.prod(spec.stack_shape)


@by_model
@pytest.mark.parametrize("rank", [1, 2, 4, 8, 16, 64])
def test_the_budget_is_used(model, rank):
    plan = mora_jax.plan(shapes_of(model), MoRAConfig(rank=rank))
    used = sum(spec.parameters for spec in plan.values())
    whole = sum(budget(spec, rank) for spec in plan.values())
    assert used <= whole
    if rank >= 8:
        assert used >= 0.97 * whole
    for spec in plan.values():
        assert spec.parameters <= 2 * budget(spec, rank)
        n, p, s = spec.operator.m_shape
        if rank >= 8:  # without blocks of two sizes
            assert (n * p, n * s) == (spec.in_features, spec.out_features)
        assert spec.scale == spec.operator.fine_tuning_scale
        assert spec.rank == rank


@by_model
def test_a_stack_has_the_blocks_of_its_layers(model):
    """So that adapters of a scanned model fit the same one without scan."""
    config = MoRAConfig(overrides={"layer_layers/.*": {"axes": "sio"}})
    stacked = mora_jax.plan(shapes_of(model, stacked=True), config)
    plan = mora_jax.plan(shapes_of(model))
    for name, spec in stacked.items():
        other = plan[name.replace("layer_layers", "layer_0")]
        assert spec.operator == other.operator


def test_what_is_asked_for_stays():
    """A number of blocks, a multiple, another operator, and another rank."""
    shapes = shapes_of("SmolLM2-135M")
    overrides = {
        "layer_0/q_proj/.*": {"square_rank": 16, "operator": "block_diagonal"},
        "layer_0/up_proj/.*": {"multiple_of": 1},
        "layer_0/o_proj/.*": {"operator": "rotation"},
        "layer_0/down_proj/.*": {"rank": 64},
    }
    plan = mora_jax.plan(shapes, MoRAConfig(overrides=overrides))
    assert plan["layer_0/q_proj/kernel"].operator.m_shape == (16, 36, 36)
    filled = plan["layer_0/up_proj/kernel"].operator
    assert filled.m_shape == (58, 10, 27)  # the least number of blocks that fits
    assert plan["layer_0/o_proj/kernel"].operator.name == "rotation"
    wide = plan["layer_0/down_proj/kernel"]
    assert 32 < wide.lora_rank < 128
    others = [s for n, s in plan.items() if n not in overrides and "layer_0" not in n]
    assert all(4 < spec.lora_rank < 16 for spec in others)


def test_scales_that_are_given_stay():
    plan = mora_jax.plan(shapes_of("SmolLM2-135M"), MoRAConfig(scale="paper"))
    assert {spec.scale for spec in plan.values()} == {1.0}


def test_kernels_that_cannot_be_cut_evenly_keep_their_blocks():
    """Primes have no common divisor; the plan says what it uses."""
    shapes = {"a": {"kernel": jax.ShapeDtypeStruct((101, 103), jnp.float32)}}
    plan = mora_jax.plan(shapes)
    alone = mora_jax.AdapterSpec.from_config(MoRAConfig(), (101, 103))
    assert plan["a/kernel"].operator == alone.operator
