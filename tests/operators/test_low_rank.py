"""An operator of another kind, in one class: the protocol asks for nothing else."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, random
from jax.sharding import PartitionSpec
from meshes import make_mesh, put

import mora_jax
from mora_jax import AdapterSpec, FrozenDense, Plan, sharding
from mora_jax._layer.equation import Delta
from mora_jax.operators import Operator
from mora_jax.operators._pytree import operator

INS, OUTS, RANK, ALPHA, SCALE = 12, 10, 3, 1.5, 0.5


@operator
class LowRank(Operator):
    """x A B: two factors instead of a square, and a delta that is not linear in them.

    They train as one array, A above the transpose of B.
    """

    name = "low_rank"
    linear = False

    @property
    def m_shape(self):
        return self.in_features + self.out_features, self.square_rank

    def rows(self, x, m, precision=None):
        product = jnp.matmul(x, m[: self.in_features], precision=precision)
        return jnp.matmul(product, m[self.in_features :].T, precision=precision)

    def matrix(self, m):
        return m[: self.in_features] @ m[self.in_features :].T

    def scaled(self, m, factor):
        return m.at[..., self.in_features :, :].multiply(factor)


def plain(m, x, kernel):
    """The formula that the layer must compute, as JAX differentiates it."""
    a, b = m[:INS], m[INS:].T
    return x @ (kernel + ALPHA * SCALE * (a @ b))


@pytest.fixture
def arrays():
    return random(0, INS + OUTS, RANK), random(1, 5, INS), random(2, INS, OUTS)


@pytest.mark.parametrize("execution", ["activation", "fold"])
def test_a_layer_and_its_gradients(execution, arrays):
    m, x, kernel = arrays

    def adapted(m, x, kernel):
        op = LowRank(INS, OUTS, RANK)
        settings = {"alpha": ALPHA, "scale": SCALE, "execution": execution}
        frozen = FrozenDense(kernel, None, op, **settings)
        return mora_jax.mora_apply({"kernel_mora": m}, frozen, x)

    def results(function):
        y, gradients = jax.vjp(function, m, x, kernel)
        tangents = jax.jvp(function, (m, x, kernel), (m + 1, x - 1, kernel * 2))
        return y, gradients(jnp.cos(y)), tangents

    close(jax.jit(lambda: results(adapted))(), jax.jit(lambda: results(plain))())


@pytest.mark.parametrize("execution", ["activation", "fold"])
def test_its_delta_and_the_merged_kernel(execution, arrays):
    m, x, kernel = arrays
    settings = {"alpha": ALPHA, "scale": SCALE, "execution": execution}
    spec = AdapterSpec(LowRank(INS, OUTS, RANK), (INS, OUTS), **settings)
    plan = Plan((spec,), base_parameters=kernel.size)
    adapters, base = {"kernel_mora": m}, {"kernel": kernel}
    delta = mora_jax.delta_weight(adapters, plan)["kernel"]
    merged = mora_jax.merge(base, adapters, plan)["kernel"]
    close(x @ merged, plain(m, x, kernel))
    close(kernel + delta, merged)
    op = spec.operator
    close(Operator.matrix(op, m), op.delta_weight(m))
    close(op.lookup(m, jnp.arange(-2, 2)), op.delta_weight(m)[np.arange(-2, 2)])
    assert plan.trainable_parameters == (INS + OUTS) * RANK
    assert mora_jax.init(plan)["kernel_mora"].shape == m.shape


@pytest.mark.parametrize(
    "settings",
    [{"execution": "activation"}, {"execution": "fold"}, {"dropout": 1e-12}],
    ids=str,
)
def test_on_a_mesh(settings, arrays):
    """A layer, rows of its delta and the delta, with their gradients by M and x."""
    mesh, split = make_mesh(inputs=2, outputs=2), PartitionSpec("inputs", "outputs")
    spec = AdapterSpec(LowRank(INS, OUTS, RANK), (INS, OUTS))
    plan = Plan((spec,), base_parameters=INS * OUTS)
    plan = sharding.plan_on_mesh(plan, {"kernel": split}, batch_axes=(), mesh=mesh)
    places = PartitionSpec(), PartitionSpec(None, "inputs"), split

    def adapted(m, x, kernel, layout=plan.specs[0].layout):
        op = LowRank(INS, OUTS, RANK)
        frozen = FrozenDense(kernel, None, op, alpha=ALPHA, layout=layout, **settings)
        key = jax.random.key(0)
        y = mora_jax.mora_apply({"kernel_mora": m}, frozen, x, key=key)
        delta = Delta(op, m, kernel.shape, "io", layout=layout)
        return y, delta.lookup(jnp.arange(4)), delta.kernel()

    def results(m, x, kernel, **layout):
        apply = functools.partial(adapted, kernel=kernel, **layout)
        y, gradients = jax.vjp(apply, m, x)
        return y, gradients(jax.tree.map(jnp.cos, y))

    expected = results(*arrays, layout=None)
    close(jax.jit(results)(*put(arrays, mesh, places)), expected)


@pytest.mark.parametrize("operator", ["low_rank", "sharing"])
def test_numbers_show_that_the_merged_model_is_the_same(operator):
    """Deltas of a given size are made by the operator, linear or not."""
    model, x = nn.Dense(OUTS), random(1, 5, INS)
    variables = model.init(jax.random.key(0), x)
    config = mora_jax.MoRAConfig(operator=operator, rank=RANK)
    plan = mora_jax.plan(variables["params"], config)
    found = mora_jax.diagnostics.check(model, variables, plan, x)
    assert found["kernel"] < 1e-5
