"""Where a tree is meant: states of NNX models are trees, models and others are not."""

import dataclasses
from typing import Any

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import close, made_for, random, random_like
from twins import Twin, nnx_model

import mora_jax
from mora_jax import FrozenDense, MoRAConfig, combine, diagnostics, init, merge, plan
from mora_jax.nnx import MoRAParam, adapters, plan_of, set_adapters, wrap

CONFIG = MoRAConfig(rank=2, operator="orthogonal", seed=1)
X = random(0, 3, 12)


def linear():
    return nnx.Linear(12, 12, rngs=nnx.Rngs(0))


def base():
    """Eleven layers, whose numbers sort otherwise than their names."""

    def make(rngs):
        return nnx.Sequential(*(nnx.Linear(12, 12, rngs=rngs) for _ in range(11)))

    return nnx_model(Twin(None, make, {}))


@pytest.fixture
def case():
    """(base, adapted model, its params as a state, its M's as a state, plan)."""
    model = base()
    adapted = wrap(model, CONFIG)
    set_adapters(adapted, random_like(adapters(adapted), 0.1))
    params, state = nnx.state(model, nnx.Param), nnx.state(adapted, MoRAParam)
    return model, adapted, params, state, plan_of(adapted)


def test_a_state_is_planned_merged_and_folded(case):
    model, adapted, params, state, chosen = case
    assert plan(params, CONFIG) == chosen
    for given in (state, adapters(adapted)):
        merged = merge(params, given)
        assert jax.tree.structure(merged) == jax.tree.structure(params)
        nnx.update(fresh := base(), merged)
        close(fresh(X), adapted(X))
        back = mora_jax.unmerge(merged, given)
        chex.assert_trees_all_close(back, params, atol=1e-5)
    plain = merge(nnx.to_pure_dict(params), state)
    chex.assert_trees_all_equal(plain, nnx.to_pure_dict(merged))
    graph = nnx.graphdef(model)

    def loss(state):
        folded = mora_jax.fold(params, state)
        return jnp.sum(nnx.merge(graph, folded)(X) ** 2)

    grads = jax.jit(jax.grad(loss))(state)
    assert jax.tree.structure(grads) == jax.tree.structure(state)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_what_a_state_says_is_what_a_tree_says(case, tmp_path):
    _, adapted, params, state, chosen = case
    plain, tree = nnx.to_pure_dict(params), adapters(adapted)
    for function in (diagnostics.merge_loss, diagnostics.relative_norm):
        assert function(params, state) == function(plain, tree)
    deltas = (mora_jax.delta_weight(given) for given in (state, tree))
    chex.assert_trees_all_equal(*deltas)
    mora_jax.save(tmp_path, state)
    loaded = mora_jax.load(tmp_path, params)
    chex.assert_trees_all_equal(loaded, tree)


def test_a_state_is_combined_split_and_masked(case):
    _, adapted, params, state, chosen = case
    for given in (state, adapters(adapted)):
        both = combine(params, given)
        assert isinstance(both, nnx.State)
        kept, extra = mora_jax.split(both)
        chex.assert_trees_all_equal(kept, params)
        chex.assert_trees_all_equal(*map(mora_jax.delta_weight, (extra, state)))
        with pytest.raises(ValueError, match="hold the adapter layers/0/kernel_mora"):
            merge(both, given)
    both = combine(params, state)
    mask = mora_jax.trainable_mask(both)
    assert mask["layers"][3] == {"bias": False, "kernel": False, "kernel_mora": True}
    tx = mora_jax.optimizer(optax.adam(1e-2), both)
    updates, _ = tx.update(both, tx.init(both), both)
    moved: Any = optax.apply_updates(both, updates)
    before, after = (nnx.to_pure_dict(t)["layers"][3] for t in (both, moved))
    np.testing.assert_array_equal(before["kernel"], after["kernel"])
    assert (before["kernel_mora"] != after["kernel_mora"]).all()


