"""What holds of every model, in Linen and in NNX."""

import dataclasses
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import by_kind
from flax import nnx
from helpers import close, largest, random_like, trained, wide
from twins import TABLES, TWINS, nnx_model

from mora_jax import fold, linen
from mora_jax import nnx as mora

KEY = jax.random.key(0)
MODELS = [
    (name, api)
    for name, twin in TWINS.items()
    for api in ("linen", "nnx")
    if getattr(twin, api)
]
# The scope lets all laws of one model follow one another, and share its program.
by_model = pytest.mark.parametrize(("name", "api"), MODELS, scope="module")


def shapes_of(twin, api):
    """The model, its variables and its parameters, with shapes in place of arrays."""
    if api == "linen":
        model = twin.linen()
        variables = jax.eval_shape(model.init, KEY, twin.x)
        return model, variables, variables["params"]
    model = nnx.eval_shape(lambda: twin.nnx(nnx.Rngs(0)))
    return model, None, nnx.to_pure_dict(nnx.state(model, nnx.Param))


def plan_of(model, variables, twin, x):
    if variables is None:
        return mora.plan(model, twin.config, x)
    return linen.plan(model, variables, twin.config, x)


def linen_functions(model, twin, plan):
    apply = linen.wrap(model, plan)

    def base(params, x):
        return model.apply({"params": params}, x)

    def adapted(params, adapters, x):
        return apply(adapters, {"params": params}, x)

    def merged(params, adapters, x):
        return base(fold(params, adapters, plan), x)

    return base, adapted, merged


def nnx_functions(model, twin, plan):
    model = nnx_model(twin)
    wrapped = mora.wrap(model, plan)

    def load(model, params, adapters=None):
        model = nnx.clone(model)
        nnx.update(model, params)
        if adapters is not None:
            mora.set_adapters(model, adapters)
        return model

    def base(params, x):
        return load(model, params)(x)

    def adapted(params, adapters, x):
        return load(wrapped, params, adapters)(x)

    def merged(params, adapters, x):
        return mora.merge_adapters(load(wrapped, params, adapters))(x)

    return base, adapted, merged


@functools.cache
def results(name, api, operator=None):
    """All that laws speak of.

    Nearly all of the time goes into tracing and compiling, so one program computes it.
    """
    twin = TWINS[name]
    if operator:
        config = dataclasses.replace(twin.config, operator=operator)
        twin = dataclasses.replace(twin, config=config)
    model, variables, shapes = shapes_of(twin, api)
    plan = plan_of(model, variables, twin, twin.x)
    make = linen_functions if api == "linen" else nnx_functions
    base, adapted, merged = make(model, twin, plan)
    params, adapters = random_like(shapes), trained(plan)
    zeros = jax.tree.map(jnp.zeros_like, adapters)
    traces = []

    @jax.jit
    def run(adapters, params, x):
        traces.append(None)
        y = base(params, x)
        weights = random_like(y, 1.0)

        def derivatives(function):
            def loss(adapters):
                y = function(params, adapters, x)
                parts = jax.tree.map(
                    lambda w, y: jnp.sum(w * y, dtype="f4"), weights, y
                )
                return sum(jax.tree.leaves(parts)), y

            return jax.value_and_grad(loss, has_aux=True)(adapters)

        return y, derivatives(adapted), derivatives(merged)

    return types.SimpleNamespace(
        plan=plan,
        params=params,
        adapters=adapters,
        zeros=zeros,
        adapted=adapted,
        run=lambda adapters: run(adapters, params, twin.x),
        traces=traces,
        at_zero=run(zeros, params, twin.x),
        after=run(adapters, params, twin.x),
        # Sums of 16-bit numbers in another order.
        tolerance=0.03 if "bfloat16" in name else 1e-5,
    )


@by_model
def test_every_kernel_is_found_with_its_axes(name, api):
    plan = results(name, api).plan
    assert {path: spec.axes for path, spec in plan.items()} == TWINS[name].axes


