"""The commands of `mora-jax`."""

import importlib.metadata
import json
from typing import Annotated

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mora_jax import io
from mora_jax.cli._options import (
    Adapter,
    AnyBase,
    AsJson,
    Base,
    Family,
    Format,
    Mergeable,
    Rank,
    RoundingTo16Bits,
    Server,
    check_apart,
    names_of,
    rank_of,
)
from mora_jax.cli._output import err, refusing, say, say_table
from mora_jax.cli._reports import compare, describe, grouped, open_adapter
from mora_jax.io._formats import format_of, read_adapter
from mora_jax.io._locations import as_path
from mora_jax.io.native._save import replace_adapter

app = typer.Typer(
    name="mora-jax",
    help="Look at MoRA adapters, merge them into a base, convert and compare them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        say(f"mora-jax {importlib.metadata.version('mora-jax')}")
        raise typer.Exit()
    return wanted


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Look at MoRA adapters, merge them into a base, convert and compare them."""


@app.command()
@refusing
def inspect(
    adapter: Adapter,
    base: Base = None,
    names: Family = None,
    all_layers: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Show a row for each layer. By default layers that differ only in the "
            "numbers of their paths share a row.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show an adapter: its layers and sizes, the norms and ranks of its deltas."""
    report = describe(adapter, base, names_of(names))
    if as_json:
        typer.echo(json.dumps(report, indent=1))
        return
    layers, trained = report.pop("layers"), report.pop("trained")
    for key, value in report.items():
        say(f"{key.replace('_', ' ')}: {value}")
    rows = layers if all_layers else grouped(layers)
    say_table(rows)
    for one in trained:
        shape = " x ".join(map(str, one["shape"]))
        say(
            f"{one['path']} ({shape}) is trained itself: {one['parameters']} parameters"
        )
    if len(rows) < len(layers):
        say(
            "A row of several layers has the sum of their parameters, and the smallest "
            "and largest of their other numbers; --all shows each layer."
        )


@app.command()
@refusing
def merge(
    base: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            help="The base's safetensors: a file, a directory or a URL.",
        ),
    ],
    adapter: Annotated[
        str, typer.Option(metavar="DIR", help="Directory of an adapter, or its URL.")
    ],
    to: Annotated[
        str, typer.Option("--out", metavar="DIR", help="Directory to make, or its URL.")
    ],
    names: Family = None,
    force: Annotated[
        bool, typer.Option(help="Replace a checkpoint that is in OUT.")
    ] = False,
    any_base: AnyBase = False,
    rounding: Annotated[
        RoundingTo16Bits,
        typer.Option(help="How to round to 16 bits; dither keeps small deltas."),
    ] = RoundingTo16Bits.DITHER,
) -> None:
    """Merge an adapter into a base checkpoint, tensor by tensor, keeping its dtypes."""
    known = names_of(names)
    checkpoint = io.Checkpoint(as_path("base", base))
    adapters, plan = read_adapter(
        as_path("adapter", adapter), checkpoint.shapes(known), known
    )
    check_apart("out", to, adapter)
    with _progress() as bar:
        task = bar.add_task("merging", total=checkpoint.size)
        lost = io.merge_checkpoint(
            base,
            adapters,
            plan,
            to,
            known,
            force=force,
            any_base=any_base,
            rounding=rounding.value,
            progress=lambda size: bar.advance(task, size),
        )
    worst = max(lost, key=lost.__getitem__)
    also = f", {len(plan.trained)} trained arrays put in" if plan.trained else ""
    say(
        f"{to}: {len(lost)} kernels merged{also}. Rounding lost at most "
        f"{lost[worst]:.2%} of a delta in the mean, in {worst}."
    )


@app.command()
@refusing
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Directory of an adapter.")
    ],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Directory to make.")],
    to: Annotated[Format, typer.Option(help="The format to write.")],
    base: Base = None,
    names: Family = None,
    rank: Rank = None,
    max_error: Annotated[
        float,
        typer.Option(
            help="The largest share of its delta that a layer may lose in a LoRA; 1 "
            "accepts any loss.",
            min=0,
            max=1,
        ),
    ] = 0.1,
    force: Annotated[
        bool, typer.Option(help="Replace an adapter that is in TARGET.")
    ] = False,
) -> None:
    """Write an adapter in another format: mora_jax's, the reference's, or LoRA."""
    known = names_of(names)
    adapters, plan = open_adapter("source", source, base, known)
    path = as_path("target", target)
    if format_of(source) != to:
        check_apart("target", target, source)
    if path.exists() and not force:
        raise FileExistsError(
            f"target must not exist, got {target}; force=True replaces an adapter there"
        )
    if to is Format.MORA:
        kept = io.read_metadata(source) if format_of(source) == to else {}
        replace_adapter(path, adapters, plan, kept, force=force)
    elif to is Format.PEFT_MORA:
        io.save_peft_mora(path, adapters, plan, known, force=force)
    else:
        lost = io.save_peft_lora(
            path,
            adapters,
            plan,
            known,
            rank=rank_of(rank),
            max_error=max_error,
            force=force,
        )
        if any(lost.values()):
            say_table([{"module": m, "cut off": x} for m, x in lost.items()])
    say(f"{target}: {len(plan)} adapters as {to}")


@app.command()
@refusing
def export(
    adapter: Adapter,
    target: Annotated[str, typer.Argument(metavar="OUT", help="Directory to make.")],
    server: Annotated[
        Server, typer.Option("--for", help="The server that is to load it.")
    ],
    base: Mergeable = None,
    names: Family = None,
    base_model: Annotated[
        str, typer.Option(help="The base that the server loads; BASE if not given.")
    ] = "",
    max_error: Annotated[
        float,
        typer.Option(
            help="The largest share of its delta that a layer may lose in a LoRA.",
            min=0,
            max=1,
        ),
    ] = 0.1,
    force: Annotated[
        bool,
        typer.Option(
            help="Replace an adapter in OUT, or a checkpoint by a merged one."
        ),
    ] = False,
    any_base: AnyBase = False,
) -> None:
    """Write what a server loads: a LoRA, or the base with the adapter merged in."""
    known = names_of(names)
    adapters, plan = open_adapter("adapter", adapter, base, known)
    check_apart("out", target, adapter)
    size = io.Checkpoint(as_path("base", base)).size if base else 0
    with _progress() as bar:
        task = bar.add_task("writing", total=size)
        done = io.export(
            target,
            adapters,
            plan,
            server.value,
            known,
            base=base,
            base_model=base_model,
            max_error=max_error,
            force=force,
            any_base=any_base,
            progress=lambda size: bar.advance(task, size),
        )
    worst = max(done.lost, key=done.lost.__getitem__)
    if done.rank is None:
        say(f"{target}: the base with {len(plan)} adapters merged in")
        say(f"rounding lost at most {done.lost[worst]:.2%} of a delta, in {worst}")
    else:
        say(f"{target}: {len(plan)} adapters as a LoRA of rank {done.rank}")
        say(f"it lacks at most {done.lost[worst]:.2%} of a delta, in {worst}")
    say(done.command)


@app.command()
@refusing
def diff(
    first: Adapter,
    second: Adapter,
    base: Base = None,
    names: Family = None,
    as_json: AsJson = False,
) -> None:
    """Compare two adapters layer by layer: settings, and the norms of deltas."""
    rows = compare(first, second, base, names_of(names))
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        say_table(rows)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
