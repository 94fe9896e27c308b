"""Ask a model with adapters, all questions in one batch of vLLM's engine.

    python answers.py REQUEST.json ANSWERS.json

It is a process of its own: the engine forks, and JAX's threads do not survive that.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Read what to ask, and write the tokens that were said."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore

    request = json.loads(Path(sys.argv[1]).read_text())
    adapters = {
        name: LoRARequest(name, number, path)
        for number, (name, path) in enumerate(request["adapters"].items(), start=1)
    }
    engine = LLM(
        request["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_batched_tokens=128,
        enable_lora=True,
        max_loras=len(adapters),
        max_lora_rank=request["max_lora_rank"],
    )
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for _, prompt in request["rows"]],
        SamplingParams(temperature=0, max_tokens=request["max_tokens"]),
        lora_request=[adapters.get(name) for name, _ in request["rows"]],
    )
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
