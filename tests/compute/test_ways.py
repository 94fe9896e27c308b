"""The ways to compute an adapted product give the same, and are chosen as told."""

import dataclasses
import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, by_few_cases, by_kind
from flax import nnx
from helpers import close, random
from jax.test_util import check_grads

import mora_jax
from mora_jax import (
    AdapterSpec,
    FrozenDense,
    MoRAConfig,
    MoRADense,
    init,
    linen,
    mora_apply,
    register_layer,
)
from mora_jax import nnx as mora_nnx
from mora_jax._compute.adapted import choose
from mora_jax.products import DENSE, Contraction, Lookup

ALPHA = 0.7
WAYS = ("activation", "fold")
by_way = pytest.mark.parametrize("way", WAYS)
# Widths, q and rows: narrowing, widening, square; wrapping around, more than once too;
# with fewer rows than q and with more.
by_size = pytest.mark.parametrize(
    "size", [(13, 7, 4, 3), (7, 13, 4, 9), (12, 12, 6, 9), (24, 10, 10, 3)], ids=str
)


def make(case, ins, outs, q, way):
    op = case.make(ins, outs, q)
    return FrozenDense(
        random(0, ins, outs, dtype=float), None, op, alpha=ALPHA, execution=way
    )


def loss(m, kernel, x, frozen):
    frozen = dataclasses.replace(frozen, kernel=kernel)
    return jnp.sum(jnp.sin(mora_apply({"kernel_mora": m}, frozen, x)))


@by_kind
@by_way
@by_size
def test_oracle(case, way, size, float64):
    """The output and its derivatives by M, kernel and input, in numpy."""
    ins, outs, q, rows = size
    frozen = make(case, ins, outs, q - q % (2 if case.even else 1), way)
    m = random(1, *frozen.spec.shape, dtype=float)
    x = random(2, rows, ins, dtype=float)
    c, d = case.matrices(frozen.operator)
    kernel = frozen.kernel + ALPHA * oracle.update(c, d, m)
    y = x @ kernel
    by_y = np.cos(y)
    by_m = ALPHA * np.einsum("inq,ti,to,nro->qr", c, x, by_y, d, optimize=True)
    got = jax.jit(jax.grad(loss, (0, 1, 2)))(m, frozen.kernel, x, frozen)
    for value, expected in zip(got, (by_m, x.T @ by_y, by_y @ kernel.T), strict=True):
        close(value, expected)
    close(jax.jit(mora_apply)({"kernel_mora": m}, frozen, x), y)


@by_kind
@by_way
def test_derivatives_of_both_orders(case, way, float64):
    frozen = make(case, 10, 6, 4, way)
    args = frozen.kernel, random(2, 5, 10, dtype=float)
    args = random(1, *frozen.spec.shape, dtype=float), *args
    check_grads(jax.jit(lambda *args: loss(*args, frozen)), args, order=2, rtol=1e-4)


@by_kind
def test_transformations(case):
    """Those of a folded product are those of the other."""
    frozen = make(case, 12, 10, 4, "fold")
    frozen = dataclasses.replace(frozen, kernel=np.float32(frozen.kernel))
    m, x = random(1, *frozen.spec.shape), random(2, 3, 5, 12)
    ms = np.stack([m, 2 * m, 3 * m])
    by_m = jax.grad(loss)

    @jax.jit
    def transformed(frozen, m, ms, x):
        def gradient(m, x=x):
            return by_m(m, frozen.kernel, x, frozen)

        def add(total, m):
            return total + gradient(m), None

        return {
            "vmap over M": jax.vmap(gradient)(ms),
            "vmap over x": jax.vmap(gradient, (None, 0))(m, x),
            "vmap over both": jax.vmap(gradient)(ms, x),
            "remat": jax.checkpoint(gradient)(m),
            "jvp": jax.jvp(gradient, (m,), (m,)),
            "hessian": jax.hessian(loss)(m, frozen.kernel, x, frozen),
            "linearize": jax.linearize(lambda x: loss(m, frozen.kernel, x, frozen), x)[
                1
            ](x),
            "scan": jax.lax.scan(add, jnp.zeros_like(m), ms)[0],
        }

    other = dataclasses.replace(frozen, execution="activation")
    got, expected = (transformed(layer, m, ms, x) for layer in (frozen, other))
    chex.assert_trees_all_close(got, expected, atol=1e-4, rtol=1e-4)


