"""What Flax NNX alone has: its state, its transformations, its optimizer, MoRALinear.

The laws over all models are in test_model_laws.py.
"""

import copy
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_files import slow
from flax import nnx
from helpers import bare, close, largest, random, random_like
from twins import CONFIG, TWINS, X, nnx_model

from mora_jax import (
    Adapter,
    AdapterSpec,
    MoRAConfig,
    MoRAWarning,
    init,
    load,
    merge,
    register_layer,
    save,
    split,
)
from mora_jax import nnx as mora
from mora_jax.nnx import MoRALinear, MoRAParam

DROPOUT = MoRAConfig(rank=2, dropout=0.5)
FEW = ("methods", "normalised", slow("fused-gru"), slow("t-kernel"), "scan-remat")
by_model = pytest.mark.parametrize("name", FEW)


def trained(model, scale=0.3):
    """`model` with adapters as after training: far from zero."""
    mora.set_adapters(model, random_like(mora.adapters(model), scale))
    return model


def make(name):
    """(model, what to adapt)."""
    return nnx_model(TWINS[name]), TWINS[name].config


def adapted(name):
    """(model, the same with adapters as after training, input)."""
    model, config = make(name)
    return model, trained(mora.wrap(model, config)), TWINS[name].x


def linear(ins=12, outs=12, seed=0, **settings):
    return nnx.Linear(ins, outs, rngs=nnx.Rngs(seed), **settings)


def stack_of(make_layer):
    """Three layers as one module, to be scanned."""
    return nnx.split_rngs(splits=3)(nnx.vmap(make_layer))(nnx.Rngs(0))


def leaves(state):
    """{slash-joined path: array} of a state."""
    return {"/".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(state)}


def types_of(model):
    return [type(node) for _, node in nnx.iter_graph(model)]


@nnx.jit
def run(model, x):
    return model(x)


scan = nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
one_after_another = scan(lambda x, layer: layer(x))


# --- The base in an adapted model ---


@by_model
def test_the_base_is_where_it_was_and_comes_back(name):
    """A checkpoint of the base loads into the adapted model, and the other way."""
    model, both, x = adapted(name)
    before, back = leaves(nnx.state(model)), mora.unwrap(both)
    for kept in (nnx.state(both, nnx.Not(MoRAParam)), nnx.state(back)):
        chex.assert_trees_all_equal(leaves(kept), before)
    y, base = run(both, x), run(model, x)
    assert y.dtype == base.dtype and largest(y - base) > 1e-2
    merged = mora.merge_adapters(both)
    assert types_of(back) == types_of(merged) == types_of(model)
    close(run(merged, x), y)
    nnx.update(both, jax.tree.map(lambda leaf: 2 * leaf, nnx.state(model, nnx.Param)))
    mora.set_adapters(both, jax.tree.map(jnp.zeros_like, mora.adapters(both)))
    nnx.update(both, nnx.state(model))
    chex.assert_trees_all_equal(run(both, x), base)
    chex.assert_trees_all_equal(run(back, x), base)


@by_model
def test_one_program_serves_models_that_are_wrapped_again(name):
    model, config = make(name)
    x, traces = TWINS[name].x, []

    @nnx.jit
    def jitted(model, x):
        traces.append(None)
        return model(x)

    y = jitted(first := mora.wrap(model, config), x)
    jitted(trained(first), x)
    jitted(trained(mora.wrap(model, config)), x)
    chex.assert_trees_all_equal(jitted(mora.wrap(model, config), x), y)
    assert len(traces) == 1


@by_model
def test_what_is_set_is_held_by_split_clone_and_copy(name):
    model, config = make(name)
    chosen, x = mora.plan(model, config), TWINS[name].x
    both = mora.wrap(model, chosen)
    assert mora.plan_of(both) == chosen
    chex.assert_trees_all_equal(mora.adapters(both), init(chosen))
    mora.set_adapters(both, new := random_like(mora.adapters(both)))
    chex.assert_trees_all_equal(mora.adapters(both), new)
    y = run(both, x)
    graph, adapters, rest = nnx.split(both, MoRAParam, ...)
    merged = nnx.merge(graph, adapters, rest)
    for again in (merged, nnx.clone(both), copy.deepcopy(both)):
        states = (leaves(nnx.state(one, nnx.Param)) for one in (again, both))
        chex.assert_trees_all_equal(*states)
        chex.assert_trees_all_equal(run(again, x), y)
    functional = jax.jit(lambda adapters, rest: nnx.merge(graph, adapters, rest)(x))
    close(functional(adapters, rest), y)
    if name == "methods":  # many adapters on one base
        several = jax.tree.map(lambda m: jnp.stack([0 * m, m]), adapters)
        close(jax.vmap(functional, (0, None))(several, rest)[1], y)


