"""Each program that runs is checked: other calls than planned, and what meets an M."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import close, made_for, random, trained

import mora_jax
from mora_jax import Call, MoRAConfig, MoRAWarning, linen
from mora_jax import nnx as mora_nnx

KEY, X = jax.random.key(0), random(0, 2, 8)
CONFIG = MoRAConfig(rank=2)
OUTSIDE = "fc/kernel: the model also reads this kernel outside"


class Reads(nn.Module):
    """Some of its calls read the kernel itself."""

    def setup(self):
        self.fc = nn.Dense(8)

    def __call__(self, x, train=False):
        y = self.fc(x)
        kernel = self.fc.variables["params"]["kernel"]
        self.sow("losses", "norm", jnp.sum(kernel**2))
        return y + jnp.sum(kernel) if train else y

    def read(self, x):
        return x @ self.fc.variables["params"]["kernel"]


class Unhashable:
    """A config as models have one."""

    __hash__ = None  # type: ignore[assignment]


class ReadsTwin(nnx.Module):
    def __init__(self):
        self.fc = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.reads, self.config = False, Unhashable()

    def __call__(self, x, train=False):
        return self.fc(x) + (self.fc.kernel[...].sum() if train or self.reads else 0)

    def read(self, x):
        return x @ self.fc.kernel[...]


OTHERS = [
    {"train": True},
    {"method": "read"},
    {"method": Reads.read},
    {"mutable": ["losses"]},
]


def reads():
    model = Reads()
    variables = {"params": made_for(model, X)["params"]}
    return model, variables, linen.wrap(model, CONFIG, variables, X)


@pytest.mark.law
@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("other", OTHERS)
def test_another_call_than_the_planned_one_is_checked(other, jitted):
    model, variables, apply = reads()
    adapters = mora_jax.init(apply.plan)
    assert (apply(adapters, variables, X) == model.apply(variables, X)).all()
    call = functools.partial(apply, **other)
    for _ in range(2):
        with pytest.raises(ValueError, match=OUTSIDE):
            (jax.jit(call) if jitted else call)(adapters, variables, X)
    with pytest.raises(ValueError, match=OUTSIDE):
        linen.plan(model, variables, CONFIG, X, calls=[Call(X, **other)])
    assert linen.plan(model, variables, CONFIG, calls=[Call(X)]) == apply.plan


@pytest.mark.parametrize("jitted", [False, True])
def test_another_call_of_an_nnx_model_is_checked(jitted):
    model = ReadsTwin()
    adapted = mora_nnx.wrap(model, mora_nnx.plan(model, CONFIG, X))
    run = nnx.jit if jitted else lambda call: call
    assert (run(lambda model, x: model(x))(adapted, X) == model(X)).all()
    for call in (lambda m, x: m(x, train=True), lambda m, x: m.read(x)):
        with pytest.raises(ValueError, match=OUTSIDE):
            run(call)(adapted, X)
    adapted.reads = True  # an attribute is another program, too
    with pytest.raises(ValueError, match=OUTSIDE):
        run(lambda model, x: model(x))(adapted, X)
    with pytest.raises(ValueError, match=OUTSIDE):
        mora_nnx.plan(model, CONFIG, calls=[Call(X), Call(X, train=True)])


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_a_plan_of_names_is_proven_by_the_first_call(api):
    if api == "linen":
        model, variables, _ = reads()
        plan = mora_jax.plan(variables["params"], CONFIG)
        apply = functools.partial(
            linen.wrap(model, plan), mora_jax.init(plan), variables
        )
    else:
        apply = mora_nnx.wrap(ReadsTwin(), CONFIG)
    apply(X)
    with pytest.raises(ValueError, match=OUTSIDE):
        apply(X, train=True)


def test_what_cannot_be_traced_is_said():
    class Loop(nnx.Module):
        def __init__(self):
            self.fc = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.fc(x)

        def generate(self, x):
            while jnp.abs(x).max() > 0.1:
                x = self(x) / 2
            return x

    model = Loop()
    adapted = mora_nnx.wrap(model, CONFIG)
    with pytest.warns(MoRAWarning, match="generate|cannot be traced"):
        assert (adapted.generate(X) == model.generate(X)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted.generate(X)


# --- An M that does not arrive as it is ---


def mapped(trans, module=nn.Dense):
    """A model whose params `trans` maps before its layer reads them."""

    class Mapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.map_variables(module, "params", trans)(8, name="fc")(x)

    return Mapped(), {"params": {"fc": made_for(nn.Dense(8), X)["params"]}}


def halved(tree):
    """Walks through dicts by itself."""
    if isinstance(tree, dict):
        return {key: halved(value) for key, value in tree.items()}
    return tree * 1.0


def rebuilt(tree):
    params = tree["params"]
    return {"params": {"kernel": params["kernel"], "bias": params["bias"]}}


TRANSFORMS = {
    "stopped": (
        functools.partial(jax.tree.map, jax.lax.stop_gradient),
        "reads fc/kernel_mora changed by `stop_gradient`",
    ),
    "by shape": (
        functools.partial(jax.tree.map, lambda a: a * (2.0 if a.ndim == 2 else 1)),
        "reads fc/kernel_mora changed by `mul`",
    ),
    "by path": (halved, "fails with an M beside fc/kernel|changes it"),
    "rebuilt": (rebuilt, "must keep the M beside it"),
}


@pytest.mark.parametrize("how", TRANSFORMS)
def test_params_that_are_mapped_keep_their_m_or_are_refused(how):
    trans, match = TRANSFORMS[how]
    model, variables = mapped(trans)
    plan = mora_jax.plan(variables["params"], CONFIG)
    apply = linen.wrap(model, plan)
    with pytest.raises(ValueError, match=match):
        apply(mora_jax.init(plan), variables, X)


def test_a_class_of_flax_itself_needs_no_teaching():
    model, variables = mapped(rebuilt)
    match = (
        "fc/kernel: its layer, a Dense, gets it alone: code that rebuilds the params"
    )
    with pytest.raises(ValueError, match=f"{match}.*, or exclude it$"):
        linen.plan(model, variables, CONFIG, X)
    plan = mora_jax.plan(variables["params"], CONFIG)
    with pytest.raises(ValueError, match="must keep the M beside it") as error:
        linen.wrap(model, plan)(mora_jax.init(plan), variables, X)
    assert "teach" not in str(error.value)


def test_a_plan_without_mapped_params_needs_no_mapped_m():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8, name="own")(x)
            return nn.map_variables(nn.Dense, "params", halved)(8, name="fc")(x)

    model, (own, fc) = Half(), [made_for(nn.Dense(8), X)["params"] for _ in "ab"]
    variables = {"params": {"own": own, "fc": fc}}
    with pytest.raises(ValueError, match="fails with an M beside its kernels.*exclude"):
        linen.plan(model, variables, MoRAConfig(rank=2), X)
    config = MoRAConfig(rank=2, exclude="fc/kernel")
    plan = linen.plan(model, variables, config, X)
    assert list(plan) == ["own/kernel"] and not plan.unproven


def test_a_cast_of_all_params_is_right():
    model, variables = mapped(
        functools.partial(jax.tree.map, lambda a: a.astype(jnp.bfloat16))
    )
    apply = linen.wrap(model, CONFIG, variables, X)
    adapters = mora_jax.init(apply.plan)
    assert (apply(adapters, variables, X) == model.apply(variables, X)).all()


# --- M = 0 is the base ---


class CountsLeaves(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="fc")(x)
        return x / len(jax.tree.leaves(self.variables["params"]))


class AsksType(nnx.Module):
    def __init__(self):
        self.fc = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.fc(x) * (2.0 if type(self.fc) is nnx.Linear else 1.0)


def test_code_that_sees_an_m_is_refused():
    model = CountsLeaves()
    variables = made_for(model, X)
    apply = linen.wrap(model, CONFIG, variables, X)
    message = "computes something else with an M beside its kernels, even if M = 0"
    with pytest.raises(ValueError, match=f"{message}: div .* 3.* instead of div .* 2"):
        apply(mora_jax.init(apply.plan), variables, X)
    adapted = mora_nnx.wrap(AsksType(), CONFIG)
    with pytest.raises(ValueError, match=f"{message}.*instead of mul"):
        adapted(X)


NUMBERS_OF_STEPS = {
    "slice": lambda x, n: x[:, n : n + 4],
    "integer_pow": lambda x, n: x**n,
    "reduce_sum": lambda x, n: jnp.sum(x[:8, :8], axis=n % 2),
    "scan": lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: jnp.sin(x), x),
    "while": lambda x, n: jax.lax.while_loop(
        lambda s: s[0] < 5, lambda s: (s[0] + 1, jnp.sin(s[1])), (n, x)
    )[1],
    "clamp": lambda x, n: jax.lax.switch(
        jnp.int32(n), [jnp.sin, jnp.cos, jnp.tanh, jnp.exp], x
    ),
    "gather": lambda x, n: x.at[:, jnp.arange(2)].get(mode="fill", fill_value=float(n)),
}


@pytest.mark.parametrize("primitive", NUMBERS_OF_STEPS)
def test_a_number_of_arrays_in_a_step_is_seen(primitive):
    """Shapes are the same: the number is a part of the step itself."""

    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(8, name="fc")(x)
            n = len(jax.tree.leaves(self.variables["params"]))
            return NUMBERS_OF_STEPS[primitive](y, n)

    model, x = Counting(), random(0, 8, 8)
    variables = made_for(model, x)
    apply = linen.wrap(model, CONFIG, variables, x)
    told = f"computes something else with an M .*: {primitive} .*3.* instead of"
    with pytest.raises(ValueError, match=told):
        apply(mora_jax.init(apply.plan), variables, x)


class Mapped(nn.Module):
    """A layer under vmap along an axis of its input, or one layer for each index."""

    axis: int
    stack: int | None

    @nn.compact
    def __call__(self, x):
        lift = {"variable_axes": {"params": self.stack}, "in_axes": self.axis}
        split = {"split_rngs": {"params": self.stack is not None}}
        return nn.vmap(nn.Dense, **lift, **split, out_axes=1)(8, name="fc")(x)


class MappedTwin(nnx.Module):
    """The same in NNX, of a function of JAX's that closes over the layer."""

    def __init__(self, axis):
        self.fc, self.axis = nnx.Linear(8, 8, rngs=nnx.Rngs(0)), axis

    def __call__(self, x):
        return jax.vmap(self.fc, in_axes=self.axis, out_axes=1)(x)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1, -2])
