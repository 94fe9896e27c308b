"""A small Llama that knows some facts, and ways to teach it others.

A fact is a key of 4 random tokens and a value of 12. The model is trained on facts of
its own first, with all of its parameters, and is then the frozen base.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

import mora_jax
from benchmarks.by_hand import adapted_by_hand, lora_by_hand
from models.smollm2 import Config, Llama
from mora_jax import MoRAConfig, linen

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
        jnp.asarray(1e-3),
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
    apply: Apply, trained: Any, params: Any, ids: jax.Array, rate: jax.Array, steps: int
) -> tuple[Any, dict[str, jax.Array]]:
    """Adam at one rate: what was trained, and loss and accuracy before each step."""
    tx = optax.adam(1.0)

    def value(trained: Any) -> tuple[jax.Array, jax.Array]:
        return loss_and_accuracy(apply(trained, params, ids), ids)

    def step(carry: Any, _: None) -> tuple[Any, dict[str, jax.Array]]:
        trained, state = carry
        (loss, accuracy), grads = jax.value_and_grad(value, has_aux=True)(trained)
        updates, state = tx.update(grads, state)
        updates = jax.tree.map(lambda u: rate * u, updates)
        found = {"loss": loss, "accuracy": accuracy}
        return (optax.apply_updates(trained, updates), state), found

    (trained, _), found = jax.lax.scan(step, (trained, tx.init(trained)), None, steps)
    return trained, found


def full(base: Base) -> tuple[Apply, Any]:
    """Full fine-tuning of the kernels that the adapters adapt."""
    flat = flatten_dict(base.params)
    kernels = {path: leaf for path, leaf in flat.items() if "_proj" in path[-2]}

    def apply(kernels: Any, params: Any, ids: jax.Array) -> jax.Array:
        both = unflatten_dict(flatten_dict(params) | kernels)
        logits: Any = base.model.apply({"params": both}, ids)
        return logits

    return apply, kernels


def lora(base: Base, rank: int, seed: int = 0) -> tuple[Apply, Any]:
    """LoRA with alpha = r: A as He has it, B of zeros."""
    key, adapters = jax.random.key(seed), {}
    flat: dict[tuple[str, ...], Any] = flatten_dict(base.params)
    for path, kernel in flat.items():
        if "_proj" in path[-2]:
            key, own = jax.random.split(key)
            ins, outs = kernel.shape
            a = jax.random.normal(own, (ins, rank)) / np.sqrt(ins)
            adapters[*path[:-1], "adapter"] = (a, jnp.zeros((rank, outs)))
    return adapted_by_hand(base.model, lora_by_hand), unflatten_dict(adapters)


def mora(base: Base, config: MoRAConfig) -> tuple[Apply, Any]:
    """MoRA on the same kernels."""
    chosen = plan(base, config)
    adapted = linen.wrap(base.model, chosen)

    def apply(adapters: Any, params: Any, ids: jax.Array) -> jax.Array:
        return adapted(adapters, {"params": params}, ids)

    return apply, mora_jax.init(chosen)


def plan(base: Base, config: MoRAConfig) -> mora_jax.Plan:
    """The plan of the same kernels."""
    config = dataclasses.replace(config, targets=TARGETS)
    return linen.plan(base.model, {"params": base.params}, config, base.known)
