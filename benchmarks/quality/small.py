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
from jax.flatten_util import ravel_pytree

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
    make: Callable[[jax.Array], Learner],
    base: Base,
    rates: Sequence[float],
    count: int,
    seeds: int,
    steps: int,
    renew: int = 0,
) -> list[list[list[float]]]:
    """Learn `count` facts: the accuracy before each step, for each seed and rate.

    `make` is a function from the facts to a learner, which is renewed after each
    `renew` steps if they are not 0. All rates are one program.
    """
    curves = []
    for seed in range(seeds):
        ids = facts(count, seed)
        learner = make(ids)
        if renew:
            run = functools.partial(_renewed_curve, learner, base, ids, steps, renew)
            curves.append([run(rate) for rate in rates])
            continue
        fit_at = functools.partial(_fit_at, learner, ids, steps)
        over_rates = jax.vmap(fit_at, in_axes=(0, None, None))
        frozen = learner.frozen(base.params)
        _, found = over_rates(jnp.asarray(rates), learner.start, frozen)
        curves.append(found.tolist())
    return curves


def _fit_at(
    learner: Learner, ids: jax.Array, steps: int, rate: Any, trained: Any, frozen: Any
) -> tuple[Any, jax.Array]:
    """What is trained after some steps, and the accuracy before each."""
    rates = jax.tree.map(lambda speed: speed * rate, learner.speeds)
    after, found = fit(learner.apply, trained, frozen, ids, rates, steps)
    return after, found["accuracy"]


def _renewed_curve(
    learner: Learner, base: Base, ids: jax.Array, steps: int, renew: int, rate: float
) -> list[float]:
    """The accuracy before each step, renewed after each `renew` of them."""
    trained, frozen, curve = learner.start, learner.frozen(base.params), []
    while len(curve) < steps:
        if curve:
            assert learner.renewed is not None
            trained, frozen = learner.renewed(trained, frozen)
        trained, found = _fit_at(
            learner, ids, renew, jnp.asarray(rate), trained, frozen
        )
        curve += found.tolist()
        if not jnp.isfinite(ravel_pytree(trained)[0]).all():
            break  # what is not finite cannot be merged
    return (curve + [0.0] * steps)[:steps]


def task(base: Base, ids: jax.Array) -> learners.Task:
    """The task of learning some facts."""

    def loss(logits: jax.Array) -> jax.Array:
        return loss_and_accuracy(logits, ids)[0]

    known = (base.known,)
    return learners.Task(base.model, base.params, TARGETS, (ids,), loss, known)


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