def test_linen_takes_what_a_state_holds():
    model = nn.Dense(12)
    variables = made_for(model, X)
    layer = wrap(linear(), CONFIG)
    set_adapters(layer, jax.tree.map(jnp.ones_like, adapters(layer)))
    state = nnx.state(layer, MoRAParam)
    adapter = combine(variables["params"], state)["kernel_mora"]
    assert isinstance(adapter, mora_jax.Adapter) and isinstance(adapter.m, jax.Array)
    apply = mora_jax.linen.wrap(model, CONFIG, variables, X)
    expected = apply(adapters(layer), variables, X)
    np.testing.assert_array_equal(apply(state, variables, X), expected)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_tree_is_told(case, tmp_path):
    model, adapted, params, state, chosen = case
    mora_jax.save(tmp_path, state)
    of_params = [
        plan,
        lambda wrong: merge(wrong, state),
        lambda wrong: mora_jax.fold(wrong, state),
        lambda wrong: mora_jax.unmerge(wrong, state),
        lambda wrong: mora_jax.load(tmp_path, wrong),
        lambda wrong: diagnostics.merge_loss(wrong, state),
        lambda wrong: diagnostics.relative_norm(wrong, state),
        lambda wrong: combine(wrong, state),
        mora_jax.trainable_mask,
    ]
    of_adapters = [
        lambda wrong: merge(params, wrong),
        lambda wrong: mora_jax.save(tmp_path, wrong),
        lambda wrong: mora_jax.delta_weight(wrong),
        lambda wrong: diagnostics.spectrum(wrong),
        lambda wrong: combine(params, wrong),
        lambda wrong: set_adapters(adapted, wrong),
    ]
    of_trees = [mora_jax.split]
    a_model = "must be a tree .* got the model Sequential: .*"
    no_tree = "must be (a tree|nested mappings)"
    variables = {"params": nnx.to_pure_dict(params)}
    refusals = [
        (model, TypeError, f"params {a_model}nnx.Param", of_params),
        ({"inside": model}, TypeError, f"params {a_model}nnx.Param", [plan]),
        (adapted, TypeError, f"adapters {a_model}MoRAParam", of_adapters),
        (adapted, TypeError, "tree must be a .*got the model", of_trees[:1]),
        (nn.Dense(3), TypeError, "the model Dense: .*init.*mora_jax.linen", of_params),
        (variables, ValueError, r"pass variables\['params'\]", of_params[:-2]),
    ]
    for wrong in ("gs://bucket/params", 3, jnp.ones((8, 8)), object()):
        everywhere = of_params + of_adapters + of_trees
        refusals.append((wrong, TypeError, no_tree, everywhere))
    for wrong, error, message, calls in refusals:
        for call in calls:
            with pytest.raises(error, match=message):
                call(wrong)
    shapes = jax.eval_shape(lambda: state)
    for function in (merge, mora_jax.fold):
        with pytest.raises(TypeError, match="must be an array, got ShapeDtypeStruct"):
            function(params, shapes)
        for wrong in (jnp.int8, chosen):  # the plan stood there once
            with pytest.raises(TypeError, match="dtype must be a floating-point dtype"):
                function(params, state, wrong)


def test_a_model_may_have_an_attribute_called_params():
    base = nnx.Dict(params=linear())
    model = wrap(base, CONFIG)
    assert list(plan_of(model)) == ["params/kernel"]
    assert list(plan(nnx.state(base, nnx.Param), CONFIG)) == ["params/kernel"]
    mora_jax.nnx.merge_adapters(model)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (42, TypeError, r"such as jax.random.key\(42\), got 42"),
        (np.ones(3), TypeError, "got ndarray"),
        (nnx.Rngs(0), TypeError, "got Rngs"),
        (jax.random.split(jax.random.key(0)), TypeError, "key must be one JAX"),
    ],
)
def test_what_is_no_key_is_told(key, error, message):
    params = {"kernel": jnp.ones((8, 8))}
    frozen = FrozenDense.from_config(jnp.ones((8, 8)))
    gaussian = plan(params, MoRAConfig(init="gaussian"))
    for given in (plan(params), frozen, gaussian):
        with pytest.raises(error, match=message):
            init(given, key)
    with pytest.raises(error, match=message):
        mora_jax.mora_apply(init(frozen), frozen, jnp.ones((2, 8)), key=key)
    init(gaussian, jax.random.PRNGKey(0))  # raw keys and traced ones are keys
    jax.jit(lambda key: init(gaussian, key))(jax.random.key(0))