def test_the_model_itself_is_left_alone_and_names_stay():
    model, config = make("methods")
    before = leaves(nnx.state(model))
    both = trained(mora.wrap(model, config))
    assert type(model.encoder) is nnx.Linear
    assert isinstance(both.encoder, nnx.Linear)
    assert both.encoder.kernel[...] is model.encoder.kernel[...]  # and no copy
    assert repr(type(both.encoder)) == repr(nnx.Linear)
    assert "kernel_mora=MoRAParam" in repr(both)
    merged = mora.merge_adapters(both)
    close((both.encode(X), both.decode(X)), (merged.encode(X), merged.decode(X)))
    chex.assert_trees_all_equal(leaves(nnx.state(model)), before)


RANK_ONE = {"rank": 1, "operator": "sharing", "alpha": 2.0}


def mora_plan(model, config):
    """The plan of an adapted model's base."""
    return mora.plan(mora.unwrap(model), config)


# --- What an M was made for ---


def pair():
    """Two models of one base: their M's have equal shapes, and are for two deltas."""
    base, _ = make("methods")
    for scale, operator in ((0.1, "orthogonal"), (1.1, "hadamard")):
        config = MoRAConfig(rank=2, operator=operator, seed=1)
        yield trained(mora.wrap(base, config), scale)


def test_a_model_computes_what_the_adapters_that_are_set_say():
    one, two = pair()
    state, tree = nnx.state(one, MoRAParam), mora.adapters(one)
    merged = nnx.clone(mora.unwrap(two))
    nnx.update(merged, merge(nnx.state(merged, nnx.Param), tree))
    for given in (state, tree):
        model = nnx.clone(two)
        mora.set_adapters(model, given)
        assert mora.plan_of(model) == mora.plan_of(one) != mora.plan_of(two)
        chex.assert_trees_all_equal(mora.adapters(model), tree)
        assert mora.adapters(two)["encoder"]["kernel_mora"].operator.name == "hadamard"
        for run in (lambda model: model(X), nnx.jit(lambda model: model(X))):
            close(run(model), run(one))
            close(run(model), merged(X))


def test_numbers_alone_are_not_taken_for_another_operators():
    one, two = pair()
    before, tree = mora.adapters(two), mora.adapters(one)

    def assign(value):
        two.encoder.kernel_mora[...] = value

    for call in (
        lambda: assign(one.encoder.kernel_mora),
        lambda: assign(tree["encoder"]["kernel_mora"]),
        lambda: nnx.update(two, tree),
    ):
        with pytest.raises(ValueError, match="kernel_mora was made for operator.name"):
            call()
    chex.assert_trees_all_equal(mora.adapters(two), before)
    nnx.update(two, doubled := jax.tree.map(lambda m: 2 * m, before))
    chex.assert_trees_all_equal(mora.adapters(two), doubled)
    assert isinstance(two.encoder.kernel_mora[...], jax.Array)


def test_adapters_of_other_kernels_are_refused_by_name():
    one, two = pair()
    before, tree = mora.adapters(two), mora.adapters(one)
    turned = AdapterSpec.from_config(CONFIG, (12, 12), "oi")
    other = AdapterSpec.from_config(CONFIG, (12, 10))
    add = {"more": {"kernel_mora": Adapter(jnp.zeros((6, 6)), turned)}}

    def replaced(spec):
        adapter = Adapter(jnp.zeros(spec.shape), spec)
        return {**tree, "encoder": {"kernel_mora": adapter}}

    at, kernel = "at 'encoder/kernel', the plan", r"a kernel \(12, 12\) with axes 'io'"
    for message, given in (
        (f"adapters have nothing {at} {kernel}", {"decoder": tree["decoder"]}),
        (r"adapters have a kernel .* at 'more/kernel', the plan nothing", tree | add),
        (rf"adapters have a kernel \(12, 12\) with axes 'oi' {at}", replaced(turned)),
        (rf"adapters have a kernel \(12, 10\) .* {at} {kernel}", replaced(other)),
    ):
        with pytest.raises(ValueError, match=message):
            mora.set_adapters(two, given)
    chex.assert_trees_all_equal(mora.adapters(two), before)


