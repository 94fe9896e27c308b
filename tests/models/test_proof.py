"""A trace shows that adapted and merged models are the same, or the plan refuses."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import random, random_like
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mora_jax
from mora_jax import MoRAConfig, diagnostics, linen, register_layer
from mora_jax import nnx as mora_nnx

WIDTH = 8
CONFIG = MoRAConfig(square_rank=4, operator="rotation", targets=".*(kernel|w|table)")
KEY = jax.random.key(0)
X = random(0, 2, 3, WIDTH)


class Own(nn.Module):
    """A layer of the user's own, registered as "...i,io->...o"; `how` says if it is."""

    how: str = "plain"

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.lecun_normal(), (WIDTH, WIDTH))
        scale = self.param("scale", nn.initializers.normal(), (1, WIDTH))
        return product(self.how, x, w, 1 + scale)


class Scaled(Own):
    """The same, registered with its scale."""


class OwnTwin(nnx.Module):
    """`Own` in NNX."""

    def __init__(self, how, rngs):
        init = nnx.initializers.lecun_normal()
        self.how = how
        self.w = nnx.Param(init(rngs.params(), (WIDTH, WIDTH)))
        self.scale = nnx.Param(init(rngs.params(), (1, WIDTH)))

    def __call__(self, x):
        return product(self.how, x, self.w[...], 1 + self.scale[...])


def product(how, x, w, scale):
    """What layers do with their kernel: first as the rule says, then otherwise."""
    eye = jnp.eye(WIDTH)
    if how == "jitted":
        return jax.jit(lambda x, w: x @ w)(x, w)
    if how == "vmapped":
        return jax.vmap(lambda x: x @ w)(x)
    if how == "scanned":
        return jax.lax.scan(lambda c, x: (c, x @ w), 0, x)[1]
    if how == "halves":
        halves = w.reshape(2, WIDTH // 2, WIDTH)
        return jnp.einsum("...hi,hio->...o", x.reshape(*x.shape[:-1], 2, -1), halves)
    if how == "turned":
        return jnp.swapaxes(w.T @ jnp.swapaxes(x, -1, -2), -1, -2)
    return {
        "plain": lambda: x @ w,
        "biased": lambda: x @ w + scale,
        "cast": lambda: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)) * 1,
        "transposed": lambda: x @ w.T,
        "scaled": lambda: x @ (w * scale),
        "scaled after": lambda: (x @ w) / scale,
        "scaled before": lambda: (x * 2) @ w,
        "twice": lambda: x @ w + x @ w,
        "squared": lambda: x @ (w @ w),
        "normalised": lambda: x @ (w / jnp.linalg.norm(w)),
        "beside": lambda: x @ w + jnp.sum(w),
        "other input": lambda: jnp.ones_like(x) @ w,
        "rounded": lambda: x @ w.astype(jnp.int8).astype(x.dtype),
        "half": lambda: x @ jnp.concatenate([w[:4], eye[4:]]),
        "array": lambda: w[: x.shape[-2]] + 0 * x,
        "branch": lambda: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w.T),
        "host": lambda: x @ jax.pure_callback(lambda w: w, w, w),
    }[how]()


for cls in (Own, OwnTwin):
    register_layer(cls, equation="...i,io->...o", kernel="w")
register_layer(
    Scaled,
    equation="...i,io->...o",
    kernel="w",
    scale=lambda layer: 1 + layer.get_variable("params", "scale"),
)

RIGHT = ("plain", "biased", "jitted", "vmapped", "halves", "turned")
WRONG = {
    "cast": "by `mul`",
    "transposed": r"Own\w*.__call__ does not compute 'abi,io->abo'",
    "scaled": "by `mul`.*scale=",
    "scaled after": "by `div`",
    "scaled before": "another array than the input",
    "twice": "by `add`",
    "squared": "by `dot_general by itself`",
    "normalised": "by `",
    "beside": "by `add`",
    "other input": "another array than the input",
    "rounded": "by `convert_element_type`",
    "half": "by `concatenate`",
    "array": "without a product",
    "branch": "by `a branch or a loop`",
}


def own(api, how):
    """A model, its variables and its plan."""
    if api == "nnx":
        return OwnTwin(how, nnx.Rngs(0)), None
    model = Own(how)
    return model, variables_of(model)


def variables_of(model):
    return random_like(jax.eval_shape(model.init, KEY, X), 0.5)


def plan_of(model, variables, traced=True):
    if variables is None:
        return mora_nnx.plan(model, CONFIG, *[X] * traced)
    if not traced:
        return mora_jax.plan(variables["params"], CONFIG)
    return linen.plan(model, variables, CONFIG, X)


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize("how", RIGHT)
def test_what_the_rule_says_passes(api, how):
    model, variables = own(api, how)
    plan = plan_of(model, variables)
    assert plan.traced and not plan.unproven
    diagnostics.check(model, variables, plan, X)


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize("how", WRONG)
def test_what_it_does_not_say_is_refused(api, how):
    with pytest.raises(ValueError, match=f"^w: .*{WRONG[how]}"):
        plan_of(*own(api, how))


