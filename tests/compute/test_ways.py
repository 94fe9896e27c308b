"""The ways to compute an adapted product give the same, and are chosen as told."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from adapter_files import slow
from cases import CASES, by_few_cases, by_kind
from flax import nnx
from helpers import close, random, trained
from jax.test_util import check_grads

import mora_jax
from mora_jax import AdapterSpec, FrozenDense, MoRAConfig, linen, mora_apply
from mora_jax import nnx as mora_nnx
from mora_jax._compute.adapted import choose
from mora_jax.products import DENSE, Contraction, Lookup

ALPHA = 0.7
WAYS = ("activation", "fold")
by_way = pytest.mark.parametrize("way", WAYS)
# Widths, q and rows: narrowing, widening, square; wrapping around, more than once too;
# with fewer rows than q and with more.
SIZES = (24, 10, 10, 3), *map(slow, [(13, 7, 4, 3), (7, 13, 4, 9), (12, 12, 6, 9)])


def make(case, ins, outs, q, way, dtype=float, bias=None):
    op, kernel = case.make(ins, outs, q), random(0, ins, outs, dtype=dtype)
    return FrozenDense(kernel, bias, op, alpha=ALPHA, execution=way)


def apply(m, frozen, x):
    return mora_apply({"kernel_mora": m}, frozen, x)


def loss(m, kernel, x, frozen):
    return jnp.sum(jnp.sin(apply(m, dataclasses.replace(frozen, kernel=kernel), x)))


def merged_loss(m, kernel, x, frozen):
    kernel += mora_jax.delta_weight({"kernel_mora": m}, frozen)
    return jnp.sum(jnp.sin(x @ kernel + frozen.bias))


@by_few_cases
@by_way
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_oracle(case, way, size, float64):
    """The output and all derivatives, adapted and merged; one compilation serves."""
    ins, outs, q, rows = size
    q -= q % (2 if case.even else 1)
    x, traces = random(2, rows, ins, dtype=float), []

    @jax.jit
    def run(m, frozen, x):
        traces.append(None)
        args, by = (m, frozen.kernel, x, frozen), (0, 1, 2)
        derivatives = jax.grad(loss, by)(*args), jax.grad(merged_loss, by)(*args)
        return apply(m, frozen, x), *derivatives

    for seed in range(2):
        bias = random(seed, outs, dtype=float)
        frozen = make(case, ins, outs, q, way, bias=bias)
        m = random(seed, *frozen.spec.shape, dtype=float)
        c, d = case.matrices(frozen.operator)
        kernel = frozen.kernel + ALPHA * oracle.update(c, d, m)
        y = x @ kernel + bias
        by_y = np.cos(y)
        by_m = ALPHA * np.einsum("inq,ti,to,nro->qr", c, x, by_y, d, optimize=True)
        derivatives = by_m, x.T @ by_y, by_y @ kernel.T
        close(run(m, frozen, x), (y, derivatives, derivatives))
    assert len(traces) == 1


@by_kind
@by_way
def test_second_derivatives(case, way, float64):
    """Of a widening layer, by differences of first ones, which are the oracle's."""
    frozen = make(case, 6, 10, 4, way)
    args = random(1, 4, 4, dtype=float), frozen.kernel, random(2, 5, 6, dtype=float)
    gradients = jax.jit(lambda *args: jax.grad(loss, (0, 1, 2))(*args, frozen))
    check_grads(gradients, args, order=1, rtol=1e-4)


@by_kind
def test_transformations(case):
    """jit gives what eager gives, the others what loops give; alike in both ways."""

    @jax.jit
    def transformed(frozen, m, ms, x):
        def gradient(m, x=x):
            return jax.grad(loss)(m, frozen.kernel, x, frozen)

        def add(total, m):
            return total + gradient(m), None

        def row(_, x):
            return None, apply(m, frozen, x)

        y, by_m, by_ms = apply(m, frozen, x), gradient(m), [gradient(m) for m in ms]
        by_both = [gradient(m, x) for m, x in zip(ms, x, strict=True)]
        return y, {
            "vmap over x": (jax.vmap(apply, (None, None, 0))(m, frozen, x), y),
            "vmap over M": (jax.vmap(gradient)(ms), jnp.stack(by_ms)),
            "vmap over both": (jax.vmap(gradient)(ms, x), jnp.stack(by_both)),
            "scan over x": (jax.lax.scan(row, None, x)[1], y),
            "scan over M": (jax.lax.scan(add, jnp.zeros_like(m), ms)[0], sum(by_ms)),
            "remat": (jax.checkpoint(gradient)(m), by_m),
            "linearize": (jax.linearize(gradient, m)[1](m), second(gradient, m)),
        }

    def second(gradient, m):
        return jax.jvp(gradient, (m,), (m,))[1]

    ms, x, both = random(1, 2, 4, 4), random(2, 2, 5, 12), []
    for way in WAYS:
        frozen = make(case, 12, 10, 4, way, np.float32)
        both.append(transformed(frozen, ms[0], ms, x))
        close(both[-1][0], apply(ms[0], frozen, x))
        for got, expected in both[-1][1].values():
            close(got, expected, 1e-4)
    close(*both, 1e-4)