def test_adapters_of_another_rank_learn_where_they_are_set():
    """Gradients and the state of the optimizer are those of what is set."""
    model, _ = pair()
    base = nnx.state(model, nnx.Not(MoRAParam))
    new = mora_plan(model, MoRAConfig(**RANK_ONE))
    mora.set_adapters(model, init(new))
    tx = mora.adapter_optimizer(model, optax.adam(1e-2))
    traces = []

    @nnx.jit
    def step(model, tx):
        traces.append(None)
        grad = mora.value_and_grad(lambda model: jnp.mean(model(X) ** 2))
        loss, grads = grad(model)
        tx.update(model, grads)
        return loss, grads

    first, grads = step(model, tx)
    for variable in jax.tree.leaves(grads, is_leaf=lambda v: isinstance(v, MoRAParam)):
        assert variable.spec.operator.name == "sharing"
        assert variable.shape == variable.spec.shape and np.abs(variable).max() > 0
    assert step(model, tx)[0] < first and len(traces) == 1
    mora.set_adapters(model, init(mora_plan(model, MoRAConfig(**RANK_ONE))))
    step(model, tx)  # equal specs of another plan
    assert len(traces) == 1 and mora.plan_of(model) == new
    chex.assert_trees_all_equal(nnx.state(model, nnx.Not(MoRAParam)), base)


def test_dropout_that_is_set_is_told_and_follows_train_and_eval():
    still, told = mora.wrap(linear(), CONFIG), "until model.eval"
    dropping = trained(mora.wrap(linear(), DROPOUT))
    with pytest.warns(MoRAWarning, match=f"have dropout, .* old ones lacked.*{told}"):
        mora.set_adapters(still, mora.adapters(dropping))
    np.testing.assert_array_equal(still(X), dropping(X))
    for model in (still, dropping):
        model.eval()
    np.testing.assert_array_equal(still(X), dropping(X))
    mora.set_adapters(still, mora.adapters(dropping))  # and stays so
    close(still(X), mora.merge_adapters(dropping)(X))
    mora.set_adapters(dropping, mora.adapters(trained(mora.wrap(linear(), CONFIG))))
    dropping.train()
    close(dropping(X), mora.merge_adapters(dropping)(X))


def test_trained_arrays_keep_the_dtypes_of_their_model():
    """A copy that was trained beside bfloat16 is not rounded beside float32."""
    config = MoRAConfig(rank=2, train="bias")
    low = linear(param_dtype=jnp.bfloat16)
    low, model = (mora.wrap(base, config) for base in (low, linear()))
    mora.set_adapters(low, given := random_like(mora.adapters(low)))
    mora.set_adapters(model, given)
    assert mora.plan_of(model).trained["bias"].base_dtype == jnp.float32
    for bias in (mora.merge_adapters(model).bias, model.bias):
        np.testing.assert_array_equal(bias[...], given["bias"].m)
    close(model(X), mora.merge_adapters(model)(X))


def test_flax_moves_numbers_together_with_what_they_mean():
    """Else a model would run another operator over the M's of this one."""
    one, two = pair()
    old, expected = one.encoder.kernel_mora, one.encode(X)
    assert np.abs(two.encode(X) - expected).max() > 1e-3
    updated, copied, replaced = (nnx.clone(two) for _ in range(3))
    nnx.update(updated, nnx.state(one, MoRAParam))
    copied.encoder.kernel_mora.copy_from(old)
    replaced.encoder.kernel_mora = old.replace(old[...] + 0)
    merged = nnx.merge(nnx.graphdef(two), nnx.state(one))
    for model in (updated, copied, replaced, merged):
        np.testing.assert_array_equal(model.encode(X), expected)
        close(nnx.jit(lambda model, x: model.encode(x))(model, X), expected)
        assert model.encoder.kernel_mora.spec == old.spec


