"""Ways to train SmolLM2-135M's shape: MoRA, and what it is compared with.

Weights are random, because time does not depend on them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import mora_jax
from benchmarks.common.by_hand import adapted_by_hand, lora_by_hand
from benchmarks.common.harness import (
    Contender,
    check_close,
    next_token_loss,
    random_like,
)
from models import smollm2, smollm2_nnx
from models.lora import qwix_lora
from mora_jax import MoRAConfig, linen

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Base:
    """A model, its parameters and a batch of tokens."""

    model: smollm2.Llama
    params: Params
    ids: np.ndarray

    @classmethod
    def random(cls, layers: int, batch: int, tokens: int, dtype: str) -> "Base":
        """Random parameters of `dtype`, and random tokens (batch, tokens)."""
        config = smollm2.Config(layers=layers)
        model, shape = smollm2.Llama(config), (batch, tokens)
        ids = np.random.default_rng(0).integers(0, config.vocab, shape)
        ids = ids.astype(np.int32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), ids[:1])["params"]
        return cls(model, random_like(shapes, 0.03, dtype), ids)


def contenders(
    base: Base, operators: Sequence[str], rank: int, with_peers: bool
) -> Iterator[tuple[str, Contender]]:
    """A training step of each method, compiled and checked; first the frozen model."""
    dtype = jax.tree.leaves(base.params)[0].dtype
    embedded = jnp.zeros((*base.ids.shape, base.model.config.width), dtype)
    alone = functools.partial(frozen, base.model)
    baseline = step(alone, embedded, base.params, base.ids)
    yield "frozen model", dataclasses.replace(baseline, trained=0)
    for operator in operators:
        apply, merged, adapters = mora(base, operator, rank)
        args = adapters, base.params, base.ids
        check_close(jax.jit(apply)(*args), jax.jit(merged)(*args))
        yield f"MoRA, {operator}", step(apply, *args)
    if with_peers:
        yield from peers(base, rank)


def step(apply: Callable[..., jax.Array], trained: Any, *rest: Any) -> Contender:
    """Loss and gradient of `apply(trained, *rest)`; the last of `rest` are tokens."""

    def value(trained: Any, *rest: Any) -> jax.Array:
        return next_token_loss(apply(trained, *rest), rest[-1])

    grad = jax.value_and_grad(value)
    return Contender.compile(grad, trained, *rest, trained=trained)


def frozen(model: nn.Module, embedded: jax.Array, params: Params, ids: Any) -> Any:
    """The model with `embedded` added to its embeddings, to differentiate by."""

    def add(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        y = method(*args, **kwargs)
        is_input = isinstance(context.module, nn.Embed)
        return y + embedded if is_input and context.method_name == "__call__" else y

    with nn.intercept_methods(add):
        return model.apply({"params": params}, ids)


def mora(
    base: Base, operator: Any, rank: int
) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    """The model as `linen.wrap` adapts it, the same merged, and adapters."""
    config = MoRAConfig(rank=rank, operator=operator)
    plan = linen.plan(base.model, {"params": base.params}, config, base.ids)
    adapters = random_like(mora_jax.init(plan), 0.01)
    wrapped = linen.wrap(base.model, plan)

    def apply(adapters: Any, params: Params, ids: Any) -> Any:
        return wrapped(adapters, {"params": params}, ids)

    def merged(adapters: Any, params: Params, ids: Any) -> Any:
        params = mora_jax.merge(params, adapters, plan)
        return base.model.apply({"params": params}, ids)

    return apply, merged, adapters


def peers(base: Base, rank: int) -> Iterator[tuple[str, Contender]]:
    """What MoRA is compared with."""
    model, params, ids = base.model, base.params, base.ids
    config = MoRAConfig(rank=rank, operator={"name": "rotation", "truncate": True})
    plan = linen.plan(model, {"params": params}, config, ids)

    def random(*shape: int) -> jax.Array:
        return random_like(jax.ShapeDtypeStruct(shape, jnp.float32), 0.01)

    ms, lora = {}, {}
    for spec in plan.specs:
        (ins, outs), path = spec.kernel_shape, (*spec.path[:-1], "adapter")
        ms[path], x = random(*spec.shape), random(4, ins)
        lora[path] = random(ins, rank), random(rank, outs)
        value = rotation_as_published(ms[path], x, outs)  # must be our operator
        np.testing.assert_allclose(value, spec.operator.apply(ms[path], x), atol=1e-5)
    qwix, qwix_adapters = qwix_lora(model, rank)
    flax, flax_adapters, flax_rest = lora_of_flax(model.config, rank, params)
    flat = flatten_dict(params, sep="/")
    kernels = {spec.name: flat.pop(spec.name) for spec in plan.specs}

    def every_kernel(kernels: Params, others: Params, ids: Any) -> Any:
        params = unflatten_dict(kernels | others, sep="/")
        return model.apply({"params": params}, ids)

    published = adapted_by_hand(model, rotation_as_published)
    by_hand = adapted_by_hand(model, lora_by_hand)
    yield "rotation as published", step(published, unflatten_dict(ms), params, ids)
    yield "LoRA, by hand", step(by_hand, unflatten_dict(lora), params, ids)
    yield "LoRA, qwix", step(qwix, qwix_adapters, {"params": params}, ids)
    yield "LoRA, flax.nnx", step(flax, flax_adapters, flax_rest, ids)
    yield "every kernel", step(every_kernel, kernels, flat, ids)


def rotation_as_published(m: jax.Array, x: jax.Array, out_features: int) -> jax.Array:
    """Rotation as the paper's authors compute it, in JAX: pad x, then rotate it.

    It is the same map as `Rotation(truncate=True)`.
    """
    *batch, ins = x.shape
    m, q = m.astype(x.dtype), m.shape[0]
    n = -(-ins // q)
    x = jnp.concatenate([x, x[..., : n * q - ins]], axis=-1).reshape(*batch, n, q)
    angle = np.outer(np.arange(n), 10000 ** (-np.arange(0, q, 2) / q))
    angle = np.concatenate([angle, angle], axis=-1).astype(x.dtype)
    half = jnp.concatenate([-x[..., q // 2 :], x[..., : q // 2]], axis=-1)
    y = (x * jnp.cos(angle) + half * jnp.sin(angle)) @ m
    y = y.reshape(*batch, n * q)
    copies = -(-out_features // (n * q))
    return jnp.concatenate([y] * copies, axis=-1)[..., :out_features]


def lora_of_flax(
    config: smollm2.Config, rank: int, params: Params
) -> tuple[Callable[..., Any], Any, Any]:
    """`nnx.LoRALinear` in the NNX twin: (adapters, rest, ids) -> logits, and both."""

    def build() -> smollm2_nnx.Llama:
        model = smollm2_nnx.Llama(config, rngs=nnx.Rngs(0))
        linears = [
            (module, name, child)
            for _, module in nnx.iter_graph(model)
            if isinstance(module, nnx.Module)
            for name, child in vars(module).items()
            if isinstance(child, nnx.Linear)
        ]
        for module, name, child in linears:
            sizes: Any = {"in_features": child.in_features, "lora_rank": rank}
            sizes |= {"out_features": child.out_features, "use_bias": False}
            setattr(module, name, nnx.LoRALinear(**sizes, rngs=nnx.Rngs(0)))
        return model

    graph, adapters, rest = nnx.split(nnx.eval_shape(build), nnx.LoRAParam, ...)
    nnx.replace_by_pure_dict(rest, params)

    def apply(adapters: Any, rest: Any, ids: Any) -> Any:
        return nnx.merge(graph, adapters, rest)(ids)

    return apply, random_like(adapters, 0.01), rest