@pytest.mark.usefixtures("unchecked")
def test_one_layer_takes_a_variable_of_its_own_update():
    layer = wrap(linear(), CONFIG)
    params, kernel = {"kernel_mora": layer.kernel_mora}, layer.kernel[...]
    frozen = FrozenDense.from_config(kernel, layer.bias[...], config=CONFIG)
    close(mora_jax.mora_apply(params, frozen, X), layer(X))
    other = dataclasses.replace(frozen, alpha=2.0)
    for function in (mora_jax.delta_weight, lambda m, f: mora_jax.mora_apply(m, f, X)):
        with pytest.raises(ValueError, match="made for alpha 1.0, not 2.0"):
            function(params, other)
        with pytest.raises(TypeError, match="frozen must be a .*, got int"):
            function(params, 3)


# --- kernels that are not floating-point ---


@flax.struct.dataclass
class Parts:
    """A quantized kernel as qwix has it: it has a shape, a dtype, and parts."""

    qvalue: jax.Array
    scale: jax.Array
    shape = property(lambda self: self.qvalue.shape)
    dtype = property(lambda self: self.scale.dtype)


EIGHT = jnp.ones((12, 12), jnp.int8)
QUANTIZED = {"int8": EIGHT, "parts": Parts(EIGHT, jnp.ones((1, 12)))}
by_kind = pytest.mark.parametrize("kind", QUANTIZED)


@pytest.mark.usefixtures("unchecked")
@by_kind
def test_quantized_kernels_are_refused_wherever_kernels_come_in(kind, tmp_path):
    """A fold into int8 gave int8, and a gradient that was exactly zero."""
    kernel = QUANTIZED[kind]
    chosen = plan({"fc": {"kernel": jnp.ones((12, 12))}}, CONFIG)
    adapters, params = init(chosen), {"fc": {"kernel": kernel}}
    mora_jax.save(tmp_path, adapters)
    frozen = FrozenDense.from_config(jnp.ones((12, 12)))
    frozen = dataclasses.replace(frozen, kernel=kernel)
    one = {"kernel_mora": jnp.zeros((9, 9))}

    def loss(adapters):
        folded = mora_jax.fold(params, adapters)["fc"]["kernel"]
        return jnp.sum(jnp.asarray(folded, jnp.float32) ** 2)

    calls = [
        lambda: jax.grad(loss)(adapters),
        lambda: merge(params, adapters),
        lambda: mora_jax.unmerge(params, adapters),
        lambda: diagnostics.merge_loss(params, adapters),
        lambda: diagnostics.relative_norm(params, adapters),
        lambda: mora_jax.load(tmp_path, params),
        lambda: FrozenDense.from_config(kernel),
        lambda: mora_jax.mora_apply(one, frozen, X),
        lambda: mora_jax.delta_weight(one, frozen),
    ]
    if kind == "int8":  # a model that runs with parts has a library that knows them
        model = wrap(linear(), CONFIG)
        model.kernel = nnx.Param(kernel)
        named = plan({"kernel": jnp.ones((12, 12))})
        apply = mora_jax.linen.wrap(nn.Dense(12, use_bias=False), named)
        variables = {"params": {"kernel": kernel}}
        calls += [lambda: model(X), lambda: apply(init(named), variables, X)]
    for call in calls:
        with pytest.raises((TypeError, ValueError), match="dequantise it first"):
            call()


@by_kind
def test_a_quantized_model_keeps_its_adapters_and_does_not_merge(kind):
    model, kernel = wrap(linear(), CONFIG), QUANTIZED[kind]
    tree, chosen = adapters(model), plan_of(model)
    if kind == "int8":
        model.kernel = nnx.Param(kernel)
    else:  # as qwix does it
        model.kernel = nnx.data(Parts(*map(nnx.Param, jax.tree.leaves(kernel))))
    chex.assert_trees_all_equal(adapters(model), tree)
    assert plan_of(model).parts == chosen.parts
    with pytest.raises((TypeError, ValueError), match="dequantise it first"):
        mora_jax.nnx.merge_adapters(model)
