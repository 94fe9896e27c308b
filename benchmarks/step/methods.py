"""Training steps with MoRA and with other methods, compiled."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import mora_jax
from benchmarks.common.harness import (
    Contender,
    check_close,
    method_name,
    next_token_loss,
    random_like,
)
from benchmarks.step.base import Base, Params
from benchmarks.step.peers import PEERS
from models import smollm2
from mora_jax import linen


def contenders(
    base: Base, operators: Iterable[str], rank: int, peers: Iterable[str]
) -> Iterator[tuple[str, Contender]]:
    """A training step of each method, compiled; first the frozen model.

    In our model each operator is also compared with the merged model.
    """
    dtype = jax.tree.leaves(base.params)[0].dtype
    embedded = jnp.zeros((*base.ids.shape, base.config.width), dtype)
    alone = functools.partial(frozen, base)
    baseline = step(alone, embedded, base.params, base.ids)
    yield "frozen model", dataclasses.replace(baseline, trained=0)
    plain, is_ours = jax.jit(base.plain), isinstance(base.model, smollm2.Llama)
    for operator in operators:
        apply, merge, adapters = mora(base, operator, rank)
        args = adapters, base.params, base.ids
        if is_ours:  # once for each operator, since a check takes as long as a round
            merged = jax.jit(merge)(base.params, adapters)
            check_close(jax.jit(apply)(*args), plain(merged, base.ids))
        yield method_name(operator), step(apply, *args)
    for key in peers:
        if key != "nnx" or is_ours:  # which has a twin
            name, build = PEERS[key]
            apply, trained, rest = build(base, rank)
            yield name, step(apply, trained, rest, base.ids)


def step(apply: Callable[..., jax.Array], trained: Any, *rest: Any) -> Contender:
    """Loss and gradient of `apply(trained, *rest)`; the last of `rest` are tokens."""

    def value(trained: Any, *rest: Any) -> jax.Array:
        return next_token_loss(apply(trained, *rest), rest[-1])

    grad = jax.value_and_grad(value)
    return Contender.compile(grad, trained, *rest, trained=trained)


def frozen(base: Base, embedded: jax.Array, params: Params, ids: Any) -> jax.Array:
    """The model with `embedded` added to its embeddings, to differentiate by."""

    def add(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        y = method(*args, **kwargs)
        is_input = isinstance(context.module, nn.Embed)
        return y + embedded if is_input and context.method_name == "__call__" else y

    with nn.intercept_methods(add):
        return base.plain(params, ids)


def mora(
    base: Base, operator: Any, rank: int
) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    """The model as `linen.wrap` adapts it, its merge, and adapters."""
    plan = base.plan(rank, operator)
    adapters = random_like(mora_jax.init(plan), 0.01)
    wrapped = linen.wrap(base.model, plan)

    def apply(adapters: Any, params: Params, ids: Any) -> jax.Array:
        model = functools.partial(wrapped, adapters, {"params": params})
        return base.logits(model, ids)

    return apply, mora_jax.merge, adapters
