"""Adapters and base: made, joined, taken apart, merged, counted."""

import dataclasses
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax.core import FrozenDict
from helpers import bare, close, random, trained

import mora_jax
from mora_jax import Adapter, MoRAConfig, combine, diagnostics, init, merge, plan, split

OTHERS = {"sharing": oracle.sharing, "signed_decoupling": oracle.signed_decoupling}


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
    assert jax.tree.map(jnp.shape, bare(adapters)) == {
        "fc": {"kernel_mora": (2, 6, 5)},
        "attn": {"query": {"kernel_mora": (2, 6, 6)}},
        "scan": {"kernel_mora": (3, 4, 3, 2)},
        "half": {"kernel_mora": (3, 4, 4)},
    }
    for m in jax.tree.leaves(adapters):
        assert m.dtype == jnp.float32 and not m.any()


def test_gaussian_init_depends_on_path_only():
    params = {"a": {"kernel": random(0, 8, 8)}, "b": {"kernel": random(1, 8, 8)}}
    config = MoRAConfig(init="gaussian")
    key = jax.random.key(0)
    both = init(plan(params, config), key)
    one, other = (both[name]["kernel_mora"] for name in "ab")
    assert not np.array_equal(one.m, other.m)
    alone = init(plan({"b": params["b"]}, config), key)
    chex.assert_trees_all_equal(alone["b"], both["b"])
    with pytest.raises(ValueError, match="needs a key"):
        init(plan(params, config))


def test_combine_and_split(model):
    params, adapters, _ = model
    both = combine(params, adapters)
    assert set(both["fc"]) == {"kernel", "bias", "kernel_mora"}
    chex.assert_trees_all_equal(split(both), (params, adapters))
    assert set(params["fc"]) == {"kernel", "bias"}  # untouched
    frozen = combine(FrozenDict(params), adapters)
    for tree in (frozen, split(frozen)[0]):
        assert isinstance(tree, FrozenDict)
    chex.assert_trees_all_equal(split(params), (params, {}))


def test_merge(model):
    params, adapters, layers = model
    merged = merge(params, adapters, rounding="nearest")
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, params)
    assert merged["norm"]["scale"] is params["norm"]["scale"]
    deltas = mora_jax.delta_weight(adapters)
    for path in layers.specs:
        kernel, delta, after = params, deltas, merged
        for key in path:
            kernel, delta, after = kernel[key], delta[key], after[key]
        assert delta.shape == kernel.shape and delta.dtype == jnp.float32
        exact = kernel.astype(jnp.float32) + delta
        chex.assert_trees_all_equal(after, exact.astype(kernel.dtype))
    wide = merge(params, adapters, dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype("float32")}
    compiled = jax.jit(merge, static_argnames="rounding")
    close(compiled(params, adapters, rounding="nearest"), merged)
    shapes = jax.eval_shape(merge, params, adapters)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, params)
    # Zeros give the base, bit for bit.
    chex.assert_trees_all_equal(merge(params, init(layers)), params)


def test_adapters_of_some_kernels_are_merged_and_combined_there_alone(model):
    params, adapters, _ = model
    some = {"fc": adapters["fc"]}
    merged, whole = (merge(params, trees) for trees in (some, adapters))
    chex.assert_trees_all_equal(merged.pop("fc"), whole["fc"])
    for name, leaves in merged.items():
        assert all(map(operator.is_, *map(jax.tree.leaves, (leaves, params[name]))))
    chex.assert_trees_all_equal(split(combine(params, some)), (params, some))


def test_what_the_given_adapters_say_is_merged(model):
    """Of equal shapes, with another operator and another factor."""
    params, adapters, _ = model
    m, spec = random(6, 6, 6), adapters["fc"]["kernel_mora"].spec
    for name, matrices in OTHERS.items():
        op = mora_jax.make_operator(name, 12, 10, 6)
        other = Adapter(m, dataclasses.replace(spec, operator=op, alpha=3.0))
        merged = merge({"fc": params["fc"]}, {"fc": {"kernel_mora": other}})
        delta = other.spec.factor * oracle.delta(*matrices(op), m)
        close(merged["fc"]["kernel"], params["fc"]["kernel"] + delta)


