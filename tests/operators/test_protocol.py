"""An operator of another kind needs one class: it inherits laws, ways and meshes.

What it trains is no square, and differs between blocks.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from helpers import close, random
from jax.sharding import PartitionSpec
from meshes import make_mesh, put
from platforms import as_if_on

import mora_jax
from mora_jax import Adapter, AdapterSpec, FrozenDense, MoRAConfig, sharding
from mora_jax._jax.tiles import pad_to
from mora_jax.operators import OPERATORS, Operator, Truncation
from mora_jax.operators._pytree import operator

ALPHA = 0.7
SIZES = [(16, 16, 4), (13, 7, 3), (7, 13, 2), (9, 9, 9), (8, 5, 1)]


@operator
class OwnBlocks(Operator):
    """n blocks of p inputs, each with a matrix (p, s) of its own for s outputs.

    The last block of inputs, and of outputs, may be short. `square_rank` is n.
    """

    name = "own_blocks"
    work = "blocks"
    block = True
    square = False

    @classmethod
    def widest(cls, rank, ins, outs, multiple=None):
        return min(ins, outs, -(-ins * outs // ((ins + outs) * rank)))

    @property
    def m_shape(self):
        n = self.square_rank
        return n, -(-self.in_features // n), -(-self.out_features // n)

    @property
    def compressed_shape(self):
        return self.m_shape[:2]

    @property
    def fine_tuning_scale(self):
        return self.in_features / self.m_shape[1]

    def _compress(self, x):
        n, p, _ = self.m_shape
        return pad_to(x, n * p).reshape(*x.shape[:-1], n, p)

    def _decompress(self, h):
        *batch, n, s = h.shape
        return h.reshape(*batch, n * s)[..., : self.out_features]

    def product(self, h, m, precision=None):
        return jnp.einsum("...np,nps->...ns", h, m, precision=precision)

    def product_by_m(self, h, g, precision=None):
        return jnp.einsum("...np,...ns->nps", h, g, precision=precision)

    def matrix(self, m):
        (n, p, s), same = self.m_shape, np.eye(self.square_rank, dtype=bool)
        blocks = jnp.where(same[:, None, :, None], m[:, :, None], 0)
        return blocks.reshape(n * p, n * s)[: self.in_features, : self.out_features]


class OwnBlocksCase(Case):
    """Its matrices, element by element."""

    def make(self, in_features, out_features, q, seed=0):
        return OwnBlocks(in_features, out_features, q)

    def delta(self, op, m):
        delta, (_, p, s) = np.zeros((op.in_features, op.out_features)), op.m_shape
        for i, o in np.ndindex(delta.shape):
            if i // p == o // s:
                delta[i, o] = m[i // p, i % p, o % s]
        return delta

    def m_gradient(self, op, m, x, g):
        by_m, (_, p, s) = np.zeros(op.m_shape), op.m_shape
        by_kernel = x.reshape(-1, op.in_features).T @ g.reshape(-1, op.out_features)
        for i, o in np.ndindex(by_kernel.shape):
            if i // p == o // s:
                by_m[i // p, i % p, o % s] = by_kernel[i, o]
        return by_m


CASE = OwnBlocksCase("own_blocks", {"name": "own_blocks"}, lambda op: op)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(OPERATORS, "own_blocks", OwnBlocks)


@pytest.mark.law
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_laws(size):
    op = CASE.make(*size)
    m, x = random(0, *op.m_shape), random(1, 3, size[0])
    delta = CASE.delta(op, m)
    y = np.float32(x @ delta)

    @jax.jit
    def everything(m, x, y):
        kept = op.kept(x, m)
        ys = op.apply(m, x), op.tangent(kept, m)
        rows = op.unit_rows(jnp.arange(size[0]), m)
        deltas = op.delta_weight(m), Operator.matrix(op, m), rows
        return ys, op.gradient(kept, y), deltas

    ys, by_m, deltas = everything(m, x, y)
    close(ys, (y, y))
    close(by_m, CASE.m_gradient(op, m, x, y))
    close(deltas, (delta, delta, delta))


def results(execution, m, x, kernel, layout=None, dropout=0.0):
    """The output of a layer, and its gradients by M and x."""
    op = OwnBlocks(*kernel.shape, m.shape[0])
    settings = {"execution": execution, "layout": layout, "dropout": dropout}
    frozen = FrozenDense(kernel, None, op, alpha=ALPHA, **settings)

    def apply(m, x):
        key = jax.random.key(0)
        return mora_jax.mora_apply({"kernel_mora": m}, frozen, x, key=key)

    y, back = jax.vjp(apply, m, x)
    return y, *back(jnp.cos(y))


def expected(m, x, kernel):
    op = OwnBlocks(*kernel.shape, m.shape[0])
    adapted = kernel + ALPHA * CASE.delta(op, m)
    y = x @ adapted
    return y, ALPHA * CASE.m_gradient(op, m, x, np.cos(y)), np.cos(y) @ adapted.T


@pytest.mark.law
@pytest.mark.parametrize("execution", ["activation", "fold"])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_ways(execution, platform):
    arrays = random(0, 3, 5, 4), random(1, 2, 6, 13), random(2, 13, 10)
    with as_if_on(platform):
        found = jax.jit(functools.partial(results, execution))(*arrays)
    close(found, expected(*arrays))


@pytest.mark.parametrize(
    ("execution", "dropout"), [("activation", 0.0), ("fold", 0.0), ("auto", 1e-12)]
)
def test_on_a_mesh(execution, dropout):
    mesh, split = make_mesh(inputs=2, outputs=2), PartitionSpec("inputs", "outputs")
    arrays = random(0, 3, 4, 4), random(1, 5, 12), random(2, 12, 10)
    adapter = Adapter(arrays[0], AdapterSpec(OwnBlocks(12, 10, 3), (12, 10)))
    where = {"batch_axes": (), "mesh": mesh}
    known = sharding.on_mesh({"kernel_mora": adapter}, {"kernel": split}, **where)
    layout = known["kernel_mora"].spec.layout
    places = PartitionSpec(), PartitionSpec(None, "inputs"), split
    run = functools.partial(results, execution, layout=layout, dropout=dropout)
    close(jax.jit(run)(*put(arrays, mesh, places)), expected(*arrays))


@operator
class Diagonal(Truncation):
    """M is a diagonal, (q,)."""

    name = "diagonal"
    square = False

    @property
    def m_shape(self):
        return (self.square_rank,)

    def product(self, h, m, precision=None):
        return h * m


@pytest.mark.parametrize("split", ["inputs", (None, "outputs")], ids=str)
def test_devices_that_share_c_take_its_product(split):
    """Under a dropout, of nothing, with which layer and delta are never joined."""
    op, split = Diagonal(12, 10, 8), PartitionSpec(*np.atleast_1d(split))
    m, x, kernel = random(0, 8), random(1, 5, 12), random(2, 12, 10)
    mesh = make_mesh(inputs=2, outputs=2)
    plan = {"kernel_mora": Adapter(m, AdapterSpec(op, (12, 10), dropout=1e-12))}
    known = sharding.on_mesh(plan, {"kernel": split}, batch_axes=(), mesh=mesh)
    spec = known["kernel_mora"].spec
    settings = {"dropout": spec.dropout, "layout": spec.layout}

    @jax.jit
    def y(m, x, kernel):
        frozen = FrozenDense(kernel, None, op, **settings)
        key = jax.random.key(0)
        return mora_jax.mora_apply({"kernel_mora": m}, frozen, x, key=key)

    delta = np.zeros((12, 10))
    np.fill_diagonal(delta[:8, :8], m)
    args = put((m, x, kernel), mesh, (PartitionSpec(), PartitionSpec(), split))
    close(y(*args), x @ (kernel + delta))


@pytest.mark.usefixtures("registered")
def test_a_plan_chooses_its_size_by_a_budget_and_merges_it():
    params = {"kernel": random(0, 24, 20)}
    plan = mora_jax.plan(params, MoRAConfig(rank=2, operator="own_blocks"))
    spec = plan["kernel"]
    assert spec.operator.m_shape == (6, 4, 4) and spec.lora_rank <= 2.2
    m = random(1, 6, 4, 4)
    merged = mora_jax.merge(params, plan.adapters({"kernel_mora": m}))["kernel"]
    delta = CASE.delta(spec.operator, m)
    close(merged, params["kernel"] + spec.factor * delta)
