"""Names of PyTorch's modules, and the paths of their kernels here."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from mora_jax._types import Shape


class Pair(NamedTuple):
    """Two templates for a kernel, whose `{fields}` stand for the same texts.

    Attributes:
      module: The module's name in PyTorch, such as "model.layers.{layer}.mlp.{name}".
      kernel: The kernel's path here, such as "model/layers/{layer}/mlp/{name}/kernel".
        A stacked kernel has an index in its stack, as in "layers/{name}/kernel[{n}]".
      axes: The order of the axes of PyTorch's weight: "oi" as in `Linear`, "io" as in
        GPT-2's `Conv1D`.
    """

    module: str
    kernel: str
    axes: str = "oi"


def _same(template: str, axes: str = "oi") -> Pair:
    """A pair for transformers, which names its Flax models as its PyTorch models."""
    return Pair(template, template.replace(".", "/") + "/kernel", axes)


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
"""The models that are known, as transformers names them."""

LIBRARIES: dict[str, tuple[Pair, ...]] = {
    "tunix": (
        *(
            Pair(
                f"model.layers.{{layer}}.self_attn.{name}_proj",
                f"layers/{{layer}}/attn/{name}_proj/w",
            )
            for name in "qkvo"
        ),
        Pair("model.layers.{layer}.mlp.{name}", "layers/{layer}/mlp/{name}/kernel"),
        Pair(
            "model.layers.{layer}.mlp.experts.{expert}.{name}",
            "layers/{layer}/mlp/{name}[{expert}]",
        ),
        Pair("model.embed_tokens", "embedder/input_embedding", "io"),
        Pair("lm_head", "lm_head/w"),
    ),
}
"""Models of libraries that have names of their own for what transformers has, too."""

Names = str | Mapping[str, str] | None
"""A family, a library, {module: kernel} as templates, or None for all families."""


def pairs(names: Names) -> tuple[Pair, ...]:
    """The pairs that `names` stands for.

    Raises:
      TypeError: `names` is neither a text nor a mapping of texts to texts.
      ValueError: The family is unknown, or the two sides of a template have different
        fields.
    """
    if names is None:
        return tuple(pair for family in FAMILIES.values() for pair in family)
    if isinstance(names, str):
        known = FAMILIES | LIBRARIES
        if names not in known:
            raise ValueError(
                f"names must be one of {list(known)} or a mapping, got {names!r}"
            )
        return known[names]
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
    """`text` rewritten from `source` to `target`; None if `source` does not fit it."""
    parts = _FIELD.split(source)
    fixed, fields = parts[::2], parts[1::2]
    pattern = re.escape(fixed[0]) + "".join(
        rf"(?P<{field}>[^./\[\],]+){re.escape(after)}"
        for field, after in zip(fields, fixed[1:], strict=True)
    )
    match = re.fullmatch(pattern, text)
    return target.format(**match.groupdict()) if match else None


def to_kernel(module: str, known: tuple[Pair, ...]) -> tuple[str, str] | None:
    """The kernel of a module, and the axes of the module's weight."""
    for pair in known:
        if kernel := translate(module, pair.module, pair.kernel):
            return kernel, pair.axes
    return None


def to_module(kernel: str, known: tuple[Pair, ...]) -> tuple[str, str] | None:
    """The module of a kernel, and the axes of the module's weight."""
    for pair in known:
        if module := translate(kernel, pair.kernel, pair.module):
            return module, pair.axes
    return None


def join_index(path: str, index: Shape) -> str:
    """A kernel's path with an index in its stack: "layers/fc/kernel[3]"."""
    return f"{path}[{','.join(map(str, index))}]" if index else path


def split_index(kernel: str) -> tuple[str, Shape]:
    """Undo `join_index`."""
    path, bracket, index = kernel.partition("[")
    if not bracket:
        return path, ()
    numbers = index.removesuffix("]").split(",")
    if not all(number.isdecimal() and number.isascii() for number in numbers):
        raise ValueError(f"an index in a stack must be numbers, got {kernel!r}")
    return path, tuple(int(number) for number in numbers)