def test_merge_in_float64_is_exact(float64):
    params = {"kernel": random(0, 12, 12, dtype=float)}
    settings = dict(rank=2, operator="decoupling", alpha=1 / 3, scale="paper")
    layers = plan(params, MoRAConfig(**settings))
    m = np.asarray(random(0, 6, 6))
    merged = merge(params, layers.adapters({"kernel_mora": m}))["kernel"]
    exact = params["kernel"] + np.kron(np.eye(2), m.astype(np.float64)) / 3
    np.testing.assert_allclose(merged, exact, rtol=1e-14)


def test_unmerge(model):
    params, adapters, layers = model
    with pytest.raises(ValueError, match="float32 kernels, got bfloat16 at 'half/ker"):
        mora_jax.unmerge(params, adapters)
    del params["half"], params["scan"], adapters["half"], adapters["scan"]
    merged = merge(params, adapters)
    close(mora_jax.unmerge(merged, adapters), params)


def test_merge_loss(model):
    params, adapters, layers = model
    loss = diagnostics.merge_loss(params, adapters)
    assert set(loss) == set(layers)
    assert loss["fc/kernel"] < 1e-6 < 1e-5 < loss["half/kernel"] < 0.01
    wide = diagnostics.merge_loss(params, adapters, dtype=jnp.float32)
    assert wide["half/kernel"] < 1e-6
    zero = diagnostics.merge_loss(params, init(layers))
    assert set(zero.values()) == {0.0}


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_merge(model):
    params, adapters, layers = model
    adapter = adapters["fc"]["kernel_mora"]
    m = adapter.m

    def fc(m):
        return params, adapters | {"fc": {"kernel_mora": adapter.replace(m=m)}}

    wrong = params | {"fc": {"kernel": random(0, 10, 12)}}
    shapes = jax.eval_shape(lambda: params)
    unknown = adapters | {"x": adapters["fc"]}
    unnamed = adapters | {"fc": {"kernel": adapter}}
    plain, plan_there = bare(adapters), adapters | {"fc": {"kernel_mora": layers}}
    twice = adapters | {"attn/query": adapters["attn"]["query"]}
    cases = [
        ((params, {}), ValueError, "adapters hold no adapter"),
        ((adapters, params), TypeError, "must hold adapters, .* are params swapped"),
        ((adapters, {"params": params}), TypeError, "'params/.*are params swapped"),
        ((adapters, adapters), ValueError, "params hold the adapter .*give the base"),
        ((params, plain), TypeError, r"at 'attn/.*': plan.adapters\(tree\) makes them"),
        ((params, layers), TypeError, r"got the Plan: adapters are init\(plan\)"),
        ((params, plan_there), TypeError, r"got the Plan: adapters are init\(plan\)"),
        ((params, unknown), ValueError, "params lack the kernel 'x/kernel'"),
        ((params, unnamed), ValueError, "a kernel at 'fc/kernel': its name must end"),
        ((params, twice), ValueError, "two leaves of the path 'attn/query/kernel_m"),
        (fc(m[:1]), ValueError, "fc/kernel_mora must have shape"),
        (fc(m * jnp.nan), ValueError, "fc/kernel_mora holds NaN"),
        (fc(m / 0), ValueError, "fc/kernel_mora holds NaN or inf"),
        (fc(m.astype(int)), TypeError, "floating-point dtype, got int32"),
        (fc(1.0), TypeError, "must be an array, got float"),
        (({"fc": params["fc"]}, adapters), ValueError, "lack the kernel 'attn/query/k"),
        ((wrong, adapters), ValueError, r"kernel in params must have shape \(12, 10\)"),
        ((shapes, adapters), TypeError, "must be an array, got ShapeDtypeStruct"),
    ]
    for trees, error, message in cases:
        with pytest.raises(error, match=message):
            merge(*trees)


