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
from flax import nnx
from helpers import close, largest, random, random_like
from twins import CONFIG, TWINS, X, nnx_model

from mora_jax import MoRAConfig, init, merge, register_layer
from mora_jax import nnx as mora
from mora_jax.nnx import MoRALinear, MoRAParam

BASE = nnx.All(nnx.Param, nnx.Not(MoRAParam))
FEW = ("methods", "generals", "normalised", "fused-gru", "t-kernel", "scan-remat")
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


def leaves(state):
    """{slash-joined path: array} of a state."""
    return {"/".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(state)}


def types_of(model):
    return [type(node) for _, node in nnx.iter_graph(model)]


@nnx.jit
def run(model, x):
    return model(x)


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
def test_split_merge_clone_and_copy(name):
    _, both, x = adapted(name)
    y = run(both, x)
    graph, adapters, rest = nnx.split(both, MoRAParam, ...)
    chex.assert_trees_all_equal(run(nnx.merge(graph, adapters, rest), x), y)
    chex.assert_trees_all_equal(run(nnx.clone(both), x), y)
    again = copy.deepcopy(both)
    chex.assert_trees_all_equal(leaves(nnx.state(again)), leaves(nnx.state(both)))
    chex.assert_trees_all_equal(run(again, x), y)
    functional = jax.jit(lambda adapters, rest: nnx.merge(graph, adapters, rest)(x))
    close(functional(adapters, rest), y)


@by_model
def test_plan_of_and_adapters(name):
    model, config = make(name)
    chosen = mora.plan(model, config)
    both = mora.wrap(model, chosen)
    assert mora.plan_of(both) == chosen
    tree = mora.adapters(both)
    chex.assert_trees_all_equal(tree, init(chosen))
    new = random_like(tree)
    mora.set_adapters(both, new)
    chex.assert_trees_all_equal(mora.adapters(both), new)


def test_compiled_and_not_give_the_same():
    for name in ("methods", "t-kernel", "scan-remat"):
        _, both, x = adapted(name)
        close(run(both, x), both(x))


# --- What an M was made for ---

OTHERS = {
    "alpha": MoRAConfig(rank=2, operator="orthogonal", seed=1, alpha=2.0),
    "operator.seed": MoRAConfig(rank=2, operator="orthogonal", seed=2),
    "operator.name": MoRAConfig(rank=2, operator="hadamard", seed=1),
}
"""{what of `pair`'s first model differs: the config of its second}."""


def pair(other):
    """Two models of one base: their M's have equal shapes, and are for two updates."""
    base, _ = make("methods")
    configs = MoRAConfig(rank=2, operator="orthogonal", seed=1), OTHERS[other]
    return [
        trained(mora.wrap(base, config), 0.1 + k) for k, config in enumerate(configs)
    ]


@pytest.mark.parametrize("other", OTHERS)
def test_adapters_of_another_update_are_refused(other):
    one, two = pair(other)
    before = mora.adapters(two)
    state, tree, plan = nnx.state(one, MoRAParam), mora.adapters(one), mora.plan_of(one)
    message = f"decoder/kernel_mora was made for {other}"
    with pytest.raises(ValueError, match=message):
        mora.set_adapters(two, state)
    with pytest.raises(ValueError, match=message):
        mora.set_adapters(two, tree, plan)
    with pytest.raises(ValueError, match="made for another plan .* its digest is"):
        mora.set_adapters(two, tree, plan.digest())
    with pytest.raises(ValueError, match=message):
        merge(mora.adapters(one), state, mora.plan_of(two))
    with pytest.raises(ValueError, match=f"kernel_mora was made for {other}"):
        two.encoder.kernel_mora[...] = one.encoder.kernel_mora
    chex.assert_trees_all_equal(mora.adapters(two), before)
    same = mora.wrap(mora.unwrap(one), plan)
    for given, says in ((state, None), (tree, plan), (tree, plan.digest())):
        mora.set_adapters(same, given, says)
        chex.assert_trees_all_equal(mora.adapters(same), tree)


