"""Laws that every operator obeys, at every size."""

import dataclasses
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CASES,
    FEW_CASES,
    FEW_SIZES,
    KINDS,
    by_case,
    by_kind,
    by_square_case,
    in_turns,
)
from helpers import close, random
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from mora_jax import AdapterSpec, MoRAConfig, make_operator, plan, square_rank
from mora_jax.operators import Operator
from mora_jax.operators.orthogonal import Projection


def fit(case, in_features, out_features, q):
    """The square rank nearest to q that the case allows."""
    if case.bounded:
        q = min(q, in_features, out_features)
    return max(2, q - q % 2) if case.even else q


@jax.jit
def deltas(op, m, x):
    """All that an operator does with a trained array."""
    results = {
        "delta_weight": op.delta_weight(m),
        "apply": op.apply(m, x),
        "rows of units": op.unit_rows(jnp.arange(op.in_features), m),
        "general delta": Operator.matrix(op, m),
        "start": op.apply(op.start((), "zeros", jax.random.key(0), x.dtype), x),
    }
    kept = op.kept(x, m)
    results["tangent"] = op.tangent(kept, m, precision=None)
    results["gradient"] = op.gradient(kept, op.apply(m, x))
    return results


@jax.jit
def maps(op, m, x, h):
    """All that an operator does by its two maps."""
    return {
        "compress": op.compress(x),
        "decompress": op.decompress(h),
        "general rows": op._decompress(op._compress(x) @ m),
        "general rows of units": Operator.unit_rows(op, jnp.arange(op.in_features), m),
        "general lookup": op._decompress(
            op._compress_units(jnp.arange(op.in_features), m.dtype) @ m
        ),
        **_matrices(op, m.dtype),
    }


def _matrices(op, dtype):
    """C and the transpose of D, where rows of both are what devices compute with."""
    if not isinstance(op, Projection):
        return {}
    return {side: op.basis(side, dtype) for side in ("in", "out")}


def check_laws(case, op: Operator):
    """All that must hold between the oracle's delta and what an operator computes.

    The forward pass, the merged kernel, single rows and the gradient follow from the
    delta, and the faster forms give what the general ones do.
    """
    m, x = random(0, *op.m_shape), random(1, 3, op.in_features)
    got = deltas(op, m, x)
    delta = case.delta(op, m)
    for name in ("delta_weight", "rows of units", "general delta"):
        close(got[name], delta)
    close(got["apply"], np.float64(x) @ delta)
    close(got["start"], np.zeros((3, op.out_features)))
    by_m = case.m_gradient(op, m, np.float64(x), np.float64(x) @ delta)
    close(got["gradient"], by_m)
    # By Euler's theorem: LoRA's delta is of the second degree in A and B.
    close(got["tangent"], (1 if op.linear else 2) * np.float64(x) @ delta)
    if op.square:
        check_maps(case, op, m, x, delta)


def check_maps(case, op: Operator, m, x, delta):
    """The two maps are the oracle's, and orthonormal where they are projections."""
    q = op.square_rank
    c, d = case.matrices(op)
    n = c.shape[1]
    assert math.prod(op.compressed_shape) == n * q
    assert op.m_shape == (q, q)
    h = random(2, 3, *op.compressed_shape)
    got = maps(op, m, x, h)
    x, h = np.float64(x), np.float64(h).reshape(3, n, q)
    close(got["compress"].reshape(3, n, q), np.einsum("bi,inq->bnq", x, c))
    close(got["decompress"], np.einsum("bnq,nqo->bo", h, d))
    if isinstance(op, Projection):
        close((got["in"], got["out"]), (c[:, 0], d[0].T))
        c_gram, d_gram = c[:, 0].T @ c[:, 0], d[0] @ d[0].T
        close((c_gram, d_gram), (np.eye(q), np.eye(q)), rounded(case))
    for name in ("general lookup", "general rows of units"):
        close(got[name], delta)
    close(got["general rows"], x @ delta)
    assert op.block == (len(op.compressed_shape) == 2)
    assert op.block or n == 1


def rounded(case):
    """How far from orthonormal maps may be: those that are given are in bfloat16."""
    return 2**-7 if case.given else 1e-5


