"""What an adapted layer costs, as far as it can be told without a clock."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import CASES
from flax import linen as nn

from mora_jax import MoRAConfig, init, linen
from mora_jax.execution import update
from mora_jax.products import DENSE, Contraction
from mora_jax.spec import AdapterSpec

ROWS = 64
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
# Widening, narrowing and square; in blocks that fill the layer, and that do not.
by_size = pytest.mark.parametrize(
    "size", [(96, 240, 24), (240, 96, 24), (100, 100, 30)], ids=str
)


def shapes(*trees):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trees)


def flops(function, *args):
    cost = jax.jit(function).lower(*args).compile().cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return cost["flops"]


def arithmetic(op):
    """Additions and multiplications for one row, by the definition of the operator."""
    q, widths = op.square_rank, op.in_features + op.out_features
    blocks, places = -(-op.in_features // q), -(-op.out_features // q)
    dense = {
        "truncation": q * q,
        "sharing": q * q,
        "decoupling": min(blocks, places) * q * q,
        "permutation": min(blocks, places) * q * q,
        "rotation": blocks * q * q,
        "orthogonal": q * q + q * widths,
        "hadamard": q * q,
    }[op.name]
    around = 4 * widths  # sums, scales and copies
    if op.name == "hadamard":  # a width of 2^a b takes a additions, b products
        for width in (op.in_features, op.out_features):
            power = width & -width
            around += 2 * width * (power.bit_length() - 1 + width // power)
    return 2 * dense + around


@by_size
@by_case
def test_arithmetic(case, size):
    """Forward and both gradients: each is a product as large as the forward one."""
    op = case.make(*size)
    spec = AdapterSpec(op, size[:2])
    product = Contraction.parse(DENSE, 2)

    def loss(m, x, g):
        return jnp.vdot(g, update(spec, m, x, product, dtype=x.dtype))

    x, g = jnp.ones((ROWS, size[0])), jnp.ones((ROWS, size[1]))
    m = jnp.ones(spec.shape)
    counted = flops(jax.value_and_grad(loss, (0, 1)), *shapes(m, x, g))
    # Turning M, or a random basis, does not depend on the rows.
    fixed = 12 * op.square_rank * max(size)
    assert counted <= 1.1 * 3 * ROWS * arithmetic(op) + fixed


class Stack(nn.Module):
    """Dense layers of one size and their activations."""

    @nn.compact
    def __call__(self, x):
        for _ in range(6):
            x = jnp.tanh(nn.Dense(x.shape[-1])(x))
        return x


def stack(case, width=200, rows=8):
    """Losses to differentiate by adapters and by the input, with their arguments."""
    model, x = Stack(), jax.ShapeDtypeStruct((rows, width), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    config = MoRAConfig(square_rank=40, operator=case.spec)
    plan = linen.plan(model, variables, config, x)
    adapters, apply = jax.eval_shape(lambda: init(plan)), linen.wrap(model, plan)

    def adapted(adapters, variables, x):
        return jnp.sum(apply(adapters, variables, x) ** 2)

    def frozen(x, variables):
        return jnp.sum(model.apply(variables, x) ** 2)

    return (adapted, (adapters, variables, x)), (frozen, (x, variables))


def products(jaxpr):
    """Shapes of the results of all dot products in a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.outvars[0].aval.shape
        inner = jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns"))
        for leaf in inner:
            if hasattr(leaf, "eqns"):
                yield from products(getattr(leaf, "jaxpr", leaf))


@by_case
def test_no_gradient_of_a_kernel(case):
    (adapted, args), _ = stack(case)
    by_adapters, by_all = (
        list(products(jax.make_jaxpr(jax.grad(adapted, argnums))(*args).jaxpr))
        for argnums in (0, (0, 1))
    )
    assert len(by_adapters) > 6 and (200, 200) not in by_adapters
    assert (200, 200) in by_all


def test_memory():
    """Sharing keeps q numbers of each input for the gradient, and no more."""
    case = next(c for c in CASES if c.label.startswith("sharing-strided-strided"))
    rows, width, q = 2048, 200, 40

    def memory(loss, args):
        compiled: Any = jax.jit(jax.value_and_grad(loss)).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    adapted, frozen = (memory(*one) for one in stack(case, width, rows))
    layer, kept = 4 * rows * width, 6 * 4 * rows * q
    assert adapted <= frozen + kept + 3 * layer  # a few in passing, not one a layer
