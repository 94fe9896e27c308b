"""Timing that a noisy machine does not fool: ratios, taken in turns.

Every contender is compiled first. Then they run one after another, round by round, and
each is divided by the baseline of its own round; the median over rounds is reported.
"""

import dataclasses
import json
import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm


@dataclasses.dataclass
class Contender:
    """A compiled program with its arguments.

    Attributes:
        run: the program.
        args: what it is called with.
        compile_seconds: tracing and compiling.
        trained: how many parameters it trains.
        seconds: of each round.
    """

    run: Any
    args: tuple[Any, ...]
    compile_seconds: float
    trained: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)

    @classmethod
    def compile(
        cls, function: Callable[..., Any], *args: Any, trained: Any = ()
    ) -> "Contender":
        """Compile `function` for `args`; `trained` is the tree of what it trains."""
        start = time.perf_counter()
        run = jax.jit(function).lower(*args).compile()
        seconds = time.perf_counter() - start
        size = sum(leaf.size for leaf in jax.tree.leaves(trained))
        return cls(run, args, seconds, size)

    def __call__(self) -> Any:
        """Run once, to the end."""
        return jax.block_until_ready(self.run(*self.args))

    @property
    def temporary_megabytes(self) -> float | None:
        """Memory beside arguments and results, as XLA plans it."""
        return self.run.memory_analysis().temp_size_in_bytes / 1e6

    @property
    def gigaflops(self) -> float | None:
        """Arithmetic, as XLA counts it."""
        cost = self.run.cost_analysis()
        cost = cost[0] if isinstance(cost, list) else cost
        return cost.get("flops", 0) / 1e9


def check_close(value: jax.Array, expected: jax.Array) -> None:
    """Raise unless both are the same but for the rounding of their dtype."""
    bound = 1e-4 if value.dtype.itemsize == 4 else 0.03
    value, expected = (jnp.asarray(a, jnp.float32) for a in (value, expected))
    error = float(jnp.abs(value - expected).max() / jnp.abs(expected).max())
    if not error < bound:
        raise SystemExit(f"adapted and merged differ by {error:.1e}, relatively")


def race(
    contenders: Mapping[str, Contender], rounds: int, *, show_progress: bool = True
) -> None:
    """Run all in turns, after one round that is not counted.

    Each round has an order of its own, so that none always follows the same one.
    """
    order, shuffle = list(contenders.values()), random.Random(0).shuffle
    total = (rounds + 1) * len(contenders)
    with tqdm(total=total, desc="running", disable=not show_progress) as bar:
        for number in range(rounds + 1):
            shuffle(order)
            for contender in order:
                start = time.perf_counter()
                contender()
                if number:
                    contender.seconds.append(time.perf_counter() - start)
                bar.update()


def ratio(contender: Contender, baseline: Contender) -> float:
    """The median over rounds of the time relative to the baseline's."""
    return float(np.median(np.divide(contender.seconds, baseline.seconds)))


def results(contenders: Mapping[str, Contender]) -> list[dict[str, Any]]:
    """A row for each contender; the first one is the baseline."""
    baseline = next(iter(contenders.values()))
    return [
        {
            "method": name,
            "parameters": one.trained,
            "seconds": float(np.median(one.seconds)),
            "time": ratio(one, baseline),
            "arithmetic": one.gigaflops and one.gigaflops / (baseline.gigaflops or 1),
            "temporary_MB": one.temporary_megabytes,
            "compile_seconds": one.compile_seconds,
        }
        for name, one in contenders.items()
    ]


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax")},
        "date": time.strftime("%Y-%m-%d"),
    }


def show(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print the rows of `results` as a Markdown table."""
    print(f"\n{title}\n")
    print("| method | parameters | seconds | time | arithmetic | temporary | compile |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = (
            row["method"],
            f"{row['parameters']:,}",
            f"{row['seconds']:.3f}",
            f"{row['time']:.2f}",
            _number(row["arithmetic"], ".2f"),
            _number(row["temporary_MB"], ",.0f", " MB"),
            f"{row['compile_seconds']:.0f} s",
        )
        print(f"| {' | '.join(cells)} |")


def _number(value: float | None, form: str, unit: str = "") -> str:
    """Formatted; nothing for what a contender does not tell."""
    return "" if value is None else format(value, form) + unit


def save(
    rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], path: Path
) -> None:
    """The rows as JSON, with machine and settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "settings": dict(settings), "results": list(rows)}
    path.write_text(json.dumps(report, indent=1) + "\n")


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Time relative to the baseline, one bar for each method."""
    plt = _pyplot()
    names, times = zip(*((row["method"], row["time"]) for row in rows), strict=True)
    colours = [
        "tab:gray"
        if k == 0
        else "tab:blue"
        if name.startswith("MoRA")
        else "tab:orange"
        for k, name in enumerate(names)
    ]
    size = 7, 0.9 + 0.3 * len(rows)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    bars = axis.barh(names, times, color=colours)
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.axvline(times[0], color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set(
        xlabel=f"seconds a step, relative to: {names[0]}", xlim=(0, max(times) * 1.1)
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_lines(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], path: Path
) -> None:
    """Time relative to the baseline against each column that varies, as panels.

    In each panel the other columns have their values of the first row.
    """
    plt = _pyplot()
    varying = [c for c in columns if len({row[c] for row in rows}) > 1]
    figure, axes = plt.subplots(
        1,
        len(varying),
        figsize=(5 * len(varying) + 1.5, 4),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axis, column in zip(axes[0], varying, strict=True):
        others = {c: rows[0][c] for c in columns if c != column}
        here = [row for row in rows if all(row[c] == v for c, v in others.items())]
        for k, name in enumerate(dict.fromkeys(row["method"] for row in here)):
            line = sorted((r[column], r["time"]) for r in here if r["method"] == name)
            style = "o-" if name.startswith("MoRA") else "s--"
            axis.plot(*zip(*line, strict=True), style, color=f"C{k % 10}", label=name)
        ticks = sorted({row[column] for row in here})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, map(str, ticks))
        fixed = ", ".join(f"{c} {v}" for c, v in others.items())
        axis.set(xlabel=column, title=fixed)
    axes[0, 0].set_ylabel(f"time relative to: {rows[0]['method']}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
