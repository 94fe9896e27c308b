"""The operators under test. A new one is one line here, and inherits every law."""

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np
import oracle
import pytest
from _pytest.mark import ParameterSet

from mora_jax import make_operator
from mora_jax.operators import Damped, Operator, Subspace


@dataclasses.dataclass(frozen=True)
class Case:
    """One operator variant.

    `matrices(op)` are C (in, n, q) and D (n, q, out) in float64 by the oracle, for a
    linear one. One with `given` arrays is no operator that a config names; `spec` then
    names its relative, which it is made of.
    """

    label: str
    spec: dict
    matrices: Callable[[Operator], tuple[np.ndarray, np.ndarray]]
    even: bool = False
    bounded: bool = False
    given: Callable[[Operator, int], Operator] | None = None

    def make(self, in_features: int, out_features: int, q: int, seed: int = 0):
        op = make_operator(self.spec, in_features, out_features, q, seed=seed)
        return self.given(op, seed) if self.given else op

    def delta(self, op: Operator, m) -> np.ndarray:
        """The delta of an M, (in, out), in float64."""
        return oracle.delta(*self.matrices(op), m)

    def m_gradient(self, op: Operator, m, x, g) -> np.ndarray:
        """The gradient of M, where g is the gradient of the output."""
        return oracle.m_gradient(*self.matrices(op), x, g)


class OtherCase(Case):
    """One whose M is no square, so that it has no C and D of its own."""

    def delta(self, op, m):
        return oracle.delta_of(op, m)

    def m_gradient(self, op, m, x, g):
        return oracle.m_gradient_of(op, m, x, g)


def _with_given_bases(op: Operator, seed: int) -> Operator:
    """Between directions that no seed of the library gives."""
    random, q = np.random.default_rng(seed + 1), op.square_rank
    bases = {
        f"{side}_basis": np.linalg.qr(random.standard_normal((width, q)))[0]
        for side, width in (("in", op.in_features), ("out", op.out_features))
    }
    return Subspace(op.in_features, op.out_features, q, **bases)


class DampedCase(OtherCase):
    """Another one that sees its inputs times P."""

    def delta(self, op, m):
        if op.name != "damped":  # as a config names it
            return super().delta(op, m)
        return oracle.damping(op) @ super().delta(op.inner, m)

    def m_gradient(self, op, m, x, g):
        return super().m_gradient(op.inner, m, x @ oracle.damping(op), g)


def _damped(op: Operator, seed: int) -> Operator:
    """Along a few directions of different lengths, and by each feature."""
    random, k = np.random.default_rng(seed + 1), min(3, op.in_features)
    directions = np.linalg.qr(random.standard_normal((op.in_features, k)))[0]
    sizes = op.in_features, op.out_features, op.square_rank
    directions = directions * np.array([1.0, 0.7, 0.4])[:k]
    diagonal = random.uniform(0.2, 1, (op.in_features, 1))
    return Damped(*sizes, inner=op, directions=directions, diagonal=diagonal)


def _scaled(op: Operator, seed: int) -> Operator:
    """By each feature alone."""
    random = np.random.default_rng(seed + 1)
    sizes = op.in_features, op.out_features, op.square_rank
    return Damped(*sizes, inner=op, diagonal=random.uniform(0.2, 1, (sizes[0], 1)))


def _sharing(compress: str, decompress: str, normalised: bool) -> Case:
    spec = {
        "name": "sharing",
        "compress_groups": compress,
        "decompress_groups": decompress,
        "normalised": normalised,
    }
    label = f"sharing-{compress}-{decompress}" + "-normalised" * normalised
    # Contiguous groups need at least one feature each.
    bounded = "contiguous" in (compress, decompress)
    return Case(label, spec, oracle.sharing, bounded=bounded)


GROUPS = ("strided", "contiguous")

