"""Claim: a training step with MoRA takes less time than one with LoRA.

The model is SmolLM2-135M's (random weights; time does not depend on them), all seven
projections of each layer adapted. The baseline, which no method can beat, is the frozen
model alone: forward, and backward to its input embeddings. First every adapter is
checked against the merged model, then all run in turns. You will see a table of times
relative to the baseline, arithmetic, memory and compile time, for each number of tokens
and each rank; then the same for the model's forward pass alone, where a merged model
should cost what the base does. A JSON file and a plot are written too.

    python benchmarks/train_step.py --quick
    python benchmarks/train_step.py --tokens 16 64 256 --operators sharing rotation
"""

import argparse
import dataclasses
import functools
import itertools
import json
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
from harness import (
    Contender,
    check_close,
    plot,
    plot_lines,
    race,
    results,
    save,
    show,
)
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


def random_like(tree: Any, scale: float, dtype: str = "float32") -> Any:
    """Small random numbers of the shapes of `tree`."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jnp.asarray(scale * rng.standard_normal(s.shape), dtype), tree
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
    specs = {spec.path[:-1]: spec for spec in plan.specs}

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
    a, b = (one.astype(x.dtype) for one in adapter)
    return (x @ a) @ b


def rotation_as_published(spec: AdapterSpec, m: jax.Array, x: jax.Array) -> jax.Array:
    """Rotation as the paper's authors compute it, in JAX: x is padded, then turned.

    The same map as `Rotation(truncate=True)`.
    """
    *batch, ins = x.shape
    m = m.astype(x.dtype)
    outs, q = spec.out_features, m.shape[0]
    n = -(-ins // q)
    x = jnp.concatenate([x, x[..., : n * q - ins]], axis=-1).reshape(*batch, n, q)
    angle = np.outer(np.arange(n), 10000 ** (-np.arange(0, q, 2) / q))
    angle = np.concatenate([angle, angle], axis=-1).astype(x.dtype)
    half = jnp.concatenate([-x[..., q // 2 :], x[..., : q // 2]], axis=-1)
    y = (x * jnp.cos(angle) + half * jnp.sin(angle)) @ m
    y = y.reshape(*batch, n * q)
    return jnp.concatenate([y] * -(-outs // (n * q)), axis=-1)[..., :outs]


def check(apply: Callable[..., Any], merged: Callable[..., Any], *args: Any) -> None:
    """Raise unless both give the same logits."""
    check_close(jax.jit(apply)(*args), jax.jit(merged)(*args))


@dataclasses.dataclass(frozen=True)
class Base:
    """A model, its parameters and a batch."""

    model: smollm2.Llama
    params: Params
    ids: np.ndarray

    @classmethod
    def make(cls, layers: int, batch: int, tokens: int, dtype: str) -> "Base":
        """Of random numbers."""
        config = smollm2.Config(layers=layers)
        model, shape = smollm2.Llama(config), (batch, tokens)
        ids = np.random.default_rng(0).integers(0, config.vocab, shape)
        ids = ids.astype(np.int32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), ids[:1])["params"]
        return cls(model, random_like(shapes, 0.03, dtype), ids)


def contenders(
    base: Base, operators: list[str], rank: int, with_peers: bool
) -> Iterator[tuple[str, Contender]]:
    """All methods, compiled and checked; the frozen model first."""
    dtype = jax.tree.leaves(base.params)[0].dtype
    embedded = jnp.zeros((*base.ids.shape, base.model.config.width), dtype)
    alone = functools.partial(frozen, base.model)
    baseline = step(alone, embedded, base.params, base.ids)
    yield "frozen model", dataclasses.replace(baseline, trained=0)
    for operator in operators:
        apply, merged, adapters = mora(base, operator, rank)
        check(apply, merged, adapters, base.params, base.ids)
        yield f"MoRA, {operator}", step(apply, adapters, base.params, base.ids)
    if with_peers:
        yield from peers(base.model, base.params, base.ids, rank)


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


def forward(
    base: Base, operators: list[str], rank: int
) -> Iterator[tuple[str, Contender]]:
    """Logits alone: of the base, of a merged model, and with adapters."""

    def logits(params: Params, ids: Any) -> Any:
        return base.model.apply({"params": params}, ids)

    yield "base model", Contender.compile(logits, base.params, base.ids)
    plan = linen.plan(base.model, {"params": base.params}, None, base.ids)
    adapters = random_like(mora_jax.init(plan), 0.01)
    merge = jax.jit(lambda params, adapters: mora_jax.merge(params, adapters, plan))
    merged = merge(base.params, adapters)
    yield "merged model", Contender.compile(logits, merged, base.ids)
    for operator in operators:
        apply, _, adapters = mora(base, operator, rank)
        one = Contender.compile(
            apply, adapters, base.params, base.ids, trained=adapters
        )
        yield f"MoRA, {operator}", one


def peers(
    model: smollm2.Llama, params: Params, ids: np.ndarray, rank: int
) -> Iterator[tuple[str, Contender]]:
    """What MoRA is compared with."""
    config = MoRAConfig(rank=rank, operator={"name": "rotation", "truncate": True})
    plan = linen.plan(model, {"params": params}, config, ids)

    def random(*shape: int) -> jax.Array:
        return random_like(jax.ShapeDtypeStruct(shape, jnp.float32), 0.01)

    ms = {spec.name: random(*spec.shape) for spec in plan.specs}
    for spec in plan.specs:  # what is timed as published is our operator
        x, m = random(4, spec.in_features), ms[spec.name]
        expected = spec.operator.apply(m, x)
        np.testing.assert_allclose(
            rotation_as_published(spec, m, x), expected, atol=1e-5
        )
    lora = {
        spec.name: (random(spec.in_features, rank), random(rank, spec.out_features))
        for spec in plan.specs
    }
    qwix, qwix_adapters = teach_facts.lora(ids, rank, 0, model)
    flax, flax_adapters, flax_rest = lora_of_flax(model.config, rank, params)
    flat = flatten_dict(params, sep="/")
    kernels = {spec.name: flat.pop(spec.name) for spec in plan.specs}

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
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[64], help="of each sequence"
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[8], help="budgets, as LoRA's rank"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="base's"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--operators", nargs="*", default=list(OPERATORS))
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--no-forward", dest="forward", action="store_false")
    parser.add_argument("--out", type=Path, default=Path("out/train_step.json"))
    parser.add_argument(
        "--add-to", type=Path, help="a file of an earlier run, to go into --out as well"
    )
    args = parser.parse_args()
    if args.quick:
        args.layers, args.rounds = 4, 5
    for name in ("layers", "batch", "tokens", "ranks", "rounds"):
        for value in np.atleast_1d(getattr(args, name)):
            if value < 1:
                parser.error(f"--{name} must be at least 1, got {value}")
    for operator in args.operators:
        if operator not in OPERATORS:
            parser.error(f"--operators must be of {list(OPERATORS)}, got {operator!r}")
    return args


def main() -> None:
    """Compile and check all, run them in turns, and report: one table after another."""
    args = arguments()
    rows: list[dict[str, Any]] = []
    if args.add_to:
        rows = json.loads(args.add_to.read_text())["results"]
    for tokens, rank in itertools.product(args.tokens, args.ranks):
        base = Base.make(args.layers, args.batch, tokens, args.dtype)
        sizes = {"tokens": args.batch * tokens, "rank": rank}
        made = {"step": contenders(base, args.operators, rank, args.peers)}
        if args.forward:
            made["forward"] = forward(base, args.operators, rank)
        totals = {"step": 1 + len(args.operators) + 5 * args.peers}
        for kind, entered in made.items():
            title = f"{kind}, {args.batch} x {tokens} tokens, r = {rank}"
            total = totals.get(kind, 2 + len(args.operators))
            entered = dict(tqdm(entered, f"compiling: {title}", total))
            race(entered, args.rounds)
            table = results(entered)
            show(table, title)
            rows += [{"kind": kind, **sizes, **row} for row in table]
    skipped = "out", "quick", "add_to"
    settings = {k: v for k, v in vars(args).items() if k not in skipped}
    save(rows, settings, args.out)
    steps = [row for row in rows if row["kind"] == "step"]
    if len({(row["tokens"], row["rank"]) for row in steps}) == 1:
        plot(steps, args.out.with_suffix(".png"))
    else:
        plot_lines(steps, ("tokens", "rank"), args.out.with_suffix(".png"))
    print(f"\nfigures and plot beside {args.out}")


if __name__ == "__main__":
    main()
