"""What the command line reports about adapters."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mora_jax import diagnostics, io
from mora_jax._layer.delta import delta_kernel
from mora_jax._plan.plan import Plan
from mora_jax._plan.spec import AdapterSpec, differences
from mora_jax._tree.adapters import Tree, adapter_items, trained_items
from mora_jax.io import Names
from mora_jax.io._formats import format_of, read_adapter
from mora_jax.io._locations import as_path


def describe(adapter: str, base: str | None, names: Names) -> dict[str, Any]:
    """An adapter's format, metadata and size, and a row for each of its layers."""
    adapters, plan = open_adapter("adapter", adapter, base, names)
    values = diagnostics.spectrum(adapters, plan)
    layers = [
        {
            "path": spec.name,
            "in": spec.in_features,
            "out": spec.out_features,
            "operator": spec.operator.name,
            "q": spec.operator.square_rank,
            "squares": spec.operator.squares,
            "parameters": spec.parameters,
            "norm": float(np.linalg.norm(values[spec.name])),
            "effective_rank": float(
                np.mean(diagnostics.effective_rank(values[spec.name]))
            ),
            "above_0.1": int(np.sum(values[spec.name] > 0.1)),
        }
        for spec in plan.specs
    ]
    kind = format_of(adapter)
    return {
        "format": kind,
        "metadata": io.read_metadata(adapter) if kind == "mora" else {},
        "adapters": len(plan),
        "parameters": plan.trainable_parameters,
        "layers": layers,
        "trained": [
            {"path": o.name, "shape": list(o.shape), "parameters": o.parameters}
            for o in plan.trained
        ],
    }


def grouped(layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for all layers that differ only in the numbers of their paths.

    A row has the sum of the parameters, and (the smallest, the largest) of each other
    number.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for layer in layers:
        kind = [layer[key] for key in ("in", "out", "operator", "q", "squares")]
        groups[re.sub(r"\d+", "*", layer["path"]), *kind].append(layer)
    rows = []
    for (path, *_), group in groups.items():
        row = dict(group[0])
        if len(group) > 1:
            row["path"] = f"{path} ({len(group)})"
            row["parameters"] = sum(layer["parameters"] for layer in group)
            for key in ("norm", "effective_rank", "above_0.1"):
                values = [layer[key] for layer in group]
                row[key] = min(values), max(values)
        rows.append(row)
    return rows


def compare(
    first: str, second: str, base: str | None, names: Names
) -> list[dict[str, Any]]:
    """A row for each layer of either adapter."""
    a, plan_a = open_adapter("first", first, base, names)
    b, plan_b = open_adapter("second", second, base, names)
    left, right = (
        {spec.name: (spec, m) for spec, m in adapter_items(adapters, plan)}
        for adapters, plan in ((a, plan_a), (b, plan_b))
    )
    rows = []
    for name in sorted(left.keys() | right.keys()):
        row: dict[str, Any] = {"path": name, "settings": "", "difference": ""}
        if name not in left or name not in right:
            row["settings"] = f"only in {first if name in left else second}"
        else:
            row["settings"] = _differing(left[name][0], right[name][0]) or "same"
            # For this layer only: the deltas of a model are as large as the model.
            deltas = [_delta(*found[name]) for found in (left, right)]
            if deltas[0].shape == deltas[1].shape:
                row["difference"] = _distance(*deltas)
        rows.append(row)
    arrays = [
        {one.name: np.asarray(copy) for one, copy in trained_items(adapters, plan)}
        for adapters, plan in ((a, plan_a), (b, plan_b))
    ]
    for name in sorted(arrays[0].keys() | arrays[1].keys()):
        row = {"path": name, "settings": "trained itself", "difference": ""}
        if name not in arrays[0] or name not in arrays[1]:
            row["settings"] += f" only in {first if name in arrays[0] else second}"
        elif arrays[0][name].shape == arrays[1][name].shape:
            row["difference"] = _distance(arrays[0][name], arrays[1][name])
        rows.append(row)
    return rows


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """The norm of the difference, divided by the first array's norm."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    norm, distance = float(np.linalg.norm(one)), float(np.linalg.norm(one - other))
    return distance / norm if norm else float(distance > 0)


def _delta(spec: AdapterSpec, m: Any) -> np.ndarray:
    dtype = jnp.promote_types(m.dtype, jnp.float32)
    return np.asarray(delta_kernel(spec, m.astype(dtype)))


def _differing(left: AdapterSpec, right: AdapterSpec) -> str:
    """The settings in which two adapters of a kernel differ."""
    found = differences(left.settings, right.settings)
    differing = [f"{name}: {a} -> {b}" for name, (a, b) in found.items()]
    if None not in (digests := (left.base_digest, right.base_digest)):
        differing += ["other weights of the base"] * (digests[0] != digests[1])
    return ", ".join(differing)


def open_adapter(
    argument: str, adapter: str, base: str | None, names: Names
) -> tuple[Tree, Plan]:
    """An adapter of any format; `argument` is what messages call its path."""
    shapes = None
    if base is not None:
        shapes = io.Checkpoint(as_path("base", base)).shapes(names)
    return read_adapter(as_path(argument, adapter), shapes, names)
