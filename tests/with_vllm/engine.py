"""Answers to prompts by vLLM, in a process of its own.

It reads {base, prompts, adapters: {name: directory}, settings, compile} from its
standard input, and writes `found`, {name: [[token, its log-probability], ...] for each
prompt}, where "" is the base, `refused`, {name: the error}, and `cut`, the operations
at which the model is cut in pieces, to the file that it is given.
"""

# pyright: reportMissingImports=false

import json
import sys
from pathlib import Path


def compile_on_cpus(mode):
    """Compile models with LoRAs, which vLLM does on GPUs and leaves on CPUs."""
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    usual = CpuPlatform.check_and_update_config

    def changed(config):
        usual(config)
        compiled = config.compilation_config
        compiled.mode, compiled.backend = CompilationMode[mode], "eager"
        compiled.compile_sizes = []

    CpuPlatform.check_and_update_config = staticmethod(changed)


def main():
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    asked = json.load(sys.stdin)
    adapters = asked["adapters"]
    if mode := asked.get("compile"):
        compile_on_cpus(mode)
    engine = LLM(
        asked["base"],
        enable_lora=True,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=64,
        **asked["settings"],
    )
    requests, refused = {"": None}, {}
    for k, (name, directory) in enumerate(adapters.items(), start=1):
        request = LoRARequest(name, k, directory)
        try:
            engine.llm_engine.add_lora(request)
        except Exception as error:
            refused[name] = str(error)
        else:
            requests[name] = request
    # One batch, in which neighbours have different adapters.
    rows = [(name, k) for k in range(len(asked["prompts"])) for name in requests]
    found = engine.generate(
        [{"prompt_token_ids": asked["prompts"][k]} for _, k in rows],
        SamplingParams(temperature=0, max_tokens=8, logprobs=0, detokenize=False),
        lora_request=[requests[name] for name, _ in rows],
        use_tqdm=False,
    )
    numbers = {name: [] for name in requests}
    for (name, _), output in zip(rows, found, strict=True):
        said = output.outputs[0]
        at = zip(said.token_ids, said.logprobs, strict=True)
        numbers[name].append([[token, place[token].logprob] for token, place in at])
    cut = engine.llm_engine.vllm_config.compilation_config.splitting_ops
    answer = {"found": numbers, "refused": refused, "cut": cut}
    Path(sys.argv[1]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
