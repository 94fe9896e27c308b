"""A trace shows that adapted and merged models are the same, or the plan refuses."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, made_for, random, random_like, trained
from merged import merge_errors

import mora_jax
from mora_jax import (
    Adapter,
    MoRAConfig,
    linen,
    register_layer,
    serving,
)
from mora_jax import nnx as mora_nnx
from mora_jax._flax.layers import convolution
from mora_jax._layer.equation import delta_kernel
from mora_jax._trace_check.views import named, reshape
from mora_jax.products import ATTEND, Claim, Lookup, Product
from mora_jax.products._product import MODES

WIDTH = 8
CONFIG = MoRAConfig(square_rank=4, operator="rotation", targets=".*(kernel|w|table)")
KEY = jax.random.key(0)
X = random(0, 2, 3, WIDTH)
DENSE = "...i,io->...o"
by_api = pytest.mark.parametrize("api", ["linen", "nnx"])


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

    def __init__(self, how):
        self.how = how
        self.w = nnx.Param(random(1, WIDTH, WIDTH) / 3)
        self.scale = nnx.Param(random(2, 1, WIDTH))

    def __call__(self, x):
        return product(self.how, x, self.w[...], 1 + self.scale[...])


def product(how, x, w, scale):
    """What layers do with their kernel: first as the rule says, then otherwise."""

    def halves():
        halves = w.reshape(2, WIDTH // 2, WIDTH)
        return jnp.einsum("...hi,hio->...o", x.reshape(*x.shape[:-1], 2, -1), halves)

    return {
        "plain": lambda: x @ w,
        "biased": lambda: x @ w + scale,
        "jitted": lambda: jax.jit(lambda x, w: x @ w)(x, w),
        "vmapped": lambda: jax.vmap(lambda x: x @ w)(x),
        "halves": halves,
        "printed": lambda: (jax.debug.callback(lambda w: None, w), x @ w)[1],
        "turned": lambda: jnp.swapaxes(w.T @ jnp.swapaxes(x, -1, -2), -1, -2),
        "half precision": lambda: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
        "all bits": lambda: through(jax.lax.reduce_precision(x, 8, 23) @ w, "float32"),
        "frozen": lambda: x @ jax.lax.stop_gradient(w),
        "cast": lambda: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)) * 1,
        "integers": lambda: through(x, "int32") @ w,
        "booleans": lambda: through(x, "bool") @ w,
        "small input": lambda: through(x, "float8_e4m3fn") @ w,
        "small kernel": lambda: x @ through(w, "float4_e2m1fn"),
        "small product": lambda: through(x @ w, "float8_e5m2"),
        "small sum": lambda: summed_in(x, w, jnp.float8_e4m3fn),
        "few bits": lambda: jax.lax.reduce_precision(x, 8, 7) @ w,
        "few bits of a kernel": lambda: x @ jax.lax.reduce_precision(w, 5, 23),
        "few bits after": lambda: jax.lax.reduce_precision(x @ w, 8, 22),
        "frozen input": lambda: jax.lax.stop_gradient(x) @ w,
        "frozen product": lambda: jax.lax.stop_gradient(x @ w) + x.mean(),
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
        "half": lambda: x @ jnp.concatenate([w[:4], jnp.eye(WIDTH)[4:]]),
        "array": lambda: w[: x.shape[-2]] + 0 * x,
        "branch": lambda: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w.T),
        "scanned": lambda: jax.lax.scan(lambda c, x: (c, x @ w), 0, x)[1],
        "host": lambda: x @ jax.pure_callback(lambda w: w, w, w),
        "complex": lambda: (x @ (w * (2 + 1j))).real,
        "complex after": lambda: ((x @ w) / 1j).imag,
        "phases": lambda: (x @ (w * jnp.exp(1j * scale))).real,
        "two parts": lambda: (x @ jax.lax.complex(w, w)).imag,
    }[how]()


def through(x, dtype):
    return x.astype(dtype).astype(x.dtype)


def summed_in(x, w, dtype):
    numbers = (((x.ndim - 1,), (0,)), ((), ()))
    y = jax.lax.dot_general(x, w, numbers, preferred_element_type=dtype)
    return y.astype(x.dtype)


def scale_of(layer):
    return 1 + layer.get_variable("params", "scale")


for cls in (Own, OwnTwin):
    register_layer(cls, equation=DENSE, kernel="w")
register_layer(Scaled, equation=DENSE, kernel="w", scale=scale_of)

RIGHT = ("plain", "biased", "jitted", "vmapped", "halves", "printed", "turned")
RIGHT += ("half precision", "all bits", "frozen")
CHANGED = "another array than the input .* changes its input by"
COMPLEX = "computes with it in complex numbers"
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
    "integers": f"{CHANGED} `convert_element_type` to int32",
    "booleans": f"{CHANGED} `convert_element_type` to bool",
    "small input": f"{CHANGED} `convert_element_type` to float8_e4m3fn",
    "small kernel": "product, by `convert_element_type` to float4_e2m1fn",
    "small product": "product, by `convert_element_type` to float8_e5m2",
    "small sum": "product, by `dot_general` to float8_e4m3fn",
    "few bits": f"{CHANGED} `reduce_precision`",
    "few bits of a kernel": "product, by `reduce_precision`",
    "few bits after": "product, by `reduce_precision`",
    "frozen input": f"{CHANGED} `stop_gradient`",
    "frozen product": "product, by `stop_gradient`",
    **dict.fromkeys(["complex", "complex after", "phases", "two parts"], COMPLEX),
}


def own(api, how):
    """A model and its variables."""
    model = Own(how) if api == "linen" else OwnTwin(how)
    return model, variables_of(model) if api == "linen" else None


def variables_of(model):
    return random_like(jax.eval_shape(model.init, KEY, X), 0.5)


def plan_of(model, variables, traced=True):
    if variables is None:
        return mora_nnx.plan(model, CONFIG, *[X] * traced)
    if not traced:
        return mora_jax.plan(variables["params"], CONFIG)
    return linen.plan(model, variables, CONFIG, X)


@by_api
@pytest.mark.parametrize("how", RIGHT)
def test_what_the_rule_says_passes(api, how):
    model, variables = own(api, how)
    plan = plan_of(model, variables)
    assert plan.traced and not plan.unproven
    bound = 0.05 if how == "half precision" else 1e-5
    assert merge_errors(model, variables, plan, X)["w"] < bound


@by_api
@pytest.mark.parametrize("how", WRONG)
def test_what_it_does_not_say_is_refused(api, how):
    with pytest.raises(ValueError, match=f"^w: .*{WRONG[how]}"):
        plan_of(*own(api, how))


class StateSpace(nn.Module):
    """Layers around a convolution by complex numbers, as S4 and S5 have it."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH, name="up")(x)
        real, imaginary, b = (
            self.param(name, nn.initializers.normal(), (WIDTH, 4)) for name in "rib"
        )
        c = self.param("c", nn.initializers.normal(), (WIDTH, 4), jnp.complex64)
        powers = jnp.exp(
            (1j * imaginary - jnp.exp(real)) * jnp.arange(3)[:, None, None]
        )
        kernel = jnp.sum(c * (b * (1 + 1j) / 2j) * powers, -1).real
        y = jnp.fft.irfft(jnp.fft.rfft(x, 6, -2) * jnp.fft.rfft(kernel, 6, -2), 6, -2)
        return nn.Dense(WIDTH, name="down")(y[..., :3, :])


