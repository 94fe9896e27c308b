"""What holds of every model, in Linen and in NNX."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import slow
from cases import KINDS, in_turns
from flax import nnx
from flax.traverse_util import flatten_dict
from helpers import close, largest, orthonormal, random_like, trained, wide
from programs import plan_of, results, shapes_of
from twins import CONVOLUTIONS, LIFTED, TABLES, TWINS

from mora_jax import AdapterSpec, MoRAConfig, Plan, directions, fold
from mora_jax import nnx as mora
from mora_jax._common.axes import rows_from_kernel

APIS = "linen", "nnx"
# By turns, one of the two is slow: layers alone are one computation in both, and of
# layers in a lift there are several models.
TURNS = {
    name: APIS[k % 2]
    for models in (CONVOLUTIONS | TABLES, LIFTED)
    for k, name in enumerate(models)
}
MODELS = [
    slow(name, api) if TURNS.get(name) == api else (name, api)
    for name, twin in TWINS.items()
    for api in APIS
    if getattr(twin, api)
]
IN_BOTH = [
    slow(name) if name in CONVOLUTIONS | TABLES else name
    for name, twin in TWINS.items()
    if twin.linen and twin.nnx
]
# The scope lets all laws of one model follow one another, and share its program.
by_model = pytest.mark.parametrize(("name", "api"), MODELS, scope="module")


@pytest.mark.law
@by_model
def test_every_kernel_is_found_with_its_axes(name, api):
    plan = results(name, api).plan
    assert {path: spec.axes for path, spec in plan.items()} == TWINS[name].axes


@pytest.mark.law
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
    if api == "nnx" and name not in TABLES:  # an embedding may also be a head
        assert mora.plan(model, twin.config) == of_shapes


@pytest.mark.law
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
    assert all(change > 5e-3 for change in jax.tree.leaves(changes))


@by_model
def test_merged_is_adapted(name, api):
    assert_merged_is_adapted(results(name, api))


@by_model
def test_every_adapter_learns_as_in_the_merged_model(name, api):
    case = results(name, api)
    for _, (_, gradients), (_, expected) in (case.at_zero, case.after):
        close(gradients, expected, case.tolerance)
        for gradient in jax.tree.leaves(gradients):
            assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


@by_model
def test_one_program_serves_all_numbers(name, api):
    case = results(name, api)
    case.run(jax.tree.map(lambda m: 2 * m, case.adapters))
    assert len(case.traces) == 1


OTHER_OPERATORS = "signed_decoupling", "low_rank", "sharing"
# Scans, vmap, remat and jit, and one model of each other kind; the APIs by turns.
GIVEN = [
    (name, api)
    if api == APIS[k % 2] or not getattr(TWINS[name], APIS[k % 2])
    else slow(name, api)
    for k, name in enumerate([*LIFTED, "methods", "einsums", "t-kernel", "tied"])
    for api in APIS
    if getattr(TWINS[name], api)
]
SOME = (
    ("experts", "linen"),
    ("scan-remat", "nnx"),
    ("tied", "linen"),
    ("einsums", "nnx"),
)
SOME_OF_MODELS = [
    slow(name, api) if (name, api) not in SOME else (name, api)
    for name, twin in TWINS.items()
    for api in APIS
    if getattr(twin, api)
]


def other_adapters(plan):
    """Adapters of the same kernels, with other operators, ranks and alphas."""
    parts = {}
    for k, (path, spec) in enumerate(plan.specs.items()):
        operator = OTHER_OPERATORS[k % 3]
        config = MoRAConfig(rank=1 + k % 2, operator=operator, alpha=0.5 / (1 + k))
        parts[path] = AdapterSpec.from_config(config, spec.kernel_shape, spec.axes)
    return trained(Plan(parts))


@pytest.mark.law
@pytest.mark.parametrize(("name", "api"), GIVEN)
def test_a_model_computes_what_the_given_adapters_say(name, api):
    """They are no part of the plan, and so are no reason to wrap the model again."""
    case = results(name, api)
    others, number = other_adapters(case.plan), len(case.traces)
    base, ((_, adapted), gradients), ((_, merged), expected) = case.run(others)
    close((adapted, gradients), (merged, expected), case.tolerance)
    folded = jax.jit(lambda *args: case.base(fold(*args), case.x))(case.params, others)
    close(adapted, folded, case.tolerance)
    assert all(largest(g) > 0 for g in jax.tree.leaves(gradients))
    changes = jax.tree.map(lambda y, base: largest(wide(y) - wide(base)), adapted, base)
    assert all(change > 5e-3 for change in jax.tree.leaves(changes))
    # Equal adapters of another plan share the program, and so do the plan's own.
    case.run(jax.tree.map(lambda m: 2 * m, other_adapters(case.plan)))
    assert len(case.traces) == number + 1
    model, variables, _ = shapes_of(TWINS[name], api)
    again = plan_of(model, variables, TWINS[name], case.x)
    assert again is not case.plan
    chex.assert_trees_all_equal(case.run(trained(again)), case.after)
    assert len(case.traces) == number + 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "api"), SOME_OF_MODELS)
def test_directions_are_those_of_the_kernels_gradients(name, api):
    """In each layer, whatever it computes, and in each layer of a stack."""
    case = results(name, api)
    weights = random_like(case.after[0], 1.0)

    def weighed(y):
        parts = jax.tree.map(lambda w, y: jnp.sum(w * y, dtype=y.dtype), weights, y)
        return sum(jax.tree.leaves(parts))

    def loss(adapters, params):
        return weighed(case.adapted(params, adapters, case.x))

    grads = jax.jit(jax.grad(lambda params: weighed(case.base(params, case.x))))
    found = directions(loss, case.plan, [(case.params,)])
    flat = flatten_dict(grads(case.params))
    flat = {"/".join(map(str, path)): leaf for path, leaf in flat.items()}
    for path, spec in found.items():
        op, rows = spec.operator, wide(rows_from_kernel(flat[path], spec.axes))
        ins, outs = orthonormal(op.in_basis), orthonormal(op.out_basis)
        between = ins.swapaxes(-2, -1) @ rows @ outs
        held, all_of = (np.sum(array**2, (-2, -1)) for array in (between, rows))
        values = np.linalg.svd(rows, compute_uv=False)[..., : op.square_rank]
        assert (held >= 0.98 * np.sum(values**2, -1)).all(), (path, held / all_of)


@pytest.mark.law
@pytest.mark.parametrize("name", IN_BOTH)
def test_linen_and_nnx_agree(name):
    one, other = (results(name, api) for api in ("linen", "nnx"))
    assert one.plan == other.plan
    chex.assert_trees_all_equal(one.params, other.params)
    close(one.after, other.after, one.tolerance)


@pytest.mark.slow
@in_turns("name, api", ["einsums", "scan-remat", "t-kernel"], APIS)
def test_compiled_and_not_give_the_same(name, api):
    case = results(name, api)
    _, ((_, compiled), _), _ = case.after
    close(case.adapted(case.params, case.adapters, case.x), compiled)


@pytest.mark.law
@in_turns("case, name", KINDS, ["groups", "t-kernel"])
def test_merged_is_adapted_for_every_kind_of_operator(name, case):
    operator = tuple(case.spec.items())
    assert_merged_is_adapted(results(name, "linen", operator))