@pytest.mark.law
@in_turns("case, size", FEW_CASES, FEW_SIZES, each=2)
def test_laws(case, size):
    ins, outs, q = size
    check_laws(case, case.make(ins, outs, fit(case, ins, outs, q)))


any_size = given(
    ins=st.integers(2, 40),
    outs=st.integers(2, 40),
    q=st.integers(1, 24),
    seed=st.integers(0, 2**32 - 1),
)


@pytest.mark.law
@by_kind
@settings(max_examples=2, deadline=None, derandomize=True)
@example(ins=3, outs=20, q=8, seed=0)  # features that are in a block twice
@any_size
def test_laws_at_any_size(case, ins, outs, q, seed):
    check_laws(case, case.make(ins, outs, fit(case, ins, outs, q), seed))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
@settings(max_examples=20, deadline=None)
@any_size
def test_laws_at_very_many_sizes(case, ins, outs, q, seed):
    check_laws(case, case.make(ins, outs, fit(case, ins, outs, q), seed))


def _products_with_c(op, x):
    if not op.linear:
        return {}
    c = op._compress_units(jnp.arange(op.in_features), x.dtype)
    return {"C": (x @ c.reshape(op.in_features, -1), op.compress(x).reshape(5, -1))}


@pytest.mark.law
@by_kind
def test_transforms(case):
    """jit = eager, vmap = loop, and one compilation serves."""
    op = case.make(12, 10, fit(case, 12, 10, 4))
    q, m, x = op.square_rank, random(0, *op.m_shape), random(1, 5, 12)
    traces = []

    @jax.jit
    def transformed(op, m, ms, x):
        traces.append(op)
        loop = jnp.stack([op.apply(m, row) for row in x])
        _, scanned = jax.lax.scan(lambda _, row: (None, op.apply(m, row)), None, x)
        by_m = jax.grad(lambda m: op.apply(m, x).sum())
        return {
            "over x": (jax.vmap(op.apply, (None, 0))(m, x), loop),
            "over both": (
                jax.vmap(op.apply)(ms, x),
                jnp.stack([op.apply(m, r) for m, r in zip(ms, x, strict=True)]),
            ),
            "scan": (scanned, loop),
            "remat": (
                jax.grad(lambda m: jax.checkpoint(op.apply)(m, x).sum())(m),
                by_m(m),
            ),
            "eager": (op.apply(m, x), loop),
            "transpose": (
                jax.vjp(lambda x: op.apply(m, x), np.eye(12, dtype="f"))[1](
                    jnp.eye(12, 10)
                )[0],
                np.eye(12, 10) @ op.delta_weight(m).T,
            ),
        } | _products_with_c(op, x)

    ms = random(2, 5, *op.m_shape)
    results = transformed(op, m, ms, x)
    transformed(case.make(12, 10, q), m, ms, x)
    assert len(traces) == 1
    results["eager"] = op.apply(m, x), results["eager"][0]
    for got, expected in results.values():
        close(got, expected)


@pytest.mark.law
@by_kind
def test_gradients(case, float64):
    """Those of differences, of first and second order."""
    op = case.make(12, 10, fit(case, 12, 10, 4))
    m, x = (
        jnp.asarray(random(k, *s), float) for k, s in ((0, op.m_shape), (1, (5, 12)))
    )
    settings = {"modes": ("fwd", "rev"), "rtol": 1e-6, "atol": 1e-6}
    check_grads(jax.jit(op.apply), (m, x), order=2, **settings)
    check_grads(jax.jit(op.delta_weight), (m,), order=1, **settings)


@by_case
def test_pytree(case):
    """A pytree whose leaves are its arrays, hashable and equal by its settings."""
    op = case.make(12, 10, fit(case, 12, 10, 4))
    leaves, structure = jax.tree.flatten(op)
    again = jax.tree.unflatten(structure, leaves)
    assert again == op and hash(again) == hash(op) and repr(again) == repr(op)
    other = case.make(12, 10, 2)
    assert other != op
    on_device = jax.tree.map(jnp.asarray, op)
    assert jax.tree.structure(on_device) == structure
    assert pickle.loads(pickle.dumps(op)) == op
    for dtype in (jnp.bfloat16, jnp.float16):
        m, x = jnp.ones(op.m_shape, dtype), jnp.ones((2, 12), dtype)
        for y in (jax.eval_shape(op.apply, m, x), jax.eval_shape(op.delta_weight, m)):
            assert y.dtype == dtype
    with pytest.raises(dataclasses.FrozenInstanceError):
        op.square_rank = 3