def test_complex_numbers_elsewhere_are_nobodys_concern():
    model, config = StateSpace(), MoRAConfig(rank=2)
    variables = variables_of(model)
    apply = linen.wrap(model, config, variables, X)
    assert list(apply.plan) == ["down/kernel", "up/kernel"] and not apply.plan.unproven
    adapters = trained(apply.plan)
    merged = {"params": mora_jax.merge(variables["params"], adapters)}
    close(apply(adapters, variables, X), model.apply(merged, X))


def test_an_input_of_integers_is_one_of_numbers():
    """What a layer is given may be of any type; what it makes of it may not."""
    for x in (X > 0, jnp.arange(WIDTH, dtype=jnp.uint8)[None]):
        model = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
        plan = mora_nnx.plan(model, CONFIG, x)
        assert not plan.unproven
        assert merge_errors(model, None, plan, x)["kernel"] < 1e-5


def test_a_convolution_of_a_changed_input_is_refused():
    class Rounded(nnx.Conv):
        def __call__(self, inputs, out_sharding=None):
            return super().__call__(through(inputs, "int32"))

    register_layer(Rounded, equation=convolution)
    layer = Rounded(WIDTH, 4, (3,), padding="CIRCULAR", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"{CHANGED} .*to int32"):
        mora_nnx.plan(layer, CONFIG, X)
    plain = nnx.Conv(WIDTH, 4, (3,), padding="CIRCULAR", rngs=nnx.Rngs(0))
    assert not mora_nnx.plan(plain, CONFIG, X).unproven


