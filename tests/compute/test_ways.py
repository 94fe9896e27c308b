"""The ways to compute an adapted product give the same, and are chosen as told."""

import dataclasses
import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import slow
from cases import CASES, KINDS, by_case, by_kind, in_turns
from flax import nnx
from helpers import close, made_for, random, trained
from jax.test_util import check_grads

import mora_jax
from benchmarks.common.ways import choose
from mora_jax import AdapterSpec, FrozenDense, MoRAConfig, linen, mora_apply
from mora_jax import nnx as mora_nnx
from mora_jax._flax.proofs import unchecked
from mora_jax._layer.tuning import TUNING
from mora_jax.products import DENSE, Contraction, Lookup

ALPHA = 0.7
WAYS = ("activation", "fold")
# Widths, q and rows: narrowing, widening, square; wrapping around, more than once too;
# with fewer rows than q and with more.
SIZES = (24, 10, 10, 3), (7, 13, 4, 9), (13, 7, 4, 3), (12, 12, 6, 9)
FEW = {("activation", SIZES[0]), ("fold", SIZES[0])}
RUNS = [run if run in FEW else slow(*run) for run in itertools.product(WAYS, SIZES)]


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


@pytest.mark.law
@by_case
@pytest.mark.parametrize(("way", "size"), RUNS, ids=str)
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
        kernel = frozen.kernel + ALPHA * case.delta(frozen.operator, m)
        y = x @ kernel + bias
        by_y = np.cos(y)
        by_m = ALPHA * case.m_gradient(frozen.operator, m, x, by_y)
        derivatives = by_m, x.T @ by_y, by_y @ kernel.T
        close(run(m, frozen, x), (y, derivatives, derivatives))
    assert len(traces) == 1


@pytest.mark.law
@by_kind
@pytest.mark.parametrize("way", [slow("activation"), "fold"])
def test_second_derivatives(case, way, float64):
    """Of a widening layer, by differences of first ones, which are the oracle's."""
    frozen = make(case, 6, 10, 4, way)
    shape = frozen.operator.m_shape
    args = random(1, *shape, dtype=float), frozen.kernel, random(2, 5, 6, dtype=float)
    gradients = jax.jit(lambda *args: jax.grad(loss, (0, 1, 2))(*args, frozen))
    check_grads(gradients, args, order=1, rtol=1e-4)


@pytest.mark.law
@in_turns("case, way", KINDS, WAYS)
def test_transformations(case, way):
    """jit gives what eager gives, the others what loops give."""

    @jax.jit
    def transformed(frozen, m, ms, x):
        def gradient(m, x=x):
            return jax.grad(loss)(m, frozen.kernel, x, frozen)

        def of_m(m):
            return loss(m, frozen.kernel, x, frozen)

        def add(total, m):
            return total + gradient(m), None

        def row(_, x):
            return None, apply(m, frozen, x)

        y, by_m, by_ms = apply(m, frozen, x), gradient(m), [gradient(m) for m in ms]
        by_both = [gradient(m, x) for m, x in zip(ms, x, strict=True)]
        hessian, ndim = jax.hessian(of_m)(m), m.ndim
        return y, {
            "vmap over x": (jax.vmap(apply, (None, None, 0))(m, frozen, x), y),
            "vmap over M": (jax.vmap(gradient)(ms), jnp.stack(by_ms)),
            "vmap over both": (jax.vmap(gradient)(ms, x), jnp.stack(by_both)),
            "gradients by row": (jax.vmap(lambda x: gradient(m, x))(x).sum(0), by_m),
            "scan over x": (jax.lax.scan(row, None, x)[1], y),
            "scan over M": (jax.lax.scan(add, jnp.zeros_like(m), ms)[0], sum(by_ms)),
            "remat": (jax.grad(jax.checkpoint(of_m))(m), by_m),
            "linearize": (jax.linearize(gradient, m)[1](m), second(gradient, m)),
            "hessian": (jnp.tensordot(hessian, m, ndim), second(gradient, m)),
        }

    def second(gradient, m):
        return jax.jvp(gradient, (m,), (m,))[1]

    shape = case.make(12, 10, 4).m_shape
    ms, x = random(1, 2, *shape), random(2, 2, 5, 12)
    frozen = make(case, 12, 10, 4, way, np.float32)
    y, pairs = transformed(frozen, ms[0], ms, x)
    close(y, apply(ms[0], frozen, x))
    for got, expected in pairs.values():
        close(got, expected, 1e-4)


