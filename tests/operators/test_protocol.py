"""An operator of another kind needs one class: it inherits laws, ways and meshes.

What it trains is no square, and M differs between blocks.
"""

import dataclasses
import functools
import math

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
from mora_jax import AdapterSpec, FrozenDense, Plan, mora_apply, sharding
from mora_jax._jax.linear_algebra import transposed
from mora_jax._layer.equation import Delta
from mora_jax.operators import Operator
from mora_jax.operators._pytree import operator

ALPHA = 0.7


@operator
class BlockDiagonal(Operator):
    """n blocks of p inputs, each with a matrix (p, s) of its own for s outputs.

    The last block of inputs and that of outputs may be short. `square_rank` is n.
    """

    name = "block_diagonal"
    block = True
    tiles = True
    work = "blocks"

    @property
    def m_shape(self):
        n = self.square_rank
        return n, -(-self.in_features // n), -(-self.out_features // n)

    @property
    def compressed_shape(self):
        return self.m_shape[:2]

    def _compress(self, x):
        n, p, _ = self.m_shape
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n * p - self.in_features)])
        return x.reshape(*x.shape[:-1], n, p)

    def _decompress(self, h):
        return h.reshape(*h.shape[:-2], -1)[..., : self.out_features]

    def product(self, h, m, precision=None):
        return jnp.einsum("...np,nps->...ns", h, m, precision=precision)

    def product_by_m(self, h, g, precision=None):
        return jnp.einsum("...np,...ns->nps", h, g, precision=precision)

    @property
    def gains(self):
        return 1.0, 1.0


class BlockDiagonalCase(Case):
    def make(self, in_features, out_features, q, seed=0):
        return BlockDiagonal(in_features, out_features, q)

    def delta(self, op, m):
        n, p, s = op.m_shape
        delta = np.zeros((n * p, n * s))
        for k in range(n):
            delta[k * p : (k + 1) * p, k * s : (k + 1) * s] = m[k]
        return delta[: op.in_features, : op.out_features]

    def m_gradient(self, op, m, x, g):
        by_kernel = x.reshape(-1, op.in_features).T @ g.reshape(-1, op.out_features)
        n, p, s = op.m_shape
        by_kernel = np.pad(by_kernel, [(0, n * p - len(by_kernel)), (0, n * s - g.shape[-1])])
        return np.stack([by_kernel[k * p : (k + 1) * p, k * s : (k + 1) * s] for k in range(n)])


CASE = BlockDiagonalCase("block_diagonal", {"name": "block_diagonal"}, None)