@pytest.mark.parametrize("passes", [{"neg"}, set()])
def test_a_product_of_ones_own_says_what_a_trace_may_find(passes):
    class Negated(Product):
        axes = "io"

        @property
        def claim(self):
            return Claim(primitive="dot_general", passes=frozenset(passes))

        def delta(self, delta, x):
            return -delta.rows(x)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return -(x @ self.param("w", nn.initializers.normal(), (WIDTH, WIDTH)))

    register_layer(Layer, equation=Negated(), kernel="w")
    variables = variables_of(Layer())
    if not passes:
        with pytest.raises(ValueError, match="^w: .*product, by `neg`"):
            plan_of(Layer(), variables)
        return
    plan = plan_of(Layer(), variables)
    assert not plan.unproven
    assert merge_errors(Layer(), variables, plan, X)["w"] < 1e-5


# --- Derivatives of a layer's own ---


@jax.custom_vjp
def times(x, w):
    """A product that sends half of the gradient to its input."""
    return x @ w


@jax.custom_vjp
def same(x):
    return x


@jax.custom_jvp
def times_by_jvp(x, w):
    return x @ w


def transpose_of(x, w, g):
    return jnp.einsum("...i,...o->io", x, g)


times.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda xw, g: (g @ xw[1].T / 2, transpose_of(*xw, g)),
)
same.defvjp(lambda x: (x, None), lambda _, g: (g / 2,))
times_by_jvp.defjvp(lambda xw, t: (xw[0] @ xw[1], t[0] @ xw[1] / 2 + xw[0] @ t[1]))


@pytest.mark.parametrize(
    ("multiply", "primitive"),
    [
        (times, "custom_vjp_call"),
        (jax.jit(times), "custom_vjp_call"),
        (times_by_jvp, "custom_jvp_call"),
        (lambda x, w: same(x) @ w, "custom_vjp_call"),
        (lambda x, w: same(x @ w), "custom_vjp_call"),
        (lambda x, w: x @ same(w), None),
    ],
)
def test_a_derivative_of_its_own_is_said(multiply, primitive):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return multiply(x, self.param("w", nn.initializers.normal(), (8, 8)))

    register_layer(Layer, equation=DENSE, kernel="w")

    def dot_general(x, w, *_, **__):
        return multiply(x, w)

    for model in (Layer(), nn.Dense(WIDTH, use_bias=False, dot_general=dot_general)):
        variables = variables_of(model)
        plan = plan_of(model, variables)
        why = f"`{primitive}` has a derivative of its own, which the delta bypasses"
        assert plan.unproven == (((next(iter(plan)), why),) if primitive else ())
        assert primitive is None or why in str(plan)


# --- Lookups beyond their table ---