def products(function, *args):
    """How many products the program of `function` has.

    A folded layer has one and an adapted layer two, where M acts on the activations.
    """
    text = jax.jit(function).lower(*args).compile().as_text()
    return len(re.findall(r" dot\(", text))


class Mixed(nn.Module):
    """Layers that fold: five of them."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(12, name="plain")(x)
        x = nn.remat(nn.Dense)(12, use_bias=False, name="remat")(x)
        x = nn.DenseGeneral((3, 4), name="split")(x)
        x = nn.DenseGeneral(12, axis=(-2, -1), name="join")(x)
        return nn.DenseGeneral(6, axis=1, name="rows")(x)


class Scanned(nn.Module):
    """Layers under two lifted transformations."""

    @nn.compact
    def __call__(self, x):
        def block(module, x, _):
            return jnp.tanh(nn.Dense(12)(x)), None

        axes, rngs = {"params": 0}, {"params": True}
        stack = nn.scan(nn.remat(block), axes, split_rngs=rngs, length=3)
        return stack(self, x, None)[0]


def wrapped(model, way, x, traced=True, targets=".*(kernel|embedding)"):
    """A Linen model's adapted apply with its arguments."""
    variables = model.init(jax.random.key(0), x)
    settings = dict(operator="rotation", square_rank=4, alpha=ALPHA, targets=targets)
    config = MoRAConfig(execution=way, **settings)
    if traced:
        plan = linen.plan(model, variables, config, x)
    else:
        plan = mora_jax.plan(variables["params"], config)
    return linen.wrap(model, plan), (trained(plan), variables, x)


@pytest.mark.parametrize(
    ("model", "layers"), [(Mixed(), 5), (Scanned(), 1)], ids=["mixed", "scanned"]
)
def test_linen_layers_fold(model, layers):
    results = []
    for way, each in (("fold", 1), ("activation", 2)):
        apply, args = wrapped(model, way, random(0, 5, 12))
        assert products(apply, *args) == each * layers

        def loss(*args, apply=apply):
            y = apply(*args)
            return jnp.sum(jnp.sin(y)), y

        results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(*args))
    close(*results, 1e-4)


class Twin(nnx.Module):
    def __init__(self, rngs):
        self.plain = nnx.Linear(12, 12, rngs=rngs)
        self.split = nnx.LinearGeneral(12, (3, 4), rngs=rngs)
        self.join = nnx.LinearGeneral((3, 4), 12, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.join(self.split(self.plain(x)))


def test_nnx_layers_fold():
    x, results = random(0, 5, 12), []
    for way, expected in (("fold", 3), ("activation", 6)):
        config = MoRAConfig(square_rank=4, execution=way, operator="permutation")
        model = mora_nnx.wrap(Twin(nnx.Rngs(0)), config)
        adapters = jax.tree.map(lambda m: m + 0.1, mora_nnx.adapters(model))
        mora_nnx.set_adapters(model, adapters)

        @nnx.jit
        def step(model, x):
            return mora_nnx.value_and_grad(lambda model: jnp.sin(model(x)).sum())(model)

        results.append(jax.tree.leaves(step(model, x)))
        graph, state = nnx.split(model)
        run = functools.partial(lambda graph, s, x: nnx.merge(graph, s)(x), graph)
        assert products(run, state, x) == expected
        with pytest.raises(TypeError):
            model(x[:, :11])
        assert model.plain.dot_general is jax.lax.dot_general  # after a failure too
    close(*results, 1e-4)


def test_moradense_folds():
    x, results = random(0, 5, 12), []
    for way, expected in (("fold", 1), ("activation", 2)):
        config = MoRAConfig(square_rank=4, init="gaussian", execution=way)
        layer = mora_jax.MoRADense(8, config=config)
        variables = layer.init(jax.random.key(0), x)
        assert products(layer.apply, variables, x) == expected
        results.append(layer.apply(variables, x))
    close(*results)


def program(model, way, x, **settings):
    apply, args = wrapped(model, way, x, **settings)
    return jax.jit(apply).lower(*args).as_text()


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Einsum((12, 6), "bi,io->bo"), random(0, 5, 12)),
        (nn.Conv(6, (3,)), random(0, 2, 5, 12)),
        (nn.Embed(12, 6), np.arange(5)),
        (nn.DenseGeneral(6, batch_dims=0), random(0, 3, 5, 12)),
    ],
    ids=["einsum", "conv", "embed", "stacked"],
)
def test_what_never_folds(model, x):
    """Its program is the same in either way, unlike that of a layer that folds."""
    assert program(model, "fold", x) == program(model, "activation", x)
    dense, x = nn.Dense(6), random(0, 5, 12)
    assert program(dense, "fold", x) != program(dense, "activation", x)


