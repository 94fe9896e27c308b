"""The options that several commands have, and the values that they take."""

from typing import Annotated, Any, Literal

import typer

from mora_jax.io import Names
from mora_jax.io._json import parse, read_json
from mora_jax.io._locations import as_path, parts
from mora_jax.io._names import pairs


def _rank_of(text: str | None) -> int | str | None:
    """The `rank` of an option."""
    if text is None or text == "auto":
        return text
    if not text.isdecimal() or not int(text):
        raise typer.BadParameter(f"{text!r} is neither a positive integer nor 'auto'.")
    return int(text)


def _base(use: str = "") -> Any:
    """An option for the base, with a help text that ends in its `use`."""
    text = f"The base's safetensors: a file, a directory or a URL. {use}"
    return typer.Option(metavar="PATH", help=text.rstrip())


Adapter = Annotated[
    str, typer.Argument(metavar="DIR", help="Directory of an adapter, or its URL.")
]
Target = Annotated[str, typer.Argument(help="Directory to make, or its URL.")]
Base = Annotated[
    str | None,
    _base(
        "The reference's adapters need it, since they do not say how large kernels are."
    ),
]
Mergeable = Annotated[
    str | None,
    _base(
        "The adapter is merged into it where a LoRA will not do. The reference's "
        "adapters need it in any case."
    ),
]
WholeBase = Annotated[str, _base()]
Rank = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBER|auto",
        callback=_rank_of,
        help="How many singular values a LoRA keeps of a delta; auto keeps the fewest "
        "that --max-error allows.",
    ),
]
MaxError = Annotated[
    float,
    typer.Option(
        help="The largest share of its delta that a layer may lose in a LoRA; 1 "
        "accepts any loss.",
        min=0,
        max=1,
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
Force = Annotated[
    bool, typer.Option(help="Replace an adapter or a checkpoint that is there.")
]
AnyBase = Annotated[
    bool,
    typer.Option(
        help="Merge also into other weights than those the adapter was trained on."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")]
Format = Literal["mora", "peft-mora", "peft-lora"]
"""The formats that `convert` writes."""


def names_of(text: str | None) -> Names:
    """The `names` of an option: a family, templates, or templates in a file."""
    names: Names = text
    if text is not None and text.lstrip().startswith("{"):
        names = parse(text.encode(), "--names")
    elif text is not None and text.endswith(".json"):
        names = read_json(as_path("--names", text))
    pairs(names)  # an error now, also for commands that come to need no names
    return names


def check_apart(argument: str, target: str, adapter: str) -> None:
    """Raise if writing `target` would replace the adapter's directory or mix with it.

    Messages call the target by the name of its argument.
    """
    there, here = parts(as_path(argument, target)), parts(as_path("adapter", adapter))
    shorter = min(len(there), len(here))
    if there[:shorter] == here[:shorter]:
        raise ValueError(
            f"{argument} must not be the adapter's directory, hold it or lie in it, "
            f"got {target}"
        )
