"""A compiled step of training that renews adapters as it goes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from adapter_files import slow
from flax import nnx
from helpers import close, made_for, random, wide
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import mora_jax
from mora_jax import MoRAConfig, directions, linen, remora
from mora_jax._layer.rounding import share_lost
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree import gradients
from mora_jax._tree.paths import adapters_in
from mora_jax.operators import Damped, Subspace
from mora_jax.operators._pytree import given, operator

X, Y = random(0, 16, 24), random(1, 16, 12)
# Between the first and the other directions of its own batch the gradient is zero: a
# small epsilon would make full steps of the rounding errors there.
TX = optax.adam(3e-2, eps=1e-2)


class Net(nn.Module):
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        dtypes = {"param_dtype": self.dtype}
        h = jnp.tanh(nn.Dense(20, name="up", **dtypes)(x))
        return nn.Dense(12, name="down", **dtypes)(h)


def task(dtype="float32", operator=None, **settings):
    """A loss, params, and adapters along its gradient, or between random maps."""
    net = Net(dtype)
    variables = made_for(net, X)
    config = MoRAConfig(square_rank=4, operator=operator or "rotation", **settings)
    plan = linen.plan(net, variables, config, X)
    apply = linen.wrap(net, plan)

    def loss(adapters, params, x, y):
        return jnp.mean((apply(adapters, {"params": params}, x) - y) ** 2)

    params = variables["params"]
    adapters = mora_jax.init(plan, params=params)
    if operator is None:
        batches = [(params, X, Y)]
        adapters = directions(loss, adapters, batches, dtype="bfloat16")
    return loss, params, adapters


def restarted(loss, params, adapters, opt_state: Any):
    """A renewal step by step, by other functions of the library."""
    found = adapters_in(adapters)
    params = mora_jax.merge(params, found.kernels.tree())
    for path, adapter in found.kernels.items():
        found[path] = adapter.replace(m=0 * adapter.m)
    adapters = directions(loss, found.tree(), [(params, X, Y)], dtype="bfloat16")
    new: Any = TX.init(adapters)
    for name in ("mu", "nu"):  # the bias goes on, and so does the count of its steps
        old = getattr(opt_state[0], name)["down"]["bias"]
        getattr(new[0], name)["down"]["bias"] = old
    count = opt_state[0].count
    return params, adapters, (new[0]._replace(count=count), *opt_state[1:])


def trained(loss, params, adapters, steps=7, every=3, batch=(X, Y), **settings):
    """The state after some steps, and the losses."""
    init, step, _ = remora.renewing(loss, TX, every, **settings)
    traces = []

    @jax.jit
    def counted(*args):
        traces.append(None)
        return step(*args)

    state, values = init(params, adapters), []
    for _ in range(steps):
        state, value = counted(state, *batch)
        values.append(float(value))
    assert len(traces) == 1  # one program for all renewals
    return state, values


@pytest.mark.slow
def test_it_is_a_loop_with_restarts_as_one_program():
    loss, params, adapters = task(train="down/bias")
    state, values = trained(loss, params, adapters)

    opt_state, expected = TX.init(adapters), []
    for k in range(7):
        if k in (3, 6):
            params, adapters, opt_state = restarted(loss, params, adapters, opt_state)
        grads: Any
        value, grads = jax.value_and_grad(loss)(adapters, params, X, Y)
        if k in (0, 3, 6):  # but for rounding
            for layer in (grads["up"], grads["down"]):
                m = layer["kernel_mora"].m
                along = m.at[0, 1:].set(0).at[1:, 0].set(0)
                close(m, along, 2**-6)
                layer["kernel_mora"] = layer["kernel_mora"].replace(m=along)
        updates, opt_state = TX.update(grads, opt_state)
        adapters = optax.apply_updates(adapters, updates)
        expected.append(float(value))
    # A number of a basis may be rounded to bfloat16 otherwise.
    close(np.asarray(values), np.asarray(expected), 1e-3)
    close(state.params, params, 2e-3)
    close(mora_jax.delta_weight(state.adapters), mora_jax.delta_weight(adapters), 2e-3)
    assert values[-1] < 0.9 * values[0] and int(state.step) == 7
    # What it made are adapters as any other.
    merged = mora_jax.merge(state.params, state.adapters)
    y = Net().apply({"params": merged}, X)
    close(jnp.mean((y - Y) ** 2), loss(state.adapters, state.params, X, Y))  # pyright: ignore


@pytest.mark.slow
def test_the_rank_grows_and_others_keep_their_directions():
    loss, base, adapters = task()
    state, _ = trained(loss, base, adapters, steps=9)
    merged = mora_jax.merge(state.params, state.adapters)
    difference = wide(merged["up"]["kernel"]) - wide(base["up"]["kernel"])
    assert np.linalg.matrix_rank(difference, tol=1e-3 * np.abs(difference).max()) > 8
    never, _ = trained(loss, base, adapters, every=lambda step: step < 0)
    close(never.params, base)
    for name, adapter in adapters_in(never.adapters).items():
        op, first = adapter.operator, adapters_in(adapters)[name].operator
        np.testing.assert_array_equal(op.in_basis, first.in_basis)


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["orthogonal", slow("hadamard")])
def test_random_maps_as_in_the_papers(operator):
    loss, base, adapters = task(operator=operator)
    state, values = trained(loss, base, adapters, steps=9, along="random")
    assert values[-1] < values[0]
    again, same = trained(loss, base, adapters, steps=9, along="random")
    assert same == values
    for name, adapter in adapters_in(state.adapters).items():
        op, first = adapter.operator, adapters_in(adapters)[name].operator
        new, old = (each.basis("in", jnp.float32) for each in (op, first))
        close(new.T @ new, np.eye(4), 2**-7)
        assert np.linalg.norm(new.T @ old) < 1.9  # of at most 2
        assert adapter.spec.scale == adapters_in(adapters)[name].spec.scale


@pytest.mark.slow
def test_it_finds_its_first_directions_and_moves_along_them():
    """Adam makes no steps of rounding errors, and other operators get a scale."""
    loss, params, adapters = task()
    _, _, others = task(operator="orthogonal")
    init, step, _ = remora.renewing(loss, optax.adam(1e-2), 100)
    ends = []
    for start in (adapters, others):
        state, _ = jax.jit(step)(init(params, start), X, Y)
        ends.append(mora_jax.delta_weight(state.adapters))
        for name, adapter in adapters_in(state.adapters).items():
            assert adapter.spec.scale == adapters_in(adapters)[name].spec.scale
            m = abs(np.asarray(adapter.m))
            np.testing.assert_array_equal(m[0, 1:], 0)
            np.testing.assert_array_equal(m[1:, 0], 0)
            close(m[m > 0], np.full(10, 1e-2), 1e-4)
    close(*ends, 1e-3)
    assert jax.tree.leaves(ends[0])[0].any()


class Stack(nn.Module):
    """Three equal layers under a scan."""

    @nn.compact
    def __call__(self, x):
        def layer(dense, h):
            return jnp.tanh(dense(h)), None

        split = {"params": True}
        scanned = nn.scan(layer, {"params": 0}, split_rngs=split, length=3)
        return scanned(nn.Dense(24, name="fc"), x)[0]


@pytest.mark.slow
@pytest.mark.parametrize("along", ["gradient", slow("random")])
def test_each_layer_of_a_stack_has_its_own_maps(along):
    net = Stack()
    variables = made_for(net, X)
    config = MoRAConfig(operator="orthogonal", square_rank=4)
    plan = linen.plan(net, variables, config, X)
    apply = linen.wrap(net, plan)

    def loss(adapters, params, x, y):
        return jnp.mean((apply(adapters, {"params": params}, x) - y) ** 2)

    params, batch = variables["params"], (X, jnp.roll(X, 1, 0))
    state, values = trained(loss, params, mora_jax.init(plan), batch=batch, along=along)
    assert values[-1] < values[0]
    op = state.adapters["fc"]["kernel_mora"].operator
    assert op.in_basis.shape == (3, 24, 4)
    assert not np.allclose(wide(op.in_basis[0]), wide(op.in_basis[1]), atol=0.1)
    merged = mora_jax.merge(state.params, state.adapters)
    y = net.apply({"params": merged}, X)
    close(y, apply(state.adapters, {"params": state.params}, X), 1e-4)


def test_moments_start_again_or_go_on():
    loss, params, adapters = task()
    for moments, count in (("restart", 1), ("keep", 4)):
        settings = {"steps": 4, "moments": moments}
        state, _ = trained(loss, params, adapters, **settings)
        assert int(state.opt_state[0].count) == count
        assert any(m.any() for m in jax.tree.leaves(state.opt_state[0].mu))


@pytest.mark.slow
def test_small_deltas_add_up_in_16_bits():
    """Each renewal has a dither of its own: 24 of one step each are not lost."""
    loss, params, adapters = task("bfloat16")
    tx = optax.sgd(1e-4)
    init, step, _ = remora.renewing(loss, tx, 1)
    state, step, total = init(params, adapters), jax.jit(step), 0
    for _ in range(24):
        before = state.params
        total = total + wide(mora_jax.delta_weight(state.adapters)["up"]["kernel"])
        state, _ = step(state, X, Y)
        assert state.params["up"]["kernel"].dtype == before["up"]["kernel"].dtype
    change = wide(state.params["up"]["kernel"]) - wide(params["up"]["kernel"])
    assert share_lost(jnp.asarray(change), jnp.asarray(total)) < 0.5


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(tmp_path):
    loss, params, adapters = task()
    init, step, _ = remora.renewing(loss, TX, 2)
    step = jax.jit(step, donate_argnums=0)
    state = init(jax.tree.map(jnp.copy, params), adapters)
    for _ in range(3):
        state, _ = step(state, X, Y)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(lambda: init(params, adapters))
        again = checkpointer.restore(tmp_path / "state", target)
    ends = []
    for run in (state, again):
        for _ in range(3):
            run, _ = step(run, X, Y)
        ends.append(jax.tree.leaves(run))
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.slow
def test_an_nnx_model():
    loss, params, adapters = task()
    expected, values = trained(loss, params, adapters)

    class Twin(nnx.Module):
        def __init__(self):
            self.up = nnx.Linear(24, 20, rngs=nnx.Rngs(0))
            self.down = nnx.Linear(20, 12, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.down(jnp.tanh(self.up(x)))

    model = Twin()
    nnx.update(model, params)
    plan = mora_jax.Plan({p: a.spec for p, a in adapters_in(adapters).items()})
    wrapped = mora_jax.nnx.wrap(model, plan)
    split, ms, base = nnx.split(wrapped, mora_jax.nnx.MoRAParam, nnx.Param)

    def of_states(ms, base, x, y):
        return jnp.mean((nnx.merge(split, ms, base)(x) - y) ** 2)

    state, again = trained(of_states, base, ms)
    close(np.asarray(again), np.asarray(values), 1e-4)
    nnx.update(wrapped, state.params, state.adapters)
    merged = mora_jax.nnx.merge_adapters(wrapped)
    close(merged(X), linen_merged(expected, X), 1e-3)


def linen_merged(state, x):
    merged = mora_jax.merge(state.params, state.adapters)
    return Net().apply({"params": merged}, x)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [False, True])
def test_on_a_mesh(layout):
    """Kernels stay split, and the run is that of one device."""
    loss, params, adapters = task()
    expected, values = trained(loss, params, adapters)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    split = NamedSharding(mesh, PartitionSpec(None, "model"))
    where = {
        name: {"kernel": split, "bias": NamedSharding(mesh, PartitionSpec("model"))}
        for name in params
    }
    params = jax.device_put(params, where)
    batch = jax.device_put((X, Y), NamedSharding(mesh, PartitionSpec("data")))
    if layout:
        adapters = mora_jax.sharding.on_mesh(adapters, params, batch_axes="data")
    with jax.set_mesh(mesh):
        state, again = trained(loss, params, adapters, batch=batch)
    close(np.asarray(again), np.asarray(values), 1e-4)
    if layout:  # directions are where their features are
        for spec in state.plan.values():
            places = [a.sharding.spec for a in jax.tree.leaves(spec)]
            assert places == [PartitionSpec(), PartitionSpec(("model",))]
    assert state.params["up"]["kernel"].sharding.is_equivalent_to(split, 2)
    close(
        mora_jax.merge(state.params, state.adapters),
        mora_jax.merge(expected.params, expected.adapters),
        1e-3,
    )


def test_another_base_is_refused(tmp_path):
    loss, params, adapters = task()
    mora_jax.save(tmp_path, adapters, params=params)
    again, (init, *_) = mora_jax.load(tmp_path, params), remora.renewing(loss, TX, 2)
    assert init(params, again).plan["up/kernel"].base_digest is None
    with pytest.raises(ValueError, match="holds other weights than the base"):
        init(jax.tree.map(lambda leaf: leaf + 1, params), again)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments():
    loss, params, adapters = task()
    cases = [
        ((loss, "adam", 2), {}, TypeError, "tx must be an optax transformation"),
        ((loss, TX, 0), {}, ValueError, "every must be a positive integer"),
        ((loss, TX, 2), {"along": "W"}, ValueError, "along must be one of"),
        ((loss, TX, 2), {"moments": "x"}, ValueError, "moments must be one of"),
        ((loss, TX, 2), {"merge": "x"}, TypeError, "merge must be a function or"),
    ]
    for args, settings, error, message in cases:
        with pytest.raises(error, match=message):
            remora.renewing(*args, **settings)
    init, *_ = remora.renewing(loss, TX, 2)
    blocks = task(operator="rotation")[2]
    cases = [
        ((params, blocks), ValueError, "renewing needs directions.* got 'rotation' at"),
        ((adapters, adapters), ValueError, "params hold the adapter"),
        (({}, adapters), ValueError, "params holds no array"),
        ((params, params), TypeError, "adapters must hold adapters"),
    ]
    for args, error, message in cases:
        with pytest.raises(error, match=message):
            init(*args)


@operator
class Lengthened(Subspace):
    """A subspace that has another array behind its directions."""

    lengths: Any = given(lambda op: np.asarray(op.lengths))

    name = "lengthened"


@pytest.mark.parametrize("is_damped", [False, True])
def test_directions_are_found_by_their_names(is_damped):
    """Of operators with other arrays, too, which stay as they are."""
    first, second = np.eye(8, 2), np.eye(8, 2, -2)
    op = Lengthened(8, 8, 2, in_basis=first, out_basis=first, lengths=np.ones((8, 2)))
    if is_damped:
        op = Damped(8, 8, 2, inner=op, directions=np.eye(8, 1, -7))
    spec = AdapterSpec(op, (8, 8))
    bases = jnp.asarray(first), jnp.asarray(second)
    moved = gradients.moved(spec, *bases).operator
    inner = moved.inner if is_damped else moved
    for basis, expected in zip((inner.in_basis, inner.out_basis), bases, strict=True):
        np.testing.assert_array_equal(wide(basis), expected)
    np.testing.assert_array_equal(inner.lengths, np.ones((8, 2)))
    ((_, turned),) = gradients.at_random({("fc",): spec}, jax.random.key(0)).items()
    inner = turned.operator.inner if is_damped else turned.operator
    np.testing.assert_array_equal(inner.lengths, np.ones((8, 2)))
    assert not np.allclose(wide(inner.in_basis), first, atol=0.1)


# --- Accumulated gradients, broken batches, and which base an adapter belongs to ---


def small_task(**settings):
    """One kernel between random maps, and the squares of its output."""
    params = {"fc": {"kernel": random(2, 24, 12)}}
    config = MoRAConfig(square_rank=4, operator="orthogonal", **settings)
    adapters = mora_jax.init(mora_jax.plan(params, config))

    def loss(adapters, params, x):
        return jnp.mean((x @ mora_jax.fold(params, adapters)["fc"]["kernel"]) ** 2)

    return loss, params, adapters


def run(step, state, batches):
    for batch in batches:
        state, _ = step(state, batch)
    return state


@pytest.mark.parametrize("wrapped", [False, True])
def test_accumulated_gradients_arrive_whatever_the_period(wrapped):
    """Two halves of a batch are one step, with a renewal at each step."""
    loss, params, adapters = small_task()
    tx = optax.MultiSteps(optax.sgd(0.1), 2)
    accumulated = tx if wrapped else tx.gradient_transformation()
    init, step, _ = remora.renewing(loss, accumulated, every=1, along="random")
    got = run(jax.jit(step), init(params, adapters), [X[:8], X[8:]] * 2)
    init, step, _ = remora.renewing(loss, optax.sgd(0.1), every=1, along="random")
    first = run(jax.jit(step), init(params, adapters), [X])
    assert int(got.renewals) == 2
    moved = mora_jax.merge(got.params, got.adapters)["fc"]["kernel"]
    assert float(jnp.abs(moved - params["fc"]["kernel"]).max()) > 0
    init, step, _ = remora.renewing(loss, accumulated, every=1, along="random")
    halves = run(jax.jit(step), init(params, adapters), [X[:8], X[8:]])
    close(
        mora_jax.merge(halves.params, halves.adapters),
        mora_jax.merge(first.params, first.adapters),
    )


def test_a_renewal_waits_for_a_complete_sum():
    loss, params, adapters = small_task()
    tx = optax.MultiSteps(optax.sgd(0.1), 2)
    init, step, renew = remora.renewing(loss, tx, lambda k: k < 0, along="random")
    state = run(jax.jit(step), init(params, adapters), [X[:8]])
    after = jax.jit(renew)(state, X[:8])
    assert int(after.renewals) == 0 and bool(after.pending)
    close(after.opt_state.acc_grads, state.opt_state.acc_grads)
    done = run(jax.jit(step), after, [X[8:], X[:8]])
    assert int(done.renewals) == 1 and not bool(done.pending)


@pytest.mark.parametrize("along", ["gradient", "random"])
def test_a_broken_batch_does_not_reach_the_params(along):
    loss, params, adapters = small_task()
    tx = optax.apply_if_finite(optax.sgd(0.1), 5)
    init, step, _ = remora.renewing(loss, tx, every=2, along=along)
    step = jax.jit(step)
    state = run(step, init(params, adapters), [X, X])
    renewals = int(state.renewals)
    broken = run(step, state, [jnp.full_like(X, jnp.nan)])
    arrays = jax.tree.leaves((broken.params, broken.ms, broken.plan))
    assert all(bool(jnp.isfinite(array).all()) for array in arrays)
    if along == "gradient":  # the renewal was due, and comes with the next good batch
        assert int(broken.renewals) == renewals and bool(broken.pending)
        close(broken.params, state.params)
    after = run(step, broken, [X])
    assert int(after.renewals) == renewals + 1 and not bool(after.pending)
    assert bool(jnp.isfinite(loss(after.adapters, after.params, X)))


def test_a_broken_m_is_not_merged():
    loss, params, adapters = small_task()
    init, step, _ = remora.renewing(loss, optax.sgd(0.1), every=2, along="random")
    state = run(jax.jit(step), init(params, adapters), [X, jnp.full_like(X, jnp.nan)])
    after = run(jax.jit(step), state, [X])
    close(after.params, state.params)
    assert bool(after.pending)


def test_adapters_of_a_run_belong_to_its_base():
    loss, params, adapters = small_task()
    init, step, _ = remora.renewing(loss, optax.sgd(0.1), every=2, along="random")
    step = jax.jit(step)
    before = run(step, init(params, adapters), [X, X])
    after = run(step, before, [X])
    merged = mora_jax.merge(after.params, after.adapters)
    assert bool(jnp.isfinite(merged["fc"]["kernel"]).all())
    for state, others in ((before, after.params), (after, before.params)):
        with pytest.raises(ValueError, match="fc/kernel.*any_base"):
            mora_jax.merge(others, state.adapters)


def test_states_across_a_renewal_are_not_averaged():
    loss, params, adapters = small_task()
    init, step, _ = remora.renewing(loss, optax.sgd(0.1), every=2, along="random")
    before = run(jax.jit(step), init(params, adapters), [X, X])
    after = run(jax.jit(step), before, [X])
    mean = jax.tree.map(lambda a, b: (a + b) / 2, before, after)
    cast = jax.tree.map(lambda m, a: m.astype(a.dtype), mean, after)
    for state in (mean, cast):
        with pytest.raises((TypeError, ValueError), match="state must be as init"):
            _ = state.adapters
        with pytest.raises((TypeError, ValueError), match="state must be as init"):
            step(state, X)


@pytest.mark.parametrize("operator", ["orthogonal", "hadamard"])
def test_the_shapes_of_a_state_are_known_without_making_it(operator):
    loss, params, adapters = small_task()
    config = MoRAConfig(square_rank=4, operator=operator)
    adapters = mora_jax.init(mora_jax.plan(params, config))
    init, _, _ = remora.renewing(loss, TX, every=2)
    shapes = jax.eval_shape(init, params, adapters)
    state = init(params, adapters)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True)
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)


@pytest.mark.parametrize(
    ("every", "error", "match"),
    [
        (0, ValueError, "every must be a positive integer, got 0"),
        (-2, ValueError, "every must be a positive integer, got -2"),
        (2.0, TypeError, "every must be a positive integer, got 2.0"),
        (True, TypeError, "every must be a positive integer, got True"),
        (lambda k: k, TypeError, "every must return True or False"),
        (lambda k: k % 2 == 0 and k > 2, TypeError, "every must be .* jit can trace"),
        (lambda: True, TypeError, "every must be"),
        (lambda k: None, TypeError, "every must be"),
    ],
)
def test_periods_that_are_none(every, error, match):
    loss, _, _ = small_task()
    with pytest.raises(error, match=match):
        remora.renewing(loss, TX, every)