@pytest.mark.law
@in_turns("case, dtype", KINDS, ["bfloat16", "float16", "float32", "float64"])
def test_dtypes(case, dtype, float64):
    """The dtype of the input is that of the result, to that dtype's accuracy."""
    op = case.make(12, 20, fit(case, 12, 20, 6))
    shapes = op.m_shape, (3, 12)
    m, x = (jnp.asarray(random(k, *s), dtype) for k, s in enumerate(shapes))

    @jax.jit
    def everything(op, m, x):
        return op.apply(m, x), op.delta_weight(m), op.unit_rows(jnp.arange(12), m)

    y, weight, rows = everything(op, m, x)
    assert y.dtype == weight.dtype == rows.dtype == x.dtype
    exact = case.delta(op, m)
    eps = float(jnp.finfo(dtype).eps)
    # The numbers of a random operator are float32 by definition.
    close(weight, exact, 8 * eps)
    close(rows, exact, 16 * eps)
    close(y, np.asarray(x, np.float64) @ exact, 16 * eps)


def delta_of(case, ins, outs, q):
    """The oracle's delta, which `test_laws` holds the operator's against."""
    op = case.make(ins, outs, fit(case, ins, outs, q))
    m = random(0, *op.m_shape)
    return case.delta(op, m), op


@by_case
def test_every_input_has_an_effect(case):
    """Ours use all inputs of a narrowing layer; truncations say that they do not."""
    delta, op = delta_of(case, 512, 128, 50)
    silent = int((np.abs(delta).max(axis=1) == 0).sum())
    expected = 512 - op.square_rank if op.name == "truncation" else 0
    if getattr(op, "truncate", False):
        # All but the first p blocks; the last block's wrapped features come back in.
        expected = 362  # of the reference's rotation at r=4
    assert silent == expected


@by_square_case
@pytest.mark.parametrize("size", [(16, 16, 4), (48, 8, 2), (8, 48, 2)])
def test_gains_are_those_of_the_matrices(case, size):
    """Of the numbers of C(x), and of the outputs that M reaches."""
    op = case.make(*size)
    c, d = case.matrices(op)
    c = c.reshape(op.in_features, -1)
    d = d.reshape(-1, op.out_features)
    reached = np.abs(d).sum(0) > 0
    norms = np.linalg.norm(c), np.linalg.norm(d)
    if case.given:  # x lies in the directions
        x = c @ random(0, op.square_rank)
        norms = (np.linalg.norm(x @ c) / np.sqrt((x**2).mean()), norms[1])
    gains = norms[0] / c.shape[1] ** 0.5, norms[1] / reached.sum() ** 0.5
    close(op.gains, gains, rounded(case))
    # A step moves an output by `q c d` if all inputs pull in one direction, and by
    # `sqrt(q) c d` if each has its own, where a step of the kernel moves it by `in`
    # and by sqrt(in).
    q = op.square_rank
    aligned = op.in_features / (q * gains[0] * gains[1])
    independent = aligned * (q / op.in_features) ** 0.5
    assert op.fine_tuning_scale == pytest.approx((aligned * independent) ** 0.5, 0.02)


def test_an_operator_without_gains_says_so():
    class Halved(Operator):
        name = "halved"

        def _compress(self, x):
            return x[..., : self.square_rank] / 2

        def _decompress(self, h):
            return h

    with pytest.raises(NotImplementedError, match=r"Halved .* property `gains`"):
        Halved(4, 4, 4).fine_tuning_scale  # noqa: B018


@by_case
def test_rank_of_the_delta(case):
    """High where the paper says so: blocks reach min(in, out), others stay at K q."""
    delta, op = delta_of(case, 64, 48, 16)
    rank = 48 if op.block else op.square_rank
    assert np.linalg.matrix_rank(delta) == rank


