"""Sums of adapters are sums of their deltas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LINEAR, by_case
from flax import nnx
from helpers import bare, close, random, random_like, wide

import mora_jax
from mora_jax import Adapter, AdapterSpec, MoRAConfig, Plan, delta_weight, serving
from mora_jax.mixing import scaled, weighted_sum
from mora_jax.operators import Damped, Truncation
from mora_jax.operators._pytree import operator

PARAMS = {"a": {"kernel": random(0, 12, 16)}, "s": {"kernel": random(1, 3, 8, 12)}}
SETTINGS = {"square_rank": 4, "overrides": {"s/kernel": {"axes": "sio"}}}
PLAN = mora_jax.plan(PARAMS, MoRAConfig(operator="rotation", alpha=0.5, **SETTINGS))
SEEDS = range(3)


def made(seed, plan=PLAN, dtype=None):
    """Adapters that are far from zero."""
    adapters = jax.tree.map(lambda m: random(seed, *m.shape), mora_jax.init(plan))
    return jax.tree.map(lambda m: m.astype(dtype or m.dtype), adapters)


def deltas(adapters):
    return jax.tree.map(wide, delta_weight(adapters))


def of_a_stack(case, seed=0):
    """Adapters of a stack of two kernels, and their deltas by the oracle."""
    op = case.make(13, 7, 4)
    spec = AdapterSpec(op, (2, 13, 7), "sio", alpha=0.5)
    ms = random(seed, *spec.shape)
    expected = np.stack([0.5 * case.delta(op, m) for m in ms])
    return {"kernel_mora": Adapter(ms, spec)}, expected


@by_case
@pytest.mark.parametrize("factor", [0.5, -1.0, 0.0])
def test_scaled_adapters_have_so_many_times_the_delta(case, factor):
    """Of every operator, also of LoRA, whose delta is a product of what is trained."""
    adapters, delta = of_a_stack(case)
    got = scaled(adapters, factor)
    assert got["kernel_mora"].spec == adapters["kernel_mora"].spec
    close(deltas(got)["kernel"], factor * delta)
    compiled = jax.jit(scaled)(adapters, factor)
    close(deltas(compiled)["kernel"], factor * delta)


@by_case
def test_a_sum_is_that_of_the_deltas_where_they_are_linear(case):
    """And ranks of LoRAs add up."""
    (one, delta), (other, its) = (of_a_stack(case, seed) for seed in (0, 1))
    got = weighted_sum([one, other], [0.5, -2])
    close(deltas(got)["kernel"], 0.5 * delta - 2 * its)
    if case in LINEAR:
        assert got["kernel_mora"].spec == one["kernel_mora"].spec
        return
    ops = [tree["kernel_mora"].operator for tree in (one, got)]
    ranks = [getattr(op, "inner", op).rank for op in ops]  # damped ones have an inner
    assert "have" not in mora_jax.summary(got)  # nobody gave it a budget
    assert ranks == [4, 8] and got["kernel_mora"].m.shape == (2, 20, 8)
    # PEFT's "svd": the least rank that a bound needs.
    base = {"kernel": jnp.zeros((2, 13, 7))}
    merged = mora_jax.merge(base, got)
    least, lost = mora_jax.remora.learned(base, merged, got, max_error=0.3)
    whole, cut = deltas(got)["kernel"], deltas(least)["kernel"]
    off, norm = (np.linalg.norm(a, axis=(1, 2)) for a in (whole - cut, whole))
    assert 0 < lost["kernel"] <= 0.3 and least["kernel_mora"].operator.rank < 7
    close(lost["kernel"], (off / norm).max(), 1e-3)


def damped_lora(seed, directions):
    """A LoRA of a stack of two kernels whose inputs are damped."""
    inner = mora_jax.make_operator("low_rank", 13, 7, 3)
    f = np.random.default_rng(4).uniform(0.2, 1, (*directions.shape[:-1], 1))
    op = Damped(13, 7, 3, inner=inner, directions=directions, diagonal=f)
    spec = AdapterSpec(op, (2, 13, 7), "sio", alpha=0.5)
    return {"kernel_mora": Adapter(random(seed, *spec.shape), spec)}


V = np.linalg.qr(np.random.default_rng(3).standard_normal((2, 13, 3)))[0]


@pytest.mark.parametrize("directions", [V, 0.6 * V[0]], ids=["of a layer", "of all"])
def test_ranks_of_loras_on_the_same_damped_inputs_add_up(directions):
    one, other = (damped_lora(seed, directions) for seed in (0, 1))
    got = weighted_sum([one, other], [0.5, -2])
    expected = 0.5 * deltas(one)["kernel"] - 2 * deltas(other)["kernel"]
    close(deltas(got)["kernel"], expected, 1e-5)
    adapter = got["kernel_mora"]
    assert adapter.m.shape == (2, 20, 6) and adapter.operator.inner.rank == 6
    assert adapter.operator.digests == one["kernel_mora"].operator.digests
    again = weighted_sum([got, scaled(got, -1)], [1, 1])
    close(deltas(again)["kernel"], np.zeros((2, 13, 7)))


def test_adapters_on_other_damped_inputs_have_no_sum():
    """Two P's make no P of the sum, so the error says how to have one."""
    trees = [damped_lora(seed, V[seed]) for seed in (0, 1)]
    remedy = "directions.*the same.*mora_jax.input_damping"
    for call in (lambda: weighted_sum(trees, [1, 1]), lambda: serving.stack(trees)):
        with pytest.raises(ValueError, match=f"^kernel_mora .*{remedy}") as caught:
            call()
        assert len(str(caught.value)) < 400  # and no hundreds of digits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weighted_sum_is_that_of_the_deltas(dtype):
    trees, weights = [made(seed, dtype=dtype) for seed in SEEDS], [0.5, -2, 0.25]
    mixed = weighted_sum(trees, weights)
    assert jax.tree.structure(mixed) == jax.tree.structure(trees[0])
    assert {m.dtype.name for m in jax.tree.leaves(mixed)} == {dtype}
    every = zip(weights, map(deltas, trees), strict=True)
    terms = [jax.tree.map(lambda d, w=w: w * d, delta) for w, delta in every]
    expected = jax.tree.map(lambda *each: sum(each), *terms)
    close(deltas(mixed), expected, 1e-6 if dtype == "float32" else 2e-2)
    one = weighted_sum(trees[:1], [1])
    assert all(map(np.array_equal, *map(jax.tree.leaves, (one, trees[0]))))


