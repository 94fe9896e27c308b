"""Flax Linen: the adapted layer, and unmodified models wherever their layers are."""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

from mora_jax import (
    FrozenDense,
    MoRAConfig,
    MoRADense,
    MoRAWarning,
    combine,
    init,
    linen,
    merge,
    mora_apply,
    optimizer,
    plan,
    register_layer,
    split,
)

CONFIG = MoRAConfig(rank=2, operator="rotation", alpha=0.5)
KEY = jax.random.key(0)


def random(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def trained(plan, scale=0.3):
    """Adapters as after training: far from zero."""
    adapters = init(plan)
    return jax.tree.map(lambda m: scale * random(m.size, *m.shape), adapters)


# --- Models: each a layer kind or a transformation, in an unmodified model ---


class Block(nn.Module):
    """Attention (DenseGeneral) and an MLP (Dense), compact."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(x)
        return x + nn.Dense(12)(nn.gelu(nn.Dense(20)(x))), None


JitBlock = nn.jit(Block)


class Stack(nn.Module):
    """Blocks under a lifted transformation."""

    lift: str

    @nn.compact
    def __call__(self, x):
        scan = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        if self.lift == "scan":
            return nn.scan(Block, **scan)()(x, None)[0]
        if self.lift == "scan-remat":
            return nn.scan(nn.remat(Block), **scan)()(x, None)[0]
        if self.lift == "scan-scan":
            inner = nn.scan(Block, **scan)
            return nn.scan(inner, **scan | {"length": 2})()(x, None)[0]
        if self.lift == "remat":
            return nn.remat(Block)()(x)[0]
        if self.lift == "remat-dense":
            return nn.remat(nn.Dense)(6)(x)
        if self.lift == "jit":
            return JitBlock()(JitBlock()(x)[0])[0]
        if self.lift == "vmap":
            vmap = nn.vmap(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}
            )
            return vmap()(jnp.stack([x, 2 * x]))[0]
        if self.lift == "vmap-shared":
            vmap = nn.vmap(
                Block, variable_axes={"params": None}, split_rngs={"params": False}
            )
            return vmap()(x)[0]
        raise ValueError(self.lift)


class Setup(nn.Module):
    """Setup-style, one submodule used twice, and other methods than __call__."""

    def setup(self):
        self.encoder = nn.Dense(12)
        self.decoder = nn.Sequential([nn.Dense(20), nn.relu, nn.Dense(12)])

    def __call__(self, x):
        return self.decode(self.encode(self.encode(x)))

    def encode(self, x):
        return jnp.tanh(self.encoder(x))

    def decode(self, x):
        return self.decoder(x)


class Einsums(nn.Module):
    """nn.Einsum with its equation in either place, experts, and odd layouts."""

    @nn.compact
    def __call__(self, x):
        h = nn.Einsum((12, 2, 6), "bti,ihd->bthd")(x)
        x = nn.Einsum((2, 6, 12))(h, "bthd,hdi->bti")
        x = nn.Einsum((3, 12, 8), "bti,eio->ebto", use_bias=False)(x)
        x = nn.Einsum((3, 8, 12), "ebti,eio->ebto", use_bias=False)(x)
        return nn.Einsum((12, 12), "...i,oi->...o", use_bias=False)(x.sum(0))


class Generals(nn.Module):
    """nn.DenseGeneral over several, batched and leading axes."""

    @nn.compact
    def __call__(self, x):
        h = nn.DenseGeneral((3, 4))(x)
        h = nn.DenseGeneral((2, 5), axis=(-1, 1))(h)
        h = nn.DenseGeneral(6, axis=-1, batch_dims=0)(h)
        return nn.DenseGeneral(4, axis=1)(h)


class BatchStats(nn.Module):
    """Mutable collections and dropout."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        return nn.Dense(4)(nn.Dropout(0.5, deterministic=not train)(x))


LIFTS = (
    *("scan", "scan-remat", "scan-scan", "remat", "remat-dense"),
    *("jit", "vmap", "vmap-shared"),
)
MODELS = {
    **{lift: Stack(lift) for lift in LIFTS},
    "dense": nn.Dense(10),
    "dense-bfloat16": nn.Dense(10, dtype=jnp.bfloat16),
    "setup": Setup(),
    "einsums": Einsums(),
    "generals": Generals(),
    "attention": nn.MultiHeadDotProductAttention(num_heads=3),
    "gru": nn.RNN(nn.GRUCell(12)),
}
by_model = pytest.mark.parametrize("name", MODELS)
X = random(3, 2, 5, 12)


@pytest.fixture
def case(name):
    """(model, variables, plan, apply)."""
    return make_case(name)


@functools.cache
def make_case(name):
    model = MODELS[name]
    variables = jax.jit(model.init)(KEY, X)
    chosen = linen.plan(model, variables, CONFIG, X)
    return model, variables, chosen, linen.wrap(model, chosen)


@by_model
def test_every_kernel_is_found(name, case):
    _, variables, chosen, _ = case
    flat, _ = jax.tree_util.tree_flatten_with_path(variables["params"])
    kernels = ["/".join(k.key for k in path) for path, leaf in flat if leaf.ndim > 1]
    kernels = [name for name in kernels if name.endswith("kernel")]
    assert [spec.name for spec in chosen.specs] == kernels


@by_model
def test_zero_changes_nothing(name, case):
    model, variables, chosen, apply = case
    y = jax.jit(apply)(init(chosen), variables, X)
    chex.assert_trees_all_equal(y, jax.jit(model.apply)(variables, X))


@by_model
def test_merged_is_adapted(name, case):
    model, variables, chosen, apply = case
    adapters = trained(chosen)
    y, base = jax.jit(apply)(adapters, variables, X), jax.jit(model.apply)(variables, X)
    assert y.dtype == base.dtype
    assert np.abs(y - base).max() > 1e-2
    merged = jax.jit(merge, static_argnums=2)(variables["params"], adapters, chosen)
    expected = np.asarray(jax.jit(model.apply)({"params": merged}, X), np.float32)
    atol = (0.05 if y.dtype == jnp.bfloat16 else 1e-4) * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("name", ["scan-remat", "jit", "einsums"])
def test_jit_is_eager(name, case):
    _, variables, chosen, apply = case
    y = jax.jit(apply)(trained(chosen), variables, X)
    eager = apply(trained(chosen), variables, X)
    np.testing.assert_allclose(y, eager, atol=1e-4 * float(np.abs(y).max()), rtol=0)


@by_model
def test_every_adapter_learns(name, case):
    _, variables, chosen, apply = case

    def loss(adapters):
        return jnp.sum(apply(adapters, variables, X).astype(jnp.float32) ** 2)

    for m in jax.tree.leaves(jax.jit(jax.grad(loss))(trained(chosen))):
        assert np.isfinite(m).all() and np.abs(m).max() > 0


@by_model
def test_one_compilation(name, case):
    _, variables, chosen, apply = case
    traces = []

    @jax.jit
    def jitted(adapters, variables, x):
        traces.append(None)
        return apply(adapters, variables, x)

    jitted(init(chosen), variables, X)
    jitted(trained(chosen), jax.tree.map(lambda p: 2 * p, variables), X)
    assert len(traces) == 1


@by_model
def test_plans_of_shapes_are_equal(name, case):
    model, variables, chosen, _ = case
    shapes = jax.eval_shape(lambda: variables)
    x = jax.ShapeDtypeStruct(X.shape, X.dtype)
    assert linen.plan(model, shapes, CONFIG, x) == chosen


def test_nn_jit_does_not_serve_another_plans_program():
    """The traces that nn.jit keeps know neither alpha nor whether it is adapted."""
    model = MODELS["jit"]
    variables = model.init(KEY, X)
    base = model.apply(variables, X)
    outputs = []
    for alpha in (0.5, 1.0):
        config = MoRAConfig(rank=2, alpha=alpha)
        chosen = linen.plan(model, variables, config, X)
        adapters = trained(chosen)
        y = linen.wrap(model, chosen)(adapters, variables, X)
        merged = merge(variables["params"], adapters, chosen)
        np.testing.assert_allclose(y, model.apply({"params": merged}, X), atol=1e-3)
        outputs.append(y)
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-2
    chex.assert_trees_all_equal(model.apply(variables, X), base)


def test_scanned_layers_have_an_m_each():
    model = MODELS["scan-scan"]
    variables = model.init(KEY, X)
    chosen = linen.plan(model, variables, CONFIG, X)
    axes = {spec.name.split("/", 1)[1]: spec.axes for spec in chosen.specs}
    assert axes == {
        "Dense_0/kernel": "ssio",
        "Dense_1/kernel": "ssio",
        **{
            f"MultiHeadDotProductAttention_0/{name}/kernel": axes
            for name, axes in [
                *(("key", "ssioo"), ("query", "ssioo"), ("value", "ssioo")),
                ("out", "ssiio"),
            ]
        },
    }
    assert chosen.specs[0].shape[:2] == (2, 3)


def test_other_scan_axes_are_refused():
    class Trailing(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                Block,
                variable_axes={"params": 1},
                split_rngs={"params": True},
                length=3,
            )
            return scan()(x, None)[0]

    variables = Trailing().init(KEY, X)
    with pytest.raises(ValueError, match="stacked axes must come first"):
        linen.plan(Trailing(), variables, CONFIG, X)


def test_methods():
    model = Setup()
    variables = model.init(KEY, X)
    chosen = linen.plan(model, variables, CONFIG, X)
    adapters = trained(chosen)
    apply = linen.wrap(model, chosen)
    merged = {"params": merge(variables["params"], adapters, chosen)}
    for method in ("encode", Setup.decode):
        y = apply(adapters, variables, X, method=method)
        expected = model.apply(merged, X, method=method)
        np.testing.assert_allclose(y, expected, atol=1e-4)


def test_mutable_collections_and_dropout_keys():
    model = BatchStats()
    variables = model.init(KEY, X, train=False)
    chosen = linen.plan(model, variables, CONFIG, X, train=False)
    assert len(chosen) == 2
    apply, adapters = linen.wrap(model, chosen), trained(chosen)
    kwargs = {"train": True, "rngs": {"dropout": jax.random.key(5)}}
    with pytest.warns(MoRAWarning, match="the call updates batch_stats, which are"):
        y, state = apply(adapters, variables, X, mutable=["batch_stats"], **kwargs)
    merged = {**variables, "params": merge(variables["params"], adapters, chosen)}
    expected, updated = model.apply(merged, X, mutable=["batch_stats"], **kwargs)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    chex.assert_trees_all_close(state, updated, atol=1e-4)
    y, state = apply(adapters, variables, X, mutable=True, **kwargs)
    chex.assert_trees_all_equal_structs(state, dict(variables))
    same = linen.plan(
        model, variables, CONFIG, X, train=True, mutable=["batch_stats"],
        rngs={"dropout": KEY},
    )  # fmt: skip
    assert same == chosen


def test_statistics_that_training_moves_are_told_once():
    model = BatchStats()
    variables = model.init(KEY, X, train=False)
    chosen = linen.plan(model, variables, CONFIG, X, train=False)
    adapters, kwargs = init(chosen), {"train": True, "rngs": {"dropout": KEY}}
    for _ in range(2):  # once for each wrapped model
        apply = linen.wrap(model, chosen)
        with pytest.warns(MoRAWarning, match="neither in the adapters nor in") as seen:
            for _ in range(3):
                apply(adapters, variables, X, mutable=["batch_stats"], **kwargs)
        assert len(seen) == 1
    apply = linen.wrap(model, chosen)
    apply(adapters, variables, X, train=False, mutable=["intermediates"])
    decoder = nn.MultiHeadDotProductAttention(num_heads=3, decode=True)
    variables = decoder.init(KEY, X)
    x = X[..., :1, :]
    chosen = linen.plan(decoder, variables, CONFIG, x, mutable=["cache"])
    linen.wrap(decoder, chosen)(init(chosen), variables, x, mutable=["cache"])


def test_capture_intermediates():
    model = nn.Sequential([nn.Dense(12), nn.Dense(12)])
    variables = model.init(KEY, X)
    chosen = linen.plan(model, variables, CONFIG, X)
    y, state = linen.wrap(model, chosen)(
        trained(chosen),
        variables,
        X,
        capture_intermediates=True,
        mutable=["intermediates"],
    )
    seen = state["intermediates"]["layers_1"]["__call__"][0]
    np.testing.assert_array_equal(seen, y)


def test_training_moves_adapters_alone():
    """The README's loop, with a TrainState."""
    model = Setup()
    variables = model.init(KEY, X)
    before = jax.tree.map(np.array, variables)
    chosen = linen.plan(model, variables, MoRAConfig(rank=4), X)
    state = train_state.TrainState.create(
        apply_fn=linen.wrap(model, chosen), params=init(chosen), tx=optax.adam(3e-2)
    )
    target = random(8, *X.shape)

    @jax.jit
    def step(state):
        def loss(adapters):
            return jnp.mean((state.apply_fn(adapters, variables, X) - target) ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(20):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    chex.assert_trees_all_equal(variables, before)


# --- Dropout ---


def test_dropout():
    model = nn.Dense(10, use_bias=False)
    config = MoRAConfig(rank=2, dropout=0.5)
    variables = model.init(KEY, X)
    chosen = linen.plan(model, variables, config, X)
    apply, adapters = linen.wrap(model, chosen), trained(chosen)
    still = apply(adapters, variables, X, adapter_deterministic=True)
    merged = {"params": merge(variables["params"], adapters, chosen)}
    np.testing.assert_allclose(still, model.apply(merged, X), atol=1e-4)

    def drop(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return apply(adapters, variables, X, adapter_deterministic=False, rngs=rngs)

    np.testing.assert_array_equal(drop(0), drop(0))
    assert np.abs(drop(0) - drop(1)).max() > 1e-2
    many = jax.vmap(drop)(jnp.arange(4000)).mean(0)
    np.testing.assert_allclose(many, still, atol=0.1)  # the mean is as without
    with pytest.raises(ValueError, match="adapter_deterministic must be True or False"):
        apply(adapters, variables, X)
    with pytest.raises(Exception, match='PRNG for "dropout"'):
        apply(adapters, variables, X, adapter_deterministic=False)


def test_dropout_differs_by_scanned_layer():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = nn.scan(
                Carry,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=2,
            )
            return body()(x, None)[1]

    class Carry(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x, nn.Dense(12, use_bias=False)(x)

    variables = Net().init(KEY, X)
    config = MoRAConfig(rank=2, dropout=0.5, operator="sharing")
    chosen = linen.plan(Net(), variables, config, X)
    ones = jax.tree.map(jnp.ones_like, init(chosen))
    zeros = jax.tree.map(jnp.zeros_like, variables)
    first, second = linen.wrap(Net(), chosen)(
        ones, zeros, X, adapter_deterministic=False, rngs={"dropout": KEY}
    )
    assert np.abs(first - second).max() > 1e-3


# --- Layers of the user's own ---


class Projection(nn.Module):
    """A hand-written Einsum with a weight `w` of three axes, as in Gemma."""

    shape: tuple[int, ...]
    equation: str

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(0.1), self.shape)
        return jnp.einsum(self.equation, x, w)


class Unknown(Projection):
    """Computes something else under the same name."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(0.1), self.shape)
        return jnp.einsum(self.equation, x**2, w)


class Same(Projection):
    """A subclass that computes as its base does."""


register_layer(Projection, equation=lambda module, x: module.equation, kernel="w")


@pytest.mark.parametrize("cls", [Projection, Same])
def test_register_layer(cls):
    model = nn.Sequential(
        [cls((2, 12, 6), "bti,hid->bthd"), cls((2, 6, 12), "bthd,hdi->bti")]
    )
    variables = model.init(KEY, X)
    chosen = linen.plan(model, variables, CONFIG, X)
    assert [spec.axes for spec in chosen.specs] == ["oio", "iio"]
    adapters = trained(chosen)
    y = linen.wrap(model, chosen)(adapters, variables, X)
    merged = {"params": merge(variables["params"], adapters, chosen)}
    np.testing.assert_allclose(y, model.apply(merged, X), atol=1e-4)


def test_unknown_layers_are_refused():
    """An adapter that would have no effect is an error, not a silence."""
    model = Unknown((12, 6), "bti,io->bto")
    variables = model.init(KEY, X)
    config = MoRAConfig(rank=2, targets="w")
    with pytest.raises(ValueError, match="w: it is not known how a layer uses it"):
        linen.plan(model, variables, config, X)
    chosen = plan(variables["params"], config)
    message = r"w: Unknown.__call__ may use this adapted kernel.*register_layer"
    with pytest.raises(TypeError, match=message):
        linen.wrap(model, chosen)(init(chosen), variables, X)

    class Local(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.ConvLocal(12, (3,))(x)

    variables = Local().init(KEY, X)
    config = MoRAConfig(rank=2, targets=".*kernel", overrides={".*": {"axes": "sio"}})
    chosen = plan(variables["params"], config)
    with pytest.raises(TypeError, match=r"ConvLocal.__call__ may use"):
        linen.wrap(Local(), chosen)(init(chosen), variables, X)


class SharedScope(nn.Module):
    """Two layers of a class whose kernel is named by a field, in one scope: Gemma's."""

    @nn.compact
    def __call__(self, x):
        gate = Named((2, 20, 12), "gating_einsum")
        linear = Named((20, 12), "linear")
        for layer in (gate, linear):
            nn.share_scope(self, layer)
        gates = gate("...f,nhf->...nh", x)
        return linear("...h,hf->...f", nn.gelu(gates[..., 0, :]) * gates[..., 1, :])


class Named(nn.Module):
    shape: tuple[int, ...]
    weight_name: str

    @nn.compact
    def __call__(self, equation, x):
        w = self.param(self.weight_name, nn.initializers.normal(), self.shape)
        return jnp.einsum(equation, x, w)


def test_shared_scopes():
    model = SharedScope()
    variables = model.init(KEY, X)
    config = MoRAConfig(rank=2, targets="linear", overrides={".*": {"axes": "io"}})
    chosen = plan(variables["params"], config)
    with pytest.raises(TypeError, match="linear: SharedScope.__call__ may use this"):
        linen.wrap(model, chosen)(init(chosen), variables, X)

    def equation(layer, equation, x):
        return equation

    def kernel(layer):
        return layer.weight_name

    register_layer(Named, equation=equation, kernel=kernel)
    message = "'equation' of Named.__call__ must be the input, an array, got '...f,nhf"
    with pytest.raises(TypeError, match=re.escape(message)):
        linen.plan(model, variables, CONFIG, X)
    register_layer(Named, equation=equation, kernel=kernel, argument="x")
    chosen = linen.plan(model, variables, CONFIG, X)
    axes = {spec.name: spec.axes for spec in chosen.specs}
    assert axes == {"gating_einsum": "ooi", "linear": "io"}
    adapters = trained(chosen)
    y = linen.wrap(model, chosen)(adapters, variables, X)
    merged = {"params": merge(variables["params"], adapters, chosen)}
    np.testing.assert_allclose(y, model.apply(merged, X), atol=1e-4)


def test_other_methods_of_a_known_layer_are_refused():
    class Tied(nn.Dense):
        def attend(self, x):
            return x @ self.get_variable("params", "kernel").T

    class Net(nn.Module):
        def setup(self):
            self.tied = Tied(12)

        def __call__(self, x):
            return self.tied.attend(self.tied(x))

    variables = Net().init(KEY, X)
    with pytest.raises(ValueError, match="tied/kernel: .* by `dot_general`, where"):
        linen.plan(Net(), variables, CONFIG, X)
    chosen = plan(variables["params"], CONFIG)  # no trace has seen the model
    with pytest.raises(TypeError, match=r"Tied.attend may use this adapted kernel"):
        linen.wrap(Net(), chosen)(init(chosen), variables, X)


def test_axes_that_the_layer_does_not_have_are_refused():
    model = Projection((12, 2, 6), "bti,ihd->bthd")
    variables = model.init(KEY, X)
    config = MoRAConfig(rank=2, targets="w", overrides={"w": {"axes": "iio"}})
    chosen = plan(variables["params"], config)
    message = re.escape("w: the plan reads its axes as 'iio', the layer computes 'ioo'")
    with pytest.raises(ValueError, match=message):
        linen.wrap(model, chosen)(init(chosen), variables, X)


def test_a_kernel_planned_the_other_way_round_is_used_transposed():
    """C then acts on what the layer calls outputs; adapted is still merged."""
    model = Projection((20, 12), "bti,oi->bto")
    variables = model.init(KEY, X)
    chosen = plan(variables["params"], MoRAConfig(rank=2, targets="w", alpha=0.5))
    assert chosen["w"].axes == "io"
    adapters = trained(chosen)
    y = linen.wrap(model, chosen)(adapters, variables, X)
    merged = {"params": merge(variables["params"], adapters, chosen)}
    np.testing.assert_allclose(y, model.apply(merged, X), atol=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_bad_input():
    model = nn.Dense(12)
    variables = model.init(KEY, X)
    chosen = linen.plan(model, variables, CONFIG, X)
    apply, adapters = linen.wrap(model, chosen), init(chosen)
    with pytest.raises(TypeError, match="model must be a flax.linen.Module, got type"):
        linen.wrap(nn.Dense, chosen)
    with pytest.raises(TypeError, match="plan must be a Plan, got MoRAConfig"):
        linen.wrap(model, CONFIG)
    with pytest.raises(TypeError, match="model must be"):
        linen.plan(lambda x: x, variables, CONFIG, X)
    with pytest.raises(ValueError, match="variables must be a mapping with 'params'"):
        apply(adapters, variables["params"], X)
    with pytest.raises(ValueError, match="variables must be a mapping with 'params'"):
        linen.plan(model, {}, CONFIG, X)
    with pytest.raises(ValueError, match="adapters lack 'kernel_mora'"):
        apply({}, variables, X)
    with pytest.raises(ValueError, match="kernel_mora must have shape"):
        apply({"kernel_mora": jnp.zeros((3, 3))}, variables, X)
    with pytest.raises(ValueError, match="already hold 'kernel_mora'"):
        apply(adapters, {"params": combine(variables["params"], adapters)}, X)
    with pytest.raises(TypeError, match="cls must be a class, got 3"):
        register_layer(3, equation="...i,io->...o")
    with pytest.raises(TypeError, match="method must name a method of Dense, got 'no'"):
        register_layer(nn.Dense, equation="...i,io->...o", method="no")
    with pytest.raises(TypeError, match="equation must be a string, a Product or a"):
        register_layer(nn.Dense, equation=3)
    with pytest.raises(TypeError, match="kernel must be a parameter's name or a"):
        register_layer(nn.Dense, equation="...i,io->...o", kernel=0)
    message = r"argument must be one of \['inputs'\] of Dense.__call__, got 'x'"
    with pytest.raises(TypeError, match=message):
        register_layer(nn.Dense, equation="...i,io->...o", argument="x")


# --- MoRADense ---


def test_moradense_is_dense_and_more():
    base = nn.Dense(10)
    layer = MoRADense(10, config=CONFIG)
    variables = layer.init(KEY, X)
    chex.assert_trees_all_equal(
        split(variables["params"])[0], base.init(KEY, X)["params"]
    )
    chex.assert_trees_all_equal(
        layer.apply(variables, X), base.init_with_output(KEY, X)[0]
    )
    m = 0.3 * random(1, *variables["params"]["kernel_mora"].shape)
    params = {**variables["params"], "kernel_mora": m}
    frozen = FrozenDense.from_config(params["kernel"], params["bias"], config=CONFIG)
    expected = mora_apply({"kernel_mora": m}, frozen, X)
    np.testing.assert_allclose(layer.apply({"params": params}, X), expected, atol=1e-5)
    fields = {field for field in nn.Dense.__dataclass_fields__}
    assert fields < set(MoRADense.__dataclass_fields__)


def test_moradense_settings():
    layer = MoRADense(
        10, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.float16,
        kernel_init=nn.initializers.ones, config=MoRAConfig(init="gaussian"),
    )  # fmt: skip
    variables = layer.init(KEY, X)
    assert set(variables["params"]) == {"kernel", "kernel_mora"}
    assert variables["params"]["kernel"].dtype == jnp.float16
    assert variables["params"]["kernel_mora"].dtype == jnp.float32
    assert layer.apply(variables, X).dtype == jnp.bfloat16
    other = layer.init(jax.random.key(1), X)
    assert not np.array_equal(
        variables["params"]["kernel_mora"], other["params"]["kernel_mora"]
    )


def test_moradense_dropout():
    layer = MoRADense(10, config=MoRAConfig(rank=2, dropout=0.5))
    variables = layer.init(KEY, X, deterministic=True)
    params = {**variables["params"]}
    params["kernel_mora"] = jnp.ones_like(params["kernel_mora"])
    still = layer.apply({"params": params}, X, deterministic=True)
    dropped = layer.apply(
        {"params": params}, X, deterministic=False, rngs={"dropout": KEY}
    )
    assert np.abs(still - dropped).max() > 1e-2
    with pytest.raises(ValueError, match="deterministic"):
        layer.apply({"params": params}, X)


def test_moradense_trains_in_a_scan():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = nn.scan(
                Carry,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return body()(x, None)[0]

    class Carry(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + MoRADense(12, config=CONFIG)(x), None

    params = Net().init(KEY, X)["params"]
    tx = optimizer(optax.adam(0.03), params)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(
            lambda p: jnp.mean(Net().apply({"params": p}, X) ** 2)
        )(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    first, losses = params, []
    for _ in range(10):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    chex.assert_trees_all_equal(split(params)[0], split(first)[0])