def test_random_operators_reproduce():
    """Numbers written down once, so that another platform or version must agree."""
    op = make_operator("block_diagonal", 12, 7, 3, seed=5)
    assert op.in_orders[0].tolist() == PERMUTATION_12
    assert op.out_orders[0].tolist() == PERMUTATION_7
    op = make_operator("hadamard", 12, 6, 4, seed=5)
    signs, odd, coordinates = op.in_arrays
    assert signs.tolist() == SIGNS_12
    assert coordinates.tolist() == PERMUTATION_12[:4]
    np.testing.assert_allclose(odd, ORTHONORMAL_3, atol=1e-6)
    basis = make_operator("orthogonal", 6, 6, 2, seed=5).in_basis
    np.testing.assert_allclose(basis, ORTHONORMAL_6_2, atol=1e-6)


def test_random_operators_share_equal_widths():
    for name in ("block_diagonal", "orthogonal", "hadamard", "signed_sharing"):
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


def test_hadamard_stores_little():
    op = make_operator("hadamard", 4096, 4096, 64)
    assert max(leaf.size for leaf in jax.tree.leaves(op)) == 4096


@pytest.mark.parametrize(
    ("rank", "ins", "outs", "operator", "expected"),
    [
        (8, 1024, 1024, "sharing", 128),  # AiDotNet's example: 16,384 parameters
        (8, 4096, 4096, "rotation", 256),  # the paper's r=8, 256 x 256
        (256, 4096, 4096, "sharing", 1024),  # the paper's 1448 divides neither width
        (256, 4096, 4096, "orthogonal", 1408),  # needs no whole groups, but whole 128s
        (8, 4096, 14336, "rotation", 256),  # 384 fits the budget and not the widths
        (8, 4096, 14336, "orthogonal", 384),
        (8, 4096, 1024, "rotation", 128),
        (8, 576, 576, "rotation", 96),  # divides both as it is
        (8, 576, 192, "rotation", 64),
        (8, 576, 1536, "rotation", 128),  # 64 would be less than half
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
        (1, 256, 4096, "sharing", 1448),
        (8, 256, 4096, "sharing", 1448),
        (32, 8, 504, "sharing", 64),
        (32, 8, 50, "sharing", 28),  # below it the budget counts
        (3, 8, 504, "rotation", 84),  # and even
        (5, 1, 6, "rotation", 2),
        (8, 12, 64, "low_rank", 8),
        (8, 4, 64, "low_rank", 4),
    ],
)
def test_multiple_of(multiple_of, rank, ins, operator, expected):
    q = square_rank(rank, ins, ins, operator, multiple_of)
    assert q == expected
    config = MoRAConfig(rank=rank, operator=operator, multiple_of=multiple_of)
    spec = AdapterSpec.from_config(config, (ins, ins))
    assert spec.operator.square_rank == expected


@pytest.mark.parametrize(
    ("multiple_of", "blocks"), [(None, 24), (1, 20), (7, 21), (8, 24), (500, 20)]
)
def test_blocks_by_a_multiple_are_the_fewest_within_the_budget(multiple_of, blocks):
    ins, outs = 576, 192
    assert square_rank(8, ins, outs, "block_diagonal", multiple_of) == blocks
    kept = {n: n * math.ceil(ins / n) * math.ceil(outs / n) for n in range(1, outs + 1)}
    fitting = [n for n, size in kept.items() if size <= 8 * (ins + outs)]
    step = multiple_of if multiple_of and multiple_of < outs else 1
    if multiple_of:
        assert blocks == min(n for n in fitting if n % step == 0)
    spec = AdapterSpec.from_config(MoRAConfig(multiple_of=multiple_of), (ins, outs))
    assert spec.operator.square_rank == blocks and spec.asked_square_rank is None