def test_layers_may_be_mapped_over_any_axis(axis):
    x = random(0, 3, 3, 3, 8)
    for stack in (None, 0):
        model = Mapped(axis, stack)
        variables = model.init(KEY, x)
        apply = linen.wrap(model, CONFIG, variables, x)
        assert not apply.plan.unproven
        adapters = trained(apply.plan)
        merged = {"params": mora_jax.merge(variables["params"], adapters)}
        close(apply(adapters, variables, x), model.apply(merged, x))
    twin = MappedTwin(axis)
    plan = mora_nnx.plan(twin, CONFIG, x)
    assert not plan.unproven
    adapted = mora_nnx.wrap(twin, plan)
    close(adapted(x), twin(x))
    mora_nnx.set_adapters(adapted, trained(plan))
    close(adapted(x), mora_nnx.merge_adapters(adapted)(x))


# --- Adapters without an effect ---


class Partial(nnx.Module):
    """A layer that runs only through a partial, which keeps the unadapted one."""

    def __init__(self):
        self.fc = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.run = functools.partial(nnx.Linear.__call__, self.fc)

    def __call__(self, x):
        return self.run(x)


class Idle(nnx.Module):
    def __init__(self):
        self.fc = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.idle = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.fc(x)


@pytest.mark.parametrize(("model", "name"), [(Partial, "fc"), (Idle, "idle")])
def test_an_adapter_without_effect_is_a_warning(model, name):
    """Of a plan that traced nothing, at the first call."""
    with pytest.warns(MoRAWarning, match=f"{name}/kernel: the call .* does not use it"):
        mora_nnx.wrap(model(), CONFIG)(X)


