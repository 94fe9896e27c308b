"""The commands of `mora-jax`."""

import importlib.metadata
import json
from operator import itemgetter
from typing import Annotated, Any

import numpy as np
import typer

from mora_jax import io
from mora_jax._layer.rounding import Rounding
from mora_jax._tree.paths import Tree, adapters_in
from mora_jax._tree.plan import summary
from mora_jax.cli import _output as opt
from mora_jax.cli._output import as_options, progress
from mora_jax.diagnostics._measures import effective_rank, spectrum
from mora_jax.io._files import (
    CONFIG,
    TENSORS,
    AdapterFileError,
    PathLike,
    as_path,
    check_free,
)
from mora_jax.io._json import read_json

app = typer.Typer(
    name="mora-jax",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # `run` says what an error says
)


@app.callback(invoke_without_command=True)
def options(version: opt.Version = False) -> None:
    """Look at MoRA adapters, merge them into a base, and write them for others."""
    if version:  # also where no command follows
        typer.echo(f"mora-jax {importlib.metadata.version('mora-jax')}")
        raise typer.Exit()


def format_of(directory: PathLike) -> str:
    """The format of an adapter: "mora", "peft-mora" or "peft-lora"."""
    config = as_path("directory", directory) / CONFIG
    if not config.exists():
        return "mora"
    content = read_json(config)
    if isinstance(content, dict) and content.get("peft_type") == "LORA":
        return "peft-mora" if content.get("use_mora") else "peft-lora"
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


@app.command()
def inspect(
    adapter: opt.Adapter,
    base: opt.Base = None,
    names: opt.Family = None,
    all_layers: Annotated[bool, typer.Option("--all", help="Show each layer.")] = False,
    as_json: opt.AsJson = False,
) -> None:
    """Show an adapter: its layers and settings, the norms and ranks of its deltas."""
    adapters, kind = read_adapter(adapter, base, names), format_of(adapter)
    metadata = io.read_metadata(adapter) if kind == "mora" else {}
    layers, trained = describe(adapters)
    if as_json:
        report = {"format": kind, "metadata": metadata, "adapters": len(layers)}
        report["parameters"] = sum(row["parameters"] for row in (*layers, *trained))
        report |= {"layers": layers, "trained": trained}
        typer.echo(json.dumps(report, indent=1))
        return
    typer.echo(f"format: {kind}\nmetadata: {metadata}")
    typer.echo(summary(adapters, collapse=not all_layers))
    for key in ("norm", "effective_rank"):
        rows = sorted(layers, key=itemgetter(key))
        ends = (f"{row[key]:.4g} of {row['path']}" for row in (rows[0], rows[-1]))
        typer.echo(f"{key.replace('_', ' ')} of the deltas: {' to '.join(ends)}")


def describe(adapters: Tree) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row for each kernel's adapter, and one for each array that trains itself."""
    spectra, layers, trained = spectrum(adapters), [], []
    for path, found in adapters_in(adapters).items():
        name, spec = "/".join(path), found.spec
        row: dict[str, Any] = {"path": name, "parameters": spec.parameters}
        if (values := spectra.get(name)) is None:
            trained.append(row | {"shape": list(spec.shape)})
            continue
        row |= {"in": spec.in_features, "out": spec.out_features}
        row |= {"operator": spec.operator.name, "q": spec.operator.square_rank}
        row |= {"norm": float(np.linalg.norm(values))}
        row |= {"effective_rank": float(np.mean(effective_rank(values)))}
        layers.append(row)
    return layers, trained


@app.command()
def merge(
    base: opt.WholeBase,
    adapter: opt.Adapter,
    out: opt.Out,
    names: opt.Family = None,
    force: opt.Force = False,
    any_base: opt.AnyBase = False,
    rounding: Annotated[
        Rounding, typer.Option(help="Rounding to 16 bits; dither keeps small deltas.")
    ] = "dither",
) -> None:
    """Merge an adapter into a base checkpoint, tensor by tensor, keeping its dtypes."""
    adapters = read_adapter(adapter, base, names)
    opt.check_apart(out, adapter)
    settings: dict[str, Any] = {"force": force, "any_base": any_base}
    settings["rounding"], arrays = rounding, adapters_in(adapters).trained
    with progress("merging", base) as settings["progress"]:
        lost = io.merge_checkpoint(base, adapters, out, names, **settings)
    also = f", {len(arrays)} trained arrays put in" if arrays else ""
    said = f"{out}: {len(lost)} kernels merged{also}. Rounding lost in the mean"
    typer.echo(f"{said} {_most(lost)}.")


def _most(lost: dict[str, float]) -> str:
    worst = max(lost, key=lost.__getitem__)
    return f"at most {lost[worst]:.2%} of a delta, in {worst}"


@app.command()
def export(
    adapter: opt.Adapter,
    out: opt.Out,
    target: opt.Target,
    base: opt.Base = None,
    names: opt.Family = None,
    base_model: Annotated[str, typer.Option(help="The base that it loads.")] = "",
    rank: opt.Rank = None,
    max_error: opt.MaxError = 0.1,
    force: opt.Force = False,
    any_base: opt.AnyBase = False,
) -> None:
    """Write what a program loads: an adapter, or the base into which it is merged."""
    adapters = read_adapter(adapter, base, names)
    opt.check_apart(out, adapter)
    if rank is not None and target != "peft":
        raise ValueError(f"rank is of a LoRA for PEFT, and not --for {target}")
    told = f"{out}: {len(adapters_in(adapters).kernels)} adapters"
    kwargs: dict[str, Any] = {"base_model": base_model, "force": force}
    kwargs["max_error"] = max_error
    if target == "mora":
        check_free("out", out, [TENSORS], force)
        # Other formats have none.
        kept = io.read_metadata(adapter) if format_of(adapter) == "mora" else None
        io.save(out, adapters, kept)
    elif target == "peft":
        kwargs["rank"] = rank
        lost = io.save_peft_lora(out, adapters, names, **kwargs)
        told += f" as a LoRA\nit lacks {_most(lost)}"
    else:
        kwargs |= {"base": base, "any_base": any_base}
        with progress("writing", base) as kwargs["progress"]:
            done = io.export(out, adapters, target, names, **kwargs)
        form, lost = f"as a LoRA of rank {done.rank}", "it lacks"
        if done.rank is None:
            form, lost = "merged into the base", "rounding lost"
        told += f" {form}\n{lost} {_most(done.lost)}\n{done.command}"
    typer.echo(told)


def run() -> None:
    """Run a command. Its error is one line, and the exit code is 1."""
    try:
        app()
    except Exception as error:
        reason = " ".join(str(error).split())
        # Errors of these kinds are ours or the system's, and say what is wrong. Clients
        # of object stores have errors of their own, which may be a word.
        if not isinstance(error, ImportError | OSError | TypeError | ValueError):
            reason = f"{type(error).__name__}: {reason}"
        typer.secho(f"error: {as_options(reason)}", fg="red", err=True)
        raise SystemExit(1) from error
