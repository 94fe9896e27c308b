"""Claim: a training step with MoRA takes less time than one with LoRA.

The model is SmolLM2-135M's (random weights; time does not depend on them), all seven
projections of each layer adapted. The baseline, which no method can beat, is the frozen
model alone: forward, and backward to its input embeddings. First every adapter is
checked against the merged model, then all run in turns. You will see a table of times
relative to the baseline, arithmetic, memory and compile time; a JSON file and a plot
are written too.

    python benchmarks/train_step.py --quick
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from harness import Contender, check_close, plot, race, results, save, show
from tqdm import tqdm

import mora_jax
from mora_jax import MoRAConfig, linen
from mora_jax.operators import OPERATORS
from mora_jax.spec import AdapterSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import smollm2
import smollm2_nnx
import teach_facts

Params = dict[str, Any]
Update = Callable[[AdapterSpec, Any, jax.Array], jax.Array]


def loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Of the next tokens."""
    return optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], ids[:, 1:]
    ).mean()


def step(apply: Callable[..., jax.Array], trained: Any, *rest: Any) -> Contender:
    """Loss and gradient of `apply(trained, *rest)`, the last of `rest` being tokens."""

    def value(trained: Any, *rest: Any) -> jax.Array:
        return loss(apply(trained, *rest), rest[-1])

    grad = jax.value_and_grad(value)
    return Contender.compile(grad, trained, *rest, trained=trained)


