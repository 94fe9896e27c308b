"""Reinforcement learning with Tunix's GRPO: SmolLM2-135M learns to answer briefly.

You will see the mean reward of each step rise. The model is Tunix's Qwen2, the learner
its `GRPOLearner` with vanilla rollout; neither knows MoRA. The reward is a toy: what an
answer leaves of 16 tokens. It takes some minutes on 2 cores:

    pip install google-tunix
    python -m examples.tunix_grpo --steps 8
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import mora_jax
from models import airports, smollm2_tunix
from models.options import positive
from mora_jax import MoRAConfig

NEW_TOKENS = 16
LENGTH = 32
PROMPTS = 4  # in each step
QUESTIONS = [*airports.ORDINARY, *airports.REHEARSED]


def load() -> tuple[Any, smollm2_tunix.Tokenizer, jax.sharding.Mesh]:
    """The base on a mesh of one device, its tokenizer, and the mesh."""
    base, tokenizer = smollm2_tunix.load()
    automatic = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), automatic)
    everywhere = jax.NamedSharding(mesh, jax.P())
    nnx.update(base, jax.device_put(nnx.state(base), everywhere))
    return base, tokenizer, mesh


def prompts_of(steps: int) -> list[dict[str, Any]]:
    """The questions of each step, as chats."""
    texts = [smollm2_tunix.chat(question) for question in QUESTIONS]
    return [{"prompts": prompts} for prompts in np.resize(texts, (steps, PROMPTS))]


def learner(
    model: nnx.Module,
    mesh: jax.sharding.Mesh,
    tokenizer: smollm2_tunix.Tokenizer,
    reward: Callable[..., Sequence[float]],
    steps: int,
    rate: float,
    generations: int,
    engine: Any = "vanilla",
) -> Any:
    """Tunix's GRPO for an adapted model: actor and vanilla rollout are one model."""
    from tunix.rl import rl_cluster  # pyright: ignore
    from tunix.rl.grpo import grpo_learner  # pyright: ignore
    from tunix.rl.rollout import base_rollout  # pyright: ignore

    role = rl_cluster.Role
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adam(rate),
        eval_every_n_steps=steps + 1,
        max_steps=steps,
    )
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=NEW_TOKENS,
        max_prompt_length=LENGTH,
        kv_cache_size=NEW_TOKENS + LENGTH,
        temperature=1.0,
    )
    cluster = rl_cluster.RLCluster(
        actor=model,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys((role.ACTOR, role.ROLLOUT), mesh),
            rollout_engine=engine,
            training_config=training,
            rollout_config=rollout,
        ),
    )
    config = grpo_learner.GRPOConfig(num_generations=generations, beta=0.0)
    return grpo_learner.GRPOLearner(cluster, config, reward)


def main() -> None:
    """Ask, reward, and ask again."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--steps", type=positive, default=12, help="number of steps")
    add("--rank", type=positive, default=8, help="budget, as the rank of a LoRA")
    add("--operator", default="auto", help="rotation, sharing, ...")
    add("--learning-rate", type=float, default=1e-4)
    add("--generations", type=positive, default=8, help="answers to each question")
    args = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)  # Tunix uses old names of JAX

    base, tokenizer, mesh = load()
    model = mora_jax.nnx.wrap(base, MoRAConfig(args.rank, args.operator))
    rewards: list[float] = []

    def reward(prompts: Any, completions: Sequence[str], **_: Any) -> list[float]:
        found = [1 - len(tokenizer.encode(text)) / NEW_TOKENS for text in completions]
        rewards.append(float(np.mean(found)))
        print(f"step {len(rewards)}: mean reward {rewards[-1]:.3f}")
        return found

    rate, answers = args.learning_rate, args.generations
    learn = learner(model, mesh, tokenizer, reward, args.steps, rate, answers)
    before = smollm2_tunix.asker(base, tokenizer)(QUESTIONS[:4])
    with mesh:
        learn.train(prompts_of(args.steps))
    trained = learn.rl_cluster.actor_trainer.model
    after = smollm2_tunix.asker(trained, tokenizer)(QUESTIONS[:4])
    for asked, first, last in zip(QUESTIONS, before, after, strict=False):
        print(f"{asked}\n  before: {first}\n  after:  {last}")


if __name__ == "__main__":
    main()