def test_equal_layers_can_be_stacked():
    """They differ in no metadata; then they run under nnx.scan."""
    layers = [trained(mora.wrap(linear(seed=k), CONFIG), 0.1 * k) for k in range(3)]
    graphs, states = zip(*map(nnx.split, layers), strict=True)
    assert len(set(graphs)) == 1
    stack = nnx.merge(graphs[0], jax.tree.map(lambda *a: jnp.stack(a), *states))
    expected = functools.reduce(lambda x, layer: layer(x), layers, X)
    close(one_after_another(X, stack), expected)
    made = stack_of(lambda rngs: MoRALinear(12, 12, config=CONFIG, rngs=rngs))
    for model in (stack, trained(made)):
        assert [spec.axes for spec in mora.plan_of(model).values()] == ["sio"]
        base, adapters = split(nnx.state(model, nnx.Param))
        merged = merge(base, adapters)  # whose specs are of one layer
        expected = nnx.state(mora.merge_adapters(model), nnx.Param)
        chex.assert_trees_all_equal(merged, expected)
        other = mora.plan(mora.unwrap(model), MoRAConfig(**RANK_ONE))
        mora.set_adapters(one := nnx.clone(model), random_like(init(other), 0.1))
        y = one_after_another(X, one)
        close(one_after_another(X, mora.merge_adapters(one)), y, 1e-4)
        y = one_after_another(X, model)
        close(one_after_another(X, mora.merge_adapters(model)), y, 1e-4)


# --- Training ---


@pytest.mark.parametrize("name", ["normalised", "scan-remat"])
def test_training_moves_adapters_alone(name):
    """A base stays alive beside donated adapters; code for nnx.LoRAParam finds M."""
    base, config = make(name)
    model = mora.wrap(base, config)
    found, expected = (nnx.state(model, kind) for kind in (nnx.LoRAParam, MoRAParam))
    assert leaves(found).keys() == leaves(expected).keys()
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-2))
    optimizer = mora.adapter_optimizer(model, tx)
    size = mora.plan_of(model).trainable_parameters
    state = nnx.state(optimizer, nnx.Not(MoRAParam))
    held = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert 2 * size <= held < 2 * size + 10  # adam's two moments, and counters
    kinds = (MoRAParam, nnx.optimizer.OptState)
    graph, donated, frozen = nnx.split((model, optimizer), kinds, ...)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(donated, frozen, x):
        model, optimizer = nnx.merge(graph, donated, frozen)
        grad = mora.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2))
        loss, grads = grad(model, x)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer), kinds), loss

    kept = (nnx.Param, nnx.BatchStat)
    before = jax.tree.map(np.array, leaves(nnx.state(base, kept)))
    first, losses = jax.tree.leaves(donated), []
    for _ in range(10):
        donated, loss = step(donated, frozen, X)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert all(array.is_deleted() for array in first)
    nnx.update((model, optimizer), donated)
    for one in (base, mora.unwrap(model)):
        chex.assert_trees_all_equal(leaves(nnx.state(one, kept)), before)
    assert np.abs(model(X) - base(X)).max() > 1e-3


def test_value_and_grad_of_another_argument_with_aux():
    def loss(x, model):
        y = model(x)
        return jnp.sum(y**2), y

    grad = mora.value_and_grad(loss, argnums=1, has_aux=True)
    (value, y), grads = grad(X, trained(mora.wrap(linear(), CONFIG)))
    np.testing.assert_allclose(value, jnp.sum(y**2), rtol=1e-6)
    assert list(grads) == ["kernel_mora"]