@pytest.mark.parametrize("other", OTHERS)
def test_flax_moves_numbers_together_with_what_they_mean(other):
    """Else a model would run another operator over the M's of this one."""
    one, two = pair(other)
    state = nnx.state(one, MoRAParam)
    expected = one.encode(X)
    assert np.abs(two.encode(X) - expected).max() > 1e-3

    def update():
        nnx.update(model := nnx.clone(two), state)
        return model

    def merged():
        return nnx.merge(nnx.graphdef(two), nnx.state(one))

    def copied():
        model = nnx.clone(two)
        model.encoder.kernel_mora.copy_from(one.encoder.kernel_mora)
        return model

    def replaced():
        model = nnx.clone(two)
        old = one.encoder.kernel_mora
        model.encoder.kernel_mora = old.replace(old[...] + 0)
        return model

    for make_model in (update, merged, copied, replaced):
        model = make_model()
        np.testing.assert_array_equal(model.encode(X), expected)
        run_jitted = nnx.jit(lambda model, x: model.encode(x))
        np.testing.assert_allclose(run_jitted(model, X), expected, atol=1e-5)
        assert model.encoder.kernel_mora.spec == one.encoder.kernel_mora.spec


def test_donated_adapters_leave_the_base_alive():
    base, config = make("methods")
    model = mora.wrap(base, config)
    optimizer = mora.adapter_optimizer(model, optax.adam(1e-2))
    kinds = (MoRAParam, nnx.optimizer.OptState)
    graph, donated, frozen = nnx.split((model, optimizer), kinds, ...)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(donated, frozen, x):
        model, optimizer = nnx.merge(graph, donated, frozen)
        grads = mora.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2))(model, x)
        optimizer.update(model, grads[1])
        return nnx.state((model, optimizer), kinds)

    before = jax.tree.leaves(donated)
    for _ in range(2):
        donated = step(donated, frozen, X)
    assert all(array.is_deleted() for array in before)
    nnx.update((model, optimizer), donated)
    assert not any(array.is_deleted() for array in jax.tree.leaves(nnx.state(base)))
    assert np.abs(model(X) - base(X)).max() > 1e-3


def test_the_model_itself_is_left_alone():
    model, config = make("methods")
    before = leaves(nnx.state(model))
    adapted = trained(mora.wrap(model, config))
    mora.merge_adapters(adapted)
    chex.assert_trees_all_equal(leaves(nnx.state(model)), before)
    assert type(model.encoder) is nnx.Linear
    assert adapted.encoder.kernel[...] is model.encoder.kernel[...]  # and no copy


def test_names_stay():
    adapted = mora.wrap(*make("methods"))
    assert isinstance(adapted.encoder, nnx.Linear)
    assert repr(type(adapted.encoder)) == repr(nnx.Linear)
    assert "kernel_mora=MoRAParam" in repr(adapted)


def test_methods():
    model, config = make("methods")
    adapted = trained(mora.wrap(model, config))
    merged = mora.merge_adapters(adapted)
    np.testing.assert_allclose(adapted.encode(X), merged.encode(X), atol=1e-5)
    np.testing.assert_allclose(adapted.decode(X), merged.decode(X), atol=1e-5)


def test_layers_adapted_alone_can_be_stacked():
    """Equal layers differ in no metadata; then they run under nnx.scan."""
    layers = [nnx.Linear(12, 12, rngs=nnx.Rngs(k)) for k in range(3)]
    adapted = [
        trained(mora.wrap(layer, CONFIG), 0.1 * k) for k, layer in enumerate(layers)
    ]
    graphs, states = zip(*map(nnx.split, adapted), strict=True)
    assert len(set(graphs)) == 1
    stack = nnx.merge(graphs[0], jax.tree.map(lambda *a: jnp.stack(a), *states))
    scan = nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    y = scan(lambda x, layer: layer(x))(X, stack)
    expected = functools.reduce(lambda x, layer: layer(x), adapted, X)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert [spec.axes for spec in mora.plan_of(stack).specs] == ["sio"]
    merged = mora.merge_adapters(stack)
    y = scan(lambda x, layer: layer(x))(X, merged)
    np.testing.assert_allclose(y, expected, atol=1e-4)


def test_vmap_over_adapters():
    """Many adapters on one base, in one call."""
    model, config = make("methods")
    adapted = mora.wrap(model, config)
    several = [trained(nnx.clone(adapted), scale) for scale in (0.1, 0.2, 0.3)]
    graph, _, rest = nnx.split(adapted, MoRAParam, ...)
    states = [nnx.state(m, MoRAParam) for m in several]
    stacked = jax.tree.map(lambda *ms: jnp.stack(ms), *states)
    y = jax.vmap(lambda a: nnx.merge(graph, a, rest)(X))(stacked)
    np.testing.assert_allclose(y, jnp.stack([m(X) for m in several]), atol=1e-5)


