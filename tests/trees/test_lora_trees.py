"""LoRAs of other libraries come in as trees, and compute the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, random, random_like

import mora_jax
from mora_jax import MoRAConfig, from_lora
from mora_jax._tree.paths import adapters_in

qwix = pytest.importorskip("qwix")

X, KEY = random(0, 2, 5, 16), jax.random.key(0)
ALL = MoRAConfig(rank=1)


class Model(nn.Module):
    """A dense layer, and perhaps heads of features in and out."""

    heads: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="fc")(x)
        attention = nn.MultiHeadDotProductAttention(num_heads=2, name="heads")
        return attention(x) if self.heads else nn.Dense(8, name="out")(x)


def adapted_by_qwix(model, *args, **rngs):
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=6.0)
    return qwix.apply_lora_to_model(model, provider, *args, **rngs)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [False, True])
def test_a_linen_model_of_qwix(heads):
    model, lora = Model(heads), adapted_by_qwix(Model(heads))
    variables = jax.jit(model.init)(KEY, X)
    try:
        params = jax.jit(lora.init)(KEY, X)["params"]
    except AssertionError as error:
        assert heads and "Unsupported" in str(error)
        pytest.skip("this qwix has no LoRA for heads")
    factors = random_like(
        {path: leaf for path, leaf in flattened(params).items() if "lora" in path[-1]}
    )
    tree = nested({**flattened(variables["params"]), **factors})
    plan = mora_jax.linen.plan(model, variables, ALL, X)
    adapters = from_lora(tree, plan, alpha=6 / 2)
    found = adapters_in(adapters).kernels
    assert found.keys() == plan.specs.keys()
    assert {adapter.operator.name for adapter in found.values()} == {"low_rank"}
    assert {adapter.operator.square_rank for adapter in found.values()} == {2}
    got = jax.jit(mora_jax.linen.wrap(model, plan))(adapters, variables, X)
    close(got, jax.jit(lora.apply)({"params": tree}, X), 1e-5)
    assert np.abs(got - jax.jit(model.apply)(variables, X)).max() > 0.1


def test_an_nnx_model_of_qwix():
    base = nnx.Sequential(*(nnx.Linear(16, 16, rngs=nnx.Rngs(k)) for k in range(2)))
    lora = adapted_by_qwix(base, X, rngs=nnx.Rngs(0))
    state = random_like(nnx.state(lora, nnx.LoRAParam))
    nnx.update(lora, state)
    plan = mora_jax.nnx.plan(base, ALL, X)
    adapters = from_lora(state, plan, alpha=3)
    wrapped = mora_jax.nnx.wrap(base, plan)
    mora_jax.nnx.set_adapters(wrapped, adapters)
    close(wrapped(X), lora(X), 1e-5)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_factors_of_a_stack_are_stacked_as_their_kernel(axis):
    """As qwix makes them under a scan; also where the layers are as many as r."""
    a, b = random(0, 2, 16, 2), random(1, 2, 2, 12)
    kernel = np.zeros(np.moveaxis(np.zeros((2, 16, 12)), 0, axis).shape, "f4")
    axes = {0: "sio", 1: "iso", -1: "ios"}[axis]
    config = MoRAConfig(rank=2, overrides={".*": {"axes": axes}})
    plan = mora_jax.plan({"fc": {"kernel": kernel}}, config)
    factors = {"kernel_lora_a": np.moveaxis(a, 0, axis)}
    factors["kernel_lora_b"] = np.moveaxis(b, 0, axis)
    adapters = from_lora({"fc": factors}, plan, alpha=3)
    (delta,) = jax.tree.leaves(mora_jax.delta_weight(adapters))
    close(np.moveaxis(delta, axis, 0), 3 * a @ b, 1e-5)


def test_lora_of_flax_itself():
    rngs = nnx.Rngs(0)
    base = nnx.Linear(16, 8, rngs=rngs)
    lora = nnx.LoRA(16, 2, 8, base_module=base, rngs=rngs)
    nnx.update(lora, state := random_like(nnx.state(lora, nnx.LoRAParam)))
    holder = nnx.Dict(base_module=base)  # as the kernel lies in the model with LoRA
    plan = mora_jax.nnx.plan(holder, ALL)
    adapters = from_lora(state, plan, alpha=1)
    (delta,) = jax.tree.leaves(mora_jax.delta_weight(adapters))
    close(X @ delta + base(X), lora(X), 1e-5)
    linear = nnx.LoRALinear(16, 8, lora_rank=2, rngs=rngs)
    nnx.update(linear, state := random_like(nnx.state(linear, nnx.LoRAParam)))
    kernel = {"kernel": linear.kernel[...]}
    adapters = from_lora(state, mora_jax.plan(kernel, ALL), 1)
    merged = mora_jax.merge(kernel, adapters)["kernel"]
    close(X @ merged + linear.bias[...], linear(X), 1e-5)


def test_bad_trees():
    plan = mora_jax.plan({"fc": {"kernel": jnp.ones((8, 6))}}, ALL)
    a, b = jnp.ones((8, 2)), jnp.ones((2, 6))
    for tree, match in [
        ({}, "no array"),
        ({"fc": {"kernel": a}}, "no factor of a LoRA"),
        ({"fc": {"kernel_lora_a": a}}, "must have lora_a and lora_b"),
        ({"up": {"kernel_lora_a": a, "kernel_lora_b": b}}, "must have the kernel 'up"),
        ({"fc": {"kernel_lora_a": a, "kernel_lora_b": b.T}}, r"shape \(2, 6\)"),
    ]:
        with pytest.raises(ValueError, match=match):
            from_lora(tree, plan, alpha=1)
    for wrong, match in [
        (a.astype(int), "fc/kernel_lora_a must have a floating-point dtype, got int32"),
        (a * np.nan, "fc/kernel_lora_a holds NaN"),
        (jax.ShapeDtypeStruct(a.shape, a.dtype), "fc/kernel_lora_a must be an array"),
        (a[:, :0], r"lora_a must have .*rank of at least 1.*\(8, 0\)"),
    ]:
        tree = {"fc": {"kernel_lora_a": wrong, "kernel_lora_b": b}}
        with pytest.raises((TypeError, ValueError), match=match):
            from_lora(tree, plan, alpha=1)
    tree = {"fc": {"kernel_lora_a": a, "kernel_lora_b": b}}
    with pytest.raises(TypeError, match="alpha"):
        from_lora(tree, plan, alpha="2")
    match = "missing 1 required positional argument: 'alpha'"
    with pytest.raises(TypeError, match=match):
        from_lora(tree, plan)


def flattened(tree):
    return nnx.traversals.flatten_mapping(tree)


def nested(flat):
    return nnx.traversals.unflatten_mapping(flat)
