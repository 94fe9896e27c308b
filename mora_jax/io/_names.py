"""Names of PyTorch's modules and tensors, and the kernels that they are here."""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from mora_jax._common.messages import did_you_mean
from mora_jax._common.types import Shape

FIELD = r"\{(\w+)\}"

Names = str | Mapping[str, str] | None
"""A family, a library, {module: kernel} as templates, or None for all families."""

Check = Callable[[str], object]  # of a tensor's name: true if it is there


class Pair(NamedTuple):
    """A module in PyTorch and its kernel here.

    A family has templates of both, whose `{fields}` stand for the same texts.

    Attributes:
      module: The module's name in PyTorch, such as "model.layers.{layer}.mlp.{name}".
      kernel: The kernel's path here, such as "layers_{layer}/mlp/{name}/kernel". An
        index in a stack, as in "layers/{name}/kernel[{n}]", may also be one on a first
        axis that tells several modules apart.
      axes: The order of PyTorch's weight, "io" in GPT-2's `Conv1D`, "o" of a vector.
      kernel_axes: The order of the kernel's axes. If it is "io" or "oi", each letter
        may stand for several axes; Gemma's "oio" is (heads, in, width).
    """

    module: str
    kernel: str
    axes: str = "oi"
    kernel_axes: str = "io"

    @property
    def tensor(self) -> str:
        """The tensor that is the kernel: the module's weight, unless it names one."""
        named = self.module.endswith((".weight", ".bias"))
        return self.module if named else f"{self.module}.weight"

    @property
    def is_table(self) -> bool:
        """True if the module looks up rows of its weight."""
        path, _, _ = self.kernel.partition("[")
        return self.module.rpartition(".")[2] in TABLES or path.endswith("embedding")

    @property
    def transposed(self) -> bool:
        return self.axes != self.kernel_axes  # the weight's outputs are elsewhere


class Bijection:
    """PyTorch's modules and kernels here, each found by the other's name.

    A template has the same fields on both sides, so that either name gives the other.
    A name that fits several templates has a pair for each, in their order.
    """

    def __init__(self, templates: Iterable[Pair]) -> None:
        pairs = [each for pair in dict.fromkeys(templates) for each in _with_bias(pair)]
        self._modules = [(_pattern(pair.module), pair) for pair in pairs]
        self._kernels = [(_pattern(pair.kernel), pair) for pair in pairs]

    def of_module(self, name: str) -> Iterator[Pair]:
        return _fitting(name, self._modules)

    def of_kernel(self, path: str) -> Iterator[Pair]:
        """The pairs of a kernel here, a path with the index in its stack if any."""
        return _fitting(path, self._kernels)

    def of_leaf(self, path: str) -> Iterator[Pair]:
        """The pairs of any array, as a port without a template has it."""
        # Its path is its tensor's name: "encoder/layer/0/q/kernel" is that layer's q.
        yield from self.of_kernel(path)
        parent, _, last = path.rpartition("/")
        if parent and last in _LEAVES:
            module = parent.replace("/", ".") + ".bias" * (last == "bias")
            yield Pair(module, path, *_LEAVES[last])

    def layers(
        self, path: str, shape: Shape, axes: str = "", there: Check | None = None
    ) -> dict[Shape, Pair | None]:
        """{index in an array's stack: its pair whose tensor is there}, or None.

        A kernel with `axes`, its stack's first, has them in its pairs. Of several
        outputs the first may be one of the index's. Without `there` templates count.
        """
        pairs_of, there = self.of_leaf if there else self.of_kernel, there or bool
        first, inner = axes.count("s"), axes.lstrip("s")
        several = inner[:1] == "o" and inner.count("o") > 1
        depths = range(first, first + 1 + several) if axes else range(len(shape) + 1)

        def find(index: Shape, there: Check = there) -> Pair | None:
            pairs = pairs_of(join_index(path, index))
            pair = next((pair for pair in pairs if there(pair.tensor)), None)
            if pair is None or not axes:
                return pair
            # Tables are as they are here, but with one axis where a kernel has heads.
            own = axes[len(index) :]
            order = re.sub(r"(.)\1+", r"\1", own) if pair.is_table else pair.axes
            return pair._replace(axes=order, kernel_axes=own)

        # No more is known of a stack's depth than that the first layer has a pair; or
        # would have one, so that it is what messages call missing.
        tried = [(k, check) for check in (there, bool) for k in depths]
        depth = next((k for k, check in tried if find((0,) * k, check)), depths[0])
        return {index: find(index) for index in np.ndindex(shape[:depth])}


def stack_first(shape: Shape, axes: str) -> tuple[Shape, str]:
    """A kernel's shape and axes, its stack's axes before the others."""
    order = sorted(range(len(axes)), key=lambda k: axes[k] != "s")
    return tuple(shape[k] for k in order), "".join(axes[k] for k in order)