def products(function, *args):
    """How many products a program has: one a folded layer, two where M acts on x."""
    text = jax.jit(function).lower(*args).compile().as_text()
    return len(re.findall(r" dot\(", text))


X = random(0, 5, 12)


class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(12, name="plain")(x)
        x = nn.remat(nn.Dense)(12, use_bias=False, name="remat")(x)
        x = nn.DenseGeneral((3, 4), name="split")(x)
        x = nn.DenseGeneral(12, axis=(-2, -1), name="join")(x)
        return nn.DenseGeneral(6, axis=1, name="rows")(x)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        def block(module, x, _):
            return jnp.tanh(nn.Dense(12)(x)), None

        axes, rngs = {"params": 0}, {"params": True}
        stack = nn.scan(nn.remat(block), axes, split_rngs=rngs, length=3)
        return stack(self, x, None)[0]


def wrapped(model, way, x, traced=True, targets=".*(kernel|embedding)"):
    """A Linen model's adapted apply with its arguments."""
    variables = made_for(model, x)
    settings = dict(operator="rotation", square_rank=4, alpha=ALPHA, targets=targets)
    config = MoRAConfig(execution=way, **settings)
    if traced:
        plan = linen.plan(model, variables, config, x)
    else:
        plan = mora_jax.plan(variables["params"], config)
    return linen.wrap(model, plan), (trained(plan), variables, x)