# --- Training ---


@pytest.mark.parametrize("name", ["methods", "normalised"])
def test_training_moves_adapters_alone(name):
    model, config = make(name)
    adapted = mora.wrap(model, config)
    before = leaves(nnx.state(adapted, BASE))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-2))
    optimizer = mora.adapter_optimizer(adapted, tx)
    loss = mora.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2))

    @nnx.jit
    def step(model, optimizer, x):
        value, grads = loss(model, x)
        optimizer.update(model, grads)
        return value

    losses = [float(step(adapted, optimizer, X)) for _ in range(10)]
    assert losses[-1] < 0.9 * losses[0]
    after = leaves(nnx.state(adapted, BASE))
    chex.assert_trees_all_equal(after, before)
    size = mora.plan_of(adapted).trainable_parameters
    state = nnx.state(optimizer, nnx.Not(MoRAParam))
    held = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert 2 * size <= held < 2 * size + 10  # adam's two moments, and counters


def test_training_by_the_filter_of_lora():
    """Code written for nnx.LoRAParam trains the M's as it is."""
    adapted = mora.wrap(*make("methods"))
    assert (
        leaves(nnx.state(adapted, nnx.LoRAParam)).keys()
        == leaves(nnx.state(adapted, MoRAParam)).keys()
    )
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    grads = nnx.grad(lambda model: jnp.sum(model(X) ** 2), argnums=wrt)(adapted)
    optimizer = nnx.Optimizer(adapted, optax.sgd(0.1), wrt=nnx.LoRAParam)
    optimizer.update(adapted, grads)
    assert all(np.abs(m).max() > 0 for m in jax.tree.leaves(mora.adapters(adapted)))


def test_value_and_grad_of_another_argument_with_aux():
    adapted = trained(mora.wrap(*make("dense")))

    def loss(x, model):
        y = model(x)
        return jnp.sum(y**2), y

    grad = mora.value_and_grad(loss, argnums=1, has_aux=True)
    (value, y), grads = grad(X, adapted)
    np.testing.assert_allclose(value, jnp.sum(y**2), rtol=1e-6)
    assert list(grads) == ["kernel_mora"]


# --- Dropout ---


def dropped(model, x, scales):
    """What `model` gives with its M's times each of `scales`."""
    graph, ms, rest = nnx.split(model, mora.MoRAParam, ...)

    @jax.jit
    def at(scale, ms, rest):
        return nnx.merge(graph, jax.tree.map(lambda m: m * scale, ms), rest)(x)

    return np.stack([at(scale, ms, rest) for scale in scales])


def test_dropout_follows_train_and_eval():
    config = MoRAConfig(rank=2, dropout=0.5)
    model = nnx.Linear(12, 12, rngs=nnx.Rngs(0))
    adapted = trained(mora.wrap(model, config))
    adapted.eval()
    still = adapted(X)
    np.testing.assert_allclose(still, mora.merge_adapters(adapted)(X), atol=1e-5)
    adapted.train()
    first, second, third = dropped(adapted, X, jnp.array([1, 1.000001, 1]))
    chex.assert_trees_all_close(first, adapted(X), atol=1e-6)
    chex.assert_trees_all_equal(first, third)  # by M alone, not by what ran before
    assert np.abs(first - second).max() > 1e-2  # the smallest step is a new mask
    mean = dropped(adapted, X, 1 + 1e-6 * jnp.arange(400)).mean(0)
    assert np.abs(mean - still).max() < 0.25 * np.abs(still - model(X)).max()
    assert type(mora.unwrap(adapted)) is nnx.Linear
    assert "dropout_mora" not in vars(mora.unwrap(adapted))


def test_dropout_drops_at_its_rate():
    ones, config = jnp.ones((50, 40)), MoRAConfig(square_rank=40, dropout=0.3)
    for seed in (0, 2**32 - 1):
        model = nnx.Linear(40, 40, use_bias=False, rngs=nnx.Rngs(0))
        adapted = mora.wrap(model, config, seed=seed)
        mora.set_adapters(adapted, {"kernel_mora": jnp.eye(40)})
        update = adapted(ones) - model(ones)
        assert abs(np.mean(np.abs(update) < 1e-5) - 0.3) < 0.05
        np.testing.assert_allclose(update.max(), 1 / 0.7, rtol=1e-5)
    other = mora.wrap(model, config, seed=1)
    mora.set_adapters(other, {"kernel_mora": jnp.eye(40)})
    assert np.abs(other(ones) - adapted(ones)).max() > 1


