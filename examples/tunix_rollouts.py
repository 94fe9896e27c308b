"""Tunix's GRPO with the answers of a vLLM server: it gets M's, and no weights.

SmolLM2-135M learns to answer briefly, as in tunix_grpo.py, and here a server answers
that runs in an environment of its own. After each step Tunix hands M's to the rollout
below, which writes them as they are and asks the server to take them. You will see the
mean reward rise, how long it took to send M's, and how far the log-probabilities of
vLLM are from Tunix's own. Write the base, start the server on the same machine, and
learn, which takes some minutes on 2 cores:

    python -m examples.tunix_rollouts --save out/SmolLM2
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 VLLM_SERVER_DEV_MODE=1 XLA_FLAGS= \
        .venv-vllm/bin/python -m vllm.entrypoints.openai.api_server \
        --model out/SmolLM2 --enable-lora --max-lora-rank 1 --dtype float32 \
        --enforce-eager --max-model-len 128 --host 127.0.0.1 --port 8000
    python -m examples.tunix_rollouts --url http://127.0.0.1:8000 --steps 4
"""

import argparse
import functools
import json
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.generate.utils import pad_to_length  # pyright: ignore
from tunix.rl import common  # pyright: ignore
from tunix.rl.rollout import base_rollout  # pyright: ignore

import mora_jax
from examples import tunix_grpo
from models import smollm2
from models.options import positive
from mora_jax import MoRAConfig

POLICY = "policy"  # the name of the server's adapter


class Rollout(base_rollout.BaseRollout):
    """A running vLLM, and the folder through which it gets adapters."""

    def __init__(
        self, rollout_actor: Any, tokenizer: Any, *, url: str, folder: Path, **_: Any
    ) -> None:
        self.tokenizer, self.url, self.folder = tokenizer, url, folder.absolute()
        self.policy = nnx.clone(rollout_actor)  # which shares all arrays
        self.update_params(nnx.state(rollout_actor, nnx.LoRAParam))

    def update_params(self, params: Any, filter_types: Any = None) -> None:
        """Answer with these M's from now on."""
        start = time.perf_counter()
        with jax.transfer_guard("allow"):  # which Tunix forbids here on CPUs
            # Copies, since Tunix updates no rollout that has the actor's arrays.
            nnx.update(self.policy, jax.tree.map(jnp.copy, params))
            adapters = mora_jax.nnx.adapters(self.policy)
            names = "vllm", "tunix"
            mora_jax.io.export(self.folder, adapters, *names, native=True, force=True)
        place = {"lora_name": POLICY, "lora_path": str(self.folder)}
        self.post("v1/load_lora_adapter", **place, load_inplace=True)
        # vLLM would know prompts again by the adapter's name, and take what the last
        # M's made of them.
        self.post("reset_prefix_cache")
        self.sent = sum(file.stat().st_size for file in self.folder.iterdir())
        self.seconds = time.perf_counter() - start

    def generate(
        self, prompts: list[str], rollout_config: Any, **_: Any
    ) -> base_rollout.RolloutOutput:
        """Answers of the server, and their log-probabilities."""
        asked = [self.tokenizer.encode(text) for text in prompts]
        new_tokens = rollout_config.max_tokens_to_generate
        how = {"temperature": rollout_config.temperature, "max_tokens": new_tokens}
        how |= {"model": POLICY, "logprobs": 0, "return_token_ids": True}
        answer = json.loads(self.post("v1/completions", prompt=asked, **how))
        choices = sorted(answer["choices"], key=lambda one: one["index"])
        said = [np.array(one["token_ids"]) for one in choices]
        numbers = [np.array(one["logprobs"]["token_logprobs"]) for one in choices]
        length, pad = rollout_config.max_prompt_length, self.pad_id()
        before = [pad_to_length(np.array(x), length, pad, left=True) for x in asked]
        after = [pad_to_length(x, new_tokens, pad) for x in said]
        own = self.get_per_token_logps(np.array(before), np.array(after))
        pairs = zip(numbers, np.asarray(own), strict=True)
        self.gap = max(np.abs(row - ours[: len(row)]).max() for row, ours in pairs)
        return base_rollout.RolloutOutput(
            text=[self.tokenizer.decode(row.tolist()) for row in said],
            logits=None,
            tokens=said,
            left_padded_prompt_tokens=np.array(before),
            logprobs=numbers,
        )

    def get_per_token_logps(self, prompt_tokens: Any, completion_tokens: Any) -> Any:
        """The log-probabilities of answers by the M's that the server has, in JAX."""
        given = prompt_tokens, completion_tokens, self.pad_id(), self.eos_id()
        return common.compute_per_token_logps(*nnx.split(self.policy), *given)

    def pad_id(self) -> int:
        """The token that pads."""
        return self.tokenizer.pad_id()

    def eos_id(self) -> int:
        """The token that ends an answer."""
        return self.tokenizer.eos_id()

    def model(self) -> nnx.Module:
        """The policy that the server has."""
        return self.policy

    def post(self, path: str, **content: Any) -> bytes:
        """The server's answer; raises a `RuntimeError` with the reason for none."""
        headers, data = {"Content-Type": "application/json"}, json.dumps(content)
        request = urllib.request.Request(f"{self.url}/{path}", data.encode(), headers)
        try:
            with urllib.request.urlopen(request) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.read().decode()}") from error


def main() -> None:
    """Ask the server, reward, learn, and send what was learned."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--save", type=Path, help="write the base for the server to this, and end")
    add("--url", default="http://127.0.0.1:8000", help="the server")
    add("--steps", type=positive, default=4, help="number of steps")
    add("--rank", type=positive, default=8, help="budget, as the rank of a LoRA")
    add("--operator", default="auto", help="rotation, sharing, ...")
    add("--learning-rate", type=float, default=1e-4)
    add("--generations", type=positive, default=8, help="answers to each question")
    args = parser.parse_args()
    if args.save:
        return smollm2.save(args.save, *smollm2.load())
    warnings.simplefilter("ignore", DeprecationWarning)  # Tunix uses old names of JAX

    base, tokenizer, mesh = tunix_grpo.load()
    model = mora_jax.nnx.wrap(base, MoRAConfig(args.rank, args.operator))
    steps = iter(range(1, args.steps + 1))

    def reward(prompts: Any, completions: Sequence[str], **_: Any) -> list[float]:
        lengths = [len(tokenizer.encode(text)) for text in completions]
        found = [1 - length / tunix_grpo.NEW_TOKENS for length in lengths]
        rollout = learn.rl_cluster.rollout
        print(
            f"step {next(steps)}: mean reward {np.mean(found):.3f}, "
            f"{rollout.sent / 1e6:.1f} MB sent in {rollout.seconds:.2f} s, "
            f"log-probabilities within {rollout.gap:.0e}"
        )
        return found

    settings = args.steps, args.learning_rate, args.generations
    with tempfile.TemporaryDirectory() as folder, mesh:
        engine = functools.partial(Rollout, url=args.url, folder=Path(folder) / POLICY)
        learn = tunix_grpo.learner(model, mesh, tokenizer, reward, *settings, engine)
        learn.train(tunix_grpo.prompts_of(args.steps))


if __name__ == "__main__":
    main()
