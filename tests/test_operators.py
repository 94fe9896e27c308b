"""Laws that every operator obeys, at every size."""

import dataclasses
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import by_case, by_few_cases, by_few_sizes, by_kind
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from mora_jax import MoRAConfig, make_operator, square_rank
from mora_jax.operators import OPERATORS, Operator, Rotation
from mora_jax.spec import AdapterSpec


def random(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def fit(case, in_features, out_features, q):
    """The square rank nearest to q that the case allows."""
    if case.bounded:
        q = min(q, in_features, out_features)
    return max(2, q - q % 2) if case.even else q


def close(got, expected, scale=1e-5):
    expected = np.asarray(expected, np.float64)
    got = np.asarray(got, np.float64)
    assert got.shape == expected.shape
    np.testing.assert_allclose(
        got, expected, rtol=0, atol=scale * max(1, np.abs(expected).max())
    )


def check_laws(case, op: Operator):
    """All that must hold between an operator's two maps, the oracle's, and M."""
    ins, outs, q = op.in_features, op.out_features, op.square_rank
    c, d = case.matrices(op)
    n = c.shape[1]
    assert math.prod(op.compressed_shape) == n * q
    m, x = random(1, q, q), random(2, 3, ins)

    # The maps are the oracle's: linear, for they act as matrices.
    h = op.compress(x)
    close(h.reshape(3, n, q), np.einsum("bi,inq->bnq", x, c))
    h = random(3, 3, *op.compressed_shape)
    close(op.decompress(h), np.einsum("bnq,nqo->bo", h.reshape(3, n, q), d))

    # Forward, merged kernel and oracle are one map.
    expected = oracle.update(c, d, m)
    close(op.delta_weight(m), expected)
    close(op.apply(m, x), x @ expected)
    close(op.apply(np.zeros((q, q), np.float32), x), np.zeros((3, outs)))


@by_few_cases
@by_few_sizes
def test_laws(case, size):
    ins, outs, q = size
    check_laws(case, case.make(ins, outs, fit(case, ins, outs, q)))


any_size = given(
    ins=st.integers(2, 40),
    outs=st.integers(2, 40),
    q=st.integers(1, 24),
    seed=st.integers(0, 2**32 - 1),
)


@by_kind
@settings(max_examples=4, deadline=None, derandomize=True)
@any_size
def test_laws_at_any_size(case, ins, outs, q, seed):
    check_laws(case, case.make(ins, outs, fit(case, ins, outs, q), seed))


@pytest.mark.slow
@by_case
@settings(max_examples=20, deadline=None)
@any_size
def test_laws_at_very_many_sizes(case, ins, outs, q, seed):
    check_laws(case, case.make(ins, outs, fit(case, ins, outs, q), seed))


@by_case
@by_few_sizes
def test_claims(case, size):
    """Partition, isometry and block are true exactly where they are claimed."""
    ins, outs, q = size
    op = case.make(ins, outs, fit(case, ins, outs, q))
    c, d = case.matrices(op)
    c, d = c.reshape(ins, -1), d.reshape(-1, outs)
    eye = np.eye(c.shape[1])
    isometry = np.allclose(c.T @ c, eye, atol=1e-6) and np.allclose(
        d @ d.T, eye, atol=1e-6
    )
    assert op.isometry == isometry
    if op.isometry:
        m = random(0, op.square_rank, op.square_rank)
        n = len(eye) // op.square_rank
        norm = np.linalg.norm(op.delta_weight(m))
        np.testing.assert_allclose(norm, math.sqrt(n) * np.linalg.norm(m), rtol=1e-5)
    partition = bool((np.count_nonzero(c, axis=1) == 1).all())
    if op.name == "orthogonal" or op.name == "hadamard":
        assert not op.partition  # one column has one entry a row, but is no group
    elif op.name == "rotation":
        assert not op.partition  # block 0 alone is left as it is
    else:
        assert op.partition == partition
    assert op.block == (len(op.compressed_shape) == 2)


@by_few_cases
@by_few_sizes
def test_the_general_way_to_the_update(case, size):
    """Which an operator has that gives `_compress` and `_decompress` alone."""
    op = case.make(*size[:2], fit(case, *size))
    m = random(3, op.square_rank, op.square_rank)
    close(op.delta_weight(m), jax.jit(Operator._delta)(op, jnp.asarray(m)))


@by_case
def test_adjoint(case):
    """The transposes that JAX derives are adjoint: <C x, h> = <x, C^T h>."""
    op = case.make(13, 9, fit(case, 13, 9, 4))
    for map_, shape in ((op.compress, (13,)), (op.decompress, op.compressed_shape)):
        x = random(0, *shape)
        y = map_(x)
        h = random(1, *y.shape)
        transpose = jax.linear_transpose(map_, jax.ShapeDtypeStruct(shape, x.dtype))
        (back,) = transpose(h)
        np.testing.assert_allclose(
            np.vdot(y, h), np.vdot(x, back), rtol=1e-4, atol=1e-5
        )


@by_kind
def test_transforms(case):
    """jit = eager, vmap = loop, gradients are right, and one compilation serves."""
    op = case.make(12, 10, fit(case, 12, 10, 4))
    q = op.square_rank
    m, x = random(0, q, q), random(1, 5, 12)
    eager = op.apply(m, x)
    traces = []

    @jax.jit
    def jitted(op, m, x):
        traces.append(op)
        return op.apply(m, x)

    close(jitted(op, m, x), eager)
    close(jitted(case.make(12, 10, q), m, x), eager)
    assert len(traces) == 1
    looped = jnp.stack([op.apply(m, row) for row in x])
    close(jax.vmap(op.apply, (None, 0))(m, x), looped)
    ms = random(2, 5, q, q)
    looped = jnp.stack([op.apply(m, row) for m, row in zip(ms, x, strict=True)])
    close(jax.vmap(op.apply)(ms, x), looped)
    check_grads(op.apply, (m, x), order=2, modes=("fwd", "rev"), rtol=2e-2)
    check_grads(op.delta_weight, (m,), order=1, rtol=2e-2)
    _, scanned = jax.lax.scan(lambda _, row: (None, op.apply(m, row)), None, x)
    close(scanned, eager)
    remat = jax.grad(lambda m: jax.checkpoint(op.apply)(m, x).sum())(m)
    close(remat, jax.grad(lambda m: op.apply(m, x).sum())(m))


@by_case
def test_pytree(case):
    """A pytree whose leaves are its arrays, hashable and equal by its settings."""
    op = case.make(12, 10, fit(case, 12, 10, 4))
    leaves, structure = jax.tree.flatten(op)
    again = jax.tree.unflatten(structure, leaves)
    assert again == op and hash(again) == hash(op) and repr(again) == repr(op)
    assert len(leaves) == len(jax.tree.leaves([getattr(op, a) for a in op.arrays]))
    other = case.make(12, 10, 2)
    assert other != op
    on_device = jax.tree.map(jnp.asarray, op)
    x = random(0, 12)
    close(on_device.compress(x), op.compress(x))
    assert pickle.loads(pickle.dumps(op)) == op
    with pytest.raises(dataclasses.FrozenInstanceError):
        op.square_rank = 3


@by_few_cases
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes(case, dtype, float64):
    """The dtype of the input is that of the result, to that dtype's accuracy."""
    op = case.make(12, 20, fit(case, 12, 20, 6))
    q = op.square_rank
    m, x = (jnp.asarray(random(k, *s), dtype) for k, s in enumerate([(q, q), (3, 12)]))
    y, weight = op.apply(m, x), op.delta_weight(m)
    assert y.dtype == weight.dtype == x.dtype
    exact = oracle.update(*case.matrices(op), np.asarray(m, np.float64))
    eps = float(jnp.finfo(dtype).eps)
    # The numbers of a random operator are float32 by definition.
    close(weight, exact, 8 * eps)
    close(y, np.asarray(x, np.float64) @ exact, 16 * eps)


@by_case
def test_every_input_has_an_effect(case):
    """Ours use all inputs of a narrowing layer; truncations say that they do not."""
    op = case.make(512, 128, fit(case, 512, 128, 50))
    update = np.asarray(op.delta_weight(random(0, op.square_rank, op.square_rank)))
    silent = int((np.abs(update).max(axis=1) == 0).sum())
    if case.label == "truncation":
        assert silent == 512 - op.square_rank
    elif case.label.endswith("-truncate"):
        # All but the first p blocks; the last block's wrapped features come back in.
        assert silent == 512 - 3 * op.square_rank
    else:
        assert silent == 0


def test_reference_rotation_ignores_inputs():
    """512 -> 128 at r=4 leaves 362 of 512 inputs without effect; ours none."""
    m = random(0, 50, 50)
    theirs = np.asarray(Rotation(512, 128, 50, truncate=True).delta_weight(m))
    ours = np.asarray(Rotation(512, 128, 50).delta_weight(m))
    assert (np.abs(theirs).max(1) == 0).sum() == 362
    assert (np.abs(ours).max(1) == 0).sum() == 0


def test_rank_of_the_update():
    """High where the paper says so: blocks reach min(in, out), sharing stays at q."""
    m = random(0, 16, 16)
    ranks = {
        name: np.linalg.matrix_rank(make_operator(name, 64, 48, 16).delta_weight(m))
        for name in OPERATORS
    }
    assert ranks["rotation"] == ranks["decoupling"] == ranks["permutation"] == 48
    for name in ("truncation", "sharing", "orthogonal", "hadamard"):
        assert ranks[name] == 16


def test_random_operators_reproduce():
    """Numbers written down once, so that another platform or version must agree."""
    op = make_operator("permutation", 12, 7, 3, seed=5)
    assert op.in_order.tolist() == PERMUTATION_12
    assert op.out_order.tolist() == PERMUTATION_7
    op = make_operator("hadamard", 12, 6, 4, seed=5)
    signs, odd, coordinates = op.in_arrays
    assert signs.tolist() == SIGNS_12
    assert coordinates.tolist() == PERMUTATION_12[:4]
    np.testing.assert_allclose(odd, ORTHONORMAL_3, atol=1e-6)
    basis = make_operator("orthogonal", 6, 6, 2, seed=5).in_basis
    np.testing.assert_allclose(basis, ORTHONORMAL_6_2, atol=1e-6)


def test_random_operators_share_equal_widths():
    for name in ("permutation", "orthogonal", "hadamard"):
        square = make_operator(name, 12, 12, 4, seed=1)
        ins, outs = (
            [getattr(square, field) for field in square.arrays if side in field]
            for side in ("in_", "out_")
        )
        assert jax.tree.all(jax.tree.map(np.array_equal, ins, outs))
        other = make_operator(name, 12, 12, 4, seed=2)
        assert other != square
        x = random(0, 12)
        assert not np.allclose(square.compress(x), other.compress(x))


def test_hadamard_is_fast():
    """O(d log d): neither a (d, d) matrix nor a product with one in the program."""
    op = make_operator("hadamard", 4096, 4096, 64)
    x = jax.ShapeDtypeStruct((4096,), jnp.float32)
    cost = jax.jit(op.compress).lower(x).compile().cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    assert cost["flops"] < 4096 * 12 * 4
    assert max(leaf.size for leaf in jax.tree.leaves(op)) == 4096


@pytest.mark.parametrize(
    ("rank", "ins", "outs", "operator", "expected"),
    [
        (8, 1024, 1024, "sharing", 128),  # AiDotNet's example: 16,384 parameters
        (8, 4096, 4096, "rotation", 256),  # the paper's r=8, 256 x 256
        (256, 4096, 4096, "sharing", 1448),
        (4, 64, 64, "rotation", 22),
        (4, 64, 64, "sharing", 22),
        (3, 50, 50, "sharing", 17),
        (3, 50, 50, "rotation", 16),
        (1000, 64, 64, "sharing", 64),  # beyond the layer: all of it
        (1000, 63, 64, "rotation", 62),
    ],
)
def test_square_rank(rank, ins, outs, operator, expected):
    q = square_rank(rank, ins, outs, operator)
    assert q == expected
    assert q * q <= rank * (ins + outs)


@pytest.mark.parametrize(
    ("multiple_of", "rank", "ins", "operator", "expected"),
    [
        (None, 8, 504, "sharing", 88),  # of 89: eight divides what is large enough
        (None, 8, 120, "sharing", 43),
        (1, 8, 504, "sharing", 89),
        (32, 8, 504, "sharing", 64),
        (32, 8, 50, "sharing", 28),  # below it the budget counts
        (3, 8, 504, "rotation", 84),  # and even
        (5, 1, 6, "rotation", 2),
    ],
)
def test_multiple_of(multiple_of, rank, ins, operator, expected):
    q = square_rank(rank, ins, ins, operator, multiple_of)
    assert q == expected
    config = MoRAConfig(rank=rank, operator=operator, multiple_of=multiple_of)
    spec = AdapterSpec.from_config(config, (ins, ins))
    assert spec.operator.square_rank == expected


@pytest.mark.parametrize("rank", [127, 128])
def test_auto_goes_by_the_budget(rank):
    """And not by what q leaves of it."""
    spec = AdapterSpec.from_config(MoRAConfig(rank=rank), (1000, 1000))
    assert spec.operator.name == ("sharing" if rank == 128 else "rotation")


def test_auto():
    """Rotation for small budgets, sharing for large, as in the paper's experiments."""
    q = square_rank(8, 4096, 4096)
    assert make_operator("auto", 4096, 4096, q).name == "rotation"
    assert make_operator({"name": "auto"}, 4096, 4096, q).name == "rotation"
    q = square_rank(256, 4096, 4096)
    assert make_operator("auto", 4096, 4096, q).name == "sharing"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: make_operator("rotate", 8, 8, 4),
            ValueError,
            "did you mean 'rotation'",
        ),
        (lambda: make_operator(6, 8, 8, 4), TypeError, "a name or a mapping, got 6"),
        (lambda: make_operator("rotation", 8, 8, 3), ValueError, "got 3; the nearest"),
        (
            lambda: make_operator("rotation", 0, 8, 2),
            ValueError,
            "in_features .* got 0",
        ),
        (lambda: make_operator("sharing", 8, 8, 0), ValueError, "square_rank .* got 0"),
        (lambda: make_operator("sharing", 8, 8, 2.0), TypeError, "square_rank .* 2.0"),
        (
            lambda: make_operator("sharing", 8, True, 2),
            TypeError,
            "out_features .* True",
        ),
        (
            lambda: make_operator("orthogonal", 8, 6, 7),
            ValueError,
            "at most .* 6, got 7",
        ),
        (lambda: make_operator("hadamard", 8, 6, 2, seed=-1), ValueError, "seed .* -1"),
        (
            lambda: make_operator("hadamard", 8, 6, 2, seed=0.5),
            TypeError,
            "seed .* 0.5",
        ),
        (
            lambda: make_operator({"name": "sharing", "groups": 1}, 8, 8, 4),
            ValueError,
            "settings .* got 'groups'",
        ),
        (
            lambda: make_operator({"name": "sharing", "compress_groups": 1}, 8, 8, 4),
            ValueError,
            "compress_groups must be one of .* got 1",
        ),
        (lambda: square_rank(0, 8, 8), ValueError, "rank must be .* got 0"),
        (lambda: square_rank(1, 1, 1, "rotation"), ValueError, "leaves no room"),
        (lambda: square_rank(1, 8, 8, multiple_of=0), ValueError, "multiple_of .* 0"),
        (lambda: MoRAConfig(multiple_of=2.0), TypeError, "multiple_of .* 2.0"),
    ],
)
def test_bad_settings(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.usefixtures("unchecked")
@by_case
def test_bad_arrays(case):
    op = case.make(12, 10, 4)
    m, x = jnp.ones((4, 4)), jnp.ones((2, 12))
    h = jnp.ones((2, *op.compressed_shape))
    for call in (
        lambda: op.compress(x[:, :11]),
        lambda: op.apply(m, x[:, :11]),
        lambda: op.apply(m[:3], x),
        lambda: op.apply(jnp.ones((2, 4, 4)), x),
        lambda: op.delta_weight(m[:, :3]),
        lambda: op.decompress(h[..., :3]),
        lambda: op.compress(jnp.ones(())),
    ):
        with pytest.raises(ValueError, match="must have"):
            call()
    for call in (
        lambda: op.compress(x.astype(int)),
        lambda: op.compress([1.0] * 12),
        lambda: op.apply(m.astype(int), x),
        lambda: op.delta_weight(jax.ShapeDtypeStruct((4, 4), jnp.float32)),
        lambda: op.decompress(h.astype(int)),
    ):
        with pytest.raises(TypeError, match="must be"):
            call()


PERMUTATION_12 = [10, 0, 8, 2, 6, 9, 1, 5, 3, 4, 11, 7]
PERMUTATION_7 = [5, 6, 3, 4, 2, 1, 0]
SIGNS_12 = [-1, -1, 1, 1, 1, -1, -1, -1, -1, -1, 1, -1]
ORTHONORMAL_3 = [
    [-0.316516, -0.839949, 0.440799],
    [0.835475, -0.026785, 0.548875],
    [-0.44922, 0.542004, 0.710234],
]
ORTHONORMAL_6_2 = [
    [0.545633, 0.555115],
    [-0.063848, -0.676149],
    [-0.093406, 0.218667],
    [-0.663933, 0.23554],
    [0.01153, -0.135015],
    [-0.498541, 0.336372],
]
