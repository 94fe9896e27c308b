"""Names of PyTorch modules beside paths of kernels."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from mora_jax._types import Shape


class Pair(NamedTuple):
    """Two ways to write one name, `{fields}` being equal in both.

    Attributes:
      module: PyTorch's, as "model.layers.{layer}.mlp.{name}".
      kernel: ours, as "model/layers/{layer}/mlp/{name}/kernel"; for a stacked kernel
        with the place in the stack, as "layers/{name}/kernel[{layer}]".
      layout: of PyTorch's weight: "oi" as in `Linear`, "io" as in GPT-2's `Conv1D`.
    """

    module: str
    kernel: str
    layout: str = "oi"


def _same(template: str, layout: str = "oi") -> Pair:
    """Of transformers, whose Flax models are named as their PyTorch models."""
    return Pair(template, template.replace(".", "/") + "/kernel", layout)


_DECODER = (
    _same("model.layers.{layer}.{block}.{name}"),
    _same("layers.{layer}.{block}.{name}"),
)
_BERT = (
    "layer.{layer}.attention.self.{name}",
    "layer.{layer}.attention.output.dense",
    "layer.{layer}.intermediate.dense",
    "layer.{layer}.output.dense",
)
FAMILIES: dict[str, tuple[Pair, ...]] = {
    "llama": _DECODER,
    "gemma": _DECODER,
    "qwen": _DECODER,
    "gpt2": (
        _same("transformer.h.{layer}.{block}.{name}", "io"),
        _same("h.{layer}.{block}.{name}", "io"),
    ),
    "bert": tuple(
        _same(f"{root}encoder.{rest}") for root in ("bert.", "") for rest in _BERT
    ),
}
"""Known models, as transformers names them."""

Names = str | Mapping[str, str] | None
"""A family, {module: kernel} in templates, or None for all families."""


def pairs(names: Names) -> tuple[Pair, ...]:
    """What `names` stands for.

    Raises:
      TypeError: neither a family nor a mapping of texts.
      ValueError: no such family, or templates whose fields differ.
    """
    if names is None:
        return tuple(pair for family in FAMILIES.values() for pair in family)
    if isinstance(names, str):
        if names not in FAMILIES:
            raise ValueError(
                f"names must be one of {list(FAMILIES)} or a mapping, got {names!r}"
            )
        return FAMILIES[names]
    texts = [*names, *names.values()] if isinstance(names, Mapping) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"names must be a family or map texts to texts, got {names!r}")
    found = tuple(Pair(module, kernel) for module, kernel in names.items())
    for pair in found:
        fields = [sorted(_FIELD.findall(text)) for text in (pair.module, pair.kernel)]
        if fields[0] != fields[1] or len(set(fields[0])) < len(fields[0]):
            raise ValueError(
                f"names must have the same {{fields}} on both sides, once each, "
                f"got {pair.module!r} and {pair.kernel!r}"
            )
    return found


_FIELD = re.compile(r"\{(\w+)\}")


def translate(text: str, source: str, target: str) -> str | None:
    """`text` as `target` writes it, if it is as `source` does."""
    parts = _FIELD.split(source)
    fixed, fields = parts[::2], parts[1::2]
    pattern = re.escape(fixed[0]) + "".join(
        rf"(?P<{field}>[^./\[\],]+){re.escape(text)}"
        for field, text in zip(fields, fixed[1:], strict=True)
    )
    match = re.fullmatch(pattern, text)
    return target.format(**match.groupdict()) if match else None


def to_kernel(module: str, known: tuple[Pair, ...]) -> tuple[str, str] | None:
    """The kernel of a module, and the layout of its weight."""
    for pair in known:
        if kernel := translate(module, pair.module, pair.kernel):
            return kernel, pair.layout
    return None


def to_module(kernel: str, known: tuple[Pair, ...]) -> tuple[str, str] | None:
    """The module of a kernel, and the layout of its weight."""
    for pair in known:
        if module := translate(kernel, pair.kernel, pair.module):
            return module, pair.layout
    return None


def join_index(path: str, index: Shape) -> str:
    """A kernel's path, with its place in a stack: "layers/fc/kernel[3]"."""
    return f"{path}[{','.join(map(str, index))}]" if index else path


def split_index(kernel: str) -> tuple[str, Shape]:
    """Undo `join_index`."""
    path, bracket, index = kernel.partition("[")
    if not bracket:
        return path, ()
    numbers = index.removesuffix("]").split(",")
    if not all(number.isdecimal() and number.isascii() for number in numbers):
        raise ValueError(f"a place in a stack must be numbers, got {kernel!r}")
    return path, tuple(int(number) for number in numbers)