class Twin(nnx.Module):
    def __init__(self, rngs):
        self.plain = nnx.Linear(12, 12, rngs=rngs)
        self.split = nnx.LinearGeneral(12, (3, 4), rngs=rngs)
        self.join = nnx.LinearGeneral((3, 4), 12, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.join(self.split(self.plain(x)))


def twin(way):
    config = MoRAConfig(square_rank=4, operator="signed_decoupling", execution=way)
    model = mora_nnx.wrap(Twin(nnx.Rngs(0)), config)
    mora_nnx.set_adapters(model, trained(mora_nnx.plan_of(model)))
    with pytest.raises(TypeError):
        model(X[:, :11])
    assert model.plain.dot_general is jax.lax.dot_general  # after a failure too
    graph, state = nnx.split(model)
    return lambda state, x: nnx.merge(graph, state)(x), (state, X)


def moradense(way):
    config = MoRAConfig(
        operator="signed_decoupling", square_rank=4, init="gaussian", execution=way
    )
    layer = mora_jax.MoRADense(8, config=config)
    return layer.apply, (layer.init(jax.random.key(0), X), X)


FOLDING = {
    "mixed": (lambda way: wrapped(Mixed(), way, X), 5),
    "scanned": (lambda way: wrapped(Scanned(), way, X), 1),
    "NNX": (twin, 3),
    "MoRADense": (moradense, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed", slow("scanned"), "NNX", slow("MoRADense")])
def test_layers_fold(name):
    (make, layers), results = FOLDING[name], []
    for way, each in (("fold", 1), ("activation", 2)):
        apply, args = make(way)
        assert products(apply, *args) == each * layers

        def loss(*args, apply=apply):
            y = apply(*args)
            return jnp.sum(jnp.sin(y)), y

        results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(*args))
    close(*map(jax.tree.leaves, results), 1e-4)


def program(model, way, x, **settings):
    apply, args = wrapped(model, way, x, **settings)
    return jax.jit(apply).lower(*args).as_text()


NEVER = {
    "einsum": (nn.Einsum((12, 6), "bi,io->bo"), X),
    "conv": (nn.Conv(6, (3,)), random(0, 2, 5, 12)),
    "embed": (nn.Embed(12, 6), np.arange(5)),
    "stacked": (nn.DenseGeneral(6, batch_dims=0), random(0, 3, 5, 12)),
}


@pytest.mark.law
@pytest.mark.parametrize("name", NEVER)
def test_what_never_folds(name):
    """Its program is the same in either way, unlike that of a layer that folds."""
    for model, x, folds in (*NEVER[name], False), (nn.Dense(6), X, True):
        one, other = (program(model, way, x) for way in WAYS)
        assert (one != other) == folds


@pytest.mark.parametrize("name", ["dot_general", "dot_general_cls"])
def test_a_product_of_the_users_own_never_folds(name):
    """And a trace shows that it is another than the rule's."""

    def twice(*args, **settings):
        return 2 * jax.lax.dot_general(*args, **settings)

    given = twice if name == "dot_general" else lambda: twice
    model = nn.Dense(6, **{name: given})
    with pytest.raises(ValueError, match="kernel: Dense.__call__ .* by `mul`"):
        wrapped(model, "fold", X)
    with unchecked():
        one, other = (program(model, way, X, traced=False) for way in WAYS)
    assert one == other


def test_nothing_folds_under_dropout():
    """The layer sees all of its input, and the adapter some of it, in either way.

    Without dropout it folds.
    """
    params, outputs = {"kernel_mora": random(1, 4, 4)}, []
    for way, count in (("activation", 2), ("fold", 1)):
        config = MoRAConfig(
            operator="signed_decoupling", square_rank=4, dropout=0.5, execution=way
        )
        frozen = FrozenDense.from_config(random(0, 12, 8), config=config)
        outputs.append(mora_apply(params, frozen, X, key=jax.random.key(0)))
        still = functools.partial(mora_apply, deterministic=True)
        assert products(still, params, frozen, X) == count
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
    apply, args = wrapped(Transposed(), "fold", X)
    with pytest.raises(
        ValueError, match=r"shape \(8, 12\), the adapter's has \(12, 8\)"
    ):
        apply(*args)


# For an operator, rows and a dtype: whether a layer of 512 features folds.
AUTO = [
    ("sharing", 512, "float32", True),
    ("sharing", 511, "float32", False),
    ("orthogonal", 511, "float32", False),
    ("rotation", 154, "float32", True),
    ("rotation", 153, "float32", False),
    ("rotation", 512, "float64", True),
    ("rotation", 512, "bfloat16", False),
    ("rotation", 512, "float16", False),
    ("rotation", 512, "float8_e4m3fn", False),
]


# The same on a TPU.
ON_TPU = [
    ("rotation", 512, "bfloat16", True),
    ("rotation", 512, "float8_e4m3fn", False),
    ("signed_decoupling", 153, "bfloat16", False),
    ("orthogonal", 512, "bfloat16", True),
    ("orthogonal", 511, "bfloat16", False),
    ("sharing", 10**6, "bfloat16", False),
    ("truncation", 10**6, "float32", False),
]


@pytest.mark.parametrize(("operator", "rows", "dtype", "expected"), ON_TPU)
def test_auto_on_tpus(operator, rows, dtype, expected):
    x, dense = jax.ShapeDtypeStruct((rows, 512), dtype), Contraction.from_axes("io", 2)
    spec = AdapterSpec.from_config(MoRAConfig(operator=operator), (512, 512))
    way = choose(spec, dense, x, dtype, tuning=TUNING["tpu"])
    assert way == ("fold" if expected else "activation")


@pytest.mark.parametrize(("operator", "rows", "dtype", "expected"), AUTO)
def test_auto(operator, rows, dtype, expected):
    """What is asked for wins, where a floating kernel is read as planned."""
    x, dense = jax.ShapeDtypeStruct((rows, 512), dtype), Contraction.from_axes("io", 2)
    for way, folds in {"auto": expected, "fold": True, "activation": False}.items():
        config = MoRAConfig(operator=operator, execution=way)
        spec = AdapterSpec.from_config(config, (512, 512))
        assert choose(spec, dense, x, dtype) == ("fold" if folds else "activation")
        assert choose(spec, dense, x, None) == "activation"
        assert choose(spec, dense, x, dtype, dropout=True) == "activation"
        for product in (Contraction.parse("bo,io->bi", 2), Lookup()):
            assert choose(spec, product, x, dtype) == "activation"


def test_no_rows():
    frozen = make(CASES[0], 12, 10, 4, "fold")
    assert apply(random(1, 4, 4), frozen, np.zeros((0, 12))).shape == (0, 10)


def test_lowering_for_other_platforms():
    """Where XLA keeps optimization barriers, the order of folds is said with one."""
    frozen = make(CASES[0], 12, 10, 4, "fold")
    args = random(1, 4, 4), frozen.kernel, random(2, 3, 12), frozen
    traced = jax.jit(jax.grad(loss)).trace(*args)
    for platform, barrier in (("cpu", False), ("cuda", True), ("tpu", True)):
        lowered = traced.lower(lowering_platforms=(platform,))
        assert ("optimization_barrier" in lowered.as_text()) == barrier
