"""The commands of `mora-jax`."""

import functools
import importlib.metadata
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from mora_jax import io
from mora_jax._layer.rounding import Rounding
from mora_jax._tree.paths import Tree, adapters_in
from mora_jax._tree.plan import summary
from mora_jax.io import _files, _json
from mora_jax.io._names import bijection

app = typer.Typer(
    name="mora-jax",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # `run` says what an error says
)


def _names_of(text: str | None) -> io.Names:
    """The `names` of an option: a family, templates, or templates in a file."""
    names: io.Names = text
    if text is not None and text.lstrip().startswith("{"):
        names = _json.parse(text.encode(), "--names")
    elif text is not None and text.endswith(".json"):
        names = _json.read_json(_files.as_path("--names", text))
    bijection(names)  # refuses them now, also for commands that come to need none
    return names


_BASE = "The base's safetensors: a file, a directory or a URL."
_WHY = "The reference's adapters need it, since they do not say how large kernels are."

Adapter = Annotated[str, typer.Argument(help="Directory of an adapter, or its URL.")]
Out = Annotated[str, typer.Argument(help="Directory to make, or its URL.")]
Base = Annotated[str | None, typer.Option(metavar="PATH", help=f"{_BASE} {_WHY}")]
Family = Annotated[
    str | None,
    typer.Option(
        "--names",
        callback=_names_of,
        help="Which PyTorch module is which kernel: llama, gemma, qwen, gpt2, gptj, "
        "gpt_neo, bloom, bert, tunix, gm; or JSON, "
        '{"model.layers.{n}.mlp.{p}": "h_{n}/{p}/kernel"}, or a file of it whose name '
        "ends in .json. By default any family.",
    ),
]
Version = Annotated[bool, typer.Option("--version", help="Print the version.")]
AnyBase = Annotated[bool, typer.Option(help="Merge into any weights of that shape.")]
Force = Annotated[bool, typer.Option(help="Replace an adapter or a checkpoint.")]


@app.callback(invoke_without_command=True)
def options(version: Version = False) -> None:
    """Look at MoRA adapters, merge them into a base, and write them for others."""
    if version:  # also where no command follows
        typer.echo(f"mora-jax {importlib.metadata.version('mora-jax')}")
        raise typer.Exit()


def read_adapter(
    directory: _files.PathLike, base: str | None = None, names: io.Names = None
) -> tuple[Tree, str, dict[str, Any]]:
    """Adapters of any format, with that and their metadata, which ours alone have.

    The format is "mora", "peft-mora" or "peft-lora". The second needs the `base`.
    """
    checkpoint = None if base is None else io.Checkpoint(_files.as_path("base", base))
    path = _files.as_path("adapter", directory)
    config = path / _files.CONFIG
    if not config.exists():
        return io.load(path), "mora", io.read_metadata(path)
    content = _json.read_json(config)
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        why = "is of no adapter that we know"
        raise io.AdapterFileError(f"{config.name} in {path} {why}")
    kind = "peft-mora" if content.get("use_mora") else "peft-lora"
    return io.load_peft(path, checkpoint and checkpoint.shapes(names), names), kind, {}


def check_apart(out: str, adapter: str) -> None:
    """Raise if `out` is the adapter's directory, holds it or lies in it."""
    there, here = _files.as_path("out", out), _files.as_path("adapter", adapter)
    if _files.holds(there, here) or _files.holds(here, there):
        rule = "out must not be the adapter's directory, hold it or lie in it"
        raise ValueError(f"{rule}, got {out}")


def _most(lost: dict[str, float]) -> str:
    worst = max(lost, key=lost.__getitem__)
    return f"at most {lost[worst]:.2%} of a delta, in {worst}"


@app.command()
def inspect(
    adapter: Adapter,
    base: Base = None,
    names: Family = None,
    all_layers: Annotated[bool, typer.Option("--all", help="Show each layer.")] = False,
) -> None:
    """Show an adapter: its format, its metadata, its layers and settings."""
    adapters, kind, metadata = read_adapter(adapter, base, names)
    typer.echo(f"format: {kind}\nmetadata: {metadata}")
    typer.echo(summary(adapters, collapse=not all_layers))


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help=_BASE)],
    adapter: Adapter,
    out: Out,
    names: Family = None,
    force: Force = False,
    any_base: AnyBase = False,
    rounding: Annotated[
        Rounding, typer.Option(help="Rounding to 16 bits; dither keeps small deltas.")
    ] = "dither",
) -> None:
    """Merge an adapter into a base checkpoint, tensor by tensor, keeping its dtypes."""
    adapters, *_ = read_adapter(adapter, base, names)
    check_apart(out, adapter)
    settings: Any = {"force": force, "any_base": any_base, "rounding": rounding}
    console = Console(stderr=True)
    hidden = not console.is_terminal  # a log would keep every state of the bar
    with Progress(console=console, transient=True, disable=hidden) as bar:
        files = io.Checkpoint(_files.as_path("base", base)).files
        task = bar.add_task("merging", total=sum(file.size for file in files))
        settings["progress"] = functools.partial(bar.advance, task)
        lost = io.merge_checkpoint(base, adapters, out, names, **settings)
    arrays = adapters_in(adapters).trained
    also = f", {len(arrays)} trained arrays put in" if arrays else ""
    said = f"{out}: {len(lost)} kernels merged{also}. Rounding lost in the mean"
    typer.echo(f"{said} {_most(lost)}.")


@app.command()
def export(
    adapter: Adapter,
    out: Out,
    program: Annotated[
        Literal["mora", "peft", "vllm", "sglang"],
        typer.Option("--for", help="This library, PEFT, or the server that loads it."),
    ],
    base: Base = None,
    names: Family = None,
    base_model: Annotated[
        str, typer.Option(help="The base, a directory or a name on the Hub.")
    ] = "",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Largest rank; else --max-error decides.")
    ] = None,
    max_error: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a delta to lose; 1 is any.")
    ] = 0.1,
    native: Annotated[
        bool, typer.Option(help="For vLLM with this library: M's as they are, no LoRA.")
    ] = False,
    force: Force = False,
) -> None:
    """Write an adapter as a LoRA for other programs, or in this library's format."""
    adapters, _, metadata = read_adapter(adapter, base, names)
    check_apart(out, adapter)
    told = f"{out}: {len(adapters_in(adapters).kernels)} adapters"
    if program == "mora":
        if rank is not None:
            raise ValueError("rank is of a LoRA, and not --for mora")
        _files.check_free("out", out, [_files.TENSORS], force)
        io.save(out, adapters, metadata)
    else:
        settings: Any = {"rank": rank, "max_error": max_error}
        settings |= {"base_model": base_model, "native": native, "force": force}
        done = io.export(out, adapters, program, names, **settings)
        kind = "they are" if native else f"a LoRA of rank {done.rank}"
        told += f" as {kind}\nit lacks {_most(done.lost)}\n{done.command}"
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
        typer.secho(f"error: {reason}", fg="red", err=True)
        raise SystemExit(1) from error
