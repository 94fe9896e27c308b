"""What Flax Linen alone has: methods, collections, dropout, users' layers, MoRADense.

The laws over all models are in test_model_laws.py.
"""

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
from helpers import close, largest, random, random_like, trained
from twins import CONFIG, TWINS, LinenMethods, X

from mora_jax import (
    FrozenDense,
    MoRAConfig,
    MoRADense,
    MoRAWarning,
    combine,
    fold,
    init,
    linen,
    mora_apply,
    optimizer,
    plan,
    register_layer,
    split,
)

KEY = jax.random.key(0)


class BatchStats(nn.Module):
    """Mutable collections and dropout."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        return nn.Dense(4)(nn.Dropout(0.5, deterministic=not train)(x))


def variables_of(model, **kwargs):
    """Normal numbers as parameters and ones as the rest, with nothing to compile."""
    shapes = jax.eval_shape(lambda: model.init(KEY, X, **kwargs))
    rest = jax.tree.map(lambda leaf: jnp.asarray(np.ones(leaf.shape, "f4")), shapes)
    return {**rest, "params": random_like(shapes["params"])}


def adapted_and_merged(model, variables, chosen, method=None, **kwargs):
    """What both give, as one program."""
    apply, adapters = linen.wrap(model, chosen), trained(chosen)

    @jax.jit
    def both(adapters, variables):
        merged = {**variables, "params": fold(variables["params"], adapters, chosen)}
        return (
            apply(adapters, variables, X, method=method, **kwargs),
            model.apply(merged, X, method=method, **kwargs),
        )

    return both(adapters, variables)


def test_nn_jit_does_not_serve_another_plans_program():
    """The traces that nn.jit keeps know neither alpha nor whether it is adapted."""
    model = TWINS["jit"].linen()
    variables = variables_of(model)
    base = model.apply(variables, X)
    outputs = []
    for alpha in (0.5, 1.0):
        config = MoRAConfig(rank=2, alpha=alpha)
        chosen = linen.plan(model, variables, config, X)
        adapters = trained(chosen)
        y = linen.wrap(model, chosen)(adapters, variables, X)
        merged = fold(variables["params"], adapters, chosen)
        close(y, model.apply({"params": merged}, X))
        outputs.append(y)
    assert largest(outputs[0] - outputs[1]) > 1e-2
    chex.assert_trees_all_equal(model.apply(variables, X), base)


def test_compiled_and_not_give_the_same():
    for name in ("einsums", "scan-remat"):
        model = TWINS[name].linen()
        variables = variables_of(model)
        chosen = linen.plan(model, variables, CONFIG, X)
        apply, adapters = linen.wrap(model, chosen), trained(chosen)
        y = apply(adapters, variables, X)
        close(jax.jit(apply)(adapters, variables, X), y)


def test_other_scan_axes_are_refused():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(12)(x), None

    class Trailing(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                Body,
                variable_axes={"params": 1},
                split_rngs={"params": True},
                length=3,
            )
            return scan()(x, None)[0]

    variables = variables_of(Trailing())
    with pytest.raises(ValueError, match="stacked axes must come first"):
        linen.plan(Trailing(), variables, CONFIG, X)


@pytest.mark.parametrize("method", ["encode", LinenMethods.decode], ids=str)
def test_methods(method):
    model = LinenMethods()
    variables = variables_of(model)
    chosen = linen.plan(model, variables, CONFIG, X)
    close(*adapted_and_merged(model, variables, chosen, method=method))


def test_mutable_collections_and_dropout_keys():
    model = BatchStats()
    variables = variables_of(model, train=False)
    chosen = linen.plan(model, variables, CONFIG, X, train=False)
    assert len(chosen) == 2
    kwargs = {"train": True, "rngs": {"dropout": jax.random.key(5)}}
    mutable = ["batch_stats"]
    with pytest.warns(MoRAWarning, match="the call updates batch_stats, which are"):
        got, expected = adapted_and_merged(
            model, variables, chosen, mutable=mutable, **kwargs
        )
    close(got, expected)
    assert largest(got[1]["batch_stats"]["BatchNorm_0"]["mean"] - 1) > 1e-3
    apply = functools.partial(linen.wrap(model, chosen), mutable=True, **kwargs)
    with pytest.warns(MoRAWarning):
        _, everything = jax.eval_shape(apply, trained(chosen), variables, X)
    chex.assert_trees_all_equal_structs(everything, dict(variables))
    same = linen.plan(model, variables, CONFIG, X, mutable=mutable, **kwargs)
    assert same == chosen


def test_statistics_that_training_moves_are_told_once():
    model = BatchStats()
    variables = variables_of(model, train=False)
    chosen = linen.plan(model, variables, CONFIG, X, train=False)
    adapters, kwargs = init(chosen), {"train": True, "rngs": {"dropout": KEY}}
    for _ in range(2):  # once for each wrapped model
        apply = functools.partial(
            linen.wrap(model, chosen), mutable=["batch_stats"], **kwargs
        )
        with pytest.warns(MoRAWarning, match="neither in the adapters nor in") as seen:
            for _ in range(3):
                jax.eval_shape(apply, adapters, variables, X)
        assert len(seen) == 1
    apply = linen.wrap(model, chosen)
    apply(adapters, variables, X, train=False, mutable=["intermediates"])
    decoder = nn.MultiHeadDotProductAttention(num_heads=3, decode=True)
    variables = jax.eval_shape(decoder.init, KEY, X)
    x = X[..., :1, :]
    chosen = linen.plan(decoder, variables, CONFIG, x, mutable=["cache"])
    apply = functools.partial(linen.wrap(decoder, chosen), mutable=["cache"])
    jax.eval_shape(apply, init(chosen), variables, x)


def test_capture_intermediates():
    model = nn.Sequential([nn.Dense(12), nn.Dense(12)])
    variables = variables_of(model)
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
    model = LinenMethods()
    variables = variables_of(model)
    before = jax.tree.map(np.array, variables)
    chosen = linen.plan(model, variables, MoRAConfig(rank=4), X)
    state = train_state.TrainState.create(
        apply_fn=linen.wrap(model, chosen), params=init(chosen), tx=optax.adam(3e-2)
    )
    target = random(8, *X.shape[:-1], 20)

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
    variables = variables_of(model)
    chosen = linen.plan(model, variables, config, X)
    apply, adapters = linen.wrap(model, chosen), trained(chosen)
    still = apply(adapters, variables, X, adapter_deterministic=True)
    close(
        still, model.apply({"params": fold(variables["params"], adapters, chosen)}, X)
    )

    @jax.jit
    def drop(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return apply(adapters, variables, X, adapter_deterministic=False, rngs=rngs)

    np.testing.assert_array_equal(drop(0), drop(0))
    assert largest(drop(0) - drop(1)) > 1e-2
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

    variables = variables_of(Net())
    config = MoRAConfig(rank=2, dropout=0.5, operator="sharing")
    chosen = linen.plan(Net(), variables, config, X)
    ones = jax.tree.map(jnp.ones_like, init(chosen))
    zeros = jax.tree.map(jnp.zeros_like, variables)
    first, second = linen.wrap(Net(), chosen)(
        ones, zeros, X, adapter_deterministic=False, rngs={"dropout": KEY}
    )
    assert largest(first - second) > 1e-3


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
    variables = variables_of(model)
    chosen = linen.plan(model, variables, CONFIG, X)
    assert [spec.axes for spec in chosen.specs] == ["oio", "iio"]
    close(*adapted_and_merged(model, variables, chosen))


def test_unknown_layers_are_refused():
    """An adapter that would have no effect is an error, not a silence."""
    model = Unknown((12, 6), "bti,io->bto")
    variables = variables_of(model)
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

    variables = variables_of(Local())
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
    variables = variables_of(model)
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
    close(*adapted_and_merged(model, variables, chosen))


def test_other_methods_of_a_known_layer_are_refused():
    class Tied(nn.Dense):
        def attend(self, x):
            return x @ self.get_variable("params", "kernel").T

    class Net(nn.Module):
        def setup(self):
            self.tied = Tied(12)

        def __call__(self, x):
            return self.tied.attend(self.tied(x))

    variables = variables_of(Net())
    with pytest.raises(ValueError, match="tied/kernel: .* by `dot_general`, where"):
        linen.plan(Net(), variables, CONFIG, X)
    chosen = plan(variables["params"], CONFIG)  # no trace has seen the model
    with pytest.raises(TypeError, match=r"Tied.attend may use this adapted kernel"):
        linen.wrap(Net(), chosen)(init(chosen), variables, X)


def test_axes_that_the_layer_does_not_have_are_refused():
    model = Projection((12, 2, 6), "bti,ihd->bthd")
    variables = variables_of(model)
    config = MoRAConfig(rank=2, targets="w", overrides={"w": {"axes": "iio"}})
    chosen = plan(variables["params"], config)
    message = re.escape("w: the plan reads its axes as 'iio', the layer computes 'ioo'")
    with pytest.raises(ValueError, match=message):
        linen.wrap(model, chosen)(init(chosen), variables, X)


def test_a_kernel_planned_the_other_way_round_is_used_transposed():
    """C then acts on what the layer calls outputs; adapted is still merged."""
    model = Projection((20, 12), "bti,oi->bto")
    variables = variables_of(model)
    chosen = plan(variables["params"], MoRAConfig(rank=2, targets="w", alpha=0.5))
    assert chosen["w"].axes == "io"
    close(*adapted_and_merged(model, variables, chosen))


@pytest.mark.usefixtures("unchecked")
def test_bad_input():
    model = nn.Dense(12)
    variables = variables_of(model)
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

    params = variables_of(Net())["params"]
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
