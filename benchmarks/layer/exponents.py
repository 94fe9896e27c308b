"""Curves y ~ x^p: the exponents, their table, and their plot."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.harness import Row, show
from benchmarks.common.plots import figure

FLOOR = "frozen model"
"""The method whose own cost is measured; the others add to it."""


def upper(values: Any) -> Any:
    """The upper half of the values, at least three, to which exponents are fitted."""
    return values[-max(3, math.ceil(len(values) / 2)) :]


def fit(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The p of y ~ x^p; None where noise leaves less than two of y above zero."""
    pairs = [(a, b) for a, b in zip(upper(x), upper(y), strict=True) if b > 0]
    if len(pairs) < 2:
        return None
    by_x, by_y = np.log(pairs).T
    return float(np.polyfit(by_x, by_y, 1)[0])


def curve(names: Sequence[str], x: Any, y: Any, expected: Sequence[Any]) -> Row:
    """A row of the report; `names` are the axis, the quantity and the method."""
    exponents = [round(p, 2) + 0.0 for p in expected]
    return {
        **dict(zip(("axis", "quantity", "method"), names, strict=True)),
        **{"x": list(x), "y": np.asarray(y).tolist(), "exponent": fit(x, y)},
        "arithmetic": [min(exponents), max(exponents)],
    }


def show_curves(rows: Sequence[Row], part: str) -> None:
    """Print the exponents of a part, with the values at the largest size."""
    columns = {part: "{sizes}", "": "{quantity}"}
    for method in dict.fromkeys(row["method"] for row in rows):
        adds = " adds" if part == "steps" and method != FLOOR else ""
        columns[method + adds] = f"{{{method}}}"
    lines: dict[Any, Row] = {}
    for row in rows:
        axis, quantity, x = row["axis"], row["quantity"], row["x"]
        sizes = f"{axis}, {x[0]:,} to {x[-1]:,}"
        line = lines.setdefault((axis, quantity), {"sizes": sizes})
        line |= {"quantity": quantity, row["method"]: cell(row)}
    show(columns, list(lines.values()))


def cell(row: Row) -> str:
    """Exponents as measured and by arithmetic, and the value at the largest size."""
    p = row["exponent"]
    measured = "noise" if p is None else f"{round(p, 2) + 0.0:.2f}"
    ends = " to ".join(dict.fromkeys(f"{p:g}" for p in row["arithmetic"]))
    unit, scale = ("MB", 1e-6) if row["quantity"] == "memory" else ("ms", 1e3)
    first = f", first {scale * row['first']:,.1f}" if "first" in row else ""
    return f"{measured} ({ends}): {scale * row['y'][-1]:,.1f}{first} {unit}"


def plot_curves(rows: Sequence[Row], path: Path) -> None:
    """Plot points, fits, and the slopes of arithmetic (dotted), in a panel for each."""
    panels: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        kind, _, way = row["quantity"].partition(",")
        column = f"{row['axis']}, to compile" if way else row["axis"]
        column = f"{column}, to plan" if "first" in row else column
        if kind != "plan and init":
            panels.setdefault(column, {}).setdefault(kind, []).append(row)
    methods = sorted({row["method"] for row in rows}, key=lambda m: (m != FLOOR, m))
    size = 1 + 2.4 * len(panels), 5
    with figure(path, 2, len(panels), figsize=size, dpi=110) as (made, axes):
        for (column, kinds), pair in zip(panels.items(), axes.T, strict=True):
            for panel, (kind, some) in zip(pair, kinds.items(), strict=True):
                for row in some:
                    draw(panel, row, f"C{methods.index(row['method'])}")
                title = f"{kind}, {'bytes' if kind == 'memory' else 's'}"
                panel.set(title=title, xlabel=column, xscale="log", yscale="log")
                panel.set_xticks(some[0]["x"][::2], map(str, some[0]["x"][::2]))
                panel.minorticks_off()
        for k, method in enumerate(methods):
            axes[0, 0].plot([], [], "o-", color=f"C{k}", label=method)
        made.legend(loc="outside lower center", ncols=len(methods))


def draw(panel: Any, row: Row, colour: str) -> None:
    """Draw the points of a curve, its fit, and dotted slopes through its middle."""
    x, y = np.asarray(row["x"], float), np.asarray(row["y"], float)
    panel.plot(x, y, "s" if "scanned" in row["quantity"] else "o", color=colour, ms=4)
    if row["exponent"] is None:
        return
    x, y = upper(x), upper(y)
    middle = [np.exp(np.log(values[y > 0]).mean()) for values in (x, y)]
    slopes = {"-": [row["exponent"]], ":": sorted(set(row["arithmetic"]))}
    for style, several in slopes.items():
        for p in several:
            panel.plot(x, middle[1] * (x / middle[0]) ** p, style, color=colour, lw=1)