KERNELS = {"kernel": ("oi", "io"), "embedding": ("io", "io")}
_LEAVES = KERNELS | dict.fromkeys(("scale", "weight", "bias"), ("o", "o"))
"""{Flax's name of a leaf: the axes of its tensor in PyTorch, and those here}."""


def _with_bias(pair: Pair) -> Iterator[Pair]:
    """Templates of a kernel and, if its last name is fixed, of the bias beside it."""
    yield pair
    bias, fixed = re.subn(r"(^|/)[^/\[{]+(\[.*)?$", r"\1bias\2", pair.kernel)
    if fixed:
        yield Pair(f"{pair.module}.bias", bias, "o", "o")


def _pattern(template: str) -> re.Pattern[str]:
    """A regular expression for texts that a template becomes, with its fields."""
    parts = re.split(FIELD, template)
    if not all(map(str.isidentifier, parts[1::2])) or set("{}") & set("".join(parts)):
        rule = "names must have braces around the names of fields alone, as in {n}"
        raise ValueError(f"{rule}, got {template!r}")
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = [rf"(?P<{field}>[^./\[\],]+)" for field in parts[1::2]]
    return re.compile("".join(parts))


def _fitting(text: str, known: list[tuple[re.Pattern[str], Pair]]) -> Iterator[Pair]:
    for pattern, pair in known:
        if match := pattern.fullmatch(text):
            module, kernel = (text.format(**match.groupdict()) for text in pair[:2])
            pair = pair._replace(module=module, kernel=kernel)
            # Embeddings have the same axes everywhere, whatever a template says.
            yield pair._replace(axes="io", kernel_axes="io") if pair.is_table else pair


def bijection(names: Names) -> Bijection:
    """Modules and kernels by the pairs that `names` stands for, if well-formed."""
    if names is None or isinstance(names, str):
        return _known(names)
    texts = [*names, *names.values()] if isinstance(names, Mapping) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"names must be a family or map texts to texts, got {names!r}")
    for module, kernel in names.items():
        fields, others = (sorted(re.findall(FIELD, t)) for t in (module, kernel))
        if fields != others or len(set(fields)) < len(fields):
            rule = "names must have the same {fields} on both sides, once each"
            raise ValueError(f"{rule}, got {module!r} and {kernel!r}")
    return Bijection(Pair(*pair) for pair in names.items())


@functools.cache
def _known(names: str | None) -> Bijection:
    if names is None:
        return Bijection(itertools.chain(*FAMILIES.values()))
    known = FAMILIES | LIBRARIES
    family = names if names in known else names.rstrip("0123456789")  # qwen3
    if family not in known:
        rule = f"names must be one of {list(known)} or a mapping"
        raise ValueError(f"{rule}, got {names!r}{did_you_mean(names, known)}")
    return Bijection(known[family])


def join_index(path: str, index: Shape) -> str:
    """A kernel's path with an index in its stack, as "layers/fc/kernel[3]"."""
    return f"{path}[{','.join(map(str, index))}]" if index else path


def split_index(kernel: str) -> tuple[str, Shape]:
    path, bracket, index = kernel.partition("[")
    numbers = index.removesuffix("]").split(",") if bracket else []
    if not all(number.isdecimal() and number.isascii() for number in numbers):
        raise ValueError(f"an index in a stack must be numbers, got {kernel!r}")
    return path, tuple(map(int, numbers))


def templates(kernels: Iterable[str]) -> str:
    """The remedy where names lack kernels, as the end of a message."""
    found: dict[str, str] = {}
    for path in kernels:
        # A number by itself is one of several layers, and "fc1" none of many.
        first, *rest = re.split(r"(?<![^/_\[,])\d+(?![^/_\],])", path)
        fields = (f"{{n{k or ''}}}{text}" for k, text in enumerate(rest))
        kernel = first + "".join(fields)
        words, _, index = kernel.partition("[")
        parts = re.sub(r"_(?=\{)", "/", words).split("/")
        parts[1:1] = index.removesuffix("]").split(",") if index else []
        found[".".join(parts[:-1] or parts)] = kernel
    return f"templates name them, as in names={found}, with PyTorch's names on the left"


_BERTS = "word_embeddings", "position_embeddings", "token_type_embeddings"
TABLES = {"shared", "embed_tokens", "embed_positions", "wte", "wpe", *_BERTS}
"""The last names of modules in PyTorch whose weights are embeddings."""


def _same(root: str, *names: str, axes: str = "oi") -> tuple[Pair, ...]:
    """Pairs of names that both libraries have, with the root before them or not."""
    pairs = []
    for module in (*(f"{root}.{name}" for name in names), *names):
        leaf = ".embedding" if module.rpartition(".")[2] in TABLES else ".kernel"
        # Each kernel in Flax is the transpose of PyTorch's weight.
        pairs.append(Pair(module, (module + leaf).replace(".", "/"), axes, axes[::-1]))
    return tuple(pairs)


