"""A small Llama that knows some facts, and ways to teach it others.

A fact is a key of 4 random tokens and a value of 12. The model is trained on facts of
its own first, with all of its parameters, and is then the frozen base.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mora_jax
from benchmarks.quality import ladders, learners
from benchmarks.quality.learners import Learner
from models.smollm2 import Config, Llama
from mora_jax import MoRAConfig

KEY, VALUE, VOCAB = 4, 8, 256
KNOWN = 128
TARGETS = r".*_proj/kernel"

Apply = Callable[[Any, Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Base:
    """A frozen model, and the facts that it knows."""

    model: Llama
    params: Any
    known: jax.Array


@functools.lru_cache
def base(width: int, layers: int = 2) -> Base:
    """A model of some width that knows `KNOWN` facts."""
    sizes = {"hidden": 3 * width, "heads": width // 16, "kv_heads": width // 32}
    model = Llama(Config(vocab=VOCAB, layers=layers, width=width, **sizes))
    known = facts(KNOWN, seed=-1)
    params = model.init(jax.random.key(0), known)["params"]
    trained, _ = fit(
        lambda trained, _, ids: model.apply({"params": trained}, ids),
        params,
        None,
        known,
        jax.tree.map(lambda _: 1e-3, params),
        steps=400,
    )
    return Base(model, trained, known)


def facts(count: int, seed: int) -> jax.Array:
    """Random facts, (count, KEY + VALUE)."""
    random = np.random.default_rng(seed + 1)
    return jnp.asarray(random.integers(0, VOCAB, (count, KEY + VALUE)), jnp.int32)


def loss_and_accuracy(logits: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the tokens of values, as the tokens before them foretell them."""
    logits, wanted = logits[:, KEY - 1 : -1], ids[:, KEY:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
    return losses.mean(), (logits.argmax(-1) == wanted).mean()


@functools.partial(jax.jit, static_argnames=("apply", "steps"))
def fit(
    apply: Apply, trained: Any, params: Any, ids: jax.Array, rates: Any, steps: int
) -> tuple[Any, dict[str, jax.Array]]:
    """Adam with a rate for each leaf.

    Returns:
        What was trained, and loss and accuracy before each step.
    """
    tx = optax.adam(1.0)

    def value(trained: Any) -> tuple[jax.Array, jax.Array]:
        return loss_and_accuracy(apply(trained, params, ids), ids)

    def step(carry: Any, _: None) -> tuple[Any, dict[str, jax.Array]]:
        trained, state = carry
        (loss, accuracy), grads = jax.value_and_grad(value, has_aux=True)(trained)
        updates, state = tx.update(grads, state)
        updates = jax.tree.map(lambda rate, u: rate * u, rates, updates)
        found = {"loss": loss, "accuracy": accuracy}
        return (optax.apply_updates(trained, updates), state), found

    (trained, _), found = jax.lax.scan(step, (trained, tx.init(trained)), None, steps)
    return trained, found


def learn(
    learner: Learner,
    base: Base,
    rates: Sequence[float],
    count: int,
    seeds: int,
    steps: int,
) -> list[list[list[float]]]:
    """Learn `count` facts: the accuracy before each step, for each seed and rate.

    All runs are one program.
    """

    def run(rate: jax.Array, ids: jax.Array) -> jax.Array:
        rates = jax.tree.map(lambda speed: speed * rate, learner.speeds)
        fitted = fit(learner.apply, learner.start, base.params, ids, rates, steps)
        return fitted[1]["accuracy"]

    ids = jnp.stack([facts(count, seed) for seed in range(seeds)])
    over_rates = jax.vmap(run, in_axes=(0, None))
    over_all = jax.jit(jax.vmap(over_rates, in_axes=(None, 0)))
    return over_all(jnp.asarray(rates), ids).tolist()


def steps_to(share: float, curves: list[list[list[float]]]) -> list[list[float | None]]:
    """Steps to a share of the tokens, for each seed and rate; None if never."""
    found = [[ladders.first_above(curve, share) for curve in row] for row in curves]
    return [[s if math.isfinite(s) else None for s in row] for row in found]


def full(base: Base) -> Learner:
    """Full fine-tuning of the kernels that the adapters adapt."""
    return learners.full(base.model, base.params, TARGETS)


def lora(base: Base, rank: int, speed: float = 1.0) -> Learner:
    """LoRA on the same kernels; LoRA+ if B has another speed than A."""
    return learners.lora(base.model, base.params, TARGETS, rank, speed=speed)


def mora(base: Base, config: MoRAConfig) -> Learner:
    """MoRA on the same kernels."""
    return learners.mora(base.model, base.params, TARGETS, config, base.known)


def plan(base: Base, config: MoRAConfig) -> mora_jax.Plan:
    """Its plan."""
    return learners.plan_of(base.model, base.params, TARGETS, config, base.known)
