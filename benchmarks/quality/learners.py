"""Ways to train a model further: all of its kernels, a LoRA, or MoRA.

Each has the same kernels to change, those whose paths match a pattern.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import mora_jax
from benchmarks.by_hand import adapted_by_hand, lora_by_hand
from mora_jax import MoRAConfig, linen

LORA_PLUS = 16
"""How many times as fast as A the B of a LoRA+ is trained."""


class Learner(NamedTuple):
    """What is trained, and the model with it.

    Attributes:
        apply: (trained, params, *inputs) -> logits.
        start: What is trained, as it is before.
        speeds: The rate of each leaf relative to the learning rate, a tree as `start`.
        deltas: (trained) -> what was added to each kernel, by its path.
    """

    apply: Callable[..., jax.Array]
    start: Any
    speeds: Any
    deltas: Callable[[Any], dict[tuple[str, ...], jax.Array]]


def full(model: nn.Module, params: Any, targets: str) -> Learner:
    """Full fine-tuning of the kernels."""

    def apply(kernels: Any, params: Any, *inputs: Any) -> jax.Array:
        both = unflatten_dict(flatten_dict(params) | kernels)
        logits: Any = model.apply({"params": both}, *inputs)
        return logits

    def deltas(trained: Any) -> Any:
        return {path: leaf - kernels[path] for path, leaf in trained.items()}

    kernels = dict(_matching(params, targets))
    return Learner(apply, kernels, jax.tree.map(lambda _: 1.0, kernels), deltas)


def lora(
    model: nn.Module,
    params: Any,
    targets: str,
    rank: int,
    seed: int = 0,
    speed: float = 1.0,
) -> Learner:
    """LoRA with alpha = r: A as He has it, B of zeros. LoRA+ if B has another speed."""
    key, adapters, speeds = jax.random.key(seed), {}, {}
    for path, kernel in _matching(params, targets):
        key, own = jax.random.split(key)
        ins, outs = kernel.shape
        a = jax.random.normal(own, (ins, rank)) / np.sqrt(ins)
        adapters[*path[:-1], "adapter"] = (a, jnp.zeros((rank, outs)))
        speeds[*path[:-1], "adapter"] = (1.0, speed)

    def deltas(adapters: Any) -> Any:
        pairs: dict[tuple[str, ...], Any] = flatten_dict(adapters)
        return {(*path[:-1], "kernel"): a @ b for path, (a, b) in pairs.items()}

    apply = adapted_by_hand(model, lora_by_hand)
    return Learner(apply, unflatten_dict(adapters), unflatten_dict(speeds), deltas)


def mora(
    model: nn.Module, params: Any, targets: str, config: MoRAConfig, *inputs: Any
) -> Learner:
    """MoRA as `config` says; `inputs` are those of a call."""
    return with_plan(model, plan_of(model, params, targets, config, *inputs))


def subspace(
    model: nn.Module,
    params: Any,
    targets: str,
    config: MoRAConfig,
    loss: Callable[[jax.Array], jax.Array],
    *inputs: Any,
) -> Learner:
    """MoRA between the directions of the gradient of `loss(logits)` at `inputs`."""
    plan = plan_of(model, params, targets, config, *inputs)
    way = full(model, params, targets)

    @jax.jit
    def gradient(kernels: Any, params: Any, *inputs: Any) -> Any:
        return jax.grad(lambda k: loss(way.apply(k, params, *inputs)))(kernels)

    grads = gradient(way.start, params, *inputs)
    pairs = (("/".join(path), gradient) for path, gradient in grads.items())
    return with_plan(model, mora_jax.gradient_bases(pairs, plan))


def with_plan(model: nn.Module, plan: mora_jax.Plan) -> Learner:
    """MoRA as a plan has it."""
    adapted = linen.wrap(model, plan)

    def apply(adapters: Any, params: Any, *inputs: Any) -> jax.Array:
        return adapted(adapters, {"params": params}, *inputs)

    def deltas(adapters: Any) -> Any:
        return flatten_dict(mora_jax.delta_weight(adapters, plan))

    start = mora_jax.init(plan)
    return Learner(apply, start, jax.tree.map(lambda _: 1.0, start), deltas)


def plan_of(
    model: nn.Module, params: Any, targets: str, config: MoRAConfig, *inputs: Any
) -> mora_jax.Plan:
    """The plan of the same kernels."""
    config = dataclasses.replace(config, targets=targets)
    return linen.plan(model, {"params": params}, config, *inputs)


def _matching(params: Any, targets: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)
    for path, leaf in flat.items():
        if re.fullmatch(targets, "/".join(path)):
            yield path, leaf
