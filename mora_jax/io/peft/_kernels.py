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
from mora_jax.io.peft._reference import reference_operator
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
    stack, is_mora = spec.stack_shape, config["use_mora"]
    parts = 1 if is_mora else len(by_index) // math.prod(stack)
    places = (*stack, parts) if parts > 1 else stack
    if odd := by_index.keys() ^ set(np.ndindex(places)):
        raise ValueError(f"the kernel is stacked {stack}, and does not fit {odd}")
    modules = [by_index[place] for place in np.ndindex(places)]
    for pair in modules:
        check_finite(pair.a, pair.module)
        check_finite(pair.b, pair.module)
    if is_mora:
        operator, alpha, ms = _reference(spec, modules, config["mora_type"])
    else:
        operator, alpha, ms = _low_rank(spec, modules, parts)
    m = np.stack(ms).reshape(*stack, *ms[0].shape)
    dropout = config["lora_dropout"]
    settings = AdapterSettings(alpha=alpha, dropout=dropout, param_dtype=m.dtype)
    return dataclasses.replace(spec, operator=operator, **vars(settings)), m


def _reference(spec: AdapterSpec, modules: list[MatrixPair], mora_type: int) -> Joined:
    widths, operators = (spec.in_features, spec.out_features), set()
    for pair in modules:
        # The layers are LoRA's, and M is transposed.
        if not np.array_equal(pair.a, pair.b):
            raise ValueError(f"lora_A and lora_B of {pair.module} must be the same M")
        operators.add(reference_operator(mora_type, *widths, pair.rank))
    if len(operators) > 1:  # the M's are to be one array
        raise ValueError("a stacked kernel must have one rank in all its layers")
    (operator,) = operators
    for pair in modules:
        if pair.a.shape != operator.m_shape:
            raise ValueError(
                f"{pair.module} must be of shape {operator.m_shape} for a kernel of "
                f"{widths[0]} -> {widths[1]} features, got {pair.a.shape}"
            )
    return operator, 1.0, [pair.a for pair in modules]


def _low_rank(spec: AdapterSpec, modules: list[MatrixPair], parts: int) -> Joined:
    """Return a LoRA, whose trained array is A above the transpose of B."""
    ins, outs = spec.in_features, spec.out_features // parts
    alpha, blocks = modules[0].factor, []
    for k, (module, table, a, b, rank, factor, _) in enumerate(modules):
        if table:
            a, b = rows_looked_up(spec, module, a, b, "here both change")
        if (a.shape, b.shape) != ((ins, rank), (rank, outs)):
            raise ValueError(
                f"lora_A and lora_B of {module} must be of shape {(rank, ins)} and "
                f"{(outs, rank)} for a kernel of {ins} -> {outs} features, got "
                f"{a.T.shape} and {b.T.shape}"
            )
        # All layers and parts have one alpha here, and columns of their own.
        b = b if factor == alpha else b * (factor / alpha)
        before = k % parts * outs
        rows = before, spec.out_features - outs - before
        blocks.append(np.concatenate([a, np.pad(b.T, (rows, (0, 0)))]))
    starts = range(0, len(blocks), parts)
    layers = [np.concatenate(blocks[k : k + parts], axis=1) for k in starts]
    rank = max(layer.shape[1] for layer in layers)
    ms = [np.pad(layer, ((0, 0), (0, rank - layer.shape[1]))) for layer in layers]
    return LowRank(ins, spec.out_features, rank), alpha, ms