ROWS = 8
BESIDE = jnp.array([[-20, -9, -8, -3, -1], [0, 3, 7, 8, 25]])
LOOKUPS = {
    "as indexed": (None, lambda t, ids: t[ids]),
    "in another order": (None, lambda t, ids: t[ids.T].swapaxes(0, 1)),
    "of each": (None, lambda t, ids: jax.vmap(lambda ids: t[ids])(ids)),
    "in a row": (None, lambda t, ids: t[ids.ravel()].reshape(*ids.shape, -1)),
    "with NaN": (None, lambda t, ids: jnp.take(t, ids, axis=0)),
    "clipped": ("clip", lambda t, ids: jnp.take(t, ids, axis=0, mode="clip")),
    "clipped before": ("clip", lambda t, ids: t[jnp.clip(ids, 0, ROWS - 1)]),
    "none below": ("clip", lambda t, ids: t[jnp.where(ids < 0, 0, ids)]),
    "wrapped": ("wrap", lambda t, ids: jnp.take(t, ids, axis=0, mode="wrap")),
    "wrapped before": ("wrap", lambda t, ids: t[ids % ROWS]),
    "zeros": ("fill", lambda t, ids: jnp.take(t, ids, axis=0, fill_value=0)),
    "ones": ("fill", lambda t, ids: t.at[ids].get(mode="fill", fill_value=1)),
}
OTHER_ROWS = {
    "next": ("takes other rows than products.Lookup", lambda t, ids: t[ids + 1]),
    "some": (
        "takes other rows than products.Lookup",
        lambda t, ids: t[jnp.minimum(ids, 3)],
    ),
    "but one": (
        "takes other rows than products.Lookup",
        lambda t, ids: t[jnp.where(ids == 2, 0, ids)],
    ),
    "but one beyond": (
        "takes other rows than products.Lookup",
        lambda t, ids: t[jnp.where(ids == -5, 0, ids)],
    ),
    "but the largest": (
        "takes other rows than products.Lookup",
        lambda t, ids: t[jnp.where(ids == 2**31 - 1, 0, ids)],
    ),
    "mirrored": ("by other numbers than its input", lambda t, ids: t[ids[::-1]]),
    "reordered": ("does not compute 'kernel.input.'", lambda t, ids: t[ids.T]),
    "masked": (
        "by `select_n`",
        lambda t, ids: jnp.where((ids == 0)[..., None], 0, t[ids]),
    ),
}


class Table(nn.Module):
    """A layer that looks up in a table."""

    look_up: Callable[[jax.Array, jax.Array], jax.Array]

    @nn.compact
    def __call__(self, ids):
        table = self.param("table", nn.initializers.normal(), (ROWS, 6))
        return self.look_up(table, ids)


def planned_lookup(look_up, mode):
    register_layer(Table, equation=Lookup(mode), kernel="table")
    model = Table(look_up)
    variables = made_for(model, BESIDE)
    return model, variables, linen.plan(model, variables, CONFIG, BESIDE)


@pytest.mark.law
@pytest.mark.parametrize("how", LOOKUPS)
def test_a_delta_beyond_the_table_is_as_in_the_layer(how):
    mode, look_up = LOOKUPS[how]
    for other in {*MODES} - {mode} if how != "with NaN" else ():
        mend = rf"products\.Lookup\(mode={mode!r}\)"
        with pytest.raises(ValueError, match=f"takes other rows than .*; say .*{mend}"):
            planned_lookup(look_up, other)
    model, variables, plan = planned_lookup(look_up, mode)
    assert not plan.unproven
    apply, spec = linen.wrap(model, plan), plan["table"]

    def by_delta(m):
        return apply({"table_mora": Adapter(m, spec)}, variables, BESIDE)

    def by_row(m):
        slots = serving.stack([{"table_mora": Adapter(m, spec)}] * 2)
        own = serving.select(slots, jnp.array([1, 0]))
        return jax.vmap(lambda a, row: apply(a, variables, row[None])[0])(own, BESIDE)

    def merged(m):
        return look_up(variables["params"]["table"] + delta_kernel(spec, m), BESIDE)

    m, weights = random(2, 4, 4), random(3, *BESIDE.shape, 6)

    def derivative(function, m):
        gradient = jax.grad(lambda m: jnp.nansum(weights * function(m)))(m)
        return jnp.vdot(gradient, m)

    @jax.jit
    def run(m):
        ways = by_delta, by_row
        outputs = [way(m) for way in ways], merged(m)
        return *outputs, [derivative(way, m) for way in ways], merged(2 * m)

    ys, y, changes, doubled = run(m)
    close(ys, [y, y], 1e-5)
    # By two M's, since JAX's own gradient of table[ids] drops what
    # is beyond the table, where its value is the last row.
    change = np.nansum(weights * (doubled - y))
    close(changes, [change, change], 1e-5)


