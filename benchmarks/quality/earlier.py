"""Adapters as the library made them until December 3, 2026, for runs of that time.

The factor of a delta then was in / (q c d), which suits inputs that all pull in one
direction: see `Operator.fine_tuning_scale` for today's. Blocks had the budget of their
own kernel alone.
"""

import dataclasses
from typing import Any

import mora_jax
from mora_jax import AdapterSpec
from mora_jax.operators import BlockDiagonal

SCALE = "aligned"
"""What the cells of such runs have for their scale."""


def aligned(plan: mora_jax.Plan) -> mora_jax.Plan:
    """The plan with the blocks and factors of that time."""
    specs = {path: _aligned(spec) for path, spec in plan.specs.items()}
    return dataclasses.replace(plan, parts={**plan.parts, **specs})


def _aligned(spec: AdapterSpec) -> AdapterSpec:
    """The adapter with its factor, and its number of blocks."""
    op: Any = spec.operator
    if isinstance(op, BlockDiagonal) and spec.rank is not None:
        blocks = op.widest(spec.rank, op.in_features, op.out_features)
        op = BlockDiagonal(op.in_features, op.out_features, blocks, seed=op.seed)
    c, d = op.gains
    scale = op.in_features / (op.m_shape[-2] * c * d)
    return dataclasses.replace(spec, operator=op, scale=scale)
