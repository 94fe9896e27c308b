"""What Flax Linen alone has: methods, collections, dropout, users' layers, MoRADense.

The laws over all models are in test_model_laws.py.
"""

import dataclasses
import functools
import re
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_files import slow
from helpers import bare, close, largest, random_like, trained
from twins import CONFIG, STACK, TWINS, LinenMethods, X

import mora_jax
from mora_jax import (
    Adapter,
    AdapterSpec,
    MoRAConfig,
    MoRADense,
    fold,
    init,
    linen,
    plan,
    register_layer,
    split,
)
from mora_jax._flax.layer_rules import RULES, LayerRule

KEY = jax.random.key(0)
DROPOUT = MoRAConfig(rank=2, dropout=0.5)
wrap = linen.wrap


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


def made(model, config=CONFIG, **kwargs):
    """(variables, adapted apply, adapters as after training)."""
    variables = variables_of(model, **kwargs)
    apply = wrap(model, config, variables, X, **kwargs)
    return variables, apply, trained(apply.plan)


def assert_merged_is_adapted(model, apply, variables, **kwargs):
    """And gives what both do."""

    @jax.jit
    def both(adapters, variables):
        params = fold(variables["params"], adapters)
        return (
            apply(adapters, variables, X, **kwargs),
            model.apply({**variables, "params": params}, X, **kwargs),
        )

    adapted, merged = both(trained(apply.plan), variables)
    close(adapted, merged)
    return adapted


def test_nn_jit_does_not_serve_another_plans_program():
    """The traces that nn.jit keeps know neither alpha nor whether it is adapted."""
    model = TWINS["jit"].linen()
    variables, outputs = variables_of(model), []
    base = model.apply(variables, X)
    for alpha in (0.5, 1.0):
        apply = wrap(model, MoRAConfig(rank=2, alpha=alpha), variables, X)
        adapters = trained(apply.plan)
        outputs.append(apply(adapters, variables, X))
        merged = fold(variables["params"], adapters)
        close(outputs[-1], model.apply({"params": merged}, X))
    assert largest(outputs[0] - outputs[1]) > 1e-2
    chex.assert_trees_all_equal(model.apply(variables, X), base)


def test_an_m_of_blocks_behind_the_kernels_features():
    """There are more axes of M than of features: the stack is the last, or refused."""
    config = MoRAConfig(rank=2, operator="block_diagonal")
    for length in (3, 4):  # 4 is also the size of a block, which hides it from shapes
        axes = STACK | {"variable_axes": {"params": 2}, "axis_size": length}
        layers = nn.vmap(functools.partial(nn.Dense, use_bias=False), **axes)(12)
        x = jnp.stack([X] * length)
        shapes = jax.eval_shape(layers.init, KEY, x)
        apply = wrap(layers, linen.plan(layers, shapes, config, x))
        with pytest.raises(ValueError, match="(fails with an M|reads kernel_mora)"):
            jax.eval_shape(apply, mora_jax.init(apply.plan), shapes, x)


@pytest.mark.parametrize(
    "method", ["encode", LinenMethods.decode], ids=["by name", "by function"]
)
def test_methods(method):
    model = LinenMethods()
    variables, apply, _ = made(model)
    assert_merged_is_adapted(model, apply, variables, method=method)


def test_mutable_collections_and_dropout_keys():
    model = BatchStats()
    variables, apply, adapters = made(model, train=False)
    assert len(apply.plan) == 2
    kwargs = {"train": True, "rngs": {"dropout": jax.random.key(5)}}
    stats = {**kwargs, "mutable": ["batch_stats"]}
    with pytest.warns(
        mora_jax.MoRAWarning, match="call updates batch_stats of the base"
    ):
        _, state = assert_merged_is_adapted(model, apply, variables, **stats)
    assert largest(state["batch_stats"]["BatchNorm_0"]["mean"] - 1) > 1e-3
    assert linen.plan(model, variables, CONFIG, X, **stats) == apply.plan
    for mutable in (True, ["batch_stats"]):  # once for each wrapped model
        apply = wrap(model, apply.plan)
        call = functools.partial(apply, mutable=mutable, **kwargs)
        with pytest.warns(
            mora_jax.MoRAWarning, match="save and merge know nothing"
        ) as seen:
            for _ in range(3):
                _, state = jax.eval_shape(call, adapters, variables, X)
        assert len(seen) == 1
        if mutable is True:
            chex.assert_trees_all_equal_structs(state, dict(variables))


