"""The options that several commands have, and the values that they take."""

from enum import StrEnum
from typing import Annotated

import typer

from mora_jax.io import Names
from mora_jax.io._json import parse, read
from mora_jax.io._paths import as_path

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
    if text is not None and text.lstrip().startswith("{"):
        return parse(text.encode(), "--names")
    if text is None or not text.endswith(".json"):
        return text
    return read(as_path("--names", text))