@pytest.mark.parametrize("rank", [127, 128])
def test_auto_goes_by_the_budget(rank):
    """And not by what q leaves of it."""
    spec = AdapterSpec.from_config(MoRAConfig(rank=rank), (1000, 1000))
    assert spec.operator.name == ("sharing" if rank == 128 else "block_diagonal")
    q = square_rank(rank, 1000, 1000, "auto")
    assert q == square_rank(rank, 1000, 1000, spec.operator.name)
    assert q == spec.operator.square_rank


def test_auto_needs_a_budget():
    """Beside a width there is none, and the operator is named."""
    rule = r"operator must be named beside square_rank=64, got 'auto'"
    config = MoRAConfig(square_rank=64)
    for make in (
        lambda: AdapterSpec.from_config(config, (1000, 1000)),
        lambda: plan({"kernel": jnp.ones((128, 128))}, config),
        lambda: make_operator("auto", 1000, 1000, 64),
        lambda: make_operator({"name": "auto"}, 1000, 1000, 64),
    ):
        with pytest.raises(ValueError, match=rule):
            make()
    overrides = {"kernel": {"square_rank": 64, "operator": "rotation"}}
    found = plan({"kernel": jnp.ones((128, 128))}, MoRAConfig(overrides=overrides))
    assert found["kernel"].operator.name == "rotation"


BAD_SETTINGS = {
    TypeError: [
        (lambda: make_operator(6, 8, 8, 4), "a name or a mapping, got 6"),
        (lambda: make_operator("sharing", 8, 8, 2.0), "square_rank .* 2.0"),
        (lambda: make_operator("sharing", 8, True, 2), "out_features .* True"),
        (lambda: make_operator("hadamard", 8, 6, 2, seed=0.5), "seed .* 0.5"),
        (lambda: MoRAConfig(multiple_of=2.0), "multiple_of .* 2.0"),
    ],
    ValueError: [
        (lambda: make_operator("rotate", 8, 8, 4), "did you mean 'rotation'"),
        (lambda: make_operator("rotation", 8, 8, 3), "got 3; the nearest"),
        (lambda: make_operator("rotation", 0, 8, 2), "in_features .* got 0"),
        (lambda: make_operator("sharing", 8, 8, 0), "square_rank .* got 0"),
        (lambda: make_operator("orthogonal", 8, 6, 7), "at most .* 6, got 7"),
        (lambda: make_operator("hadamard", 8, 6, 2, seed=-1), "seed .* -1"),
        (lambda: sharing(groups=1), "settings .* got 'groups'"),
        (lambda: sharing(compress_groups=1), "compress_groups must be one of .* got 1"),
        (lambda: square_rank(0, 8, 8), "rank must be .* got 0"),
        (lambda: square_rank(1, 1, 1, "rotation"), "leaves no room"),
        (lambda: square_rank(1, 8, 8, multiple_of=0), "multiple_of .* 0"),
    ],
}


def sharing(**settings):
    return make_operator({"name": "sharing", **settings}, 8, 8, 4)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("error", BAD_SETTINGS)
def test_bad_settings(error):
    for call, message in BAD_SETTINGS[error]:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.law
@pytest.mark.usefixtures("unchecked")
@by_case
def test_bad_arrays(case):
    op = case.make(12, 10, 4)
    m, x = jnp.ones(op.m_shape), jnp.ones((2, 12))
    h = jnp.ones((2, *op.compressed_shape))
    for call in (
        lambda: op.compress(x[:, :11]),
        lambda: op.apply(m, x[:, :11]),
        lambda: op.apply(m[..., :-1, :], x),
        lambda: op.apply(jnp.ones((7, *op.m_shape)), x),
        lambda: op.apply(jnp.ones(op.m_shape[1:]), x),
        lambda: op.delta_weight(m[..., :-1]),
        lambda: op.decompress(h[..., :-1]),
        lambda: op.compress(jnp.ones(())),
    ):
        with pytest.raises(ValueError, match="must have"):
            call()
    for call in (
        lambda: op.compress(x.astype(int)),
        lambda: op.compress([1.0] * 12),
        lambda: op.apply(m.astype(int), x),
        lambda: op.delta_weight(jax.ShapeDtypeStruct(op.m_shape, jnp.float32)),
        lambda: op.decompress(h.astype(int)),
    ):
        with pytest.raises(TypeError, match="must (be|have)"):
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