def test_a_factor_is_an_argument_of_one_program():
    """It scales the delta, 0 turns it off and -1 negates it."""
    adapters, traces, x = made(0), [], random(5, 2, 12)

    @jax.jit
    def apply(adapters, factor):
        traces.append(None)
        return x @ mora_jax.fold(PARAMS, scaled(adapters, factor))["a"]["kernel"]

    base = x @ PARAMS["a"]["kernel"]
    change = apply(adapters, 1.0) - base
    for factor in (0.0, -1.0, 3.0):
        close(apply(adapters, factor) - base, factor * change)
    assert len(traces) == 1
    weights = jnp.array([1.0, -1.0])
    trees = [made(0), made(0)]
    assert not any(m.any() for m in jax.tree.leaves(weighted_sum(trees, weights)))


def test_weights_are_arguments_of_a_program():
    trees = [made(0), made(1)]
    compiled = jax.jit(lambda weights: weighted_sum(trees, weights))
    close(compiled(jnp.array([1.0, -0.5])), weighted_sum(trees, [1.0, -0.5]), 1e-4)


def test_states_of_nnx_stay_states():
    class Model(nnx.Module):
        def __init__(self):
            self.fc = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

    model = mora_jax.nnx.wrap(
        Model(), MoRAConfig(operator="signed_decoupling", square_rank=4)
    )
    state = nnx.state(model, mora_jax.nnx.MoRAParam)
    state = random_like(state)
    doubled = scaled(state, 2)
    assert isinstance(doubled, nnx.State)
    close(jax.tree.leaves(doubled), [2 * m for m in jax.tree.leaves(state)])
    mixed = weighted_sum([state, doubled], [1, 1])
    close(jax.tree.leaves(mixed), [3 * m for m in jax.tree.leaves(state)])


def other_base(seed):
    import tempfile

    params = jax.tree.map(lambda leaf: leaf + seed, PARAMS)
    with tempfile.TemporaryDirectory() as directory:
        mora_jax.save(directory, made(seed), params=params)
        return mora_jax.load(directory)


