"""Answers to prompts by vLLM, in a process of its own.

It reads {base, prompts, adapters: {name: directory}, settings, compile} from its
standard input, and writes `found`, {name: [[token, its log-probability], ...] for each
prompt}, where "" is the base, `exchanged`, the same of the first two after each was
loaded under the other's name, `refused`, {name: the error}, and `cut`, the operations
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
        block_size=32,  # so that a part of each prompt is known again
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
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)
    sampling.detokenize = False

    def ask(names):
        # One batch, in which neighbours have different adapters.
        rows = [(name, k) for k in range(len(asked["prompts"])) for name in names]
        outputs = engine.generate(
            [{"prompt_token_ids": asked["prompts"][k]} for _, k in rows],
            sampling,
            lora_request=[requests[name] for name, _ in rows],
            use_tqdm=False,
        )
        numbers = {name: [] for name in names}
        for (name, _), output in zip(rows, outputs, strict=True):
            said = output.outputs[0]
            at = zip(said.token_ids, said.logprobs, strict=True)
            numbers[name].append([[token, place[token].logprob] for token, place in at])
        return numbers

    found = ask(requests)
    # Two adapters take each other's place, under their names.
    first, second = [name for name in requests if name][:2]
    other = {first: adapters[second], second: adapters[first]}
    for name, directory in other.items():
        link = Path(sys.argv[1]).with_name("link")
        link.unlink(missing_ok=True)
        link.symlink_to(directory)
        number = requests[name].lora_int_id
        engine.llm_engine.add_lora(
            LoRARequest(name, number, str(link), load_inplace=True)
        )
    engine.reset_prefix_cache()
    exchanged = ask(other)
    cut = engine.llm_engine.vllm_config.compilation_config.splitting_ops
    answer = {"found": found, "exchanged": exchanged, "refused": refused, "cut": cut}
    Path(sys.argv[1]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
