"""What tests of meshes share."""

import math

import jax
import numpy as np
from helpers import wide
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.mesh.traffic import collectives


def make_mesh(kind="Auto", devices=None, **sizes):
    """A mesh with axes of these names and sizes, by default of the first devices."""
    shape, types = tuple(sizes.values()), (getattr(AxisType, kind),) * len(sizes)
    devices = devices or jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, tuple(sizes), axis_types=types, devices=devices)


def shardings(specs, mesh):
    """A tree of `PartitionSpec`s as one of `NamedSharding`s."""
    is_spec = {"is_leaf": lambda leaf: isinstance(leaf, P)}
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, **is_spec)


def put(arrays, mesh, specs):
    """A tree of arrays where a tree of `PartitionSpec`s says."""
    return jax.device_put(arrays, shardings(specs, mesh))


def placed(arrays, places):
    """The shapes of arrays, with these shardings."""
    return jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
        arrays,
        places,
    )


def sent(program):
    """The collectives of a compiled program, and how often it has each."""
    return collectives(program.as_text())


def assert_close(got, expected, tolerance=1e-5):
    """Each array differs by at most `tolerance` times the largest expected value."""
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        one, other = wide(one), wide(other)
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())


def assert_shardings(arrays, expected):
    """Each array is where its leaf of a tree of shardings says."""
    for array, one in zip(*map(jax.tree.leaves, (arrays, expected)), strict=True):
        assert array.sharding.is_equivalent_to(one, array.ndim)


def sums_of_m(op):
    """Sums over devices of M's gradient, which may be one for each factor."""
    widths = (op.in_features, op.out_features) if not op.linear else ()
    # Of a factor a device may sum the rows or columns that it has, and then all of it.
    pairs = [(n // parts, op.square_rank) for n in widths for parts in (1, 2)]
    directions = getattr(op, "directions", None)
    if directions is not None:  # as of a LoRA's B, on one device or on several
        k, outs = directions.shape[1], op.out_features
        pairs += [(n, k) for n in (op.in_features, outs, outs // 2)]
    shapes = [op.m_shape, *pairs]
    # Without directions M has what damps the inputs, and is that of the inner operator.
    inner = getattr(op, "inner", op) if directions is None else op
    if inner.name == "block_diagonal":  # of the blocks that one device needs
        n, *block = op.m_shape
        shapes += [(n // 2, *block)]
    shapes += [(*stack, columns, rows) for *stack, rows, columns in shapes]
    return {("all-reduce", shape) for shape in shapes}
