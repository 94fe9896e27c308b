"""Adapters of any format that can be read."""

import os
from typing import Any

from mora_jax._plan.plan import Plan
from mora_jax._tree.adapters import Tree
from mora_jax.io._errors import AdapterFileError
from mora_jax.io._files import CONFIG, TENSORS
from mora_jax.io._json import read_json
from mora_jax.io._locations import as_path
from mora_jax.io._names import Names
from mora_jax.io.native._load import is_ours, load
from mora_jax.io.peft._read_mora import load_peft_mora


def format_of(directory: str | os.PathLike[str]) -> str:
    """Return the format of an adapter: "mora", "peft-mora" or "peft-lora"."""
    path = as_path("directory", directory)
    if (path / TENSORS).is_file() and is_ours(path, TENSORS):
        return "mora"
    config = read_json(path / CONFIG)
    if isinstance(config, dict) and config.get("peft_type") == "LORA":
        return "peft-mora" if config.get("use_mora") else "peft-lora"
    raise AdapterFileError(f"{CONFIG} in {directory} is of no adapter that we know")


def read_adapter(
    directory: str | os.PathLike[str], model: Any = None, names: Names = None
) -> tuple[Tree, Plan]:
    """Return (adapters, plan), in this library's format or the reference's.

    Only the reference's format needs `model` and `names`, as in `load_peft_mora`. A
    plain LoRA is an `AdapterFileError`.
    """
    kind = format_of(directory)
    if kind == "mora":
        return load(directory)
    if kind == "peft-lora":
        raise AdapterFileError(f"{directory} is a plain LoRA, which no M can stand for")
    if model is None:
        raise AdapterFileError(
            f"{directory} is the reference's, and does not say how large kernels are: "
            "the base is needed too"
        )
    return load_peft_mora(directory, model, names)
