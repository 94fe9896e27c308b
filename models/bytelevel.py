"""A small random Llama whose tokens are bytes: for tests and for load.

It needs no file, and it talks in SmolLM2's chat format.
"""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from models.smollm2 import EOS, Config, Llama, Params

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""The first tokens, in the order of their ids; the bytes come after them."""
assert SPECIAL.index("<|im_end|>") == EOS

CONFIG = Config(
    vocab=len(SPECIAL) + 256, layers=2, width=64, hidden=128, heads=4, kv_heads=2
)

_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")


class ByteTokenizer:
    """Text as the bytes of its UTF-8, with SmolLM2's special tokens."""

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, in which a special token counts as one token."""
        ids: list[int] = []
        for part in _SPECIAL.split(text):
            if part in SPECIAL:
                ids.append(SPECIAL.index(part))
            else:
                ids += [len(SPECIAL) + byte for byte in part.encode()]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that UTF-8 lacks are shown as U+FFFD."""
        first = len(SPECIAL)
        pieces = (SPECIAL[i].encode() if i < first else bytes([i - first]) for i in ids)
        return b"".join(pieces).decode(errors="replace")


def load(seed: int = 0) -> tuple[Llama, Params, ByteTokenizer]:
    """The model with random weights, and its tokenizer."""
    model = Llama(CONFIG)
    ids = jnp.zeros((1, 1), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(seed), ids)["params"]
    return model, params, ByteTokenizer()