def _layers(root: str, table: str) -> Iterator[Pair]:
    """Pairs of a table: module, the axes of both if unusual, kernels after `root`."""
    for module, *words in map(str.split, filter(None, table.splitlines())):
        axes = [word for word in words if not word.startswith("/")]
        for kernel in words[len(axes) :]:
            yield Pair(f"model.layers.{{layer}}.{module}", root + kernel, *axes)


# Gemma 1 has fewer norms: its pre_ffw_norm comes after attention in PyTorch.
_GEMMA = """
self_attn.q_proj  oi oio    /attn/q_einsum/w  /attn/qkv_einsum/w[0]
self_attn.k_proj  oi oio    /attn/kv_einsum/w[0]  /attn/qkv_einsum/w[1]
self_attn.v_proj  oi oio    /attn/kv_einsum/w[1]  /attn/qkv_einsum/w[2]
self_attn.o_proj            /attn/attn_vec_einsum/w
input_layernorm             /pre_attention_norm/scale
pre_feedforward_layernorm   /pre_ffw_norm/scale
post_attention_layernorm    /post_attention_norm/scale  /post_attn_norm/scale
post_attention_layernorm    /pre_ffw_norm/scale
post_feedforward_layernorm  /post_ffw_norm/scale
self_attn.q_norm            /attn/_query_norm/scale  /attn/query_norm/scale
self_attn.k_norm            /attn/_key_norm/scale  /attn/key_norm/scale
"""
_GEMMA_ENDS = (
    Pair("model.norm", "final_norm/scale"),
    Pair("model.embed_tokens", "embedder/input_embedding", "io"),
)
_TUNIX_ENDS = Pair("model.norm", "final_norm/w"), Pair("lm_head", "lm_head/w")
_GM = """
mlp.gate_proj  oi oi  /mlp/gating_einsum[0]
mlp.up_proj    oi oi  /mlp/gating_einsum[1]
mlp.down_proj         /mlp/linear
"""
_TUNIX = """
self_attn.{name}_proj        /attn/{name}_proj/w
self_attn.{name}_proj.bias   /attn/{name}_bias
self_attn.{name}_norm        /attn/{name}_norm/w
{norm}                       /{norm}/w
mlp.gate                     /mlp/router/kernel
mlp.{name}                   /mlp/{name}/kernel
mlp.experts.{expert}.{name}  /mlp/{name}[{expert}]
"""

_DECODER = _same("model", "layers.{layer}.{block}.{name}", "embed_tokens")
_CONV1D = "h.{layer}.{block}.c_{name}", "h.{layer}.crossattention.q_attn"
_LINEAR = "h.{layer}.{block}.{name}", "h.{layer}.attn.attention.{name}"
_GPT = _same("transformer", *_LINEAR, "wte", "wpe", "word_embeddings")
FAMILIES: dict[str, tuple[Pair, ...]] = {
    **dict.fromkeys(("llama", "gemma", "qwen"), _DECODER),
    "gpt2": _same("transformer", *_CONV1D, "wte", "wpe", axes="io"),
    **dict.fromkeys(("gptj", "gpt_neo", "bloom"), _GPT),
    "bert": _same(
        "bert",
        "encoder.layer.{layer}.attention.self.{name}",
        "encoder.layer.{layer}.attention.output.dense",
        "encoder.layer.{layer}.{block}.dense",
        *(f"embeddings.{name}" for name in _BERTS),
    ),
}
"""The models that are known, as transformers names them."""

LIBRARIES: dict[str, tuple[Pair, ...]] = {
    "gm": (*_layers("layer_{layer}", _GEMMA + _GM), *_GEMMA_ENDS),
    "tunix": (*_layers("layers/{layer}", _TUNIX + _GEMMA), *_GEMMA_ENDS, *_TUNIX_ENDS),
}
"""Models of libraries that have names of their own for transformers' modules."""

TIED = (
    ("embed_tokens.weight", "lm_head.weight"),
    ("wte.weight", "lm_head.weight"),
    ("embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ("cls.predictions.bias", "cls.predictions.decoder.bias"),
)
"""Tensors by their canonical names; files often have but one of two."""

BUFFERS = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|h\.\d+\.attn\.(masked_)?bias"
    r"|embeddings\.(position|token_type)_ids)"
)
"""Tensors that PyTorch stores though they can be computed."""


def canonical(tensor: str) -> str:
    """The part of a tensor's name that is the same in all files of a model."""
    # A GPT-2 was saved as "transformer.wte.weight" or as "wte.weight", and BERT's norms
    # had gammas and betas once.
    roots = r"^((base_model|model|transformer|bert|language_model)\.)+"
    name = re.sub(roots, "", tensor)
    name = name.replace(".base_layer.bias", ".bias")  # PEFT has it inside its layer
    name = re.sub(r"(?<=LayerNorm\.)gamma$", "weight", name)
    return re.sub(r"(?<=LayerNorm\.)beta$", "bias", name)
