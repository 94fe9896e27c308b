"""Claim: MoRA in JAX adds less time to a training step than LoRA does in PyTorch.

The same model runs on the same processor in one process, in turns: SmolLM2-135M's shape
with random weights, all seven projections of each layer adapted by MoRA, by this
library's LoRA and qwix's, and by Hugging Face PEFT's in PyTorch. Each step computes the
loss of a batch of tokens and the gradient of the adapters, in float32; with a frozen
model, the gradient of its input embeddings. The LoRAs of qwix and PEFT are first
checked to train as many parameters. You will see seconds per step, and times relative
to the frozen model in JAX.

    make bench-torch
"""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common.harness import COLUMNS, options, race, results, save, show
from benchmarks.step.base import Base
from benchmarks.step.methods import contenders
from models.options import positive

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
PROJECTIONS += ["down_proj"]


class Step:
    """A contender of `harness` in PyTorch, not compiled, as its users run it."""

    gigaflops = temporary_megabytes = None  # PyTorch does not tell them

    def __init__(self, function: Callable[[], torch.Tensor], trained: int) -> None:
        self.function, self.trained = function, trained
        self.seconds: list[float] = []
        start = time.perf_counter()
        function()
        self.compile_seconds = time.perf_counter() - start

    def __call__(self) -> torch.Tensor:
        """Take one step."""
        return self.function()


def llama(layers: int) -> LlamaForCausalLM:
    """Hugging Face's model with random weights."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def torch_contenders(
    ids: np.ndarray, layers: int, rank: int
) -> Iterator[tuple[str, Step]]:
    """The frozen model and LoRA."""
    tokens = torch.from_numpy(ids.astype(np.int64))

    frozen = llama(layers).requires_grad_(False)
    embedded = frozen.get_input_embeddings()(tokens).requires_grad_(True)

    def alone() -> torch.Tensor:
        embedded.grad = None
        loss = frozen(inputs_embeds=embedded, labels=tokens).loss
        loss.backward()
        return loss

    yield "frozen model, PyTorch", Step(alone, 0)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=PROJECTIONS)
    lora = get_peft_model(llama(layers), config)

    def adapted() -> torch.Tensor:
        lora.zero_grad()
        loss = lora(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss

    trained = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    yield "LoRA, PEFT", Step(adapted, trained)


def main() -> None:
    """Compile all, check, run in turns, and report."""
    parser = options(__doc__, "out/torch_step.json")
    parser.add_argument("--layers", type=positive, default=30)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--tokens", type=positive, default=64, help="in each sequence")
    parser.add_argument("--rank", type=positive, default=8)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument(
        "--operators", nargs="*", default=["sharing", "rotation", "low_rank"]
    )
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    base = Base.random("SmolLM2", args.layers, args.batch, args.tokens, "float32")
    ours = contenders(base, args.operators, args.rank, ["qwix"])
    total = len(args.operators) + 2
    entered: dict[str, Any] = dict(tqdm(ours, "compiling", total))
    entered |= dict(torch_contenders(base.ids, args.layers, args.rank))
    sizes = entered["LoRA, qwix"].trained, entered["LoRA, PEFT"].trained
    if sizes[0] != sizes[1]:
        raise SystemExit(f"LoRAs of {sizes[0]:,} and {sizes[1]:,} parameters")
    race(entered, args.rounds)
    rows = results(entered)
    show(COLUMNS, rows, f"step, {args.batch} x {args.tokens} tokens, r = {args.rank}")
    save(rows, args, torch=torch.__version__)


if __name__ == "__main__":
    main()