@by_model
def test_plans_of_shapes_are_those_of_arrays(name, api):
    twin = TWINS[name]
    model, variables, params = shapes_of(twin, api)
    x = jax.ShapeDtypeStruct(twin.x.shape, twin.x.dtype)
    of_shapes = plan_of(model, variables, twin, x)
    if api == "linen":
        variables = {"params": random_like(params)}
    else:
        nnx.update(model, random_like(params))
    assert plan_of(model, variables, twin, twin.x) == of_shapes
    # An embedding may also be a head, and Gemma's equation is known in the call alone.
    if api == "nnx" and name != "gemma" and name not in TABLES:
        assert mora.plan(model, twin.config) == of_shapes


@by_model
def test_zero_changes_nothing(name, api):
    base, ((_, adapted), _), ((_, merged), _) = results(name, api).at_zero
    chex.assert_trees_all_equal(adapted, base)
    chex.assert_trees_all_equal(merged, base)


def assert_merged_is_adapted(case):
    base, ((_, adapted), _), ((_, merged), _) = case.after
    chex.assert_trees_all_equal_dtypes(adapted, base)
    close(adapted, merged, case.tolerance)
    changes = jax.tree.map(lambda y, base: largest(wide(y) - wide(base)), adapted, base)
    assert all(change > 5e-3 for change in jax.tree.leaves(changes)) or empty(base)


def empty(y):
    return not any(leaf.size for leaf in jax.tree.leaves(y))


@by_model
def test_merged_is_adapted(name, api):
    assert_merged_is_adapted(results(name, api))


def assert_gradients_are_those_of_the_merged_model(case):
    for y, (_, gradients), (_, expected) in (case.at_zero, case.after):
        close(gradients, expected, case.tolerance)
        for gradient in jax.tree.leaves(gradients):
            assert np.isfinite(gradient).all()
            assert np.abs(gradient).max() > 0 or empty(y)


@by_model
def test_every_adapter_learns_as_in_the_merged_model(name, api):
    assert_gradients_are_those_of_the_merged_model(results(name, api))


@by_model
def test_down_the_gradients_the_loss_falls(name, api):
    case = results(name, api)
    adapters, losses = case.zeros, []
    for _ in range(4):
        y, ((loss, _), gradients), _ = case.run(adapters)
        losses.append(float(loss))
        step = 1e-2 / max(1e-9, largest(gradients))
        steps = jax.tree.map(functools.partial(jnp.multiply, -step), gradients)
        adapters = jax.tree.map(jnp.add, adapters, steps)
    assert losses == sorted(set(losses), reverse=True) or empty(y)


@by_model
def test_one_program_serves_all_numbers(name, api):
    case = results(name, api)
    case.run(jax.tree.map(lambda m: 2 * m, case.adapters))
    assert len(case.traces) == 1


@pytest.mark.parametrize(
    "name", [name for name, twin in TWINS.items() if twin.linen and twin.nnx]
)
def test_linen_and_nnx_agree(name):
    one, other = (results(name, api) for api in ("linen", "nnx"))
    assert one.plan == other.plan and one.plan.digest() == other.plan.digest()
    chex.assert_trees_all_equal(one.params, other.params)
    close(one.after, other.after, one.tolerance)


@pytest.mark.parametrize("name", ["groups", "t-kernel", "tied"])
@by_kind
def test_merged_is_adapted_for_every_kind_of_operator(name, case):
    assert_merged_is_adapted(results(name, "linen", case.spec["name"]))


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["sharing", "rotation", "orthogonal"])
@by_model
def test_every_law_for_other_operators(name, api, operator):
    if name == "one-word" and operator == "rotation":
        return  # which needs two features
    case = results(name, api, operator)
    chex.assert_trees_all_equal(case.at_zero[0], case.at_zero[1][0][1])
    assert_merged_is_adapted(case)
    assert_gradients_are_those_of_the_merged_model(case)
