"""Reinforcement learning whose answers come from vLLM: it gets M's, and no weights.

SmolLM2-135M learns to answer briefly. In each step JAX writes the adapters as they are,
a running vLLM takes them for the last ones and answers each question several times, and
JAX learns from the answers that left most of 16 tokens. You will see the mean reward
rise, how long it took to send M's, and how far the log-probabilities of vLLM are from
JAX's: so little that all answers come from the model that learns. It takes some minutes
on 2 cores, in the environment of `make test-vllm`:

    XLA_FLAGS= .venv-vllm/bin/python -m examples.rollouts_vllm --steps 8
"""

import argparse
import functools
import os
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mora_jax
from models import lesson, smollm2
from models.airports import ORDINARY, REHEARSED
from models.options import positive
from mora_jax import MoRAConfig, linen

NEW_TOKENS = 16
QUESTIONS = 4  # in each step
POLICY = "policy", 1  # the name and the number of vLLM's adapter


class Sampler:
    """A running vLLM, and the folder through which it gets adapters."""

    def __init__(self, base: Path, folder: Path) -> None:
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        self.folder = folder
        self.engine = LLM(
            str(base),
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
            enable_lora=True,
            max_lora_rank=1,
        )

    def close(self) -> None:
        """Stop vLLM, whose process Python would wait for."""
        self.engine.llm_engine.engine_core.shutdown()

    def take(self, adapters: Any) -> int:
        """Answer with these adapters from now on; how many bytes that took."""
        from vllm.lora.request import LoRARequest  # pyright: ignore

        path = str(self.folder)
        mora_jax.io.export(
            path, adapters, "vllm", smollm2.NAMES, native=True, force=True
        )
        request = LoRARequest(*POLICY, path, load_inplace=True)
        self.engine.llm_engine.add_lora(request)
        # vLLM would know prompts again by the adapter's name, and take what the last
        # M's made of them.
        self.engine.reset_prefix_cache()
        return sum(file.stat().st_size for file in self.folder.iterdir())

    def answer(self, prompts: list[list[int]], count: int, seed: int) -> Any:
        """Prompts, each `count` times, answers, and their log-probabilities."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.lora.request import LoRARequest  # pyright: ignore

        outputs = self.engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(n=count, max_tokens=NEW_TOKENS, logprobs=0, seed=seed),
            lora_request=LoRARequest(*POLICY, str(self.folder)),
            use_tqdm=False,
        )
        asked, said, numbers = [], [], []
        for prompt, output in zip(prompts, outputs, strict=True):
            for one in output.outputs:
                found = zip(one.token_ids, one.logprobs, strict=True)
                asked.append(prompt)
                said.append(list(one.token_ids))
                numbers.append([at[token].logprob for token, at in found])
        return asked, said, numbers


def main() -> None:
    """Ask, reward, learn, and send what was learned."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--steps", type=positive, default=8, help="number of steps")
    add("--rank", type=positive, default=8, help="budget, as the rank of a LoRA")
    add("--operator", default="auto", help="rotation, sharing, ...")
    add("--learning-rate", type=float, default=3e-4)
    add("--generations", type=positive, default=8, help="answers to each question")
    args = parser.parse_args()
    # A process that is forked off this one would lack JAX's threads.
    os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "spawn"
    model, params, tokenizer = smollm2.load()
    variables = {"params": params}
    config = MoRAConfig(rank=args.rank, operator=args.operator)
    adapted = linen.wrap(model, config, variables, jnp.zeros((1, 8), jnp.int32))
    adapters, tx = mora_jax.init(adapted.plan), optax.adam(args.learning_rate)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(adapters: Any, state: Any, variables: Any, batch: Any, good: Any) -> Any:
        def loss(adapters: Any) -> tuple[jax.Array, jax.Array]:
            logits = adapted(adapters, variables, batch.ids, batch.at)
            found = -optax.softmax_cross_entropy_with_integer_labels(
                logits, batch.targets
            )
            return -jnp.sum(good[:, None] * found * batch.weights) / len(good), found

        (_, found), grads = jax.value_and_grad(loss, has_aux=True)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, found

    questions = [*ORDINARY, *REHEARSED]
    prompts = [tokenizer.chat(question) for question in questions]
    size = max(map(len, prompts)) + NEW_TOKENS, NEW_TOKENS
    state = tx.init(adapters)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = folder / "SmolLM2"
        smollm2.save(base, model, params, tokenizer)
        sampler = stack.enter_context(closing(Sampler(base, folder / "adapters")))
        for number in range(1, args.steps + 1):
            start = time.perf_counter()
            sent = sampler.take(adapters)
            seconds = time.perf_counter() - start
            chosen = np.arange(QUESTIONS) + QUESTIONS * number
            asked, said, numbers = sampler.answer(
                [prompts[k % len(prompts)] for k in chosen], args.generations, number
            )
            rewards = np.array([1 - len(one) / NEW_TOKENS for one in said])
            groups = rewards.reshape(QUESTIONS, -1)
            good = (groups - groups.mean(1, keepdims=True)).ravel()
            batch = lesson.batch(asked, said, size)
            adapters, state, found = step(adapters, state, variables, batch, good)
            heard = np.array([one + [0.0] * (size[1] - len(one)) for one in numbers])
            gap = np.abs(np.where(batch.weights, found - heard, 0)).max()
            print(
                f"step {number}: mean reward {rewards.mean():.3f}, "
                f"{sent / 1e6:.1f} MB sent in {seconds:.2f} s, "
                f"log-probabilities within {gap:.0e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