def test_dropout_differs_between_layers_at_the_start():
    """Where every M is zero still."""
    model = nnx.List([nnx.Linear(12, 12, rngs=nnx.Rngs(k)) for k in range(2)])
    adapted = mora.wrap(model, MoRAConfig(rank=2, dropout=0.5))
    first, second, again = (
        jax.random.key_data(layer.dropout_mora.key(layer.kernel_mora[...], kernel))
        for layer, kernel in (
            (adapted[0], adapted[0].kernel),
            (adapted[1], adapted[1].kernel),
            (adapted[1], adapted[0].kernel),
        )
    )
    assert (first != second).any() and (first == again).all()


@pytest.mark.parametrize("name", ["scan", "vmap", "einsums", "normalised"])
def test_dropout_in_stacks(name):
    (model, _), x = make(name), TWINS[name].x
    config = MoRAConfig(rank=2, dropout=0.5)
    adapted = trained(mora.wrap(model, config))
    adapted.train()
    first, second, third = dropped(adapted, x, jnp.array([1, 1.000001, 1]))
    assert np.abs(first - second).max() > 1e-3
    chex.assert_trees_all_equal(first, third)
    adapted.eval()
    chex.assert_trees_all_equal(run(adapted, x), run(adapted, x))


@pytest.mark.parametrize("transform", [lambda f: f, nnx.remat], ids=["", "remat"])
def test_scanned_layers_drop_in_their_own_way(transform):
    """Even with M's that are equal, as the zeros of the start are."""

    class Stack(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda rngs: nnx.Linear(16, 16, rngs=rngs))
            self.layers = nnx.split_rngs(splits=3)(make)(rngs)

        def __call__(self, x):
            layer = transform(lambda layer, x: layer(x))
            scan = nnx.scan(in_axes=(0, nnx.Carry), out_axes=(nnx.Carry, 0))
            return scan(lambda one, x: (x, layer(one, x)))(self.layers, x)[1]

    model = Stack(nnx.Rngs(0))
    adapted = mora.wrap(model, MoRAConfig(square_rank=16, dropout=0.5))
    ones = {"layers": {"kernel_mora": jnp.ones((3, 1, 1)) * jnp.eye(16)}}
    mora.set_adapters(adapted, ones)
    x = jnp.ones((4, 16))
    kept = np.asarray(adapted(x) - model(x) > 1)
    assert all((kept[k] != kept[k - 1]).any() for k in range(3))
    chex.assert_trees_all_equal(adapted(x), adapted(x))


def test_no_generator_is_in_the_state():
    """Only the base's variables and M's: what a sampler or a checkpoint expects."""
    model, _ = make("scan")
    adapted = mora.wrap(model, MoRAConfig(rank=2, dropout=0.5))
    kinds = {type(v) for _, v in nnx.to_flat_state(nnx.state(adapted))}
    assert kinds == {nnx.Param, mora.MoRAParam}
    layer = MoRALinear(
        8, 8, config=MoRAConfig(rank=2, dropout=0.5), seed=3, rngs=nnx.Rngs(0)
    )
    assert set(nnx.state(layer)) == {"kernel", "bias", "kernel_mora"}
    assert layer.dropout_mora.seed == 3
    with pytest.raises(ValueError, match="seed must be in"):
        mora.wrap(model, MoRAConfig(rank=2, dropout=0.5), seed=-1)


def test_missing_rngs():
    model, _ = make("methods")
    config = MoRAConfig(rank=2, init="gaussian")
    with pytest.raises(ValueError, match="init='gaussian' needs a key, got None"):
        mora.wrap(model, config)
    adapted = mora.wrap(model, config, rngs=nnx.Rngs(0))
    assert all(np.abs(m).max() > 0 for m in jax.tree.leaves(mora.adapters(adapted)))


# --- MoRALinear ---