def test_an_optimizer_takes_gradients_of_the_adapters_alone():
    """A gradient of the base would cost memory, and change nothing."""
    model, loss = mora.wrap(linear(), CONFIG), lambda model: jnp.sum(model(X) ** 2)
    optimizer = mora.adapter_optimizer(model, optax.sgd(0.1))
    for where in (MoRAParam, nnx.LoRAParam):
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, where))(model)
        optimizer.update(model, grads)
    pair = mora.value_and_grad(loss)(model)
    for wrong, path in ((nnx.grad(loss)(model), "bias"), (pair, "0"), ({}, "kernel_m")):
        with pytest.raises(ValueError, match=f"mora_jax.nnx.value_and_grad.*'{path}"):
            optimizer.update(model, wrong)
    nnx.jit(lambda *args: args[0].update(*args[1:]))(optimizer, model, pair[1])
    with pytest.raises(TypeError, match="grads"):  # as Flax has it
        optimizer.update(model)


def test_a_model_without_adapters_trains_nothing_and_says_so():
    """As where somebody forgets that `wrap` returns another model."""
    model = linear()
    mora.wrap(model, CONFIG)
    with pytest.raises(ValueError, match="model has no adapters; see mora_jax.nnx"):
        mora.value_and_grad(lambda model: jnp.sum(model(X)))(model)


def test_adapters_of_another_base_are_refused(tmp_path):
    model = trained(mora.wrap(linear(), CONFIG))
    params = nnx.state(linear(), nnx.Param)
    save(tmp_path, mora.adapters(model), params=params)
    adapters = load(tmp_path)
    same, other = (mora.wrap(linear(seed=seed), CONFIG) for seed in (0, 1))
    mora.set_adapters(same, adapters)
    with pytest.raises(ValueError, match="'kernel' holds other weights than the base"):
        mora.set_adapters(other, adapters)
    assert not mora.adapters(other)["kernel_mora"].m.any()
    mora.set_adapters(other, adapters, any_base=True)
    chex.assert_trees_all_equal(mora.adapters(other), adapters)


# --- Dropout ---


def dropped(model, x, scales):
    """What `model` gives with its M's times each of `scales`, its first output."""
    graph, ms, rest = nnx.split(model, MoRAParam, ...)

    @jax.jit
    def at(scale, ms, rest):
        y = nnx.merge(graph, jax.tree.map(lambda m: m * scale, ms), rest)(x)
        return jax.tree.leaves(y)[0]

    return np.stack([at(scale, ms, rest) for scale in scales])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["scan-remat", "methods", slow("einsums"), slow("experts")]
)
def test_dropout_follows_train_and_eval(name):
    (model, _), x = make(name), TWINS[name].x
    both = trained(mora.wrap(model, DROPOUT))
    both.eval()
    close(run(both, x), run(mora.merge_adapters(both), x))
    both.train()
    first, second, third = dropped(both, x, jnp.array([1, 1.000001, 1]))
    close(first, jax.tree.leaves(run(both, x))[0])
    chex.assert_trees_all_equal(first, third)  # by M alone, not by what ran before
    assert np.abs(first - second).max() > 1e-3  # the smallest step is a new mask
    back = mora.unwrap(both)
    assert not any(issubclass(cls, nnx.Dropout) for cls in types_of(back))
    assert leaves(nnx.state(back)).keys() == leaves(nnx.state(model)).keys()


def test_dropout_drops_at_its_rate():
    model, ones = linear(40, 40, use_bias=False), jnp.ones((50, 40))
    config, outputs = (
        MoRAConfig(operator="signed_decoupling", square_rank=40, dropout=0.3),
        [],
    )
    for seed in (0, 2**32 - 1):
        both = mora.wrap(model, config, seed=seed)
        mora.set_adapters(
            both, jax.tree.map(lambda _: jnp.eye(40), mora.adapters(both))
        )
        outputs.append(both(ones))
        delta = outputs[-1] - model(ones)
        assert abs(np.mean(np.abs(delta) < 1e-5) - 0.3) < 0.05
        np.testing.assert_allclose(delta.max(), 1 / 0.7, rtol=1e-5)
    assert np.abs(outputs[0] - outputs[1]).max() > 1


