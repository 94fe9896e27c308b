"""Options, progress and errors of the command line."""

import contextlib
import functools
import re
import shlex
from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from mora_jax.io import Checkpoint, Names
from mora_jax.io._files import as_path, holds
from mora_jax.io._json import parse, read_json
from mora_jax.io._names import bijection


def _rank_of(text: str | None) -> int | str | None:
    # Typer takes an option of two types for a text.
    if text is None or text == "auto":
        return text
    if not text.isdecimal() or not int(text):
        raise typer.BadParameter(f"{text!r} is neither a positive integer nor 'auto'.")
    return int(text)


def _names_of(text: str | None) -> Names:
    """The `names` of an option: a family, templates, or templates in a file."""
    names: Names = text
    if text is not None and text.lstrip().startswith("{"):
        names = parse(text.encode(), "--names")
    elif text is not None and text.endswith(".json"):
        names = read_json(as_path("--names", text))
    bijection(names)  # refuses them now, also for commands that come to need none
    return names


_BASE = "The base's safetensors: a file, a directory or a URL."
_WHY = "The reference's adapters need it, since they do not say how large kernels are."

Adapter = Annotated[str, typer.Argument(help="Directory of an adapter, or its URL.")]
Out = Annotated[str, typer.Argument(help="Directory to make, or its URL.")]
WholeBase = Annotated[str, typer.Argument(help=_BASE)]
Base = Annotated[str | None, typer.Option(metavar="PATH", help=f"{_BASE} {_WHY}")]
Rank = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBER|auto",
        callback=_rank_of,
        help="How many singular values a LoRA keeps; auto: as --max-error allows.",
    ),
]
MaxError = Annotated[
    float,
    typer.Option(
        min=0, max=1, help="The share of its delta a LoRA may lose; 1 accepts any loss."
    ),
]
Family = Annotated[
    str | None,
    typer.Option(
        "--names",
        callback=_names_of,
        help="Which PyTorch module is which kernel: llama, gemma, qwen, gpt2, bert, "
        'tunix, gm; or JSON, {"model.layers.{n}.mlp.{p}": "h_{n}/{p}/kernel"}, or a '
        "file of it whose name ends in .json. By default any family.",
    ),
]
Force = Annotated[bool, typer.Option(help="Replace an adapter or a checkpoint.")]
AnyBase = Annotated[bool, typer.Option(help="Merge into any weights of that shape.")]
Version = Annotated[bool, typer.Option("--version", help="Print the version.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")]
Target = Annotated[
    Literal["mora", "peft", "vllm", "sglang"],
    typer.Option("--for", help="This library, PEFT, or the server that loads it."),
]


def check_apart(out: str, adapter: str) -> None:
    """Raise if `out` is the adapter's directory, holds it or lies in it."""
    there, here = as_path("out", out), as_path("adapter", adapter)
    if holds(there, here) or holds(here, there):
        raise ValueError(
            f"out must not be the adapter's directory, hold it or lie in it, got {out}"
        )


def as_options(text: str) -> str:
    """A message of the library with arguments as the command line has them."""

    # `force=True` becomes `--force`, and `names={...}` becomes `--names '{...}'`.
    def option(match: re.Match[str]) -> str:
        name, value = match.groups()
        flag = "--" + name.replace("_", "-")
        return flag if value == "True" else f"{flag} {shlex.quote(value)}"

    arguments = r"\b(any_base|base|force|max_error|names|rank|rounding)"
    return re.sub(rf"{arguments}=(\{{.*\}}|[\w.]*\w)", option, text)


@contextlib.contextmanager
def progress(task: str, base: str | None) -> Iterator[Callable[[int], None]]:
    """Show a bar up to the base's size on a terminal, moved by what is yielded."""
    size = Checkpoint(as_path("base", base)).size if base else 0
    console = Console(stderr=True)
    hidden = not console.is_terminal  # a log would keep every state of the bar
    with Progress(console=console, transient=True, disable=hidden) as bar:
        yield functools.partial(bar.advance, bar.add_task(task, total=size))