CASES = [
    Case("truncation", {"name": "truncation"}, oracle.truncation, bounded=True),
    *(_sharing(c, d, n) for c in GROUPS for d in GROUPS for n in (False, True)),
    Case("signed_sharing", {"name": "signed_sharing"}, oracle.signed_sharing),
    Case("decoupling", {"name": "decoupling"}, oracle.decoupling),
    Case(
        "decoupling-truncate",
        {"name": "decoupling", "truncate": True},
        oracle.decoupling,
    ),
    Case("signed_decoupling", {"name": "signed_decoupling"}, oracle.signed_decoupling),
    Case("rotation", {"name": "rotation"}, oracle.rotation, even=True),
    Case(
        "rotation-truncate",
        {"name": "rotation", "truncate": True},
        oracle.rotation,
        even=True,
    ),
    Case("orthogonal", {"name": "orthogonal"}, oracle.orthogonal, bounded=True),
    Case(
        "subspace",
        {"name": "orthogonal"},
        oracle.orthogonal,
        bounded=True,
        given=_with_given_bases,
    ),
    *(
        DampedCase(
            f"damped-{name}",
            {"name": name},
            oracle.damped,
            bounded=name != "rotation",
            even=name == "rotation",
            given=_damped,
        )
        for name in ("block_diagonal", "rotation", "orthogonal")
    ),
    *(
        DampedCase(
            f"scaled-{name}",
            {"name": name},
            oracle.damped,
            bounded=name == "block_diagonal",
            given=_scaled,
        )
        for name in ("block_diagonal", "sharing", "low_rank")
    ),
    Case("hadamard", {"name": "hadamard"}, oracle.hadamard, bounded=True),
    OtherCase(
        "block_diagonal",
        {"name": "block_diagonal"},
        oracle.block_diagonal,
        bounded=True,
    ),
    OtherCase("low_rank", {"name": "low_rank"}, oracle.low_rank),
]
LINEAR = [case for case in CASES if "low_rank" not in case.label]
SIZES = [
    (16, 16, 4),
    (16, 16, 16),
    (12, 20, 6),
    (20, 12, 6),
    (13, 7, 4),
    (7, 13, 4),
    (48, 8, 2),
    (8, 48, 2),
    (9, 9, 8),
    (24, 36, 10),
]
"""Square and not, divisible and not, narrowing and widening, one block and many."""

_FEW_SIZES = {(16, 16, 4), (13, 7, 4), (9, 9, 8), (24, 36, 10)}
_FEW_SHARING = ("strided-strided-normalised",)


def _slow(unless: bool) -> list[pytest.MarkDecorator]:
    return [] if unless else [pytest.mark.slow]


def _is_of_few(case: Case) -> bool:
    if case.label == "subspace":  # computes as orthogonal does
        return False
    kind, _, variant = case.label.partition("-")
    return variant in _FEW_SHARING if kind == "sharing" else not variant


_KINDS = (
    "sharing-strided-strided-normalised",
    "rotation",
    "signed_decoupling",
    "orthogonal",
    "block_diagonal",
    "damped-rotation",
    "low_rank",
)

# The slow tests take all cases and sizes. Kinds are for what JAX's transformations do
# to an operator: one for each way to compute.
FEW_CASES = [pytest.param(case, marks=_slow(_is_of_few(case))) for case in CASES]
KINDS = [pytest.param(case, marks=_slow(case.label in _KINDS)) for case in CASES]
FEW_LINEAR = [p for p in FEW_CASES if p.values[0] in LINEAR]
LINEAR_KINDS = [p for p in KINDS if p.values[0] in LINEAR]
FEW_SIZES = [pytest.param(size, marks=_slow(size in _FEW_SIZES)) for size in SIZES]


def _label(value: Any) -> str:
    return value.label if isinstance(value, Case) else str(value)


def in_turns(
    names: str, rows: Iterable[Any], columns: Sequence[Any], each: int = 1
) -> pytest.MarkDecorator:
    """All pairs, of which a row's are slow but for `each` of the columns, in turn.

    For laws of two parameters that have nothing to do with one another. What is slow
    by itself, as some of `FEW_CASES` and `FEW_SIZES` are, is slow for this reason too.
    """
    pairs, turns = [], collections.Counter()
    few = [column for column in columns if not _parts(column)[1]]
    for row in rows:
        value, marks = _parts(row)
        first = each * turns[bool(marks)]
        turns[bool(marks)] += 1
        turn = [few[(first + k) % len(few)] for k in range(each)]
        for column in columns:
            other, more = _parts(column)
            shown = bool(more) or column in turn
            marked = [*marks, *more, *_slow(shown)]
            pairs.append(pytest.param(value, other, marks=marked))
    return pytest.mark.parametrize(names, pairs, ids=_label)


def _parts(parameter: Any) -> tuple[Any, Collection[Any]]:
    """The one value of a parameter, and its marks."""
    if isinstance(parameter, ParameterSet):
        return parameter.values[0], parameter.marks
    return parameter, ()


by_case = pytest.mark.parametrize("case", FEW_CASES, ids=_label)
by_size = pytest.mark.parametrize("size", SIZES, ids=str)
by_kind = pytest.mark.parametrize("case", KINDS, ids=_label)
by_linear_case = pytest.mark.parametrize("case", FEW_LINEAR, ids=_label)
by_square_case = pytest.mark.parametrize(
    "case",
    [p for p in FEW_LINEAR if not isinstance(p.values[0], OtherCase)],
    ids=_label,
)
by_linear_kind = pytest.mark.parametrize("case", LINEAR_KINDS, ids=_label)
by_few_sizes = pytest.mark.parametrize("size", FEW_SIZES, ids=str)
