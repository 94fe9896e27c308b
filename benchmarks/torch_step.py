"""Claim: MoRA in JAX adds less time to a training step than LoRA does in PyTorch.

The same model on the same processor in one process, in turns: SmolLM2-135M's shape with
random weights, all seven projections of each layer adapted; ours, qwix's LoRA, and
Hugging Face PEFT's LoRA on their Llama. Each step is loss and gradient of the adapters
for a batch of tokens, in float32. The frozen models have a gradient to their input
embeddings alone. First, the LoRAs are checked to train as many parameters. You will
see seconds a step, and ratios to the frozen model in JAX.

    make bench-torch
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from harness import race, results, save, show
from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
from tqdm import tqdm
from train_step import Base, contenders
from transformers import LlamaConfig, LlamaForCausalLM

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
PROJECTIONS += ["down_proj"]


class Step:
    """A contender of `harness` that runs in PyTorch, uncompiled as its users run it."""

    gigaflops = temporary_megabytes = None  # PyTorch does not tell

    def __init__(self, function: Callable[[], torch.Tensor], trained: int) -> None:
        self.function, self.trained = function, trained
        self.seconds: list[float] = []
        start = time.perf_counter()
        function()
        self.compile_seconds = time.perf_counter() - start

    def __call__(self) -> torch.Tensor:
        """One step."""
        return self.function()


def llama(layers: int) -> LlamaForCausalLM:
    """Hugging Face's model, of random weights."""
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
    """Compile all, check, run in turns, report."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of each sequence")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--operators", nargs="*", default=["sharing", "rotation"])
    parser.add_argument("--out", type=Path, default=Path("out/torch_step.json"))
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    base = Base.make(args.layers, args.batch, args.tokens, "float32")
    entered = {}
    ours = contenders(base, args.operators, args.rank, True)
    wanted = {"frozen model", "LoRA, qwix", *(f"MoRA, {o}" for o in args.operators)}
    for name, one in tqdm(ours, "compiling", len(args.operators) + 6):
        if name in wanted:
            entered[name] = one
    entered |= dict(torch_contenders(base.ids, args.layers, args.rank))
    sizes = entered["LoRA, qwix"].trained, entered["LoRA, PEFT"].trained
    if sizes[0] != sizes[1]:
        raise SystemExit(f"LoRAs of {sizes[0]:,} and {sizes[1]:,} parameters")
    race(entered, args.rounds)
    rows = results(entered)
    show(rows, f"step, {args.batch} x {args.tokens} tokens, r = {args.rank}")
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    save(rows, {**settings, "torch": torch.__version__}, args.out)
    print(f"\nfigures in {args.out}")


if __name__ == "__main__":
    main()