def random_like(tree: Any, scale: float) -> Any:
    """Small random numbers of the shapes of `tree`."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jnp.asarray(scale * rng.standard_normal(s.shape), jnp.float32), tree
    )


def frozen(model: nn.Module, embedded: jax.Array, params: Params, ids: Any) -> Any:
    """The model alone, with something to differentiate by added to its embeddings."""

    def add(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        y = method(*args, **kwargs)
        is_input = isinstance(context.module, nn.Embed)
        return y + embedded if is_input and context.method_name == "__call__" else y

    with nn.intercept_methods(add):
        return model.apply({"params": params}, ids)


def adapted_by_hand(
    model: nn.Module, plan: mora_jax.Plan, update: Update
) -> Callable[..., jax.Array]:
    """(adapters, params, ids) -> logits, with `update(spec, adapter, x)` added."""
    specs = {spec.path[:-1]: spec for spec in plan}

    def apply(adapters: Any, params: Params, ids: Any) -> Any:
        def add(
            method: Callable[..., Any], args: Any, kwargs: Any, context: Any
        ) -> Any:
            y = method(*args, **kwargs)
            if (spec := specs.get(context.module.path)) is None:
                return y
            return y + update(spec, adapters[spec.name], args[0])

        with nn.intercept_methods(add):
            return model.apply({"params": params}, ids)

    return apply


def lora_by_hand(
    spec: AdapterSpec, adapter: tuple[jax.Array, jax.Array], x: jax.Array
) -> jax.Array:
    """LoRA, without its factor: x A B."""
    a, b = adapter
    return (x @ a) @ b


def rotation_as_published(spec: AdapterSpec, m: jax.Array, x: jax.Array) -> jax.Array:
    """Rotation as the paper's authors compute it, in JAX: x is padded, then turned.

    The same map as `Rotation(truncate=True)`.
    """
    *batch, ins = x.shape
    outs, q = spec.out_features, m.shape[0]
    n = -(-ins // q)
    x = jnp.concatenate([x, x[..., : n * q - ins]], axis=-1).reshape(*batch, n, q)
    angle = np.outer(np.arange(n), 10000 ** (-np.arange(0, q, 2) / q))
    angle = np.concatenate([angle, angle], axis=-1).astype(np.float32)
    half = jnp.concatenate([-x[..., q // 2 :], x[..., : q // 2]], axis=-1)
    y = (x * jnp.cos(angle) + half * jnp.sin(angle)) @ m
    y = y.reshape(*batch, n * q)
    return jnp.concatenate([y] * -(-outs // (n * q)), axis=-1)[..., :outs]


def check(apply: Callable[..., Any], merged: Callable[..., Any], *args: Any) -> None:
    """Raise unless both give the same logits."""
    check_close(jax.jit(apply)(*args), jax.jit(merged)(*args))


def contenders(args: argparse.Namespace) -> Iterator[tuple[str, Contender]]:
    """All methods, compiled and checked; the frozen model first."""
    config = smollm2.Config(layers=args.layers)
    model = smollm2.Llama(config)
    shape = args.batch, args.tokens
    ids = np.random.default_rng(0).integers(0, config.vocab, shape).astype(np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids[:1])["params"]
    params = random_like(shapes, 0.03)
    embedded = jnp.zeros((*shape, config.width))
    baseline = step(functools.partial(frozen, model), embedded, params, ids)
    yield "frozen model", dataclasses.replace(baseline, trained=0)
    for operator in args.operators:
        yield f"MoRA, {operator}", mora(model, params, ids, operator, args.rank)
    if args.peers:
        yield from peers(model, params, ids, args.rank)


def mora(
    model: nn.Module, params: Params, ids: np.ndarray, operator: Any, rank: int
) -> Contender:
    """The model as `linen.wrap` adapts it."""
    config = MoRAConfig(rank=rank, operator=operator)
    plan = linen.plan(model, {"params": params}, config, ids)
    adapters = random_like(mora_jax.init(plan), 0.01)
    wrapped = linen.wrap(model, plan)

    def apply(adapters: Any, params: Params, ids: Any) -> Any:
        return wrapped(adapters, {"params": params}, ids)

    def merged(adapters: Any, params: Params, ids: Any) -> Any:
        params = mora_jax.merge(params, adapters, plan)
        return model.apply({"params": params}, ids)

    check(apply, merged, adapters, params, ids)
    return step(apply, adapters, params, ids)


def peers(
    model: smollm2.Llama, params: Params, ids: np.ndarray, rank: int
) -> Iterator[tuple[str, Contender]]:
    """What MoRA is compared with."""
    config = MoRAConfig(rank=rank, operator={"name": "rotation", "truncate": True})
    plan = linen.plan(model, {"params": params}, config, ids)

    def random(*shape: int) -> jax.Array:
        return random_like(jax.ShapeDtypeStruct(shape, jnp.float32), 0.01)

    ms = {spec.name: random(*spec.shape) for spec in plan}
    for spec in plan:  # what is timed as published is our operator
        x, m = random(4, spec.in_features), ms[spec.name]
        expected = spec.operator.apply(m, x)
        np.testing.assert_allclose(
            rotation_as_published(spec, m, x), expected, atol=1e-5
        )
    lora = {
        spec.name: (random(spec.in_features, rank), random(rank, spec.out_features))
        for spec in plan
    }
    qwix, qwix_adapters = teach_facts.lora(ids, rank, 0, model)
    flax, flax_adapters, flax_rest = lora_of_flax(model.config, rank, params)
    flat = flatten_dict(params, sep="/")
    kernels = {spec.name: flat.pop(spec.name) for spec in plan}

    def every_kernel(kernels: Params, others: Params, ids: Any) -> Any:
        params = unflatten_dict(kernels | others, sep="/")
        return model.apply({"params": params}, ids)

    published = adapted_by_hand(model, plan, rotation_as_published)
    by_hand = adapted_by_hand(model, plan, lora_by_hand)
    yield "rotation as published", step(published, ms, params, ids)
    yield "LoRA, by hand", step(by_hand, lora, params, ids)
    yield "LoRA, qwix", step(qwix, qwix_adapters, {"params": params}, ids)
    yield "LoRA, flax.nnx", step(flax, flax_adapters, flax_rest, ids)
    yield "every kernel", step(every_kernel, kernels, flat, ids)


def lora_of_flax(
    config: smollm2.Config, rank: int, params: Params
) -> tuple[Callable[..., Any], Any, Any]:
    """`nnx.LoRALinear` in the NNX twin: apply, the adapters, and the rest."""

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
            layer = nnx.LoRALinear(
                **sizes,
                out_features=child.out_features,
                use_bias=False,
                rngs=nnx.Rngs(0),
            )
            setattr(module, name, layer)
        return model

    graph, adapters, rest = nnx.split(nnx.eval_shape(build), nnx.LoRAParam, ...)
    nnx.replace_by_pure_dict(rest, params)

    def apply(adapters: Any, rest: Any, ids: Any) -> Any:
        return nnx.merge(graph, adapters, rest)(ids)

    return apply, random_like(adapters, 0.01), rest


def arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="4 layers, some minutes")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of each sequence")
    parser.add_argument("--rank", type=int, default=8, help="budget, as LoRA's rank")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--operators", nargs="*", default=list(OPERATORS))
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--out", type=Path, default=Path("out/train_step.json"))
    args = parser.parse_args()
    if args.quick:
        args.layers, args.rounds = 4, 5
    for name in ("layers", "batch", "tokens", "rank", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    for operator in args.operators:
        if operator not in OPERATORS:
            parser.error(f"--operators must be of {list(OPERATORS)}, got {operator!r}")
    return args


def main() -> None:
    """Compile and check all, run them in turns, and report."""
    args = arguments()
    total = 1 + len(args.operators) + 5 * args.peers
    entered = dict(tqdm(contenders(args), "compiling, checking", total))
    race(entered, args.rounds)
    rows = results(entered)
    show(rows)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "quick")}
    save(rows, settings, args.out)
    plot(rows, args.out.with_suffix(".png"))
    print(f"\nfigures and plot beside {args.out}")


if __name__ == "__main__":
    main()