def test_moralinear_is_linear_and_more():
    layer = MoRALinear(12, 10, config=CONFIG, rngs=nnx.Rngs(0))
    base = nnx.Linear(12, 10, rngs=nnx.Rngs(0))
    chex.assert_trees_all_equal(layer(X), base(X))
    assert set(vars(base)) <= set(vars(layer))
    merged = mora.merge_adapters(trained(layer))
    assert type(merged) is nnx.Linear and type(mora.unwrap(layer)) is nnx.Linear
    np.testing.assert_allclose(merged(X), layer(X), atol=1e-5)
    wrapped = trained(mora.wrap(base, CONFIG))
    chex.assert_trees_all_equal(wrapped(X), layer(X))


def test_moralinear_settings():
    config = MoRAConfig(rank=2, init="gaussian", dropout=0.5, param_dtype=jnp.float16)
    layer = MoRALinear(
        12, 10, config=config, use_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    assert layer.kernel_mora.dtype == jnp.float16 and layer.bias is None
    assert layer(X).dtype == jnp.bfloat16
    dropping = layer(X)
    layer.eval()
    assert (layer(X) != dropping).any()


def test_moralinears_in_a_model_by_hand():
    class Net(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda rngs: MoRALinear(12, 12, config=CONFIG, rngs=rngs))
            self.stack = nnx.split_rngs(splits=3)(make)(rngs)
            self.head = MoRALinear(12, 4, config=CONFIG, rngs=rngs)

        def __call__(self, x):
            scan = nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return self.head(scan(lambda x, layer: layer(x))(x, self.stack))

    model = trained(Net(nnx.Rngs(0)))
    names = {spec.name: spec.axes for spec in mora.plan_of(model).specs}
    assert names == {"head/kernel": "io", "stack/kernel": "sio"}
    merged = mora.merge_adapters(model)
    np.testing.assert_allclose(merged(X), model(X), atol=1e-4)


# --- Checkpoints ---


def test_orbax_restores_a_base_before_and_after_wrapping(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    model, config = make("methods")
    base = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "base", base)
    other = nnx.clone(model)
    nnx.update(other, jax.tree.map(jnp.zeros_like, nnx.state(other, nnx.Param)))
    adapted = mora.wrap(other, config)
    target = nnx.to_pure_dict(nnx.state(adapted, BASE))
    with checkpoint.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "base", target)
    nnx.update(adapted, restored)
    chex.assert_trees_all_equal(adapted(X), model(X))


# --- Errors ---


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


class ByEquation(nnx.Module):
    """Its equation is known in the call only."""

    def __init__(self, rngs):
        self.w = nnx.Param(rngs.params.normal((12, 8)))

    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.w[...])


def test_registered_layers():
    register_layer(Registered, equation="...i,io->...o", kernel="w")
    model = Registered(nnx.Rngs(0))
    adapted = trained(mora.wrap(model, CONFIG))
    np.testing.assert_allclose(adapted(X), mora.merge_adapters(adapted)(X), atol=1e-5)
    assert np.abs(adapted(X) - model(X)).max() > 1e-2
    message = r"Registered.norm may use .* 'w' in '__call__' is known"
    with pytest.raises(TypeError, match=message):
        adapted.norm()


def test_equations_known_in_the_call():
    register_layer(
        ByEquation,
        equation=lambda layer, equation, x: equation,
        kernel="w",
        argument="x",
    )

    class Net(nnx.Module):
        def __init__(self):
            self.layer = ByEquation(nnx.Rngs(0))

        def __call__(self, x):
            return self.layer("...i,io->...o", x)

    model, config = Net(), MoRAConfig(rank=2, targets=".*/w", alpha=0.5)
    with pytest.raises(ValueError, match="layer/w: it is not known .* inputs of"):
        mora.plan(model, config)
    chosen = mora.plan(model, config, X)
    adapted = trained(mora.wrap(model, chosen))
    np.testing.assert_allclose(adapted(X), mora.merge_adapters(adapted)(X), atol=1e-5)
    axes = MoRAConfig(rank=2, targets=".*/w", overrides={".*": {"axes": "io"}})
    assert mora.plan_of(mora.wrap(model, axes)).specs[0].axes == "io"
    # A stack of them: whether "s" is lifted is not known, and dropout need not know.
    model.layer.w = nnx.Param(random(0, 3, 12, 8))
    config = MoRAConfig(targets=".*/w", overrides={".*": {"axes": "sio"}}, dropout=0.5)
    assert mora.wrap(model, config).layer.dropout_mora.rate == 0.5


