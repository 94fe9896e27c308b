"""Timing that a noisy machine does not fool: ratios, taken in turns.

Every contender is compiled first. Then they run one after another, round by round, and
each is divided by the baseline of its own round; the median over rounds is reported.
"""

import dataclasses
import json
import os
import platform
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
    def temporary_megabytes(self) -> float:
        """Memory beside arguments and results, as XLA plans it."""
        return self.run.memory_analysis().temp_size_in_bytes / 1e6

    @property
    def gigaflops(self) -> float:
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
    """Run all in turns, after one round that is not counted."""
    total = (rounds + 1) * len(contenders)
    with tqdm(total=total, desc="running", disable=not show_progress) as bar:
        for number in range(rounds + 1):
            for contender in contenders.values():
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
            "arithmetic": one.gigaflops / baseline.gigaflops,
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


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of `results` as a Markdown table."""
    print("| method | parameters | s/step | time | arithmetic | temporary | compile |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            "| {method} | {parameters:,} | {seconds:.3f} | {time:.2f} | "
            "{arithmetic:.2f} | {temporary_MB:,.0f} MB | {compile_seconds:.0f} s |"
            "".format(**row)
        )


def save(
    rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], path: Path
) -> None:
    """The rows as JSON, with machine and settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "settings": dict(settings), "results": list(rows)}
    path.write_text(json.dumps(report, indent=1) + "\n")


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Time relative to the baseline, one bar for each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
