"""Methods that MoRA is compared with."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks.common.by_hand import adapted_by_hand, lora_by_hand
from benchmarks.common.harness import random_like
from benchmarks.step.base import Base, Params
from models import smollm2_nnx
from models.lora import qwix_lora

Adapted = tuple[Callable[..., jax.Array], Any, Any]
"""(trained, frozen, ids) -> logits, and values for `trained` and `frozen`."""


def published(base: Base, rank: int) -> Adapted:
    """Rotation as the paper's authors compute it; it must be our operator."""
    plan = base.plan(rank, {"name": "rotation", "truncate": True})
    ms = {}
    for path, spec in plan.specs.items():
        (ins, outs), path = spec.kernel_shape, (*path[:-1], "adapter")
        ms[path], x = _random(*spec.shape), _random(4, ins)
        value = rotation_as_published(ms[path], x, outs)
        np.testing.assert_allclose(value, spec.operator.apply(ms[path], x), atol=1e-5)
    return _with_delta(base, rotation_as_published), unflatten_dict(ms), base.params


def by_hand(base: Base, rank: int) -> Adapted:
    """LoRA, added to each layer's output."""
    lora = {}
    for path, spec in base.plan(rank).specs.items():
        ins, outs = spec.kernel_shape
        pair = _random(ins, rank), _random(rank, outs)
        lora[*path[:-1], "adapter"] = pair
    return _with_delta(base, lora_by_hand), unflatten_dict(lora), base.params


def folded(base: Base, rank: int) -> Adapted:
    """LoRA as x (W + A B), with the derivative of `folded_lora`."""
    lora = {}
    for path, spec in base.plan(rank).specs.items():
        ins, outs = spec.kernel_shape
        lora[path[:-1]] = _random(ins, rank), _random(rank, outs)

    def apply(lora: Any, params: Params, ids: Any) -> jax.Array:
        def fold(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            layer = context.module
            if not isinstance(layer, nn.Dense) or layer.path not in lora:
                return call(*args, **kwargs)
            kernel = layer.get_variable("params", "kernel")
            return folded_lora(args[0], kernel, *lora[layer.path])

        with nn.intercept_methods(fold):
            return base.plain(params, ids)

    return apply, lora, base.params


@jax.custom_vjp
def folded_lora(x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array) -> Any:
    """Product x (W + A B), whose derivative forms no gradient of a kernel."""
    return x @ (kernel + a @ b)


def _folded_forward(*args: jax.Array) -> Any:
    return folded_lora(*args), args


def _folded_backward(args: Any, g: jax.Array) -> Any:
    x, kernel, a, b = args
    x_rows, g_rows = (array.reshape(-1, array.shape[-1]) for array in (x, g))
    by_a = x_rows.T @ (g_rows @ b.T)
    return g @ (kernel + a @ b).T, None, by_a, (x_rows @ a).T @ g_rows


folded_lora.defvjp(_folded_forward, _folded_backward)


def _random(*shape: int) -> jax.Array:
    return random_like(jax.ShapeDtypeStruct(shape, jnp.float32), 0.01)


def _with_delta(
    base: Base, delta: Callable[[Any, jax.Array, int], jax.Array]
) -> Callable[..., jax.Array]:
    model = adapted_by_hand(base.model, delta)

    def apply(adapters: Any, params: Params, ids: Any) -> jax.Array:
        return base.logits(functools.partial(model, adapters, params), ids)

    return apply


def lora_of_qwix(base: Base, rank: int) -> Adapted:
    """LoRA by `qwix.apply_lora_to_model`."""
    adapted, init = qwix_lora(base.model, rank, *base.inputs(base.ids[:1]))
    # Only shapes: it takes 20 seconds to compile the start.
    adapters = random_like(jax.eval_shape(init, jax.random.key(0)), 0.01)

    def apply(adapters: Any, params: Params, ids: Any) -> jax.Array:
        model = functools.partial(adapted, adapters, {"params": params})
        return base.logits(model, ids)

    return apply, adapters, base.params


def every_kernel(base: Base, rank: int) -> Adapted:
    """Full fine-tuning of the kernels that the other methods adapt."""
    rest: Params = flatten_dict(base.params, sep="/")
    kernels = {name: rest.pop(name) for name in base.plan(rank)}

    def apply(kernels: Params, rest: Params, ids: Any) -> jax.Array:
        return base.plain(unflatten_dict(kernels | rest, sep="/"), ids)

    return apply, kernels, rest


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


def lora_of_flax(base: Base, rank: int) -> Adapted:
    """`nnx.LoRALinear` in the NNX twin of our Llama."""

    def build() -> smollm2_nnx.Llama:
        model = smollm2_nnx.Llama(base.config, rngs=nnx.Rngs(0))
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
    nnx.replace_by_pure_dict(rest, base.params)

    def apply(adapters: Any, rest: Any, ids: Any) -> Any:
        return nnx.merge(graph, adapters, rest)(ids)

    return apply, random_like(adapters, 0.01), rest


PEERS: dict[str, tuple[str, Callable[[Base, int], Adapted]]] = {
    "published": ("rotation as published", published),
    "by_hand": ("LoRA, by hand", by_hand),
    "folded": ("LoRA, folded by hand", folded),
    "qwix": ("LoRA, qwix", lora_of_qwix),
    "nnx": ("LoRA, flax.nnx", lora_of_flax),
    "every_kernel": ("every kernel", every_kernel),
}
"""Names in tables, and programs, by names on the command line."""