@by_few_cases
def test_one_compilation(case):
    """Serves all layers of one shape."""
    traces = []

    @jax.jit
    def step(m, x, frozen):
        traces.append(None)
        return jax.grad(loss)(m, frozen.kernel, x, frozen)

    x = random(2, 3, 12)
    for seed in range(2):
        frozen = make(case, 12, 10, 4, "fold")
        step(random(seed, *frozen.spec.shape), x, frozen)
    assert len(traces) == 1


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


def wrapped(model, way, *inputs, traced=True, **settings):
    """Outputs and gradients of a Linen model, and the products of its forward pass."""
    variables = model.init(jax.random.key(0), *inputs)
    settings = {"operator": "rotation", "square_rank": 4, "alpha": ALPHA} | settings
    config = MoRAConfig(execution=way, **settings)
    if traced:
        plan = linen.plan(model, variables, config, *inputs)
    else:
        plan = mora_jax.plan(variables["params"], config)
    adapters = jax.tree.map(lambda m: m + random(1, *m.shape) / 4, init(plan))
    apply = linen.wrap(model, plan)

    def loss(adapters):
        y = apply(adapters, variables, *inputs)
        return jnp.sum(jnp.sin(y)), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapters)
    return (y, grads), products(apply, adapters, variables, *inputs)


class Scanned(nn.Module):
    """Layers under two lifted transformations."""

    @nn.compact
    def __call__(self, x):
        def block(module, x, _):
            return jnp.tanh(nn.Dense(12)(x)), None

        stack = nn.scan(
            nn.remat(block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return stack(self, x, None)[0]


@pytest.mark.parametrize(
    ("model", "layers"), [(Mixed(), 5), (Scanned(), 1)], ids=["mixed", "scanned"]
)
def test_linen_layers_fold(model, layers):
    x = random(0, 5, 12)
    folded, count = wrapped(model, "fold", x)
    assert count == layers
    plain, count = wrapped(model, "activation", x)
    assert count == 2 * layers
    chex.assert_trees_all_close(folded, plain, atol=1e-4)


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
        mora_nnx.set_adapters(
            model, jax.tree.map(lambda m: m + 0.1, mora_nnx.adapters(model))
        )

        @nnx.jit
        def step(model, x):
            def loss(model):
                return jnp.sum(jnp.sin(model(x)))

            return mora_nnx.value_and_grad(loss)(model)

        results.append(step(model, x))
        graph, state = nnx.split(model)
        run = functools.partial(lambda graph, s, x: nnx.merge(graph, s)(x), graph)
        assert products(run, state, x) == expected
        assert model.plain.dot_general is jax.lax.dot_general
    chex.assert_trees_all_close(*map(jax.tree.leaves, results), atol=1e-4)


def test_moradense_folds():
    x, results = random(0, 5, 12), []
    for way, expected in (("fold", 1), ("activation", 2)):
        config = MoRAConfig(square_rank=4, init="gaussian", execution=way)
        layer = MoRADense(8, config=config)
        variables = layer.init(jax.random.key(0), x)
        assert products(layer.apply, variables, x) == expected
        results.append(layer.apply(variables, x))
    close(*results)


def own_dot_general(x, kernel, dimension_numbers, **settings):
    return 2 * jax.lax.dot_general(x, kernel, dimension_numbers, **settings)


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
    targets = ".*(kernel|embedding)"
    folded = wrapped(model, "fold", x, targets=targets)
    plain = wrapped(model, "activation", x, targets=targets)
    chex.assert_trees_all_close(folded, plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"dot_general": own_dot_general},
        {"dot_general_cls": lambda: own_dot_general},
    ],
    ids=["dot_general", "dot_general_cls"],
)
def test_a_product_of_the_users_own_never_folds(settings):
    """And a trace shows that it is another than the rule's."""
    model, x = nn.Dense(6, **settings), random(0, 5, 12)
    with pytest.raises(ValueError, match="kernel: Dense.__call__ .* by `mul`"):
        wrapped(model, "fold", x)
    folded = wrapped(model, "fold", x, traced=False)
    plain = wrapped(model, "activation", x, traced=False)
    chex.assert_trees_all_close(folded, plain)