def test_a_layer_that_runs_only_through_a_partial_gets_no_adapter():
    with pytest.raises(ValueError, match="fc/kernel: the call .* does not use it"):
        mora_nnx.plan(Partial(), CONFIG, X)


# --- Inputs that are not what they should be ---


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize(
    ("args", "calls", "told"),
    [
        ((), [X], r"as in calls=.mora_jax.Call\(\*inputs\).*, got .Array"),
        ((), Call(X), r"calls must be a list.*, got Call\("),
        ((), "call", "got 'call'"),
        ((Call(X),), (), "inputs must be the model's, got a Call"),
    ],
)
def test_calls_are_a_list_of_calls(api, args, calls, told, unchecked):
    model, variables, _ = reads()
    given = (model, variables) if api == "linen" else (ReadsTwin(),)
    plan = linen.plan if api == "linen" else mora_nnx.plan
    with pytest.raises(TypeError, match=told):
        plan(*given, CONFIG, *args, calls=calls)


def test_an_nnx_model_is_wrapped_with_the_inputs_of_a_call():
    adapted = mora_nnx.wrap(ReadsTwin(), CONFIG, X)
    assert (adapted(X) == mora_nnx.unwrap(adapted)(X)).all()
    with pytest.raises(ValueError, match=OUTSIDE):
        mora_nnx.wrap(ReadsTwin(), CONFIG, X, calls=[Call(X, train=True)])
    plan = mora_nnx.plan(ReadsTwin(), CONFIG)
    with pytest.raises(TypeError, match="inputs must not be given with a plan"):
        mora_nnx.wrap(ReadsTwin(), plan, X)