@pytest.mark.parametrize("how", ["transposed", "scaled", "scaled before", "beside"])
def test_the_check_by_numbers_finds_the_same(how):
    model, variables = own("linen", how)
    plan = mora_jax.plan(variables["params"], CONFIG)
    with pytest.raises(ValueError, match=r"differ by more than 0.0014 .* 'w' by"):
        diagnostics.check(model, variables, plan, X)


@pytest.mark.parametrize(
    ("how", "primitive"), [("host", "pure_callback"), ("scanned", "scan")]
)
def test_what_a_trace_cannot_see_is_said(how, primitive):
    model, variables = own("linen", how)
    plan = plan_of(model, variables)
    assert plan.unproven == (("w", f"a trace cannot look into `{primitive}`"),)
    assert f"w: a trace cannot look into `{primitive}`" in str(plan)
    diagnostics.check(model, variables, plan, X)


SCALES = {
    "outputs": (1, WIDTH),
    "inputs": (WIDTH, 1),
    "last axis": (WIDTH,),
    "all": (),
}


@pytest.mark.parametrize("shape", SCALES.values(), ids=SCALES)
def test_a_scaled_kernel_is_merged_into_the_kernel_itself(shape):
    class Layer(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jax.random.normal(KEY, (WIDTH, WIDTH)))
            self.w_scale = nnx.Param(jax.random.normal(KEY, shape))

        def __call__(self, x):
            return x @ (self.w[...] * self.w_scale[...])

    register_layer(Layer, equation="...i,io->...o", kernel="w", scale="w_scale")
    plan = mora_nnx.plan(Layer(), CONFIG, X)
    assert diagnostics.check(Layer(), None, plan, X)["w"] < 1e-5


def test_a_layer_may_have_no_scale():
    """As Gemma's Einsum, which scales in some places."""

    class Layer(nnx.Module):
        def __init__(self, factor):
            self.w = nnx.Param(jax.random.normal(KEY, (WIDTH, WIDTH)))
            self.factor = factor

        def __call__(self, x):
            w = self.w[...]
            return x @ (w if self.factor is None else w * self.factor)

    scale = lambda layer: layer.factor  # noqa: E731
    register_layer(Layer, equation="...i,io->...o", kernel="w", scale=scale)
    for factor in (None, 0.25):
        plan = mora_nnx.plan(Layer(factor), CONFIG, X)
        assert diagnostics.check(Layer(factor), None, plan, X)["w"] < 1e-5


def test_scales_that_do_not_factor_are_refused(unchecked):
    class Layer(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((WIDTH, WIDTH)))

        def __call__(self, x):
            return x @ (self.w[...] * 2)

    for scale, message in (
        (lambda layer: jnp.ones((WIDTH, WIDTH)), "not along both"),
        (lambda layer: jnp.ones((2, 1, 1)), "must broadcast against a kernel"),
    ):
        register_layer(Layer, equation="...i,io->...o", kernel="w", scale=scale)
        adapted = mora_nnx.wrap(Layer(), CONFIG)
        with pytest.raises(ValueError, match=message):
            adapted(X)
    register_layer(Layer, equation="...i,io->...o", kernel="w", scale="w")
    with pytest.raises(TypeError, match="scale must be a parameter's name or"):
        register_layer(Layer, equation="...i,io->...o", kernel="w", scale=2.0)


@pytest.mark.parametrize("kind", ["WeightNorm", "SpectralNorm"])
def test_normalised_layers_are_refused_with_plans_of_shapes_too(kind):
    settings = {"update_stats": False} if kind == "SpectralNorm" else {}

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            inner = nn.Dense(WIDTH, name="d")
            return getattr(nn, kind)(inner)(x, **settings)

    variables = variables_of(Layer())
    message = f"d/kernel: {kind} changes this kernel before its layer multiplies"
    config = MoRAConfig(rank=2)
    with pytest.raises(ValueError, match="d/kernel: Dense.__call__ changes it"):
        linen.plan(Layer(), variables, config, X)
    shapes = mora_jax.plan({"d": variables["params"]["d"]}, config)
    with pytest.raises(ValueError, match=message):
        linen.wrap(Layer(), shapes)(mora_jax.init(shapes), variables, X)
    if not hasattr(nnx, kind):  # in flax 0.12.0
        return
    linear = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    twin = getattr(nnx, kind)(linear, rngs=nnx.Rngs(1))
    shapes = mora_jax.plan({"layer_instance": {"kernel": X[0].T @ X[0]}}, config)
    for chosen in (config, shapes):
        with pytest.raises(ValueError, match=f"layer_instance/kernel: {kind} changes"):
            mora_nnx.wrap(twin, chosen)


