"""The adapters of kernels that PEFT's modules are."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mora_jax._common.checks import check_finite
from mora_jax._common.types import Shape
from mora_jax._plan.settings import AdapterSettings
from mora_jax._plan.spec import AdapterSpec
from mora_jax.io.peft._modules import MatrixPair, rows_looked_up
from mora_jax.io.peft._reference import reference_operator, reference_square_rank
from mora_jax.operators import LowRank, Operator

ByIndex = dict[Shape, MatrixPair]
"""{index in a kernel's stack, or in its first output axis: the module there}."""

Joined = tuple[Operator, float, list[np.ndarray]]
"""A kernel's operator, its alpha, and the trained array of each layer of its stack."""


def adapter_of(
    spec: AdapterSpec, by_index: ByIndex, config: Mapping[str, Any]
) -> tuple[AdapterSpec, np.ndarray]:
    """Return the spec of a kernel's adapter, and the array that it trains."""
    # A layer of a LoRA's kernel may be several modules, each with some of the outputs.
    stack, mora_type = spec.stack_shape, config["use_mora"] and config["mora_type"]
    parts = 1 if mora_type else len(by_index) // math.prod(stack)
    places = (*stack, parts) if parts > 1 else stack
    if odd := by_index.keys() ^ set(np.ndindex(places)):
        raise ValueError(f"the kernel is stacked {stack}, and does not fit {odd}")
    widths, modules = (spec.in_features, spec.out_features // parts), []
    for pair in (by_index[place] for place in np.ndindex(places)):
        module, table, a, b, rank, *_ = pair
        if table:
            a, b = rows_looked_up(spec, module, a, b, "here both change")
        left, right = (widths[0], rank), (rank, widths[1])
        if mora_type:
            left = right = (reference_square_rank(mora_type, *widths, rank),) * 2
        if (a.shape, b.shape) != (left, right):
            raise ValueError(
                f"lora_A and lora_B of {module} must be of shape {left[::-1]} and "
                f"{right[::-1]} for a kernel of {widths[0]} -> {widths[1]} features, "
                f"got {a.T.shape} and {b.T.shape}"
            )
        check_finite(a, module)
        check_finite(b, module)
        modules.append(pair._replace(a=a, b=b))
    if mora_type:
        operator, alpha, ms = _reference(spec, modules, mora_type)
    else:
        operator, alpha, ms = _low_rank(spec, modules, parts)
    m = np.stack(ms).reshape(*stack, *ms[0].shape)
    dropout = config["lora_dropout"]
    settings = AdapterSettings(alpha=alpha, dropout=dropout, param_dtype=m.dtype)
    return dataclasses.replace(spec, operator=operator, **vars(settings)), m


def _reference(spec: AdapterSpec, modules: list[MatrixPair], mora_type: int) -> Joined:
    for pair in modules:
        if not np.array_equal(pair.a, pair.b):
            raise ValueError(f"lora_A and lora_B of {pair.module} must be the same M")
    widths = spec.in_features, spec.out_features
    operators = {reference_operator(mora_type, *widths, p.rank) for p in modules}
    if len(operators) > 1:  # the M's are to be one array
        raise ValueError("a stacked kernel must have one rank in all its layers")
    return operators.pop(), 1.0, [pair.a for pair in modules]


def _low_rank(spec: AdapterSpec, modules: list[MatrixPair], parts: int) -> Joined:
    """Return a LoRA, whose trained array is A above the transpose of B."""
    alpha, width, blocks = modules[0].factor, spec.out_features // parts, []
    for k, (_, _, a, b, _, factor, _) in enumerate(modules):
        # All layers and parts have one alpha here, and columns of their own.
        b = b if factor == alpha else b * (factor / alpha)
        before = k % parts * width
        rows = before, spec.out_features - width - before
        blocks.append(np.concatenate([a, np.pad(b.T, (rows, (0, 0)))]))
    starts = range(0, len(blocks), parts)
    layers = [np.concatenate(blocks[k : k + parts], axis=1) for k in starts]
    rank = max(layer.shape[1] for layer in layers)
    ms = [np.pad(layer, ((0, 0), (0, rank - layer.shape[1]))) for layer in layers]
    return LowRank(spec.in_features, spec.out_features, rank), alpha, ms
