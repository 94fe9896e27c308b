"""What `mora-jax` can do, command by command."""

import functools
import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from mora_jax import io
from mora_jax.cli._reports import compare, describe
from mora_jax.io import Names
from mora_jax.io._json import read

app = typer.Typer(
    name="mora-jax",
    help="Look at MoRA adapters, merge them into a base, convert and compare them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)

P = ParamSpec("P")
T = TypeVar("T")

Adapter = Annotated[Path, typer.Argument(help="Directory of an adapter.")]
Base = Annotated[
    Path | None,
    typer.Option(
        help="The base's safetensors, a file or a directory. The reference's adapters "
        "need it, since they do not say how large kernels are."
    ),
]
Family = Annotated[
    str | None,
    typer.Option(
        "--names",
        help="Which PyTorch module is which kernel: llama, gemma, qwen, gpt2, bert, or "
        'a JSON file of templates, {"model.layers.{n}.mlp.{p}": "h_{n}/{p}/kernel"}. '
        "By default whatever family fits.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")]


class Format(StrEnum):
    """What `convert` writes."""

    MORA = "mora"
    PEFT_MORA = "peft-mora"
    PEFT_LORA = "peft-lora"


def refusing(command: Callable[P, T]) -> Callable[P, T]:
    """Exit with 1 and one line where input is refused."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except (ImportError, OSError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            err.print(f"error: {reason}", style="red", markup=False, soft_wrap=True)
            raise typer.Exit(1) from error

    return run


def names_of(text: str | None) -> Names:
    """A family, or the templates in a file."""
    if text is None or not text.endswith(".json"):
        return text
    return read(Path(text))


@app.command()
@refusing
def inspect(
    adapter: Adapter,
    base: Base = None,
    names: Family = None,
    as_json: AsJson = False,
) -> None:
    """Show what an adapter is: layers, sizes, norms and ranks of its updates."""
    report = describe(adapter, base, names_of(names))
    if as_json:
        typer.echo(json.dumps(report, indent=1))
        return
    layers = report.pop("layers")
    for key, value in report.items():
        out.print(f"{key.replace('_', ' ')}: {value}", markup=False, highlight=False)
    out.print(_table(layers))


@app.command()
@refusing
def merge(
    base: Annotated[
        Path, typer.Option(help="The base's safetensors, a file or a directory.")
    ],
    adapter: Annotated[Path, typer.Option(help="Directory of an adapter.")],
    to: Annotated[Path, typer.Option("--out", help="Directory to make.")],
    names: Family = None,
    force: Annotated[bool, typer.Option(help="Replace OUT if it is there.")] = False,
) -> None:
    """Merge an adapter into a base checkpoint, tensor by tensor, keeping its dtypes."""
    known = names_of(names)
    checkpoint = io.Checkpoint(base)
    adapters, plan = io.read_adapter(adapter, checkpoint.shapes(known), known)
    with _progress() as bar:
        task = bar.add_task("merging", total=checkpoint.size)
        lost = io.merge_checkpoint(
            base,
            adapters,
            plan,
            to,
            known,
            force=force,
            progress=lambda size: bar.advance(task, size),
        )
    worst = max(lost, key=lost.__getitem__)
    out.print(
        f"{to}: {len(lost)} kernels merged. Rounding lost {lost[worst]:.2%} of an "
        f"update at most, in {worst}.",
        markup=False,
        highlight=False,
    )


@app.command()
@refusing
def convert(
    source: Annotated[Path, typer.Argument(help="Directory of an adapter.")],
    target: Annotated[Path, typer.Argument(help="Directory to make.")],
    to: Annotated[Format, typer.Option(help="The format to write.")],
    base: Base = None,
    names: Family = None,
    rank: Annotated[
        int | None,
        typer.Option(help="How much of a full-rank update a LoRA keeps.", min=1),
    ] = None,
) -> None:
    """Write an adapter in another format: ours, the reference's, or as plain LoRA."""
    known = names_of(names)
    shapes = io.Checkpoint(base).shapes(known) if base else None
    adapters, plan = io.read_adapter(source, shapes, known)
    if target.exists():
        raise FileExistsError(f"target must not exist, got {target}")
    if to is Format.MORA:
        kept = io.read_metadata(source) if io.format_of(source) == to else {}
        io.save(target, adapters, plan, kept)
    elif to is Format.PEFT_MORA:
        io.save_peft_mora(target, adapters, plan, known)
    else:
        lost = io.save_peft_lora(target, adapters, plan, known, rank=rank)
        if any(lost.values()):
            out.print(_table([{"module": m, "cut off": x} for m, x in lost.items()]))
    out.print(f"{target}: {len(plan)} adapters as {to}", markup=False, highlight=False)


@app.command()
@refusing
def diff(
    first: Adapter,
    second: Adapter,
    base: Base = None,
    names: Family = None,
    as_json: AsJson = False,
) -> None:
    """Compare two adapters, layer by layer: settings, and updates by their norm."""
    rows = compare(first, second, base, names_of(names))
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        out.print(_table(rows))


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None)
    for key in rows[0]:  # names are broken into lines rather than cut off
        table.add_column(key.replace("_", " "), overflow="fold")
    for row in rows:
        cells = (
            f"{value:.4g}" if isinstance(value, float) else str(value)
            for value in row.values()
        )
        table.add_row(*cells)
    return table


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=err,
    )
