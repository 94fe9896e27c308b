"""Names of the modules of well-known models, in PyTorch and here."""

import re
from typing import NamedTuple


class Pair(NamedTuple):
    """A module in PyTorch and its kernel here.

    A family has templates of both, whose `{fields}` stand for the same texts.

    Attributes:
      module: The module's name in PyTorch, such as "model.layers.{layer}.mlp.{name}".
      kernel: The kernel's path here, such as "layers_{layer}/mlp/{name}/kernel". An
        index in a stack, as in "layers/{name}/kernel[{n}]", may also be one on a first
        axis that tells several modules apart.
      axes: The order of the axes of PyTorch's weight, "io" in GPT-2's `Conv1D`, and "o"
        of what is a vector.
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
        """True if the weight has the axes of its outputs elsewhere than the kernel."""
        return self.axes != self.kernel_axes

    def filled(self, fields: dict[str, str]) -> "Pair":
        module, kernel = (template.format(**fields) for template in self[:2])
        pair = self._replace(module=module, kernel=kernel)
        # Embeddings have the same axes everywhere, whatever a template says.
        return pair._replace(axes="io", kernel_axes="io") if pair.is_table else pair


_BERTS = "word_embeddings", "position_embeddings", "token_type_embeddings"
TABLES = {"embed_tokens", "embed_positions", "wte", "wpe", *_BERTS}
"""The last names of modules in PyTorch whose weights are embeddings."""


def _same(root: str, *names: str, axes: str = "oi") -> tuple[Pair, ...]:
    """Pairs for transformers, which has the same names in both libraries.

    Modules may have the root before their names or not.
    """
    pairs = []
    for module in (*(f"{root}.{name}" for name in names), *names):
        leaf = ".embedding" if module.rpartition(".")[2] in TABLES else ".kernel"
        kernel = (module + leaf).replace(".", "/")
        # Each kernel in Flax is the transpose of PyTorch's weight.
        pairs.append(Pair(module, kernel, axes, axes[::-1]))
    return tuple(pairs)


def _layers(root: str, table: str) -> tuple[Pair, ...]:
    """Pairs of a table: module, the axes of both if unusual, kernels.

    Kernels' paths begin with `root`, and modules' names always with the same.
    """
    pairs = []
    for module, *words in map(str.split, filter(None, table.splitlines())):
        axes = [word for word in words if not word.startswith("/")]
        name = f"model.layers.{{layer}}.{module}"
        pairs += [Pair(name, root + word, *axes) for word in words if word not in axes]
    return tuple(pairs)


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
FAMILIES: dict[str, tuple[Pair, ...]] = {
    "llama": _DECODER,
    "gemma": _DECODER,
    "qwen": _DECODER,
    "gpt2": _same("transformer", "h.{layer}.{block}.{name}", "wte", "wpe", axes="io"),
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
    "tunix": (
        *_layers("layers/{layer}", _TUNIX + _GEMMA),
        *_GEMMA_ENDS,
        Pair("model.norm", "final_norm/w"),
        Pair("lm_head", "lm_head/w"),
    ),
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
    name = re.sub(r"(?<=LayerNorm\.)gamma$", "weight", name)
    return re.sub(r"(?<=LayerNorm\.)beta$", "bias", name)