@pytest.mark.slow
def test_scanned_layers_drop_in_their_own_way():
    """Even with M's that are equal, as the zeros of the start are."""
    model = stack_of(lambda rngs: nnx.Linear(16, 16, rngs=rngs))
    both = mora.wrap(
        model, MoRAConfig(operator="signed_decoupling", square_rank=16, dropout=0.5)
    )
    eyes = jnp.ones((3, 1, 1)) * jnp.eye(16)
    mora.set_adapters(both, jax.tree.map(lambda _: eyes, mora.adapters(both)))
    each = nnx.scan(in_axes=(0, nnx.Carry), out_axes=(nnx.Carry, 0))
    layer, x = nnx.remat(lambda layer, x: layer(x)), jnp.ones((4, 16))
    run = each(lambda one, x: (x, layer(one, x)))
    (_, y), (_, again), (_, base) = run(both, x), run(both, x), run(model, x)
    kept = np.asarray(y - base > 1)
    assert all((kept[k] != kept[k - 1]).any() for k in range(3))
    chex.assert_trees_all_equal(y, again)


def test_no_generator_is_in_the_state():
    """Only the base's variables and M's: what a sampler or a checkpoint expects."""
    model, _ = make("scan-remat")
    state = nnx.state(mora.wrap(model, DROPOUT))
    assert {type(v) for _, v in nnx.to_flat_state(state)} == {nnx.Param, MoRAParam}
    layer = MoRALinear(8, 8, config=DROPOUT, seed=3, rngs=nnx.Rngs(0))
    assert set(nnx.state(layer)) == {"kernel", "bias", "kernel_mora"}
    assert layer.dropout_mora.seed == 3


# --- MoRALinear ---


def test_moralinear_is_linear_and_more():
    layer, base = MoRALinear(12, 10, config=CONFIG, rngs=nnx.Rngs(0)), linear(12, 10)
    chex.assert_trees_all_equal(layer(X), base(X))
    assert set(vars(base)) <= set(vars(layer))
    merged = mora.merge_adapters(trained(layer))
    assert type(merged) is nnx.Linear and type(mora.unwrap(layer)) is nnx.Linear
    close(merged(X), layer(X))
    chex.assert_trees_all_equal(trained(mora.wrap(base, CONFIG))(X), layer(X))


def test_moralinear_settings():
    config = MoRAConfig(rank=2, init="gaussian", dropout=0.5, param_dtype=jnp.float16)
    settings = {"config": config, "use_bias": False, "dtype": jnp.bfloat16}
    layer = MoRALinear(12, 10, **settings, rngs=nnx.Rngs(0))
    assert layer.kernel_mora.dtype == jnp.float16 and layer.bias is None
    assert layer(X).dtype == jnp.bfloat16
    dropping = layer(X)
    layer.eval()
    assert (layer(X) != dropping).any()


# --- Layers of the user's own, and errors ---


class Named(nnx.Module):
    """A layer of a class of its own, with other methods that use its kernel."""

    def __init__(self, rngs):
        self.w = nnx.Param(rngs.params.normal((12, 8)))

    def __call__(self, x):
        return self.project(x)

    def project(self, x):
        return x @ self.w[...]

    def norm(self):
        return jnp.sum(self.w[...] ** 2)


class Registered(Named):
    """The same, known; as a class of its own, or `Named` would not stay unknown."""

    def __call__(self, x):
        return self.project(x)


def test_registered_layers():
    register_layer(Registered, equation="...i,io->...o", kernel="w")
    model = Registered(nnx.Rngs(0))
    both = trained(mora.wrap(model, CONFIG))
    close(both(X), mora.merge_adapters(both)(X))
    assert np.abs(both(X) - model(X)).max() > 1e-2
    message = r"Registered.norm may use .* 'w' in '__call__' is known"
    with pytest.raises(TypeError, match=message):
        both.norm()


class ByEquation(Named):
    """Its equation is known in the call only."""

    def __call__(self, eqn, x):  # pyright: ignore[reportIncompatibleMethodOverride]
        return jnp.einsum(eqn, x, self.w[...])


