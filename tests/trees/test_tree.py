"""Adapters and base: made, joined, taken apart, merged, counted."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from helpers import random, trained

from mora_jax import (
    MoRAConfig,
    combine,
    delta_weight,
    diagnostics,
    init,
    merge,
    plan,
    ravel_adapters,
    split,
    unmerge,
    unravel_adapters,
)


@pytest.fixture
def model():
    """(params, adapters, plan) of a model with several kinds of kernel."""
    params = {
        "fc": {"kernel": random(0, 12, 10), "bias": random(1, 10)},
        "attn": {"query": {"kernel": random(2, 12, 2, 6)}},
        "scan": {"kernel": random(3, 3, 12, 8)},
        "half": {"kernel": random(4, 12, 12, dtype=jnp.bfloat16)},
        "norm": {"scale": random(5, 12)},
    }
    config = MoRAConfig(rank=2, alpha=0.5, overrides={"scan/.*": {"axes": "sio"}})
    layers = plan(params, config)
    return params, trained(layers, 1.0), layers


def test_init_holds_only_m(model):
    _, _, layers = model
    adapters = init(layers)
    assert jax.tree.map(jnp.shape, adapters) == {
        "fc": {"kernel_mora": (6, 6)},
        "attn": {"query": {"kernel_mora": (6, 6)}},
        "scan": {"kernel_mora": (3, 6, 6)},
        "half": {"kernel_mora": (6, 6)},
    }
    assert all(
        m.dtype == jnp.float32 and not m.any() for m in jax.tree.leaves(adapters)
    )


def test_gaussian_init_depends_on_path_only():
    params = {"a": {"kernel": random(0, 8, 8)}, "b": {"kernel": random(1, 8, 8)}}
    config = MoRAConfig(init="gaussian")
    key = jax.random.key(0)
    both = init(plan(params, config), key)
    assert not np.array_equal(both["a"]["kernel_mora"], both["b"]["kernel_mora"])
    alone = init(plan({"b": params["b"]}, config), key)
    chex.assert_trees_all_equal(alone["b"], both["b"])
    with pytest.raises(ValueError, match="needs a key"):
        init(plan(params, config))


def test_combine_and_split(model):
    params, adapters, _ = model
    both = combine(params, adapters)
    assert set(both["fc"]) == {"kernel", "bias", "kernel_mora"}
    base, extra = split(both)
    chex.assert_trees_all_equal(base, params)
    chex.assert_trees_all_equal(extra, adapters)
    assert set(params["fc"]) == {"kernel", "bias"}  # untouched
    frozen = combine(FrozenDict(params), adapters)
    assert isinstance(frozen, FrozenDict)
    assert isinstance(split(frozen)[0], FrozenDict)
    base, extra = split(params)
    assert extra == {}
    chex.assert_trees_all_equal(base, params)


def test_merge(model):
    params, adapters, layers = model
    merged = merge(params, adapters, layers)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, params)
    assert merged["norm"]["scale"] is params["norm"]["scale"]
    deltas = delta_weight(adapters, layers)
    for spec in layers.specs:
        kernel, delta, after = params, deltas, merged
        for key in spec.path:
            kernel, delta, after = kernel[key], delta[key], after[key]
        assert delta.shape == kernel.shape and delta.dtype == jnp.float32
        exact = kernel.astype(jnp.float32) + delta
        chex.assert_trees_all_equal(after, exact.astype(kernel.dtype))
    wide = merge(params, adapters, layers, dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype("float32")}
    jitted = jax.jit(merge, static_argnums=2)(params, adapters, layers)
    chex.assert_trees_all_close(jitted, merged, rtol=1e-5)
    shapes = jax.eval_shape(lambda p, a: merge(p, a, layers), params, adapters)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, params)


def test_merge_of_zeros_is_the_base_bit_for_bit(model):
    params, _, layers = model
    chex.assert_trees_all_equal(merge(params, init(layers), layers), params)


def test_merge_in_float64_is_exact(float64):
    params = {"kernel": np.random.default_rng(0).standard_normal((12, 12))}
    layers = plan(params, MoRAConfig(rank=2, operator="decoupling", alpha=1 / 3))
    m = np.asarray(random(0, 6, 6, dtype=jnp.float32))
    merged = merge(params, {"kernel_mora": m}, layers)["kernel"]
    exact = params["kernel"] + np.kron(np.eye(2), m.astype(np.float64)) / 3
    np.testing.assert_allclose(merged, exact, rtol=1e-14)


def test_unmerge(model):
    params, adapters, _ = model
    wide = {name: params[name] for name in ("fc", "attn", "norm")}
    layers = plan(wide, MoRAConfig(rank=2))
    adapters = {name: adapters[name] for name in ("fc", "attn")}
    back = unmerge(merge(wide, adapters, layers), adapters, layers)
    chex.assert_trees_all_close(back, wide, atol=1e-5)
    params, adapters, layers = model
    with pytest.raises(
        ValueError, match="float32 kernels, got bfloat16 at 'half/kernel'"
    ):
        unmerge(params, adapters, layers)


def test_merge_loss(model):
    params, adapters, layers = model
    loss = diagnostics.merge_loss(params, adapters, layers)
    assert set(loss) == {spec.name for spec in layers.specs}
    assert loss["fc/kernel"] < 1e-6 < 1e-4 < loss["half/kernel"] < 0.1
    wide = diagnostics.merge_loss(params, adapters, layers, dtype=jnp.float32)
    assert wide["half/kernel"] < 1e-6
    zero = diagnostics.merge_loss(params, init(layers), layers)
    assert set(zero.values()) == {0.0}


def test_ravel(model):
    _, adapters, layers = model
    vector = ravel_adapters(adapters)
    assert vector.shape == (layers.trainable_parameters,)
    # Sorted by path; each M row by row.
    m = adapters["attn"]["query"]["kernel_mora"]
    np.testing.assert_array_equal(vector[: m.size], np.asarray(m).reshape(-1))
    for like in (layers, adapters):
        chex.assert_trees_all_equal(unravel_adapters(vector, like), adapters)
    jitted = jax.jit(lambda a: unravel_adapters(ravel_adapters(a), layers))
    chex.assert_trees_all_equal(jitted(adapters), adapters)
    with pytest.raises(ValueError, match=r"shape \(216,\), got \(215,\)"):
        unravel_adapters(vector[1:], layers)
    with pytest.raises(ValueError, match="adapters hold no M"):
        ravel_adapters({})


@pytest.mark.usefixtures("unchecked")
def test_adapters_that_do_not_fit(model):
    params, adapters, layers = model
    m = adapters["fc"]["kernel_mora"]
    cases = [
        ({k: v for k, v in adapters.items() if k != "fc"}, "lack 'fc/kernel_mora'"),
        (adapters | {"x": {"kernel_mora": m}}, "hold 'x/kernel_mora', which the plan"),
        (adapters | {"fc": {"kernel_mora": m[:3]}}, r"fc/kernel_mora must have shape"),
        (adapters | {"fc": {"kernel_mora": m * jnp.nan}}, "fc/kernel_mora holds NaN"),
        (adapters | {"fc": {"kernel_mora": m / 0}}, "fc/kernel_mora holds NaN or inf"),
        ({}, "lack"),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            merge(params, bad, layers)
    with pytest.raises(TypeError, match="floating-point dtype, got int32"):
        merge(params, adapters | {"fc": {"kernel_mora": m.astype(int)}}, layers)
    with pytest.raises(TypeError, match="must be an array, got float"):
        merge(params, adapters | {"fc": {"kernel_mora": 1.0}}, layers)
    with pytest.raises(ValueError, match="params lack the kernel 'attn/query/kernel'"):
        merge({"fc": params["fc"]}, adapters, layers)
    with pytest.raises(ValueError, match=r"fc/kernel must have shape \(12, 10\), got"):
        merge(params | {"fc": {"kernel": random(0, 10, 12)}}, adapters, layers)
    shapes = jax.eval_shape(lambda: params)
    with pytest.raises(TypeError, match="got ShapeDtypeStruct; for shapes alone"):
        merge(shapes, adapters, layers)


@pytest.mark.usefixtures("unchecked")
def test_trees_that_do_not_combine(model):
    params, adapters, _ = model
    with pytest.raises(ValueError, match="already hold '.*kernel_mora'"):
        combine(combine(params, adapters), adapters)
    with pytest.raises(ValueError, match="have nothing at 'x'"):
        combine(params, {"x": adapters["fc"]})
    with pytest.raises(
        ValueError, match="no kernel for the adapter 'norm/kernel_mora'"
    ):
        combine(params, {"norm": adapters["fc"]})
    with pytest.raises(ValueError, match="which is not an M"):
        combine(params, {"fc": {"bias": jnp.ones(10)}})
    with pytest.raises(ValueError, match="no module at 'fc/kernel'"):
        combine(params, {"fc": {"kernel": {"kernel_mora": jnp.ones(10)}}})