@pytest.mark.parametrize("how", OTHER_ROWS)
def test_a_lookup_of_other_rows_is_refused(how):
    message, look_up = OTHER_ROWS[how]
    with pytest.raises(ValueError, match=f"^table: Table.__call__ .*{message}"):
        planned_lookup(look_up, None)


def test_the_modes_of_lookups():
    with pytest.raises(ValueError, match="mode must be one of .*, got 'promise'"):
        Lookup("promise")


@pytest.mark.parametrize("how", ["transposed", "scaled", "scaled before", "beside"])
def test_numbers_show_the_same(how):
    model, variables = own("linen", how)
    plan = plan_of(model, variables, traced=False)
    assert merge_errors(model, variables, plan, X)["w"] > 0.1


@pytest.mark.parametrize(
    ("how", "primitive"), [("host", "pure_callback"), ("scanned", "scan")]
)
def test_what_a_trace_cannot_see_is_said(how, primitive):
    model, variables = own("linen", how)
    plan = plan_of(model, variables)
    assert plan.unproven == (("w", f"a trace cannot look into `{primitive}`"),)
    assert f"w: a trace cannot look into `{primitive}`" in str(plan)
    assert merge_errors(model, variables, plan, X)["w"] < 1e-5


# --- Kernels that their layer scales ---


def scaled_layer(scale):
    """A class of layers that multiply their kernel by `scale`, an array or None."""

    class Layer(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(random(1, WIDTH, WIDTH))
            self.scale = None if scale is None else nnx.Param(scale)

        def __call__(self, x):
            w = self.w[...]
            return x @ (w if self.scale is None else w * self.scale[...])

    return Layer


SCALES = [(random(2, *shape), "scale") for shape in ((1, 8), (8, 1), (8,), ())]
# A layer may have none, as Gemma's Einsum, which scales in some places.
SCALES += [(None, lambda layer: None), (jnp.array(0.25), lambda layer: 0.25)]


@pytest.mark.parametrize(("value", "scale"), SCALES)
def test_a_scaled_kernel_is_merged_into_the_kernel_itself(value, scale):
    layer = scaled_layer(value)
    register_layer(layer, equation=DENSE, kernel="w", scale=scale)
    plan = mora_nnx.plan(layer(), CONFIG, X)
    assert merge_errors(layer(), None, plan, X)["w"] < 1e-5


NAMED = {
    "of the outputs": (True, lambda x, w, s: x @ (w * s)),
    "of the product": (True, lambda x, w, s: (x @ w) * s),
    "of the transpose": (True, lambda x, w, s: x @ (s[:, None] * w.T).T),
    "of each row": (True, lambda x, w, s: jax.vmap(lambda x: x @ (w * s))(x)),
    "of halves": (True, lambda x, w, s: in_halves(x, w, s)),
    "in copies": (None, lambda x, w, s: x @ (w * jnp.broadcast_to(s, w.shape))),
    "of the inputs": ("s .along other axes.", lambda x, w, s: x @ (w * s[:, None])),
    "divided": ("s .changed.", lambda x, w, s: x @ w / s),
    "one more": ("s .changed.", lambda x, w, s: x @ (w * (1 + s))),
    "twice": ("s and 2.0", lambda x, w, s: x @ (w * s) * 2),
    "another": ("another array", lambda x, w, s: x @ (w * jnp.arange(1.0, 9))),
}
NUMBERS = {
    "of the kernel": (0.25, lambda x, w, s: x @ (w * 0.25)),
    "divided": (0.25, lambda x, w, s: x @ w / 4),
    "in two": (0.25, lambda x, w, s: (x @ (w * 0.5)) / 2),
    "computed": (WIDTH**-0.5, lambda x, w, s: x @ (w / jnp.sqrt(w.shape[0]))),
    "rounded": (0.1, lambda x, w, s: x @ (w * jnp.asarray(0.1, jnp.bfloat16))),
}


def in_halves(x, w, s):
    halves = w.reshape(WIDTH, 2, -1) * s.reshape(2, -1)
    return jnp.einsum("...i,iho->...ho", x, halves).reshape(x.shape)


def planned_scale(compute, scale):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.normal(), (WIDTH, WIDTH))
            return compute(x, w, self.param("s", nn.initializers.normal(), (WIDTH,)))

    register_layer(Layer, equation=DENSE, kernel="w", scale=scale)
    model = Layer()
    variables = variables_of(model)
    return model, variables, plan_of(model, variables)