def test_methods_without_a_rule_call_those_that_have_one():
    class Twice(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(random(1, 12, 12))

        def half(self, x):
            return x @ self.w[...]

        def _both(self, x):
            return self.half(self.half(x))

        def both(self, x):
            return self._both(x)

    class Model(nnx.Module):
        def __init__(self):
            self.twice = Twice()

        def __call__(self, x, method="_both"):
            return getattr(self.twice, method)(x)

    register_layer(Twice, equation="...i,io->...o", kernel="w", method="half")
    x, config = random(2, 3, 12), MoRAConfig(rank=2, targets="twice/w")
    adapted = trained(mora.wrap(Model(), mora.plan(Model(), config, x)))
    close(adapted(x), mora.merge_adapters(adapted)(x))
    with pytest.raises(TypeError, match="Twice.both may use this adapted kernel"):
        adapted(x, "both")


def test_equations_known_in_the_call():
    settings = {"kernel": "w", "argument": "x"}
    register_layer(ByEquation, equation=lambda layer, eqn, x: eqn, **settings)

    class Net(nnx.Module):
        def __init__(self):
            self.layer = ByEquation(nnx.Rngs(0))

        def __call__(self, x):
            return self.layer(x=x, eqn="...i,io->...o")

    model, config = Net(), MoRAConfig(rank=2, targets=".*/w", alpha=0.5)
    with pytest.raises(ValueError, match="layer/w: it is not known .* inputs of"):
        mora.plan(model, config)
    both = trained(mora.wrap(model, mora.plan(model, config, X)))
    close(both(X), mora.merge_adapters(both)(X))
    axes = MoRAConfig(rank=2, targets=".*/w", overrides={".*": {"axes": "io"}})
    assert mora.plan_of(mora.wrap(model, axes))["layer/w"].axes == "io"
    # A stack of them: whether "s" is lifted is not known, and dropout need not know.
    model.layer.w = nnx.Param(random(0, 3, 12, 8))
    config = MoRAConfig(targets=".*/w", overrides={".*": {"axes": "sio"}}, dropout=0.5)
    assert mora.wrap(model, config).layer.dropout_mora.rate == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("layers", [3, 12])
def test_layers_on_another_axis(layers):
    """Also where as many layers as features hide it from the shapes: a call tells."""
    axes = nnx.StateAxes({...: 1})

    @nnx.vmap(out_axes=axes)
    def stacked(key):
        return nnx.Linear(12, 12, use_bias=False, rngs=nnx.Rngs(key))

    class Stack(nnx.Module):
        def __init__(self):
            self.layers = stacked(jax.random.split(jax.random.key(0), layers))

        def __call__(self, x):
            scan = nnx.scan(in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
            return scan(lambda layer, x: layer(x))(self.layers, x)

    adapted = trained(mora.wrap(Stack(), CONFIG, X))
    assert mora.plan_of(adapted)["layers/kernel"].axes == "iso"
    assert adapted.layers.kernel_mora.shape == (6, layers, 6)
    close(adapted(X), mora.merge_adapters(adapted)(X))
    untraced = mora.plan(Stack(), CONFIG)["layers/kernel"]
    assert untraced.axes == ("iso" if layers == 3 else "sio")
    if layers == 12:  # taken to be in front, and refused by the first call
        with pytest.raises(ValueError, match="(fails with an M|reads .*other axes)"):
            mora.wrap(Stack(), CONFIG)(X)


def test_shared_modules_and_kernels():
    model, _ = make("methods")
    model.again = model.encoder
    message = "again/kernel is shared: the model holds 'again' also as 'encoder'"
    with pytest.raises(ValueError, match=message):
        mora.wrap(model, CONFIG)
    mora.wrap(model, MoRAConfig(rank=2, exclude="(encoder|again)/.*"))
    del model.again
    model.tied = linear(seed=1)
    model.tied.kernel = model.encoder.kernel
    with pytest.raises(ValueError, match="'encoder/kernel' also as 'tied/kernel'"):
        mora.wrap(model, CONFIG)


class SharedKernel(nnx.Module):
    def __init__(self):
        self.a, self.b, self.c = linear(seed=1), linear(seed=2), linear(seed=3)
        self.b.kernel = self.a.kernel

    def __call__(self, x):
        return self.c(self.b(self.a(x)))


def test_a_kernel_of_two_layers_is_refused_when_planning_or_excluded():
    model, message = SharedKernel(), "'a/kernel' also as 'b/kernel'; exclude it"
    for inputs in ((), (X,)):
        with pytest.raises(ValueError, match=f"^a/kernel is shared: .*{message}"):
            mora.plan(model, CONFIG, *inputs)
    plan = mora.plan(model, MoRAConfig(rank=2, exclude="a/kernel"), X)
    assert list(plan) == ["c/kernel"] and not plan.unproven
    adapted = mora.wrap(model, plan)
    assert (adapted(X) == model(X)).all()
    mora.set_adapters(adapted, random_like(mora.adapters(adapted)))
    close(adapted(X), mora.merge_adapters(adapted)(X))


@pytest.mark.usefixtures("unchecked")
def test_bad_input():
    (model, config), (einsums, _) = make("methods"), make("einsums")
    both, named = mora.wrap(model, config), Named(nnx.Rngs(0))
    tree, set_adapters = mora.adapters(both), functools.partial(mora.set_adapters, both)
    gaussian = MoRAConfig(rank=2, init="gaussian")
    started = mora.adapters(mora.wrap(model, gaussian, rngs=nnx.Rngs(0)))
    assert all(np.abs(m).max() > 0 for m in jax.tree.leaves(started))
    other = mora.plan(nnx.Sequential(linear()))
    broken, square = mora.wrap(model, config), "kernel_mora must have shape"
    mora.set_adapters(broken, jax.tree.map(lambda m: m * np.nan, tree))

    def wrap(model, target, axes=None):
        overrides = {target: {"axes": axes}} if axes else {}
        mora.wrap(model, MoRAConfig(rank=2, targets=target, overrides=overrides))

    for message, call in {
        "must be a flax.nnx.Module, got <function": lambda: mora.wrap(lambda x: x),
        "flax.nnx.Module, got <class .*Linear": lambda: mora.plan(nnx.Linear),
        "model must be a flax.nnx.Module, got 3": lambda: mora.adapters(3),
        "tx must be an optax": lambda: mora.adapter_optimizer(both, None),
        "rngs must be an nnx.Rngs, got 3": lambda: mora.wrap(model, gaussian, rngs=3),
        "rngs must be an nnx.Rngs, got Array": lambda: mora.wrap(
            model, gaussian, rngs=jax.random.key(0)
        ),
        r"got ArrayImpl at .*plan.adapters\(tree\)": lambda: set_adapters(bare(tree)),
        "w: Named.* may use.*nothing is known": lambda: wrap(named, "w", "io"),
    }.items():
        with pytest.raises(TypeError, match=message):
            call()
    lacks = "adapters have nothing at 'encoder/kernel', the plan a kernel"
    has_none, first = "model has no adapters", "the first at 'decoder/kernel_mora'"
    for message, call in (
        ("targets: '.*q_proj.*' matches no path", lambda: wrap(model, ".*q_proj.*")),
        (has_none, lambda: mora.unwrap(model)),
        (has_none, lambda: mora.merge_adapters(model)),
        (has_none, lambda: mora.adapters(model)),
        (has_none, lambda: mora.plan_of(model)),
        (has_none, lambda: mora.adapter_optimizer(model, optax.sgd(1.0))),
        (f"has adapters already, {first}", lambda: mora.wrap(both, CONFIG)),
        (f"has adapters already, {first}", lambda: mora.plan(both, CONFIG)),
        ("at 'layers/0/kernel', the model has N", lambda: mora.wrap(model, other)),
        ("init='gaussian' needs a key, got N", lambda: mora.wrap(model, gaussian)),
        ("seed must be an", lambda: mora.wrap(model, DROPOUT, seed=-1)),
        ("seed must be an", lambda: mora.wrap(model, CONFIG, seed=-1)),
        ("adapters hold no adapter", lambda: set_adapters({})),
        (square, lambda: set_adapters(jax.tree.map(lambda m: m[:2], tree))),
        ("holds NaN or infinity", lambda: mora.merge_adapters(broken)),
        (lacks, lambda: set_adapters({"decoder": tree["decoder"]})),
        ("w: it is not known how a layer uses it", lambda: wrap(named, "w")),
        ("s/kernel: .*'iio', the layer", lambda: wrap(einsums, "heads/kernel", "iio")),
    ):
        with pytest.raises(ValueError, match=message):
            call()
