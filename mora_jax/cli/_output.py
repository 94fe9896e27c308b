"""Tables, progress and errors of the command line."""

import contextlib
import functools
import inspect
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import typer
from rich import progress as bars
from rich.console import Console

P = ParamSpec("P")
T = TypeVar("T")


def refusing(command: Callable[P, T]) -> Callable[P, T]:
    """Wrap `command`, so that an error prints one line and exits with 1."""
    options = inspect.signature(command).parameters

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except Exception as error:
            reason = " ".join(str(error).split())
            if not isinstance(error, ImportError | OSError | TypeError | ValueError):
                reason = f"{type(error).__name__}: {reason}"
            typer.secho(f"error: {as_options(reason, options)}", fg="red", err=True)
            raise typer.Exit(1) from error

    return run


def as_options(text: str, options: Collection[str]) -> str:
    """A message of the library, rewritten for the command line.

    Arguments that are options of the command become options: `force=True` becomes
    `--force`, and `names={...}` becomes `--names '{...}'`.
    """

    def option(match: re.Match[str]) -> str:
        name, value = match.groups()
        if name not in options:
            return match[0]
        flag = "--" + name.replace("_", "-")
        return flag if value == "True" else f"{flag} {shlex.quote(value)}"

    return re.sub(r"\b([a-z_]+)=(\{.*\}|[\w.]*\w)", option, text)


def say_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows, a line each, under the names of their keys."""
    cells = [[name.replace("_", " ") for name in rows[0]]]
    cells += [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        typer.echo("  ".join(map(str.ljust, line, widths)).rstrip())


def _cell(value: object) -> str:
    if isinstance(value, tuple):
        return " to ".join(dict.fromkeys(map(_cell, value)))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def progress(task: str, size: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal; the result is called with the bytes that are done."""
    console, name = Console(stderr=True), bars.TextColumn("{task.description}")
    amounts = bars.BarColumn(), bars.DownloadColumn(), bars.TransferSpeedColumn()
    columns = name, *amounts, bars.TimeRemainingColumn()
    hidden = not console.is_terminal
    with bars.Progress(
        *columns, console=console, transient=True, disable=hidden
    ) as bar:
        yield functools.partial(bar.advance, bar.add_task(task, total=size))