def test_a_merge_that_overflows_is_refused():
    """In 16 bits without float32's range; as `io.merge_checkpoint` does."""
    params = {"kernel": jnp.full((8, 8), 6e4, jnp.float16)}
    plan = mora_jax.plan(params, MoRAConfig(operator="truncation", scale="paper"))
    adapters = jax.tree.map(lambda m: m + 1e4, init(plan))
    for dtype in (None, "float16"):
        with pytest.raises(
            ValueError, match="'kernel' overflows float16 with its delta"
        ):
            merge(params, adapters, dtype)
    wide = merge(params, adapters, "float32")["kernel"]
    assert wide[0, 0] == 7e4 and jnp.isinf(
        mora_jax.fold(params, adapters)["kernel"][0, 0]
    )


def test_kernels_of_8_bits_are_merged():
    """They have no promotion to the delta's float32, so JAX would refuse the sum."""
    params = {"kernel": jnp.ones((8, 8), jnp.float8_e4m3fn)}
    chosen = plan(params, MoRAConfig(operator="truncation", scale="paper"))
    adapters = jax.tree.map(jnp.ones_like, init(chosen))
    for function in (merge, mora_jax.fold):
        new = function(params, adapters)["kernel"]
        assert new.dtype == jnp.float8_e4m3fn and (new.astype("float32") == 2).all()
    assert diagnostics.merge_loss(params, adapters) == {"kernel": 0}
    with pytest.raises(TypeError, match="^kernel: param_dtype must .*16 bits"):
        plan(params, MoRAConfig(param_dtype=None))
    with pytest.raises(TypeError, match="^bias must .*16 bits, got float8"):
        bias = jnp.ones(8, jnp.float8_e4m3fn)
        plan({**params, "bias": bias}, MoRAConfig(train="bias"))


def test_arrays_that_were_donated_are_told():
    params = {"kernel": jnp.ones((8, 8))}
    adapters = init(plan(params, MoRAConfig(rank=2)))
    gone = jax.tree.map(jnp.copy, (params, adapters))
    for leaf in jax.tree.leaves(gone):
        leaf.delete()
    for base, own, name in (
        (params, gone[1], "kernel_mora"),
        (gone[0], adapters, "kernel in params"),
    ):
        for function in (merge, mora_jax.fold):
            with pytest.raises(ValueError, match=f"^{name} must .* was donated"):
                function(base, own)
    with pytest.raises(ValueError, match="kernel_mora must .* was donated"):
        mora_jax.mixing.scaled(gone[1], 2)


def test_keys_that_jax_cannot_sort_are_told():
    params = {0: {"kernel": jnp.ones((8, 8))}, "a": {"kernel": jnp.ones((8, 8))}}
    with pytest.raises(ValueError, match="params must .* keys of one type"):
        plan(params)


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_combine(model):
    params, adapters, _ = model
    fc = adapters["fc"]
    plain = {"fc": {"bias": jnp.ones(10)}}
    rule = "must hold adapters, .* are params swapped"
    cases = [
        (combine(params, adapters), adapters, "already hold '.*kernel_mora'"),
        (
            params,
            {"x": fc},
            "the adapter 'x/kernel_mora'; the nearest are",
        ),
        (params, {"norm": fc}, "no kernel for the adapter 'norm/kernel_mora'"),
        (params, plain, rule),
        (params, bare(adapters), rule),
        (adapters, params, rule),
        (params, {"fc": {"kernel": fc}}, "no kernel .* 'fc/kernel/kernel_mora'"),
        (params, jax.tree.map(lambda m: m[..., :2, :2], adapters), "must have shape"),
        (
            jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), params),
            adapters,
            "in params must have shape",
        ),
        ({"a": [params["fc"]]}, {"a": {"0": fc}}, "got a list at 'a': .* use fold"),
    ]
    for tree, other, message in cases:
        with pytest.raises((TypeError, ValueError), match=message):
            combine(tree, other)
    listed = {"a": [combine(params, adapters)["fc"]]}
    with pytest.raises(TypeError, match="got a list at 'a': .* own tree"):
        split(listed)