@pytest.mark.parametrize("how", NAMED)
def test_a_named_scale_is_compared(how):
    found, compute = NAMED[how]
    if isinstance(found, str):
        message = f"^w: .* scales it by {found} and not by s"
        with pytest.raises(ValueError, match=message):
            planned_scale(compute, "s")
        return
    model, variables, plan = planned_scale(compute, "s")
    assert bool(plan.unproven) is (found is None)
    assert merge_errors(model, variables, plan, X)["w"] < 1e-5


@pytest.mark.parametrize("how", NUMBERS)
def test_a_number_that_scales_is_compared(how):
    number, compute = NUMBERS[how]
    model, variables, plan = planned_scale(compute, lambda _: number)
    assert not plan.unproven
    assert merge_errors(model, variables, plan, X)["w"] < 0.01
    with pytest.raises(ValueError, match=f"scales it by .* and not by {2 * number:.4}"):
        planned_scale(compute, lambda _: jnp.full((1, WIDTH), 2 * number))
    with pytest.raises(ValueError, match="scales it by .* and not by s"):
        planned_scale(compute, "s")


def test_a_scale_that_cannot_be_compared_is_said():
    def doubled(layer):
        return 2 * layer.get_variable("params", "s")

    def twice(x, w, s):
        return x @ (w * (2 * s))

    for compute, scale in ((twice, doubled), (twice, lambda _: 3.0)):
        model, variables, plan = planned_scale(compute, scale)
        why = "a trace compares scale= of its rule if it is a number or a parameter"
        assert plan.unproven == (("w", why),) and f"w: {why}" in str(plan)
    assert merge_errors(model, variables, plan, X)["w"] > 0.1
    with pytest.raises(ValueError, match="^w: .* does not scale it"):
        planned_scale(lambda x, w, s: (x @ w) * x.mean(), lambda _: 3.0)
    with pytest.raises(ValueError, match=f"^w: .* {COMPLEX}"):
        planned_scale(lambda x, w, s: (x @ (w * 2j)).imag, lambda _: 2j)


