"""What the models that we know call their modules, in PyTorch and here."""

import re
from typing import NamedTuple


class Pair(NamedTuple):
    """Two templates for a kernel, whose `{fields}` stand for the same texts.

    Attributes:
      module: The module's name in PyTorch, such as "model.layers.{layer}.mlp.{name}".
      kernel: The kernel's path here, such as "model/layers/{layer}/mlp/{name}/kernel".
        A stacked kernel has an index in its stack, as in "layers/{name}/kernel[{n}]",
        and so has one whose first axis tells several modules apart.
      axes: The order of the axes of PyTorch's weight: "oi" as in `Linear`, "io" as in
        GPT-2's `Conv1D`.
      kernel_axes: The order of the kernel's axes: "io" as in `nn.Dense`, "oi" as in
        GPT-2's `FlaxConv1D`, "oio" as in Gemma's (heads, in, width). A plan knows that
        by itself.
    """

    module: str
    kernel: str
    axes: str = "oi"
    kernel_axes: str = "io"


def _same(template: str, axes: str = "oi") -> Pair:
    """A pair for transformers, which names its Flax models as its PyTorch models.

    It also keeps each kernel in Flax as the transpose of PyTorch's weight.
    """
    return Pair(template, template.replace(".", "/") + "/kernel", axes, axes[::-1])


def _table(template: str) -> Pair:
    """A pair for an embedding, which has the same axes everywhere."""
    return Pair(template, template.replace(".", "/") + "/embedding", "io")


def _gemma(layer: str) -> tuple[Pair, ...]:
    """Gemma's layers as Google writes them, with several modules in one kernel."""
    kernels = {
        "q": ("q_einsum/w", "qkv_einsum/w[0]"),
        "k": ("kv_einsum/w[0]", "qkv_einsum/w[1]"),
        "v": ("kv_einsum/w[1]", "qkv_einsum/w[2]"),
        "o": ("attn_vec_einsum/w",),
    }
    norms = {
        "input_layernorm": ("pre_attention_norm",),
        "pre_feedforward_layernorm": ("pre_ffw_norm",),
        "post_attention_layernorm": (
            "post_attention_norm",
            "post_attn_norm",
            "pre_ffw_norm",  # of Gemma 1, which has fewer norms
        ),
        "post_feedforward_layernorm": ("post_ffw_norm",),
        "self_attn.q_norm": ("attn/_query_norm", "attn/query_norm"),
        "self_attn.k_norm": ("attn/_key_norm", "attn/key_norm"),
    }
    return (
        *(
            Pair(
                f"model.layers.{{layer}}.self_attn.{letter}_proj",
                f"{layer}/attn/{kernel}",
                kernel_axes="io" if letter == "o" else "oio",
            )
            for letter, found in kernels.items()
            for kernel in found
        ),
        *(
            Pair(f"model.layers.{{layer}}.{name}", f"{layer}/{norm}/scale")
            for name, found in norms.items()
            for norm in found
        ),
        Pair("model.norm", "final_norm/scale"),
        Pair("model.embed_tokens", "embedder/input_embedding", "io"),
    )


_DECODER = (
    _same("model.layers.{layer}.{block}.{name}"),
    _same("layers.{layer}.{block}.{name}"),
    _table("model.embed_tokens"),
    _table("embed_tokens"),
)
_BERT = (
    "layer.{layer}.attention.self.{name}",
    "layer.{layer}.attention.output.dense",
    "layer.{layer}.intermediate.dense",
    "layer.{layer}.output.dense",
)
_BERT_ROOTS, _GPT2_ROOTS = ("bert.", ""), ("transformer.", "")
FAMILIES: dict[str, tuple[Pair, ...]] = {
    "llama": _DECODER,
    "gemma": _DECODER,
    "qwen": _DECODER,
    "gpt2": (
        _same("transformer.h.{layer}.{block}.{name}", "io"),
        _same("h.{layer}.{block}.{name}", "io"),
        *(_table(f"{root}{name}") for root in _GPT2_ROOTS for name in ("wte", "wpe")),
    ),
    "bert": (
        *(_same(f"{root}encoder.{rest}") for root in _BERT_ROOTS for rest in _BERT),
        *(
            _table(f"{root}embeddings.{kind}_embeddings")
            for root in _BERT_ROOTS
            for kind in ("word", "position", "token_type")
        ),
    ),
}
"""The models that are known, as transformers names them."""

LIBRARIES: dict[str, tuple[Pair, ...]] = {
    "gm": (
        *_gemma("layer_{layer}"),
        *(
            Pair(
                f"model.layers.{{layer}}.mlp.{name}_proj",
                f"layer_{{layer}}/mlp/gating_einsum[{number}]",
                kernel_axes="oi",
            )
            for number, name in enumerate(("gate", "up"))
        ),
        Pair("model.layers.{layer}.mlp.down_proj", "layer_{layer}/mlp/linear"),
    ),
    "tunix": (
        *(
            Pair(
                f"model.layers.{{layer}}.self_attn.{name}_proj",
                f"layers/{{layer}}/attn/{name}_proj/w",
            )
            for name in "qkvo"
        ),
        *(
            Pair(
                f"model.layers.{{layer}}.self_attn.{name}_proj.bias",
                f"layers/{{layer}}/attn/{name}_bias",
            )
            for name in "qkv"
        ),
        Pair(
            "model.layers.{layer}.self_attn.{name}_norm",
            "layers/{layer}/attn/{name}_norm/w",
        ),
        *_gemma("layers/{layer}"),
        Pair("model.layers.{layer}.{norm}", "layers/{layer}/{norm}/w"),
        Pair("model.norm", "final_norm/w"),
        Pair("model.layers.{layer}.mlp.gate", "layers/{layer}/mlp/router/kernel"),
        Pair("model.layers.{layer}.mlp.{name}", "layers/{layer}/mlp/{name}/kernel"),
        Pair(
            "model.layers.{layer}.mlp.experts.{expert}.{name}",
            "layers/{layer}/mlp/{name}[{expert}]",
        ),
        Pair("lm_head", "lm_head/w"),
    ),
}
"""Models of libraries that have names of their own for what transformers has, too."""

TABLES = {"embed_tokens", "embed_positions", "wte", "wpe", "word_embeddings"}
TABLES |= {"position_embeddings", "token_type_embeddings"}
"""The last names of modules in PyTorch whose weights are embeddings."""

TIED = (
    ("embed_tokens.weight", "lm_head.weight"),
    ("wte.weight", "lm_head.weight"),
    ("embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ("cls.predictions.bias", "cls.predictions.decoder.bias"),
)
"""Tensors by their canonical names, of which files often have but one."""

BUFFERS = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|h\.\d+\.attn\.(masked_)?bias"
    r"|embeddings\.(position|token_type)_ids)"
)
"""Tensors that PyTorch stores though they can be computed."""
