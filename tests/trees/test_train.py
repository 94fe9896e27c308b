"""Arrays of the base that train themselves, in Linen, NNX and one tree."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_files import assert_same, flatten
from flax import nnx
from helpers import bare, close, made_for, random, random_like
from jax.sharding import PartitionSpec as P
from merged import merge_errors
from meshes import make_mesh, put

import mora_jax
from mora_jax import (
    MoRAConfig,
    Plan,
    TrainedArray,
    combine,
    init,
    merge,
    mixing,
    optimizer,
    plan,
    split,
)

TRAIN = ("head/.*", ".*norm/scale", "fc/bias")
CONFIG = MoRAConfig(rank=1, targets="fc/kernel", train=TRAIN, scale="paper")
X, SGD = random(1, 4, 8), optax.sgd(0.1)
NAMES = ["fc/bias", "head/bias", "head/kernel", "norm/scale"]


class Linen(nn.Module):
    """A dense layer, a norm and a head."""

    dtype: jnp.dtype = jnp.dtype("float32")

    def setup(self):
        self.fc = nn.Dense(8, param_dtype=self.dtype)
        self.norm = nn.LayerNorm(param_dtype=self.dtype)
        self.head = nn.Dense(3, param_dtype=self.dtype)

    def __call__(self, x):
        return self.head(nn.tanh(self.norm(self.fc(x))))


class Nnx(nnx.Module):
    """The same."""

    def __init__(self, dtype=jnp.float32):
        settings = {"rngs": nnx.Rngs(0), "param_dtype": dtype}
        self.fc = nnx.Linear(8, 8, **settings)
        self.norm = nnx.LayerNorm(8, **settings)
        self.head = nnx.Linear(8, 3, **settings)

    def __call__(self, x):
        return self.head(nnx.tanh(self.norm(self.fc(x))))


def numbers(dtype=jnp.float32):
    return {
        "fc": {"kernel": random(2, 8, 8, dtype=dtype), "bias": jnp.zeros(8, dtype)},
        "norm": {"scale": jnp.ones(8, dtype), "bias": random(3, 8, dtype=dtype)},
        "head": {"kernel": random(4, 8, 3, dtype=dtype), "bias": jnp.zeros(3, dtype)},
    }


def in_nnx(params):
    model = Nnx(params["fc"]["kernel"].dtype)
    nnx.update(model, params)
    return model


def loss_of(y):
    return jnp.mean(jnp.square(y.astype(jnp.float32) - 1))


@jax.jit
@jax.grad
def slopes_of(params):
    return loss_of(Linen().apply({"params": params}, X))


def expected(params, m=None):
    """By hand: plain descent on the chosen arrays, all else frozen."""
    flat, slopes = flatten(params), flatten(slopes_of(params))
    return {name: flat[name] - 0.1 * slopes[name] for name in NAMES}


def step(adapters, variables, apply):
    grads = jax.grad(lambda a: loss_of(apply(a, variables, X)))(adapters)
    updates, _ = SGD.update(grads, SGD.init(adapters), adapters)
    return optax.apply_updates(adapters, updates)


@pytest.fixture
def params():
    return numbers()


@pytest.fixture
def made(params):
    return plan(params, CONFIG)


def check_step(adapters, params):
    flat = flatten(bare(adapters))
    assert sorted(flat) == sorted([*NAMES, "fc/kernel_mora"])
    assert np.abs(flat.pop("fc/kernel_mora")).max() > 0
    close(flat, expected(params))


def test_a_step_in_linen_is_plain_descent_on_these_arrays(params, made):
    apply = mora_jax.linen.wrap(Linen(), CONFIG, {"params": params}, X)
    assert apply.plan == made
    adapters = init(made, params=params)
    variables = {"params": params}
    y = Linen().apply(variables, X)
    np.testing.assert_array_equal(apply(adapters, variables, X), y)
    after = jax.jit(step, static_argnums=2)(adapters, variables, apply)
    check_step(after, params)
    merged = merge(params, after)
    close(Linen().apply({"params": merged}, X), apply(after, variables, X))
    for name in ("norm/bias",):
        assert flatten(merged)[name] is flatten(params)[name]


@pytest.mark.slow
def test_a_step_in_nnx_is_plain_descent_on_these_arrays(params, made):
    base = in_nnx(params)
    model = mora_jax.nnx.wrap(base, CONFIG)
    assert mora_jax.nnx.plan_of(model) == made
    np.testing.assert_array_equal(model(X), base(X))
    opt = mora_jax.nnx.adapter_optimizer(model, SGD)
    grad = mora_jax.nnx.value_and_grad(lambda model: loss_of(model(X)))
    opt.update(model, grad(model)[1])
    adapters = mora_jax.nnx.adapters(model)
    check_step(adapters, params)
    assert_same(nnx.to_pure_dict(nnx.state(base)), params)
    merged = mora_jax.nnx.merge_adapters(model)
    close(merged(X), model(X))
    assert type(merged.norm.scale) is nnx.Param
    assert jax.tree.structure(nnx.state(merged)) == jax.tree.structure(nnx.state(base))
    other = mora_jax.nnx.wrap(base, made)
    mora_jax.nnx.set_adapters(other, adapters)
    np.testing.assert_array_equal(other(X), model(X))
    with pytest.raises(
        ValueError, match="fc/bias: this array is trained .* nnx.wrap was"
    ):
        mora_jax.nnx.unwrap(model)


def test_a_step_in_one_tree_is_plain_descent_on_these_arrays(params, made):
    apply = mora_jax.linen.wrap(Linen(), made)
    tree = combine(params, init(made, params=params))

    def loss(tree):
        base, adapters = split(tree)
        return loss_of(apply(adapters, {"params": base}, X))

    tx = optimizer(SGD, tree)
    updates, _ = tx.update(jax.grad(loss)(tree), tx.init(tree), tree)
    after = optax.apply_updates(tree, updates)
    base, adapters = split(after)
    check_step(adapters, params)
    for name in ("fc/kernel", "norm/bias"):
        np.testing.assert_array_equal(flatten(base)[name], flatten(params)[name])
    mask = flatten(mora_jax.trainable_mask(tree))
    assert sorted(k for k, v in mask.items() if v) == sorted([*NAMES, "fc/kernel_mora"])


def test_fold_trains_them_too(params, made):
    def apply(adapters, variables, x):
        folded = mora_jax.fold(variables["params"], adapters)
        return Linen().apply({"params": folded}, x)

    check_step(step(init(made, params=params), {"params": params}, apply), params)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_copies_of_a_16_bit_base_are_float32_and_the_model_computes_as_before(api):
    params = numbers(jnp.bfloat16)
    made, x = plan(params, CONFIG), X.astype(jnp.bfloat16)
    assert {one.dtype for one in made.trained.values()} == {jnp.dtype("float32")}
    adapters, base = init(made, params=params), in_nnx(params)
    changed = jax.tree.map(lambda a: a + 1e-5, adapters)  # less than bfloat16 tells
    if api == "nnx":
        model = mora_jax.nnx.wrap(base, made)
        mora_jax.nnx.set_adapters(model, changed)
        y = model(x)
        merged = mora_jax.nnx.merge_adapters(model, rounding="nearest")(x)
        assert_same(mora_jax.nnx.adapters(model), changed)
    else:
        variables = {"params": params}
        apply = mora_jax.linen.wrap(Linen(jnp.dtype("bfloat16")), made)
        y = apply(changed, variables, x)
        both = merge(params, changed, rounding="nearest")
        assert flatten(both)["norm/scale"].dtype == jnp.bfloat16
        merged = Linen(jnp.dtype("bfloat16")).apply({"params": both}, x)
    assert y.dtype == merged.dtype == base(x).dtype == jnp.bfloat16
    close(y, merged, 1e-2)
    close(y, base(x), 2e-2)


def test_overrides_say_the_dtype_of_a_copy():
    overrides = {"norm/scale": {"param_dtype": None}}
    params = numbers(jnp.bfloat16)
    made = plan(params, dataclasses.replace(CONFIG, overrides=overrides))
    found = {name: one.dtype for name, one in made.trained.items()}
    assert found == {
        name: jnp.bfloat16 if name == "norm/scale" else jnp.float32 for name in NAMES
    }


def test_plan_counts_shows_and_compares_them(params, made):
    assert list(made.trained) == NAMES
    assert made.trained["head/kernel"] == TrainedArray((8, 3))
    q = made["fc/kernel"].parameters
    assert made.trainable_parameters == q + 8 + 3 + 24 + 8
    leaves = jax.tree.leaves(init(made, params=params))
    assert sum(leaf.size for leaf in leaves) == made.trainable_parameters
    assert "head/kernel" not in {kind.pattern for kind in made.left_out}
    text = str(made)
    assert "1 adapter and 4 trained arrays: 59 trainable parameters" in text
    assert re.search(r"head/kernel +8 x 3  trained  +-  +-  +24  +20.87%", text)
    without = plan(params, dataclasses.replace(CONFIG, train=()))
    fewer = plan(params, dataclasses.replace(CONFIG, train=TRAIN[1:]))
    assert len({made, without, fewer}) == 3
    assert Plan(made.specs, made.base_parameters) == without
    restored = jax.tree.map(lambda leaf: leaf, made)
    assert restored == made and hash(restored) == hash(made)


def test_init_makes_copies(params, made):
    adapters = init(made, params=params)
    jax.tree.map(lambda leaf: leaf.delete(), adapters)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_layers_in_a_stack():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(8, name="fc")(nn.LayerNorm(name="norm")(x)), None

    lift = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    model = nn.scan(Block, length=3, **lift)()
    variables = made_for(model, X, None)
    config = MoRAConfig(rank=1, train="norm/scale")
    apply = mora_jax.linen.wrap(model, config, variables, X, None)
    adapters = random_like(init(apply.plan, params=variables["params"]))
    assert adapters["norm"]["scale"].m.shape == (3, 8)
    merged = merge(variables["params"], adapters)
    y = model.apply({"params": merged}, X, None)[0]
    close(apply(adapters, variables, X, None)[0], y)
    updated = apply(adapters, variables, X, None, mutable=["params"])[1]
    assert_same(updated["params"], variables["params"])


def test_a_restart_keeps_them(params):
    config = dataclasses.replace(CONFIG, operator="sharing")
    made, tx = plan(params, config), optax.adam(0.1)
    adapters = random_like(init(made, params=params))
    apply = mora_jax.linen.wrap(Linen(), made)
    y = apply(adapters, {"params": params}, X)
    for tree in (adapters, combine(params, adapters)):
        after = mora_jax.remora.restart(params, adapters, tx.init(tree), tx)
        assert_same(after.adapters["norm"], adapters["norm"])
        assert not after.adapters["fc"]["kernel_mora"].m.any()
        close(apply(after.adapters, {"params": after.params}, X), y)


def test_shardings_and_checks(params, made):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("model",), axis_types=auto)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    shardings = jax.tree.map(lambda _: place, params)
    found = mora_jax.sharding.adapter_shardings(made, shardings)
    assert found["norm"]["scale"].m == place
    assert jax.tree.structure(found) == jax.tree.structure(init(made, params=params))
    adapters = random_like(init(made, params=params))
    for model, variables in ((Linen(), {"params": params}), (in_nnx(params), None)):
        found = merge_errors(model, variables, made, X)
        assert list(found) == ["fc/kernel"]
    assert list(mora_jax.diagnostics.spectrum(adapters)) == ["fc/kernel"]
    loss = mora_jax.diagnostics.merge_loss(params, adapters)
    assert list(loss) == ["fc/kernel"]


def config(**settings):
    return dataclasses.replace(CONFIG, **settings)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "norms/scale"}, "train: 'norms/scale' matches no path; the nearest"),
        ({"train": "norm"}, "patterns match whole paths"),
        ({"train": "("}, "train holds '[(]', which is not a regular expression"),
        ({"train": "fc/.*"}, "'fc/kernel' also gets an adapter.*exclude='fc/kernel'"),
        ({"train": None}, "train must be regular expressions"),
        ({"train": "step"}, "step must have a floating-point dtype.* train$"),
        ({"train": "a"}, "a is shared: the model holds 'a' also as 'b'"),
        (
            {"overrides": {"head/bias": {"rank": 2}}},
            "whose only setting is param_dtype",
        ),
        ({"overrides": {"fc/kernel": {"train": ()}}}, "overrides.*must use"),
    ],
)
def test_bad_settings(params, settings, message):
    tied = random(0, 3)
    params |= {"step": jnp.array(3), "a": tied, "b": tied}
    with pytest.raises((TypeError, ValueError), match=message):
        plan(params, config(**settings))


def test_bad_input(params, made):
    adapters = init(made, params=params)
    scale = adapters["norm"]["scale"]
    lacking = {**adapters, "norm": {}}
    wrong = {**adapters, "norm": {"scale": scale.replace(m=jnp.ones(3))}}
    infinite = {**adapters, "norm": {"scale": scale.replace(m=jnp.full(8, jnp.nan))}}
    plain = {**adapters, "norm": {"scale": scale.m}}
    base = {**params, "norm": {"bias": jnp.ones(8)}}
    cases = [
        (lambda: init(made), "the plan trains 'fc/bias'.*init[(]plan, params=params"),
        (lambda: init(made, params=base), "params lack 'norm/scale', which is trained"),
        (lambda: init(made, params={"params": params}), "not all variables"),
        (lambda: combine(base, adapters), "params lack 'norm/scale'"),
        (lambda: merge(params, wrong), r"in the adapters must have shape \(8,\)"),
        (lambda: merge(params, infinite), "norm/scale .* holds NaN or infinity"),
        (lambda: merge(base, adapters), "params lack 'norm/scale'"),
        (lambda: mora_jax.unmerge(params, adapters), "keep the base instead"),
        (
            lambda: mora_jax.nnx.set_adapters(wrapped, lacking),
            r"nothing at 'norm/scale', the plan an array \(8,\) to train",
        ),
        (
            lambda: mora_jax.nnx.set_adapters(fewer, adapters),
            r"an array \(3,\) to train at 'head/bias', the plan nothing",
        ),
        (lambda: apply(lacking, {"params": params}, X), "have nothing at 'norm/scale'"),
        (
            lambda: mora_jax.FrozenDense.from_config(jnp.ones((8, 8)), config=CONFIG),
            "train must be empty for one layer",
        ),
        (
            lambda: mora_jax.nnx.MoRALinear(8, 8, config=CONFIG, rngs=nnx.Rngs(0)),
            "train must be empty for one layer",
        ),
        (
            lambda: mora_jax.MoRADense(8, config=CONFIG).init(jax.random.key(0), X),
            "train must be empty for one layer",
        ),
    ]
    wrapped = mora_jax.nnx.wrap(in_nnx(params), made)
    fewer = mora_jax.nnx.wrap(in_nnx(params), config(train=TRAIN[1:]))
    apply = mora_jax.linen.wrap(Linen(), made)
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="got ArrayImpl at 'norm/scale': plan.adapters"):
        merge(params, plain)
    with pytest.raises(TypeError, match="modules_to_save|train, regular expressions"):
        MoRAConfig(modules_to_save=["head"])  # pyright: ignore


def test_a_shared_variable_of_nnx_is_refused(params):
    model = in_nnx(params)
    model.again = model.norm.scale  # pyright: ignore
    with pytest.raises(ValueError, match="is shared.*take it out of train"):
        mora_jax.nnx.plan(model, config(train=".*scale|again"))
    with pytest.raises(ValueError, match="is shared.*take it out of train"):
        mora_jax.nnx.wrap(model, plan(params, config(train="norm/scale")))


def test_adapters_start_from_the_base_alone(params, made):
    combined = mora_jax.combine(params, init(made, params=params))
    with pytest.raises(ValueError, match="give the base alone"):
        init(made, params=combined)
    with pytest.raises(TypeError, match="in params must be an array"):
        init(made, params=jax.eval_shape(lambda: params))
    with pytest.raises(ValueError, match="params lack 'fc/bias'"):
        init(made, params={"fc": {"kernel": params["fc"]["kernel"]}})


def test_mixing_refuses_what_is_no_delta(params, made):
    adapters = init(made, params=params)
    for call in (
        lambda: mixing.scaled(adapters, 0),
        lambda: mixing.weighted_sum([adapters], [1.0]),
    ):
        with pytest.raises(ValueError, match="is no delta, which this needs"):
            call()


@pytest.mark.slow
def test_gradients_of_all_params_do_not_move_the_adapters(params):
    """As nnx.value_and_grad gives them: Flax itself would take them in silence."""
    model = mora_jax.nnx.wrap(in_nnx(params), CONFIG)
    opt = mora_jax.nnx.adapter_optimizer(model, SGD)
    grads = nnx.grad(lambda model: loss_of(model(X)))(model)
    with pytest.raises(ValueError, match="what mora_jax.nnx.value_and_grad gives"):
        opt.update(model, grads)


def test_copies_are_where_the_base_is_and_a_second_step_compiles_nothing(params):
    mesh = make_mesh(model=2)
    specs = jax.tree.map(lambda _: P(), params)
    specs["head"]["kernel"] = P("model")
    params = put(params, mesh, specs)
    made = plan(params, config(train="head/.*"))
    adapters = init(made, params=params)
    assert adapters["head"]["kernel"].m.sharding.spec == P("model")
    model, traces = mora_jax.nnx.wrap(in_nnx(params), made), []
    found = mora_jax.nnx.adapters(model)["head"]["kernel"].m
    opt = mora_jax.nnx.adapter_optimizer(model, SGD)
    grad = mora_jax.nnx.value_and_grad(lambda model: loss_of(model(X)))

    @nnx.jit
    def step(model, opt):
        traces.append(None)
        opt.update(model, grad(model)[1])

    step(model, opt)
    step(model, opt)
    assert len(traces) == 1 and found.sharding.spec == P("model")