def own_dot_general(x, kernel, dimension_numbers, **settings):
    return 2 * jax.lax.dot_general(x, kernel, dimension_numbers, **settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [("dot_general", own_dot_general), ("dot_general_cls", lambda: own_dot_general)],
)
def test_a_product_of_the_users_own_never_folds(name, value):
    """And a trace shows that it is another than the rule's."""
    model, x = nn.Dense(6, **{name: value}), random(0, 5, 12)
    with pytest.raises(ValueError, match="kernel: Dense.__call__ .* by `mul`"):
        wrapped(model, "fold", x)
    one, other = (program(model, way, x, traced=False) for way in WAYS)
    assert one == other


def test_nothing_folds_under_dropout():
    """The layer sees all of its input, and the adapter some of it, in either way."""
    params, x = {"kernel_mora": np.ones((4, 4), np.float32)}, random(1, 3, 12)
    outputs = []
    for way in WAYS:
        config = MoRAConfig(square_rank=4, dropout=0.5, execution=way)
        frozen = FrozenDense.from_config(random(0, 12, 8), config=config)
        outputs.append(mora_apply(params, frozen, x, key=jax.random.key(0)))
    close(*outputs, 0)


def test_a_kernel_of_another_shape_is_refused():
    class Transposed(nn.Module):
        dot_general: object = None

        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.ones, (12, 8))
            dot_general = self.dot_general or jax.lax.dot_general
            return dot_general(x, kernel.T, (((1,), (1,)), ((), ())))

    mora_jax.register_layer(Transposed, equation=DENSE, dot_general=True)
    apply, args = wrapped(Transposed(), "fold", random(0, 5, 12))
    with pytest.raises(ValueError, match=r"shape \(8, 12\), the plan's has \(12, 8\)"):
        apply(*args)


@pytest.mark.parametrize(
    ("operator", "rows", "dtype", "expected"),
    [
        ("sharing", 512, "float32", True),
        ("sharing", 511, "float32", False),
        ("orthogonal", 511, "float32", False),
        ("rotation", 154, "float32", True),
        ("rotation", 153, "float32", False),
        ("rotation", 512, "float64", True),
        ("rotation", 512, "bfloat16", False),
        ("rotation", 512, "float16", False),
    ],
)
def test_auto(operator, rows, dtype, expected):
    """By operator, rows and dtype; what is asked for wins."""
    x = jax.ShapeDtypeStruct((rows, 512), dtype)
    for way, folds in {"auto": expected, "fold": True, "activation": False}.items():
        config = MoRAConfig(operator=operator, execution=way)
        spec = AdapterSpec.from_config(config, (512, 512))
        chosen = choose(spec, Contraction.from_axes("io", 2), x, dtype)
        assert chosen == ("fold" if folds else "activation")


def test_folds_are_of_floating_kernels_that_are_read_as_planned():
    spec = AdapterSpec.from_config(MoRAConfig(execution="fold"), (32, 16))
    dense = Contraction.from_axes("io", 2)
    x = jax.ShapeDtypeStruct((4, 32), jnp.float32)
    assert choose(spec, dense, x, x.dtype) == "fold"
    assert choose(spec, dense, x, None) == "activation"
    assert choose(spec, dense, x, x.dtype, dropout=True) == "activation"
    for product in (Contraction.parse("bo,io->bi", 2), Lookup()):
        assert choose(spec, product, x, x.dtype) == "activation"


def test_no_rows():
    frozen = make(CASES[0], 12, 10, 4, "fold")
    assert apply(random(1, 4, 4), frozen, np.zeros((0, 12))).shape == (0, 10)


def test_lowering_for_other_platforms():
    """Where XLA keeps optimization barriers, the order of folds is said with one."""
    frozen = make(CASES[0], 12, 10, 4, "fold")
    traced = jax.jit(jax.grad(loss)).trace(
        random(1, 4, 4), frozen.kernel, random(2, 3, 12), frozen
    )
    for platform, barrier in (("cpu", False), ("cuda", True), ("tpu", True)):
        lowered = traced.lower(lowering_platforms=(platform,))
        assert ("optimization_barrier" in lowered.as_text()) == barrier
