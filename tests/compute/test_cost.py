"""What an adapted layer costs, as far as it can be told without a clock."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from adapter_files import slow
from cases import CASES, by_case, by_kind
from flax import linen as nn

from mora_jax import AdapterSpec, FrozenDense, MoRAConfig, init, linen, mora_apply
from mora_jax._layer.equation import Delta
from mora_jax.products import DENSE, Contraction

ROWS = 64
by_way = pytest.mark.parametrize("way", ["activation", "fold"])
# Narrowing, widening and square; in blocks that fill the layer, and that do not.
SIZES = (230, 100, 30), slow((96, 240, 24)), slow((100, 100, 30))


def lower(function, *args):
    return jax.jit(function).lower(*args)


def flops(lowered):
    """As written, before a compiler removes some."""
    return lowered.cost_analysis()["flops"]


def thin(op):
    """The number of directions along which inputs are damped."""
    directions = getattr(op, "directions", None)
    return 0 if directions is None else directions.shape[1]


def arithmetic(op):
    """Additions and multiplications for one row, by the definition of the operator."""
    op, _ = op.absorbed(jnp.ones(op.m_shape), 1.0)  # a factor of M's rows is no work
    widths, dense = op.in_features + op.out_features, math.prod(op.m_shape)
    if op.block and op.square:  # M may multiply the sum of the blocks that feed one
        dense *= op.enter(jnp.ones(op.in_features)).shape[0]
    if op.square and op.work == "products":  # with C and D
        dense += op.square_rank * widths
    dense += thin(op) * widths  # two products
    if getattr(op, "diagonal", None) is not None:  # a factor for each input
        dense += op.in_features
    return 2 * dense + 4 * widths  # sums, scales and copies


@pytest.mark.law
@by_case
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_arithmetic(case, size):
    """Forward and both gradients: each is a product as large as the forward one.

    A fold takes the layer's own products, and one for M.
    """
    op = case.make(*size)
    x, g = jnp.ones((ROWS, size[0])), jnp.ones((ROWS, size[1]))
    spec, product = AdapterSpec(op, size[:2]), Contraction.parse(DENSE, 2)
    frozen = FrozenDense(jnp.ones(size[:2]), None, op, execution="fold")
    m = jnp.ones(spec.shape)

    def added(m, x, g):
        return jnp.vdot(g, product.delta(Delta.of(spec, m), x))

    def folded(m, x, g, frozen):
        return jnp.vdot(g, mora_apply({"kernel_mora": m}, frozen, x))

    def plain(x, g, frozen):
        return jnp.vdot(g, x @ frozen.kernel)

    counted = flops(lower(jax.value_and_grad(added, (0, 1)), m, x, g))
    # Rotating M, or making a random basis, does not depend on the rows.
    fixed = 12 * op.square_rank * max(size)
    fixed += 3 * thin(op) * arithmetic(op)  # the directions are rows like those of x
    by_m = 2 * ROWS * math.prod(op.m_shape)
    assert 3 * by_m <= counted <= 1.1 * 3 * ROWS * arithmetic(op) + fixed
    counted = flops(lower(jax.value_and_grad(folded, (0, 1)), m, x, g, frozen))
    counted -= flops(lower(jax.value_and_grad(plain), x, g, frozen))
    folds = 2 * 8 * size[0] * size[1]  # twice, a few operations an entry
    if op.square and op.work == "products":  # from M by two products
        folds += 2 * 2 * op.square_rank * size[1] * (size[0] + op.square_rank)
        folds += 4 * 12 * op.square_rank * (size[0] + size[1])  # of matrices made anew
    if not op.linear:  # from its factors
        folds += 2 * 2 * op.square_rank * size[0] * size[1]
    folds += 2 * 2 * thin(op) * size[0] * size[1]  # directions with their outputs
    trained = 1 if op.linear else 2  # factors, with a product and a gradient each
    assert by_m <= counted <= 1.1 * trained * ROWS * arithmetic(op) + folds


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(6):
            x = jnp.tanh(nn.Dense(x.shape[-1])(x))
        return x


def stack(case, way, width=200, rows=8):
    """Losses to differentiate by adapters and by the input, with their arguments."""
    model, x = Stack(), jax.ShapeDtypeStruct((rows, width), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    config = MoRAConfig(square_rank=40, operator=case.spec, execution=way)
    plan = linen.plan(model, variables, config, x)
    adapters, apply = jax.eval_shape(lambda: init(plan)), linen.wrap(model, plan)

    def adapted(adapters, variables, x):
        return jnp.sum(apply(adapters, variables, x) ** 2)

    def frozen(x, variables):
        return jnp.sum(model.apply(variables, x) ** 2)

    return (adapted, (adapters, variables, x)), (frozen, (x, variables))


@pytest.mark.law
@pytest.mark.parametrize("way", ["activation", slow("fold")])
@by_kind
def test_no_gradient_of_a_kernel(case, way):
    """To differentiate by the kernels as well takes a product more for each."""
    (adapted, args), _ = stack(case, way)
    by_adapters, by_all = (lower(jax.grad(adapted, by), *args) for by in (0, (0, 1)))
    added = flops(by_all) - flops(by_adapters)
    products = 6 * 2 * 8 * 200 * 200
    assert 0.99 * products <= added <= 1.1 * products
    if way == "activation":
        product = re.compile(r"stablehlo.dot_general .*-> tensor<200x200xf32>")
        assert "stablehlo.dot_general" in by_adapters.as_text()
        assert product.search(by_all.as_text())
        assert not product.search(by_adapters.as_text())


def memory(loss, args):
    """Bytes beside arguments and results."""
    compiled: Any = lower(jax.value_and_grad(loss), *args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@by_way
def test_memory(way):
    """Sharing keeps q numbers of each input for the gradient, and no more."""
    case = next(c for c in CASES if c.label.startswith("sharing-strided-strided"))
    rows, width, q = 2048, 200, 40
    adapted, frozen = (memory(*one) for one in stack(case, way, width, rows))
    layer, kept = 4 * rows * width, 6 * 4 * rows * q
    assert adapted <= frozen + kept + 3 * layer  # a few in passing, not one a layer


@pytest.mark.law
@by_kind
def test_memory_of_folds(case):
    """No folded kernel outlives its product, forward or backward."""
    rows, width = 8, 512
    adapted, frozen = (memory(*one) for one in stack(case, "fold", width, rows))
    kernel, inputs = 4 * width * width, 6 * 4 * rows * width
    assert adapted <= frozen + 2.5 * kernel + 2 * inputs