def test_unknown_layers_are_refused():
    model = Named(nnx.Rngs(0))
    config = MoRAConfig(rank=2, targets="w")
    with pytest.raises(ValueError, match="w: it is not known how a layer uses it"):
        mora.wrap(model, config)
    config = MoRAConfig(rank=2, targets="w", overrides={"w": {"axes": "io"}})
    with pytest.raises(TypeError, match="w: Named.__call__ may use.*nothing is known"):
        mora.wrap(model, config)


def test_wrong_axes_are_refused():
    model, _ = make("einsums")
    path = "heads/kernel"
    config = MoRAConfig(rank=2, targets=path, overrides={path: {"axes": "iio"}})
    with pytest.raises(ValueError, match="heads/kernel: .*'iio', the layer computes"):
        mora.wrap(model, config)


def test_wrapping_twice():
    adapted = mora.wrap(*make("methods"))
    message = "model has adapters already, the first at 'decoder/kernel_mora'"
    for function in (mora.wrap, mora.plan):
        with pytest.raises(ValueError, match=message):
            function(adapted, CONFIG)


def test_shared_modules_and_kernels():
    model, _ = make("methods")
    model.again = model.encoder
    message = "again/kernel is shared: the model holds 'again' also as 'encoder'"
    with pytest.raises(ValueError, match=message):
        mora.wrap(model, CONFIG)
    mora.wrap(model, MoRAConfig(rank=2, exclude="(encoder|again)/.*"))
    del model.again
    model.tied = nnx.Linear(12, 12, rngs=nnx.Rngs(1))
    model.tied.kernel = model.encoder.kernel
    with pytest.raises(ValueError, match="'encoder/kernel' also as 'tied/kernel'"):
        mora.wrap(model, CONFIG)


@pytest.mark.usefixtures("unchecked")
def test_bad_input():
    model, config = make("methods")
    with pytest.raises(TypeError, match="must be a flax.nnx.Module, got function"):
        mora.wrap(lambda x: x)
    with pytest.raises(TypeError, match="flax.nnx.Module, got the class Linear"):
        mora.plan(nnx.Linear)
    with pytest.raises(ValueError, match="targets: '.*q_proj.*' matches no path"):
        mora.wrap(model, MoRAConfig(targets=".*q_proj/kernel"))
    with pytest.raises(ValueError, match="params holds no array"):
        mora.wrap(nnx.Dropout(0.1))
    for function in (mora.unwrap, mora.merge_adapters, mora.adapters, mora.plan_of):
        with pytest.raises(ValueError, match="model has no adapters"):
            function(model)
    with pytest.raises(ValueError, match="model has no adapters"):
        mora.adapter_optimizer(model, optax.sgd(1.0))
    with pytest.raises(TypeError, match="tx must be an optax transformation"):
        mora.adapter_optimizer(mora.wrap(model, config), None)
    with pytest.raises(TypeError, match="model must be a flax.nnx.Module, got int"):
        mora.adapters(3)
    other = mora.plan(nnx.Sequential(nnx.Linear(12, 12, rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match=r"at 'layers/0/kernel', the model has None"):
        mora.wrap(model, other)
    adapted = mora.wrap(model, config)
    with pytest.raises(ValueError, match="adapters lack 'decoder/kernel_mora"):
        mora.set_adapters(adapted, {})
    tree = jax.tree.map(lambda m: m[:2], mora.adapters(adapted))
    with pytest.raises(ValueError, match="kernel_mora must have shape"):
        mora.set_adapters(adapted, tree)
    tree = mora.adapters(adapted)
    with pytest.raises(ValueError, match="64 hexadecimal digits; .*plan_from_json"):
        mora.set_adapters(adapted, tree, "{}")
    with pytest.raises(TypeError, match="plan must be a Plan or its digest, got int"):
        mora.set_adapters(adapted, tree, 3)
    mora.set_adapters(
        adapted, jax.tree.map(lambda m: m + np.nan, mora.adapters(adapted))
    )
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        mora.merge_adapters(adapted)
    quantised = nnx.Linear(12, 12, rngs=nnx.Rngs(0))
    quantised.kernel = nnx.Param(jnp.ones((12, 12), jnp.int8))
    with pytest.raises(TypeError, match="kernel must have a floating-point dtype"):
        mora.wrap(quantised)
