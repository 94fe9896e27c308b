"""The options that several commands have, and the values that they take."""

import re
from enum import StrEnum
from typing import Annotated, Literal

import typer

from mora_jax.io import Names
from mora_jax.io._json import parse, read_json
from mora_jax.io._locations import as_path, parts
from mora_jax.io._names import pairs


def _check_rank(text: str | None) -> str | None:
    if text not in (None, "auto") and not re.fullmatch("0*[1-9][0-9]*", text):
        raise typer.BadParameter(f"{text!r} is neither a positive integer nor 'auto'.")
    return text


Adapter = Annotated[
    str, typer.Argument(metavar="DIR", help="Directory of an adapter, or its URL.")
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="The base's safetensors: a file, a directory or a URL. The reference's "
        "adapters need it, since they do not say how large kernels are.",
    ),
]
Mergeable = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="The base's safetensors: a file, a directory or a URL. The adapter is "
        "merged into it where a LoRA will not do. The reference's adapters need it in "
        "any case.",
    ),
]
Rank = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBER|auto",
        callback=_check_rank,
        help="How many singular values a LoRA keeps of a delta; auto keeps the fewest "
        "that --max-error allows.",
    ),
]
Family = Annotated[
    str | None,
    typer.Option(
        "--names",
        help="Which PyTorch module is which kernel: llama, gemma, qwen, gpt2, bert, "
        "tunix, gm; templates as JSON, "
        '{"model.layers.{n}.mlp.{p}": "h_{n}/{p}/kernel"}, '
        "or a file of such JSON whose name ends in .json. By default any family.",
    ),
]
AnyBase = Annotated[
    bool,
    typer.Option(
        help="Merge also into other weights than those the adapter was trained on."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")]


class Format(StrEnum):
    """The formats that `convert` writes."""

    MORA = "mora"
    PEFT_MORA = "peft-mora"
    PEFT_LORA = "peft-lora"


class Server(StrEnum):
    """The servers that `export` writes for."""

    VLLM = "vllm"
    SGLANG = "sglang"


class RoundingTo16Bits(StrEnum):
    """How `merge` rounds."""

    DITHER = "dither"
    NEAREST = "nearest"


def names_of(text: str | None) -> Names:
    """The `names` of an option: a family, templates, or templates in a file."""
    names: Names = text
    if text is not None and text.lstrip().startswith("{"):
        names = parse(text.encode(), "--names")
    elif text is not None and text.endswith(".json"):
        names = read_json(as_path("--names", text))
    pairs(names)  # an error now, also for commands that come to need no names
    return names


def rank_of(text: str | None) -> int | Literal["auto"] | None:
    """The `rank` of an option."""
    if text is None or text == "auto":
        return text
    return int(text)


def check_apart(argument: str, target: str, adapter: str) -> None:
    """Raise if what is to be written would replace or mix with the adapter.

    Args:
      argument: What messages call the target.
      target: The directory to write.
      adapter: The directory of the adapter, which was read already.
    """
    there, here = parts(as_path(argument, target)), parts(as_path("adapter", adapter))
    shorter = min(len(there), len(here))
    if there[:shorter] == here[:shorter]:
        raise ValueError(
            f"{argument} must not be the adapter's directory, hold it or lie in it, "
            f"got {target}"
        )
