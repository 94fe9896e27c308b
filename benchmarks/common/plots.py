"""Plots of what the benchmarks measure."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.harness import Row


@contextlib.contextmanager
def figure(
    path: Path, rows: int = 1, columns: int = 1, **settings: Any
) -> Iterator[tuple[Any, Any]]:
    """A figure with axes (rows, columns), which is written to `path` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = {"layout": "constrained", "squeeze": False, "dpi": 150, **settings}
    made, axes = plt.subplots(rows, columns, **settings)
    yield made, axes
    made.savefig(path)
    plt.close(made)


def plot_mean(axis: Any, x: Any, curves: Any, *style: str, **settings: Any) -> None:
    """The mean of some curves, with its standard error as a band if there are more."""
    values = np.asarray(curves, float)
    mean = values.mean(0)
    (line,) = axis.plot(x, mean, *style, **settings)
    if len(values) > 1:
        error = values.std(0, ddof=1) / np.sqrt(len(values))
        band = {"color": line.get_color(), "alpha": 0.2, "linewidth": 0}
        axis.fill_between(x, mean - error, mean + error, **band)


def legend_below(made: Any, axis: Any, columns: int = 3) -> None:
    """One legend for a figure, with what one of its axes has."""
    handles, labels = axis.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=columns)


def plot_bars(rows: Sequence[Row], path: Path) -> None:
    """Plot the time relative to the frozen model, a bar for each method and model."""
    kinds = {"MoRA": "tab:blue", "frozen": "tab:gray"}
    models = list(dict.fromkeys(row["model"] for row in rows))
    most = max(row["fastest"] for row in rows)
    height = 0.9 + 0.3 * len({row["method"] for row in rows})
    size = {"figsize": (3 + 4 * len(models), height), "sharey": True}
    with figure(path, 1, len(models), **size) as (_, axes):
        for axis, model in zip(axes[0], models, strict=True):
            here = [row for row in rows if row["model"] == model]
            names, times = zip(
                *((r["method"], r["fastest"]) for r in here), strict=True
            )
            colours = [kinds.get(re.split(r"\W", n)[0], "tab:orange") for n in names]
            bars = axis.barh(names, times, color=colours)
            axis.bar_label(bars, fmt="%.2f", padding=3)
            axis.axvline(times[0], color="black", linewidth=0.8)
            axis.set_xlim(0, most * 1.15)
            axis.set(title=model, xlabel="time of a step, of the frozen model's")
        axes[0, 0].invert_yaxis()


def plot_lines(rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    """Plot the time relative to the baseline against each column that varies.

    Each column has a panel, in which the others have the values of the first row.
    """
    varying = [c for c in columns if len({row[c] for row in rows}) > 1]
    size = 5 * len(varying) + 1.5, 4
    with figure(path, 1, len(varying), figsize=size, sharey=True) as (made, axes):
        for axis, column in zip(axes[0], varying, strict=True):
            others = {c: rows[0][c] for c in columns if c != column}
            here = [row for row in rows if all(row[c] == v for c, v in others.items())]
            for k, name in enumerate(dict.fromkeys(row["method"] for row in here)):
                line = sorted(
                    (r[column], r["time"]) for r in here if r["method"] == name
                )
                style = "o-" if name.startswith("MoRA") else "s--"
                colour = f"C{k % 10}"
                axis.plot(*zip(*line, strict=True), style, color=colour, label=name)
            ticks = sorted({row[column] for row in here})
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, map(str, ticks))
            fixed = ", ".join(f"{c} {v}" for c, v in others.items())
            axis.set(xlabel=column, title=fixed)
        axes[0, 0].set_ylabel(f"time relative to: {rows[0]['method']}")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        made.legend(handles, labels, loc="outside right center")