def test_the_check_says_which_layer_has_no_effect(unchecked):
    class Half(nnx.Module):
        def __init__(self):
            self.used = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
            self.idle = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(1))

        def __call__(self, x):
            self.idle(x)
            return self.used(x)

    found = diagnostics.check(Half(), None, mora_nnx.plan(Half(), CONFIG), X)
    assert np.isnan(found["idle/kernel"]) and found["used/kernel"] < 1e-5
    with pytest.raises(TypeError, match="model must be a Flax module, got int"):
        diagnostics.check(3, None, mora_nnx.plan(Half(), CONFIG), X)
    with pytest.raises(TypeError, match="plan must be a Plan, got MoRAConfig"):
        diagnostics.check(Half(), None, CONFIG, X)
    with pytest.raises(ValueError, match="finite .* got NaN or infinity"):
        diagnostics.check(Half(), None, mora_nnx.plan(Half(), CONFIG), X * np.nan)
    model, variables = own("linen", "plain")
    with pytest.raises(ValueError, match="variables must be a mapping with 'params'"):
        diagnostics.check(model, None, plan_of(model, variables), X)


# --- Models, drawn ---


class Net(nn.Module):
    """Blocks one after another; what each does is in its name."""

    blocks: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        for k, block in enumerate(self.blocks):
            x = nn.LayerNorm()(getattr(self, block)(x, f"b{k}"))
        return x

    def dense(self, x, name):
        return nn.relu(nn.Dense(WIDTH, name=name)(x))

    def attention(self, x, name):
        return nn.MultiHeadDotProductAttention(2, name=name)(x)

    def shared(self, x, name):
        layer = nn.Dense(WIDTH, name=name)
        return layer(nn.tanh(layer(x)))

    def remat(self, x, name):
        return nn.remat(nn.Dense)(WIDTH, name=name)(x)

    def gradient(self, x, name):
        """An energy's gradient by its input, as score models take."""
        layer = nn.Dense(WIDTH, name=name)
        layer(x)  # its parameters, before they are closed over
        return jax.grad(lambda x: jnp.sum(jnp.sin(layer(x))))(x)

    def direct(self, x, name):
        layer = nn.Dense(WIDTH, name=name)
        return layer(x) + x @ layer.variables["params"]["kernel"]

    def scaled(self, x, name):
        return Own("scaled", name=name)(x)

    def scaled_as_said(self, x, name):
        return Scaled("scaled", name=name)(x)

    def turned(self, x, name):
        return Own("transposed", name=name)(x)

    def weight_norm(self, x, name):
        return nn.WeightNorm(nn.Dense(WIDTH, name=name))(x)

    def outside(self, x, name):
        """What is done after a layer is nobody's concern."""
        return 2 * nn.Dense(WIDTH, name=name)(x) ** 2


class Twin(nnx.Module):
    """Blocks in NNX."""

    def __init__(self, blocks, rngs):
        linear = functools.partial(nnx.Linear, WIDTH, WIDTH, rngs=rngs)
        made = {
            "attention": lambda: nnx.MultiHeadAttention(
                2, WIDTH, decode=False, rngs=rngs
            ),
            "scaled": lambda: OwnTwin("scaled", rngs),
            "turned": lambda: OwnTwin("transposed", rngs),
            "weight_norm": lambda: nnx.WeightNorm(linear(), rngs=rngs),
        }
        self.blocks = blocks
        self.layers = nnx.List([made.get(block, linear)() for block in blocks])

    def __call__(self, x):
        for block, layer in zip(self.blocks, self.layers, strict=True):
            y = layer(x)
            if block == "shared":
                y = layer(nnx.tanh(y))
            if block == "direct":
                y = y + x @ layer.kernel[...]
            x = nnx.relu(y) / (1 + jnp.abs(y).mean())
        return x


FINE = {"dense", "attention", "shared", "remat", "gradient", "outside"}
LINEN = sorted(FINE | {"scaled_as_said", "direct", "scaled", "turned", "weight_norm"})
NNX = ["attention", "dense", "direct", "scaled", "shared", "turned"]
NNX += ["weight_norm"] * hasattr(nnx, "WeightNorm")


def holds(api, blocks, traced=True):
    """Whether the plan refuses by name, or adapted equals merged to float tolerance."""
    if api == "linen":
        model = Net(blocks)
        variables = variables_of(model)
    else:
        model, variables = Twin(blocks, nnx.Rngs(0)), None
    try:
        plan = plan_of(model, variables, traced)
    except ValueError as error:
        name = str(error).partition(":")[0]
        assert name.endswith(("kernel", "w")), error
        return "refused"
    try:
        diagnostics.check(model, variables, plan, X)
    except ValueError:
        return "wrong"
    return "equal"


def drawn(blocks):
    return st.lists(st.sampled_from(blocks), min_size=1, max_size=3).map(tuple)


@pytest.mark.parametrize(("api", "blocks"), [("linen", LINEN), ("nnx", NNX)])
def test_adapted_is_merged_or_the_plan_refuses(api, blocks):
    quick = settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )

    @quick
    @given(drawn(blocks))
    def law(chosen):
        fine = set(chosen) <= FINE | {"scaled_as_said"}
        assert holds(api, chosen) == ("equal" if fine else "refused")

    law()


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize("block", ["direct", "scaled"])
def test_without_a_trace_the_law_fails(api, block):
    """So the law would find these faults: it is not true of everything."""
    assert holds(api, (block,)) == "refused"
    assert holds(api, (block,), traced=False) == "wrong"