@pytest.mark.slow
def test_a_scaled_embedding_is_merged_into_the_kernel_itself(unchecked):
    """Gemma scales what it looks up, and not what its head multiplies by."""

    class Table(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(random(1, 16, WIDTH))

        def encode(self, ids):
            return self.w[...][ids] * 3.0

        def decode(self, x):
            return x @ self.w[...].T

    class Model(nnx.Module):
        def __init__(self):
            self.table = Table()

        def __call__(self, ids):
            return self.table.decode(jnp.tanh(self.table.encode(ids)))

    ids, rule = jnp.arange(4), {"kernel": "w", "method": "encode"}
    for scale in (3.0, jnp.full(WIDTH, 3.0), jnp.full((16, 1), 3.0)):
        register_layer(Table, equation=Lookup(), **rule, scale=lambda _, s=scale: s)
        register_layer(Table, equation=ATTEND, kernel="w", method="decode")
        plan = mora_nnx.plan(Model(), CONFIG, ids)
        if jnp.ndim(scale) < 2:
            assert merge_errors(Model(), None, plan, ids)["table/w"] < 1e-5
        else:
            match = r"got Lookup scaled by shape \(16, 1\)"
            with pytest.raises(ValueError, match=match):
                mora_nnx.wrap(Model(), plan)(ids)


def test_rows_of_a_table_of_three_axes_are_no_kernel():
    """As Gemma 3n looks up what it gives to its layers."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            table = self.param("table", nn.initializers.normal(), (16, 2, WIDTH))
            return nn.Dense(WIDTH)(table[ids].sum(-2))

    model, ids = Model(), jnp.arange(4)
    variables = made_for(model, ids)
    plan = linen.plan(model, variables, MoRAConfig(rank=2), ids)
    assert list(plan) == ["Dense_0/kernel"]
    assert "  table: not multiplied with an input as it is" in str(plan)


def test_a_kernel_that_scales_another_one_is_refused():
    class Both(nn.Module):
        def setup(self):
            shape = WIDTH, WIDTH
            self.w = self.param("w", nn.initializers.normal(), shape)
            self.s = self.param("s", nn.initializers.normal(), shape)

        def __call__(self, x):
            return self.scaled(self.plain(x))

        def plain(self, x):
            return x @ self.s

        def scaled(self, x):
            return x @ (self.w * self.s)

    register_layer(Both, equation=DENSE, kernel="s", method="plain")
    register_layer(Both, equation=DENSE, kernel="w", method="scaled", scale="s")
    variables = variables_of(Both())
    config = MoRAConfig(square_rank=4, operator="rotation", targets="w|s")
    with pytest.raises(ValueError, match="^s: the model also reads this kernel"):
        linen.plan(Both(), variables, config, X)


def test_scales_that_do_not_factor_are_refused(unchecked):
    layer = scaled_layer(jnp.array(2.0))
    for scale, message in (
        (jnp.ones((WIDTH, WIDTH)), "not along both"),
        (jnp.ones((2, 1, 1)), "must broadcast against a kernel"),
    ):
        register_layer(layer, equation=DENSE, kernel="w", scale=lambda _, s=scale: s)
        adapted = mora_nnx.wrap(layer(), CONFIG)
        with pytest.raises(ValueError, match=message):
            adapted(X)
    register_layer(layer, equation=DENSE, kernel="w", scale="w")
    with pytest.raises(TypeError, match="scale must be a parameter's name or"):
        register_layer(layer, equation=DENSE, kernel="w", scale=2.0)


@pytest.mark.parametrize("kind", ["WeightNorm", "SpectralNorm"])
def test_normalised_layers_are_refused_with_plans_of_shapes_too(kind):
    model, config = getattr(nn, kind)(nn.Dense(WIDTH)), MoRAConfig(rank=2)
    settings = {"update_stats": False} if kind == "SpectralNorm" else {}
    variables = random_like(jax.eval_shape(lambda: model.init(KEY, X, **settings)))
    path = "layer_instance/kernel"
    with pytest.raises(ValueError, match=f"{path}: Dense.__call__ changes it"):
        linen.plan(model, variables, config, X, **settings)
    shapes = mora_jax.plan({"layer_instance": {"kernel": X[0].T @ X[0]}}, config)
    apply, fails = linen.wrap(model, shapes), f"fails with an M beside {path}: .*excl"
    with pytest.raises(ValueError, match=fails):
        apply(mora_jax.init(shapes), variables, X, **settings)
    linear = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    twin = getattr(nnx, kind)(linear, rngs=nnx.Rngs(1))
    for chosen in (config, shapes):
        with pytest.raises(ValueError, match=f"{path}: .* changes it|{fails}"):
            mora_nnx.wrap(twin, chosen)(X)
    with pytest.raises(ValueError, match=path):
        mora_nnx.plan(twin, config, X)


# --- Models of several layers ---


class Net(nn.Module):
    """Blocks one after another; what each does is in its name."""

    blocks: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        for k, block in enumerate(self.blocks):
            x = nn.LayerNorm()(getattr(self, block)(x, f"b{k}"))
        return x

    def remat(self, x, name):
        return nn.remat(nn.Dense)(WIDTH, name=name)(x)

    def gradient(self, x, name):
        """An energy's gradient by its input, as score models take."""
        layer = nn.Dense(WIDTH, name=name)
        layer(x)  # its parameters, before they are closed over
        return jax.grad(lambda x: jnp.sum(jnp.sin(layer(x))))(x)

    def outside(self, x, name):
        """What is done after a layer is nobody's concern."""
        return 2 * nn.Dense(WIDTH, name=name)(x) ** 2

    def scaled_as_said(self, x, name):
        return Scaled("scaled", name=name)(x)

    def direct(self, x, name):
        layer = nn.Dense(WIDTH, name=name)
        return layer(x) + x @ layer.variables["params"]["kernel"]

    def scaled(self, x, name):
        return Own("scaled", name=name)(x)


class Direct(nnx.Module):
    """`Net.direct` in NNX."""

    def __init__(self):
        self.layer = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(x) + x @ self.layer.kernel[...]


@pytest.mark.slow
def test_a_model_of_layers_that_do_as_said_is_adapted_as_merged():
    model = Net(("remat", "gradient", "outside", "scaled_as_said"))
    variables = variables_of(model)
    found = merge_errors(model, variables, plan_of(model, variables), X)
    assert len(found) == 4 and max(found.values()) < 1e-5


@pytest.mark.law
@pytest.mark.parametrize(
    ("make", "kernel"),
    [
        (lambda: Net(("remat", "direct")), "b1/kernel"),
        (lambda: Net(("remat", "scaled")), "b1/w"),
        (Direct, "layer/kernel"),
        (lambda: OwnTwin("scaled"), "w"),
    ],
)
def test_one_wrong_layer_is_refused_by_name_and_matters(make, kernel):
    """Without the trace, numbers would differ: the refusal is not needless."""
    model = make()
    variables = variables_of(model) if isinstance(model, Net) else None
    with pytest.raises(ValueError, match=f"^{kernel}: "):
        plan_of(model, variables)
    plan = plan_of(model, variables, traced=False)
    assert merge_errors(model, variables, plan, X)[kernel] > 0.1


def test_a_view_follows_axes_through_reshapes():
    view = named("bhd", (2, 3, 4))
    joined = reshape(view, (2, 12))
    assert joined == (view[0], view[1] + view[2])
    assert reshape(joined, (2, 3, 4)) == view
    assert reshape(view, (4, 6)) is None


class OneWord(nn.Module):
    """It adds the row of one index, a number of the program."""

    @nn.compact
    def __call__(self, x):
        return x + nn.Embed(6, WIDTH, name="table")(np.array(3, np.int32))


class OneWordTwin(nnx.Module):
    def __init__(self):
        self.table = nnx.Embed(6, WIDTH, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return x + self.table(np.array(3, np.int32))


@by_api
def test_a_number_that_a_layer_is_given_stays_one(api):
    """A mark on it makes a variable of it, and is no other program."""
    config = MoRAConfig(rank=2, targets=".*embedding")
    if api == "linen":
        model = OneWord()
        variables = random_like(jax.eval_shape(model.init, KEY, X))
        apply = linen.wrap(model, config, variables, X)
        adapters = random_like(mora_jax.init(apply.plan))
        y = jax.jit(lambda a: apply(a, variables, X))(adapters)
        merged = {"params": mora_jax.merge(variables["params"], adapters)}
        close(y, model.apply(merged, X), 1e-5)
        return
    model = mora_nnx.wrap(OneWordTwin(), config, X)
    mora_nnx.set_adapters(model, random_like(mora_nnx.adapters(model)))
    close(nnx.jit(lambda m: m(X))(model), mora_nnx.merge_adapters(model)(X), 1e-5)