SEEDED = mora_jax.plan(
    PARAMS, MoRAConfig(operator="signed_decoupling", seed=1, **SETTINGS)
)
NARROW = mora_jax.plan(
    {"a": PARAMS["a"]}, MoRAConfig(operator="rotation", alpha=0.5, square_rank=4)
)


@operator
class Bent(Truncation):
    """An operator that says of itself that its delta is not linear in M."""

    name = "bent"
    linear = False


def test_an_operator_that_is_not_linear_is_refused_by_name():
    """Where sums of M's would not be sums of deltas, and zeros might add something."""
    spec = AdapterSpec(Bent(12, 16, 4), (12, 16))
    plan = Plan({("a", "kernel"): spec}, base_parameters=192)
    bent = made(0, plan)
    with pytest.raises(ValueError, match="delta of 'bent' is not linear in"):
        weighted_sum([bent], [1])
    (values,) = mora_jax.diagnostics.spectrum(bent).values()
    delta = deltas(bent)["a"]["kernel"]
    close(values, np.linalg.svd(delta, compute_uv=False), 1e-5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: weighted_sum([], []), "adapters must be .* got none"),
        (lambda: weighted_sum(made(0), [1, 1]), "sequence of adapters.* got dict"),
        (lambda: weighted_sum([bare(made(0))], [1]), "'a/kernel_mora': plan.adapters"),
        (lambda: weighted_sum([(made(0), PLAN)], [1]), "must be a tree of arrays, got"),
        (lambda: weighted_sum([made(0)], 1), "weights must be a sequence.* got 1"),
        (lambda: weighted_sum([made(0)], None), "weights must be .* got None"),
        (lambda: weighted_sum([made(0)], {0: 1.0}), "weights must be .* got {0"),
        (lambda: weighted_sum([made(0)], "1"), "weights must be .* got '1'"),
        (
            lambda: weighted_sum([made(0)], jnp.ones(())),
            r"weights must be .* shape \(\)",
        ),
        (lambda: weighted_sum([made(0)], jnp.ones((1, 2))), "weights must be .*1, 2"),
        (lambda: jax.jit(scaled)(made(0), 1j), "factor must be real, got complex64"),
        (lambda: jax.jit(scaled)(made(0), True), "factor must be real, got bool"),
        (lambda: weighted_sum([made(0)], [1, 2]), "got 2 for 1"),
        (lambda: weighted_sum([made(0)], ["1"]), r"weights\[0\] must be a number"),
        (lambda: weighted_sum([made(0)], [np.nan]), r"weights\[0\] must be finite"),
        (lambda: weighted_sum([made(0)], [jnp.inf]), r"must be finite"),
        (
            lambda: weighted_sum([made(0), made(0, SEEDED)], [1, 1]),
            "made for operator.name 'signed_decoupling', not 'rotation'",
        ),
        (lambda: weighted_sum([made(0), made(0, NARROW)], [1, 1]), "s/kernel"),
        (lambda: weighted_sum([{}], [1]), "adapters hold no adapter"),
        (lambda: weighted_sum([other_base(1), other_base(2)], [1, 1]), "of one base"),
        (lambda: scaled(made(0), "2"), "factor must be a number"),
        (lambda: scaled(made(0), 1j), "factor must be a number"),
        (lambda: scaled(made(0), jnp.ones(2)), "factor must be a number"),
        (lambda: scaled((made(0), PLAN), 2), "must be a tree of arrays, got the Plan"),
        (lambda: scaled(PLAN, 2), "adapters must be a tree of arrays, got the Plan"),
        (lambda: scaled({"kernel_mora": 3}, 2), "must hold adapters, got int at"),
        (lambda: scaled(bare(made(0)), 2), "'a/kernel_mora': plan.adapters"),
        (lambda: scaled(made(0, dtype="float16"), 1e6), "infinity in float16"),
        (
            lambda: weighted_sum([made(0, dtype="float16")], [1e6]),
            "a/kernel_mora holds",
        ),
        (lambda: scaled(jax.eval_shape(lambda: made(0)), 2), "must be an array"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises((TypeError, ValueError), match=match):
        call()
