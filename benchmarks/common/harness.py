"""Timing on a machine that others use as well: ratios, measured in turns.

Every contender is compiled first. Then all run one after another, round by round. Each
time is divided by the baseline's in the same round, and the median over rounds is
reported. This file also has what all benchmarks need to print and save their results.
"""

import argparse
import dataclasses
import json
import os
import platform
import random
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

Row = dict[str, Any]


@dataclasses.dataclass
class Contender:
    """A compiled program with its arguments.

    Attributes:
        run: The program.
        args: Its arguments.
        compile_seconds: The time for tracing and compiling it.
        trained: The number of parameters that it trains.
        seconds: The time of each round.
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
        """Compile `function` for `args`; `trained` is the tree that it trains."""
        start = time.perf_counter()
        run = jax.jit(function).lower(*args).compile()
        seconds = time.perf_counter() - start
        size = sum(leaf.size for leaf in jax.tree.leaves(trained))
        return cls(run, args, seconds, size)

    def __call__(self) -> Any:
        """Run once, and wait for the result."""
        return jax.block_until_ready(self.run(*self.args))

    @property
    def temporary_megabytes(self) -> float | None:
        """Memory besides arguments and results, as XLA plans it."""
        return self.run.memory_analysis().temp_size_in_bytes / 1e6

    @property
    def gigaflops(self) -> float | None:
        """Arithmetic, as XLA counts it."""
        cost = self.run.cost_analysis()
        cost = cost[0] if isinstance(cost, list) else cost
        return cost.get("flops", 0) / 1e9


def random_like(tree: Any, scale: float, dtype: str | None = None) -> Any:
    """Normal random numbers with the shapes of `tree`, in its dtypes by default."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jnp.asarray(
            scale * rng.standard_normal(s.shape, np.float32), dtype or s.dtype
        ),
        tree,
    )


def next_token_loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """The mean cross-entropy of the tokens `ids`: (batch, length) after the first."""
    loss = optax.softmax_cross_entropy_with_integer_labels
    return loss(logits[:, :-1], ids[:, 1:]).mean()


def check_close(value: jax.Array, expected: jax.Array) -> None:
    """Raise SystemExit unless both are equal up to the rounding of their dtype."""
    bound = 1e-4 if value.dtype.itemsize == 4 else 0.03
    value, expected = (jnp.asarray(a, jnp.float32) for a in (value, expected))
    error = float(jnp.abs(value - expected).max() / jnp.abs(expected).max())
    if not error < bound:
        raise SystemExit(f"adapted and merged differ by {error:.1e}, relatively")


def race(
    contenders: Mapping[str, Contender],
    rounds: int,
    *,
    warm: int = 0,
    show_progress: bool = True,
) -> None:
    """Run all in turns, after a first round that is not counted.

    Each round has another order, so that no contender always follows the same one.

    Args:
        contenders: The programs, by name.
        rounds: The number of times that each is timed.
        warm: The number of runs in its turn before it is timed. In training a step
            follows another one of its own kind. After a step of another kind it took
            up to a fifth longer, where it needs much memory.
        show_progress: Whether to show a bar.
    """
    order, shuffle = list(contenders.values()), random.Random(0).shuffle
    total = (rounds + 1) * len(contenders)
    with tqdm(total=total, desc="running", disable=not show_progress) as bar:
        for number in range(rounds + 1):
            shuffle(order)
            for contender in order:
                for _ in range(warm):
                    contender()
                start = time.perf_counter()
                contender()
                if number:
                    contender.seconds.append(time.perf_counter() - start)
                bar.update()


def ratio(contender: Contender, baseline: Contender) -> float:
    """The median over rounds of the time relative to the baseline's."""
    return float(np.median(np.divide(contender.seconds, baseline.seconds)))


def results(contenders: Mapping[str, Contender]) -> list[Row]:
    """A row for each contender; the first one is the baseline."""
    baseline = next(iter(contenders.values()))
    return [
        {
            "method": name,
            "parameters": contender.trained,
            "seconds": float(np.median(contender.seconds)),
            "time": ratio(contender, baseline),
            # What else runs on a machine only adds to a time.
            "fastest": min(contender.seconds) / min(baseline.seconds),
            "arithmetic": contender.gigaflops
            and contender.gigaflops / (baseline.gigaflops or 1),
            "temporary_MB": contender.temporary_megabytes,
            "compile_seconds": contender.compile_seconds,
        }
        for name, contender in contenders.items()
    ]


COLUMNS = {
    "method": "{method}",
    "parameters": "{parameters:,}",
    "seconds": "{seconds:.3f}",
    "time": "{time:.2f}",
    "fastest": "{fastest:.2f}",
    "arithmetic": "{arithmetic:.2f}",
    "temporary": "{temporary_MB:,.0f} MB",
    "compile": "{compile_seconds:.0f} s",
}
"""The columns for the rows of `results`."""


def show(columns: Mapping[str, str], rows: Sequence[Row], title: str = "") -> None:
    """Print a Markdown table, in which a value of None leaves a cell empty.

    Args:
        columns: The heading of each column, and the format of its cells.
        rows: The values by name.
        title: A line to print above the table.
    """

    def cell(form: str, row: Row) -> str:
        names = re.findall(r"{([^:[}]+)", form)
        return "" if any(row[name] is None for name in names) else form.format(**row)

    lines = [[cell(form, row) for form in columns.values()] for row in rows]
    print(f"\n{title}\n" if title else "")
    for cells in (columns, ["---"] * len(columns), *lines):
        print("".join(f"| {text} " if text else "| " for text in cells) + "|")


def method_name(operator: str) -> str:
    """The name of an operator's method in tables and plots."""
    return "LoRA, this library" if operator == "low_rank" else f"MoRA, {operator}"


def claim(text: str, holds: bool, figures: str) -> None:
    """Print a claim with the figures that it rests on; "not so" where it failed."""
    print(f"{text}: {'so it is' if holds else 'not so'} ({figures})")


def options(description: str | None, out: str) -> argparse.ArgumentParser:
    """A parser for the options of a benchmark, which has `--out` already."""
    first_line = str(description).partition("\n")[0]
    parser = argparse.ArgumentParser(description=first_line)
    parser.add_argument("--out", type=Path, default=Path(out), help="a JSON file")
    return parser


def save(
    rows: Sequence[Row],
    args: argparse.Namespace,
    leave_out: Collection[str] = (),
    **settings: Any,
) -> None:
    """Write rows, options and more `settings`, and the machine to `args.out`."""
    given = {k: v for k, v in vars(args).items() if k not in ("out", *leave_out)}
    machine = {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax")},
        "date": time.strftime("%Y-%m-%d"),
    }
    report = {"machine": machine, "settings": given | settings, "results": list(rows)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # Of a path its name is kept, since other machines have other folders.
    text = json.dumps(report, indent=1, default=lambda path: path.name)
    args.out.write_text(text + "\n")
    print(f"\nfigures in {args.out}")
    if given.get("quick"):
        print("this was a --quick run: smaller than the runs that the pages report")
