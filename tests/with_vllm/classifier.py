"""Scores of prompts by a classifier in vLLM, in a process of its own.

It reads {base, prompts, adapters: {name: directory}} from its standard input, and
writes {name: scores of each prompt}, where "" is the base, to the file it is given.
"""

# pyright: reportMissingImports=false

import json
import os
import sys
from pathlib import Path


def main():
    from vllm import LLM, PoolingParams
    from vllm.lora.request import LoRARequest

    asked = json.load(sys.stdin)
    engine = LLM(
        asked["base"],
        runner="pooling",
        enable_lora=True,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=64,
        max_lora_rank=16,
        max_loras=8,
        enforce_eager=True,
    )
    requests = {"": None}
    for k, (name, directory) in enumerate(asked["adapters"].items(), start=1):
        requests[name] = LoRARequest(name, k, directory)
        engine.llm_engine.add_lora(requests[name])
    # One batch, in which neighbours have different adapters.
    rows = [(name, k) for k in range(len(asked["prompts"])) for name in requests]
    outputs = engine.classify(
        [{"prompt_token_ids": asked["prompts"][k]} for _, k in rows],
        pooling_params=PoolingParams(use_activation=False),
        lora_request=[requests[name] for name, _ in rows],
        use_tqdm=False,
    )
    scores = {name: [] for name in requests}
    for (name, _), output in zip(rows, outputs, strict=True):
        scores[name].append(list(output.outputs.probs))
    Path(sys.argv[1]).write_text(json.dumps(scores))
    # vLLM leaves a thread of its renderer behind, and C++ ends a process that still has
    # one by an abort, at times. The scores are written, so end without its destructors.
    engine.llm_engine.engine_core.shutdown()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