def test_nothing_folds_under_dropout():
    """The layer sees all of its input, and the adapter some of it, in either way."""
    params, x = {"kernel_mora": np.ones((4, 4), np.float32)}, random(1, 3, 12)
    outputs = []
    for way in WAYS:
        config = MoRAConfig(square_rank=4, dropout=0.5, execution=way)
        frozen = FrozenDense.from_config(random(0, 12, 8), config=config)
        outputs.append(mora_apply(params, frozen, x, key=jax.random.key(0)))
    close(*outputs, 0)


def test_a_layer_that_fails_gets_its_product_back():
    config = MoRAConfig(square_rank=4, execution="fold")
    model = mora_nnx.wrap(nnx.Linear(12, 8, rngs=nnx.Rngs(0)), config)
    with pytest.raises(TypeError):
        model(jnp.ones((3, 11)))
    assert model.dot_general is jax.lax.dot_general


def test_a_kernel_of_another_shape_is_refused():
    class Transposed(nn.Module):
        dot_general: object = None

        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.ones, (12, 8))
            return (self.dot_general or jax.lax.dot_general)(
                x, kernel.T, (((1,), (1,)), ((), ()))
            )

    register_layer(Transposed, equation=DENSE, dot_general=True)
    with pytest.raises(ValueError, match=r"shape \(8, 12\), the plan's has \(12, 8\)"):
        wrapped(Transposed(), "fold", random(0, 5, 12))


@pytest.mark.parametrize(
    ("operator", "shape", "rows", "dtype", "expected"),
    [
        ("sharing", (512, 512), 512, "float32", True),
        ("sharing", (512, 512), 511, "float32", False),
        ("orthogonal", (512, 512), 511, "float32", False),
        ("rotation", (512, 512), 154, "float32", True),
        ("rotation", (512, 512), 153, "float32", False),
        ("rotation", (512, 512), 512, "float64", True),
        ("rotation", (512, 512), 512, "bfloat16", False),
        ("rotation", (512, 512), 512, "float16", False),
    ],
)
def test_auto(operator, shape, rows, dtype, expected):
    """By operator, shape, rows and dtype; what is asked for wins."""
    product = Contraction.from_axes("io", 2)
    x = jax.ShapeDtypeStruct((rows, shape[0]), dtype)
    for way, folds in {"auto": expected, "fold": True, "activation": False}.items():
        config = MoRAConfig(operator=operator, execution=way)
        spec = AdapterSpec.from_config(config, shape)
        chosen = choose(spec, product, x, dtype)
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


@by_way
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes(way, dtype):
    """The output has the layer's dtype, M's gradient that of M."""
    config = MoRAConfig(square_rank=4, execution=way)
    frozen = FrozenDense.from_config(
        jnp.asarray(random(0, 12, 8), dtype), config=config
    )
    m, x = (
        jnp.asarray(random(1, 4, 4), jnp.float32),
        jnp.asarray(random(2, 5, 12), dtype),
    )
    y = mora_apply({"kernel_mora": m}, frozen, x)
    wide = dataclasses.replace(frozen, kernel=frozen.kernel.astype(jnp.float32))
    expected = mora_apply({"kernel_mora": m}, wide, x.astype(jnp.float32))
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.1, rtol=0.02)
    assert jax.grad(loss)(m, frozen.kernel, x, frozen).dtype == jnp.float32


def test_no_rows():
    frozen = make(CASES[0], 12, 10, 4, "fold")
    params = {"kernel_mora": random(1, 4, 4)}
    assert mora_apply(params, frozen, np.zeros((0, 12))).shape == (0, 10)


def test_bad_execution():
    with pytest.raises(ValueError, match="execution must be one of .* got 'fast'"):
        MoRAConfig(execution="fast")
    spec = AdapterSpec.from_config(MoRAConfig(), (12, 8))
    with pytest.raises(ValueError, match="execution must be one of .* got 'fast'"):
        dataclasses.replace(spec, execution="fast")


def test_lowering_for_other_platforms():
    """Where XLA keeps optimization barriers, the order of folds is said with one."""
    frozen = make(CASES[0], 12, 10, 4, "fold")
    m, x = random(1, 4, 4), random(2, 3, 12)
    grad = jax.jit(jax.grad(loss))
    for platform, barrier in (("cpu", False), ("cuda", True), ("tpu", True)):
        lowered = grad.trace(m, frozen.kernel, x, frozen).lower(
            lowering_platforms=(platform,)
        )
        assert ("optimization_barrier" in lowered.as_text()) == barrier
