"""What the command line tells of adapters."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mora_jax import diagnostics, io
from mora_jax.execution import kernel_update
from mora_jax.io import Names
from mora_jax.planning import Plan
from mora_jax.spec import AdapterSpec, differences
from mora_jax.tree import Tree, adapter_items


def describe(adapter: Path, base: Path | None, names: Names) -> dict[str, Any]:
    """What one adapter is, and a row for each of its layers."""
    adapters, plan = _open(adapter, base, names)
    values = diagnostics.spectrum(adapters, plan)
    layers = [
        {
            "path": spec.name,
            "in": spec.in_features,
            "out": spec.out_features,
            "operator": spec.operator.name,
            "q": spec.operator.square_rank,
            "parameters": spec.parameters,
            "norm": float(np.linalg.norm(values[spec.name])),
            "effective_rank": float(
                np.mean(diagnostics.effective_rank(values[spec.name]))
            ),
            "above_0.1": int(np.sum(values[spec.name] > 0.1)),
        }
        for spec in plan.specs
    ]
    kind = io.format_of(adapter)
    return {
        "format": kind,
        "metadata": io.read_metadata(adapter) if kind == "mora" else {},
        "adapters": len(plan),
        "parameters": plan.trainable_parameters,
        "layers": layers,
    }


def compare(
    first: Path, second: Path, base: Path | None, names: Names
) -> list[dict[str, Any]]:
    """A row for each layer of either adapter."""
    (a, plan_a), (b, plan_b) = (_open(one, base, names) for one in (first, second))
    left, right = (
        {spec.name: (spec, m) for spec, m in adapter_items(*both)}
        for both in ((a, plan_a), (b, plan_b))
    )
    rows = []
    for name in sorted(left.keys() | right.keys()):
        row: dict[str, Any] = {"path": name, "settings": "", "difference": ""}
        if name not in left or name not in right:
            row["settings"] = f"only in {first if name in left else second}"
        else:
            row["settings"] = _differing(left[name][0], right[name][0]) or "same"
            # Layer by layer: a model's updates together are as large as the model.
            one, other = (_update(*found[name]) for found in (left, right))
            if one.shape == other.shape:
                norm = float(np.linalg.norm(one))
                apart = float(np.linalg.norm(one - other))
                row["difference"] = apart / norm if norm else float(apart > 0)
        rows.append(row)
    return rows


def _update(spec: AdapterSpec, m: Any) -> np.ndarray:
    dtype = jnp.promote_types(m.dtype, jnp.float32)
    return np.asarray(kernel_update(spec, m.astype(dtype)))


def _differing(one: AdapterSpec, other: AdapterSpec) -> str:
    """The settings in which two adapters of a kernel differ."""
    found = differences(one.settings, other.settings)
    return ", ".join(f"{name}: {a} -> {b}" for name, (a, b) in found.items())


def _open(adapter: Path, base: Path | None, names: Names) -> tuple[Tree, Plan]:
    shapes = io.Checkpoint(base).shapes(names) if base else None
    return io.read_adapter(adapter, shapes, names)
