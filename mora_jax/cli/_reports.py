"""Reports of the command line about adapters."""

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from mora_jax import io
from mora_jax._common.suggestions import alike, shown
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree.paths import Tree, adapters_in
from mora_jax.diagnostics._measures import effective_rank, spectrum
from mora_jax.io._files import CONFIG, TENSORS, AdapterFileError, PathLike, as_path
from mora_jax.io._json import read_json
from mora_jax.io.native._adapter import is_ours


def format_of(directory: PathLike) -> str:
    """The format of an adapter: "mora", "peft-mora" or "peft-lora"."""
    path = as_path("directory", directory)
    # Ours are known by their tensors, since their config may be missing.
    if (path / TENSORS).is_file() and is_ours(path, TENSORS):
        return "mora"
    config = read_json(path / CONFIG)
    if isinstance(config, dict) and config.get("peft_type") == "LORA":
        return "peft-mora" if config.get("use_mora") else "peft-lora"
    raise AdapterFileError(f"{CONFIG} in {directory} is of no adapter that we know")


def read_adapter(
    directory: PathLike, base: str | None = None, names: io.Names = None
) -> Tree:
    """Adapters of any format; only the reference's needs the `base`."""
    checkpoint = None if base is None else io.Checkpoint(as_path("base", base))
    path = as_path("adapter", directory)
    if format_of(path) == "mora":
        return io.load(path)
    return io.load_peft(path, checkpoint and checkpoint.shapes(names), names)


Row = dict[str, Any]
"""{name of a column: what is printed there}."""


def describe(adapter: str, base: str | None, names: io.Names) -> Row:
    """An adapter's format, metadata and size, and a row for each of its layers."""
    adapters = read_adapter(adapter, base, names)
    kind, spectra = format_of(adapter), spectrum(adapters)
    specs = {"/".join(path): a.spec for path, a in adapters_in(adapters).items()}
    whole = {name: spec for name, spec in specs.items() if name not in spectra}
    layers = [_layer(name, specs[name], values) for name, values in spectra.items()]
    return {
        "format": kind,
        "metadata": io.read_metadata(adapter) if kind == "mora" else {},
        "adapters": len(layers),
        "parameters": sum(spec.parameters for spec in specs.values()),
        "layers": layers,
        "trained": [
            {"path": name, "shape": list(spec.shape), "parameters": spec.parameters}
            for name, spec in whole.items()
        ],
    }


def _layer(name: str, spec: AdapterSpec, values: np.ndarray) -> Row:
    """A row of numbers for a layer and the singular values of its delta."""
    return {
        "path": name,
        "in": spec.in_features,
        "out": spec.out_features,
        "operator": spec.operator.name,
        "q": spec.operator.square_rank,
        "parameters": spec.parameters,
        "norm": float(np.linalg.norm(values)),
        "effective_rank": float(np.mean(effective_rank(values))),
    }


def grouped(layers: Sequence[Row]) -> list[Row]:
    """One row for all layers that differ only in the numbers of their paths."""
    # It has the sum of their parameters, which are what one pays for, and the smallest
    # and largest of the numbers that training has made.
    kind = itemgetter("path", "in", "out", "operator", "q")
    rows = []
    for pattern, group in alike(layers, kind):
        row = group[0] | {"path": shown(pattern, len(group))}
        row["parameters"] = sum(layer["parameters"] for layer in group)
        for key in ("norm", "effective_rank"):
            values = [layer[key] for layer in group]
            row[key] = min(values), max(values)
        rows.append(row)
    return rows