def test_capture_intermediates():
    variables, apply, adapters = made(nn.Sequential([nn.Dense(12), nn.Dense(12)]))
    capture = {"capture_intermediates": True, "mutable": ["intermediates"]}
    y, state = apply(adapters, variables, X, **capture)
    seen = state["intermediates"]["layers_1"]["__call__"][0]
    np.testing.assert_array_equal(seen, y)


# --- Dropout ---


def test_dropout():
    model = nn.Dense(10, use_bias=False)
    variables, apply, adapters = made(model, DROPOUT)
    still = apply(adapters, variables, X, adapter_deterministic=True)
    merged = fold(variables["params"], adapters)
    close(still, model.apply({"params": merged}, X))

    @jax.jit
    def drop(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return apply(adapters, variables, X, adapter_deterministic=False, rngs=rngs)

    np.testing.assert_array_equal(drop(0), drop(0))
    assert largest(drop(0) - drop(1)) > 1e-2
    with pytest.raises(ValueError, match="adapter_deterministic must be True or False"):
        apply(adapters, variables, X)
    with pytest.raises(Exception, match='PRNG for "dropout"'):
        apply(adapters, variables, X, adapter_deterministic=False)


def scan(layer):
    """The class of two layers, one after another."""
    split = {"split_rngs": {"params": True, "dropout": True}}
    return nn.scan(layer, **STACK | split, length=2)


class Each(nn.Module):
    """A layer whose output is one of the scan's."""

    make: Any

    @nn.compact
    def __call__(self, x, _=None):
        return x, self.make()(x)


def test_dropout_differs_by_scanned_layer():
    model = scan(nn.remat(Each))(lambda: nn.Dense(12))
    variables, apply, adapters = made(model, DROPOUT)
    variables = jax.tree.map(jnp.zeros_like, variables)
    ones = jax.tree.map(jnp.ones_like, adapters)
    settings = {"adapter_deterministic": False, "rngs": {"dropout": KEY}}
    _, (first, second) = apply(ones, variables, X, **settings)
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
    first, last = cls((2, 12, 6), "bti,hid->bthd"), cls((2, 6, 12), "bthd,hdi->bti")
    model = nn.Sequential([first, last])
    variables, apply, _ = made(model)
    assert [spec.axes for spec in apply.plan.values()] == ["oio", "iio"]
    assert_merged_is_adapted(model, apply, variables)


def call_of_shapes(model, config):
    """What happens with a plan that no trace of the model has checked."""
    variables = variables_of(model)
    chosen = plan(variables["params"], config)
    wrap(model, chosen)(init(chosen), variables, X)


def test_a_kernel_planned_the_other_way_round_is_used_transposed():
    """C then acts on what the layer calls outputs; adapted is still merged."""
    model = Projection((20, 12), "bti,oi->bto")
    variables = variables_of(model)
    config = MoRAConfig(rank=2, targets="w", alpha=0.5)
    chosen = plan(variables["params"], config)
    assert chosen["w"].axes == "io"
    assert_merged_is_adapted(model, wrap(model, chosen), variables)


class SharedScope(nn.Module):
    """Two layers of a class whose kernel is named by a field, in one scope: Gemma's."""

    @nn.compact
    def __call__(self, x):
        gate = Named((2, 20, 12), "gating_einsum")
        linear = Named((20, 12), "linear")
        for layer in (gate, linear):
            nn.share_scope(self, layer)
        gates = gate("...f,nhf->...nh", x)
        x = nn.gelu(gates[..., 0, :]) * gates[..., 1, :]
        return linear(x=x, equation="...h,hf->...f")


class Named(nn.Module):
    shape: tuple[int, ...]
    weight_name: str

    @nn.compact
    def __call__(self, equation, x):
        w = self.param(self.weight_name, nn.initializers.normal(), self.shape)
        return jnp.einsum(equation, x, w)


def test_shared_scopes():
    model = SharedScope()
    config = MoRAConfig(rank=2, targets="linear", overrides={".*": {"axes": "io"}})
    with pytest.raises(ValueError, match="linear: .*teach its class SharedScope"):
        call_of_shapes(model, config)
    known = {
        "equation": lambda layer, equation, x: equation,
        "kernel": lambda layer: layer.weight_name,
    }
    register_layer(Named, **known)
    message = "'equation' of Named.__call__ must be the input, an array, got '...f,nhf"
    with pytest.raises(TypeError, match=re.escape(message)):
        made(model)
    register_layer(Named, **known, argument="x")
    variables, apply, _ = made(model)
    axes = {path: spec.axes for path, spec in apply.plan.items()}
    assert axes == {"gating_einsum": "ooi", "linear": "io"}
    assert_merged_is_adapted(model, apply, variables)


def test_rules_by_the_name_of_a_class(monkeypatch):
    """They wait until a model has the class; another version's class is unknown."""

    def known(cls, **rule):
        name = f"{cls.__module__}.{cls.__qualname__}"
        monkeypatch.setitem(RULES, name, [LayerRule("bti,io->bto", "w", **rule)])

    class Later(Unknown):
        pass

    class Mine(Projection):
        pass

    for cls, rule in ((Later, {"method": "encode"}), (Mine, {"argument": "x"})):
        known(cls, **rule)
    with pytest.raises(ValueError, match="known how .* teach its class Later"):
        made(Later((12, 6), "bti,io->bto"), MoRAConfig(rank=2, targets="w"))
    model = Mine((12, 6), "bti,io->bto")
    variables, apply, _ = made(model)
    assert_merged_is_adapted(model, apply, variables)
    register_layer(Mine, equation="bti,oi->bto", kernel="w")
    with pytest.raises(ValueError, match="w: Mine.__call__ .*does not compute"):
        made(model)


class Tied(nn.Dense):
    def attend(self, x):
        return x @ self.get_variable("params", "kernel").T


class TiedNet(nn.Module):
    def setup(self):
        self.tied = Tied(12)

    def __call__(self, x):
        return self.tied.attend(self.tied(x))


class TiedKnown(Tied):
    """Its own method is registered, and the base class's is known as before."""


class TiedKnownNet(TiedNet):
    def setup(self):
        self.tied = TiedKnown(6)


def test_a_registered_method_leaves_the_rules_of_base_classes():
    register_layer(TiedKnown, equation="...o,io->...i", method="attend")
    variables, apply, _ = made(TiedKnownNet())
    assert {path: spec.axes for path, spec in apply.plan.items()} == {
        "tied/kernel": "io"
    }
    assert_merged_is_adapted(TiedKnownNet(), apply, variables)


def test_layers_that_do_otherwise_are_refused():
    """An adapter that would have no effect is an error, not a silence."""
    model, config = Unknown((12, 6), "bti,io->bto"), MoRAConfig(rank=2, targets="w")
    with pytest.raises(ValueError, match="w: it is not known how a layer uses it"):
        made(model, config)
    message = r"w: .*teach its class Unknown with mora_jax.register_layer"
    with pytest.raises(ValueError, match=message):
        call_of_shapes(model, config)
    config = MoRAConfig(rank=2, targets=".*kernel", overrides={".*": {"axes": "sio"}})
    with pytest.raises(ValueError, match="teach its class ConvLocal"):
        call_of_shapes(nn.ConvLocal(12, (3,)), config)
    with pytest.raises(ValueError, match="tied/kernel: .* by `dot_general`, where"):
        made(TiedNet())
    with pytest.raises(ValueError, match="tied/kernel: .* by `dot_general`, where"):
        call_of_shapes(TiedNet(), CONFIG)
    config = MoRAConfig(rank=2, targets="w", overrides={"w": {"axes": "iio"}})
    message = re.escape(
        "w: the adapter reads the kernel's axes as 'iio', the layer computes 'ioo'"
    )
    model = Projection((12, 2, 6), "bti,ihd->bthd")
    for refused in (call_of_shapes, made):  # when called, and when planned
        with pytest.raises(ValueError, match=message):
            refused(model, config)


@pytest.mark.usefixtures("unchecked")
def test_bad_input():
    model = nn.Dense(12)
    variables, apply, _ = made(model)
    plan, adapters = apply.plan, init(apply.plan)
    both = {"params": mora_jax.combine(variables["params"], adapters)}
    small = jax.tree.map(lambda m: m[:3], adapters)
    plain = {"kernel_mora": jnp.zeros((6, 6))}
    register = functools.partial(register_layer, nn.Dense, equation="...i,io->...o")
    no_class = functools.partial(register_layer, 3, equation="...i,io->...o")
    lacks = "variables must be a mapping with 'params'"
    no_such = r"must be one of \['inputs'\] of Dense.__call__, got 'x'"
    for error, message, call in (
        (TypeError, "flax.linen.Module, got type", lambda: wrap(nn.Dense, plan)),
        (TypeError, "must be given with a", lambda: wrap(model, CONFIG)),
        (TypeError, "must not be given with", lambda: wrap(model, plan, both)),
        (TypeError, "model must be", lambda: linen.plan(max, variables, CONFIG, X)),
        (ValueError, lacks, lambda: apply(adapters, variables["params"], X)),
        (ValueError, lacks, lambda: linen.plan(model, {}, CONFIG, X)),
        (ValueError, "adapters hold no adapter", lambda: apply({}, variables, X)),
        (TypeError, "swapped", lambda: apply(variables, {"params": adapters}, X)),
        (ValueError, "must have shape", lambda: apply(small, variables, X)),
        (TypeError, r"plan.adapters\(tree\)", lambda: apply(plain, variables, X)),
        (ValueError, "already hold 'kernel_m", lambda: apply(adapters, both, X)),
        (TypeError, "cls must be a class, got 3", no_class),
        (TypeError, "a method of Dense, got 'n'", lambda: register(method="n")),
        (TypeError, "equation must be a string, a", lambda: register(equation=3)),
        (TypeError, "kernel must be a parameter's", lambda: register(kernel=0)),
        (TypeError, f"argument {no_such}", lambda: register(argument="x")),
    ):
        with pytest.raises(error, match=message):
            call()


# --- MoRADense ---


def test_moradense_is_dense_and_more():
    base, layer = nn.Dense(10), MoRADense(10, config=CONFIG)
    y, expected = base.init_with_output(KEY, X)
    variables = layer.init(KEY, X)
    kernels, adapters = split(variables["params"])
    chex.assert_trees_all_equal(kernels, expected["params"])
    chex.assert_trees_all_equal(layer.apply(variables, X), y)
    m = random_like(adapters)
    frozen = mora_jax.FrozenDense.from_config(**kernels, config=CONFIG)
    close(layer.apply({"params": kernels | m}, X), mora_jax.mora_apply(m, frozen, X))
    with pytest.raises(TypeError, match=r"write MoRADense\(features, config=config\)"):
        MoRADense(10, CONFIG)
    with pytest.raises(TypeError, match="config must be a MoRAConfig"):
        MoRADense(10, config="rank=2")
    fields = set(nn.Dense.__dataclass_fields__)
    assert fields < set(MoRADense.__dataclass_fields__)


def test_moradense_settings_and_dropout():
    config = MoRAConfig(rank=2, init="gaussian", dropout=0.5)
    layer = MoRADense(
        10, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.float16,
        kernel_init=nn.initializers.ones, config=config,
    )  # fmt: skip
    variables, other = (
        layer.init(jax.random.key(k), X, deterministic=True) for k in (0, 1)
    )
    dtypes = {name: p.dtype for name, p in bare(variables["params"]).items()}
    assert dtypes == {"kernel": jnp.float16, "kernel_mora": jnp.float32}
    m, other_m = (one["params"]["kernel_mora"].m for one in (variables, other))
    assert not np.array_equal(m, other_m)
    still = layer.apply(variables, X, deterministic=True)
    dropped = layer.apply(variables, X, deterministic=False, rngs={"dropout": KEY})
    assert still.dtype == jnp.bfloat16 and largest(still - dropped) > 1e-2
    with pytest.raises(ValueError, match="deterministic"):
        layer.apply(variables, X)


def vmap(layer):
    """The class of two layers side by side."""
    return nn.vmap(layer, **STACK, in_axes=None, axis_size=2)


LIFTS = {
    "scan": scan(Each),
    "scan of remat": scan(nn.remat(Each)),
    "scan of jit": scan(nn.jit(Each)),
    "vmap": vmap(Each),
    "vmap of scan": vmap(scan(Each)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [slow("scan"), "scan of remat", "scan of jit", slow("vmap"), "vmap of scan"]
)
def test_moradense_in_lifted_layers_is_merged_by_what_it_holds(how):
    """Their specs are of one layer, their M's of the stack, and no plan is known."""
    model = LIFTS[how](lambda: MoRADense(12, config=CONFIG, name="fc"))
    plain = LIFTS[how](lambda: nn.Dense(12, name="fc"))
    base, adapters = split(variables_of(model)["params"])
    stack = (2, 2) if how == "vmap of scan" else (2,)
    adapter = adapters["fc"]["kernel_mora"]
    assert adapter.spec.axes == "io" and adapter.m.shape == (*stack, 6, 6)
    # Those of a plan know of the stack, and may mean something else.
    config = dataclasses.replace(
        CONFIG, operator="signed_decoupling", rank=1, alpha=2.0
    )
    whole = trained(linen.plan(plain, {"params": base}, config, X))
    assert whole["fc"]["kernel_mora"].spec.axes == "s" * len(stack) + "io"

    @jax.jit
    def both(adapters):
        def adapted(adapters):
            params = mora_jax.combine(base, adapters)
            return model.apply({"params": params}, X)

        def merged(adapters):
            return plain.apply({"params": fold(base, adapters)}, X)

        def loss(adapters, run):
            y = run(adapters)
            return jnp.mean(y[1] ** 2), y

        grad = jax.grad(loss, has_aux=True)
        return [grad(adapters, run) for run in (adapted, merged)]

    for given in (adapters, whole):
        adapted, merged = both(given)
        close(adapted, merged)
        (gradient,) = jax.tree.leaves(adapted[0])
        assert (np.abs(gradient).max((-2, -1)) > 0).all()


def test_steps_of_an_optimizer_keep_what_adapters_mean():
    """Also of those that the model was not planned for; and compile once for each."""
    variables, apply, adapters = made(nn.Sequential([nn.Dense(12), nn.Dense(12)]))
    tx, traces = optax.adamw(1e-2), []

    @jax.jit
    def step(adapters, state):
        traces.append(None)
        grads = jax.grad(lambda a: jnp.mean(apply(a, variables, X) ** 2))(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, grads

    def train(adapters):
        state: Any = tx.init(adapters)
        new, state, _ = step(adapters, state)
        new, state, grads = step(new, state)
        moments = state[0]
        for tree in (new, grads, moments.mu, moments.nu):
            chex.assert_trees_all_equal_structs(tree, adapters)
        merged = {"params": fold(variables["params"], new)}
        close(apply(new, variables, X), apply.model.apply(merged, X))

    other = dataclasses.replace(CONFIG, operator="signed_decoupling", rank=1, alpha=2.0)
    for config, number in ((CONFIG, 1), (CONFIG, 1), (other, 2), (other, 2)):
        train(trained(linen.plan(apply.model, variables, config, X)))
        assert len(traces) == number
    train(adapters)
    assert len(traces) == 2


def test_adapters_of_other_kernels_are_refused_by_name():
    variables, apply, adapters = made(nn.Sequential([nn.Dense(12), nn.Dense(10)]))
    turned = AdapterSpec.from_config(CONFIG, (12, 12), "oi")
    other = AdapterSpec.from_config(CONFIG, (12, 10))

    def at(layer, spec):
        adapter = Adapter(jnp.zeros(spec.shape), spec)
        return {**adapters, layer: {"kernel_mora": adapter}}

    where, kernel = "'layers_0/kernel', the plan a kernel", r"a kernel \(12, 12\) with"
    for message, given in (
        (f"have nothing at {where}", {"layers_1": adapters["layers_1"]}),
        ("have .* at 'layers_2/kernel', the plan nothing", at("layers_2", other)),
        (rf"have {kernel} axes 'oi' at {where}", at("layers_0", turned)),
        (rf"have a kernel \(12, 10\) .* at {where}", at("layers_0", other)),
    ):
        with pytest.raises(ValueError, match=f"adapters {message}"):
            apply(given, variables, X)
