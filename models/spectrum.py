"""A picture of the singular values of an adapter's deltas."""

import re
from pathlib import Path
from typing import Any

from mora_jax.diagnostics import spectrum


def plot_spectrum(adapters: Any, path: Path) -> Any:
    """Plot the singular values of every delta, and the number of those above 0.1.

    Args:
      adapters: The adapters, as `mora_jax.init` makes them.
      path: The file to write.

    Returns:
      The `matplotlib.figure.Figure`.
    """
    from matplotlib.figure import Figure

    spectra = sorted(spectrum(adapters).items(), key=_numerically)
    layers = [
        (name, values)
        for name, stack in spectra
        for values in stack.reshape(-1, stack.shape[-1])
    ]
    figure = Figure(figsize=(10, 4), layout="constrained")
    lines, bars = figure.subplots(1, 2)
    kinds = list(dict.fromkeys(_kind(name) for name, _ in layers))
    for name, values in layers:
        colour = f"C{kinds.index(_kind(name)) % 10}"
        lines.plot(values, color=colour, linewidth=0.8, alpha=0.6)
    for kind in kinds:
        counts = [
            (values > 0.1).sum() for name, values in layers if _kind(name) == kind
        ]
        bars.plot(counts, "o-", color=f"C{kinds.index(kind) % 10}", label=kind)
    lines.set(yscale="log", xlabel="index", ylabel="singular value of the delta")
    bars.set(xlabel="layer", ylabel="singular values above 0.1", ylim=(0, None))
    figure.legend(*bars.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=150)
    return figure


def _numerically(item: tuple[str, Any]) -> list[Any]:
    """A key that puts layer 2 before layer 10."""
    words = re.split(r"(\d+)", item[0])
    return [int(word) if word.isdigit() else word for word in words]


def _kind(name: str) -> str:
    """The name of a layer's kind: the end of its path, without the numbers."""
    words = [word for word in name.split("/") if not any(map(str.isdigit, word))]
    return "/".join(words[-2:])
