r"""Claim: the wider a layer and the more its rows, the less an adapter costs.

One dense layer of each size is adapted in both ways that `execution=` knows. (It is a
short chain of such layers, so that kernels come from memory as they do in a model.) A
step is a forward pass, and a backward pass to the adapter and the input; the baseline
is the same without an adapter. Each adapter is first checked against the merged kernel;
then all run in turns. You will see the time of each way relative to the baseline, next
to what a model of the cost says that knows only arithmetic and memory traffic, and
which way `execution="auto"` takes.

    python -m benchmarks.layer.one_layer --quick

For an accelerator, use layers as large as in Llama-8B:

    python -m benchmarks.layer.one_layer --dtype bfloat16 --rows 8192 32768 \
        --kernels 4096x4096 4096x14336 14336x4096
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import mora_jax
from benchmarks.common import harness
from benchmarks.common.by_hand import lora_by_hand
from benchmarks.common.cost import WAYS, Cost, way_of_auto
from benchmarks.common.harness import Contender, Row, check_close, race
from models.options import positive
from mora_jax import FrozenDense, MoRAConfig
from mora_jax.operators import OPERATORS


@dataclasses.dataclass(frozen=True)
class Case:
    """The layer of one table."""

    ins: int
    outs: int
    rows: int
    rank: int
    dtype: str

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The kernels of the chain, there and back, about 64 MB in all."""
        back = [(self.ins, self.outs)]
        if self.ins != self.outs:
            back.append((self.outs, self.ins))
        size = jnp.dtype(self.dtype).itemsize * self.ins * self.outs
        return back * max(1, min(8, 64_000_000 // (size * len(back))))

    def random(self, *shape: int, scale: float = 1.0) -> jax.Array:
        """Normal random numbers."""
        rng = np.random.default_rng(sum(shape))
        return jnp.asarray(scale * rng.standard_normal(shape), self.dtype)

    def kernels(self) -> list[jax.Array]:
        """The kernels of the chain, no two of them alike."""
        return [
            self.random(ins, outs, scale=ins**-0.5) * (1 + k / 8)
            for k, (ins, outs) in enumerate(self.sizes)
        ]


def bandwidth() -> float:
    """Bytes a second that an elementwise operation reads and writes."""
    # A layer's worth: it fits into a CPU's caches, and not into an accelerator's.
    size = 2**22 if jax.default_backend() == "cpu" else 2**28
    x = jnp.ones(size, jnp.float32)
    copy = Contender.compile(lambda x: x * 2, x)
    race({"copy": copy}, 5, show_progress=False)
    return 2 * x.nbytes / float(np.median(copy.seconds))


def step(
    product: Callable[[Any, jax.Array, jax.Array], jax.Array],
    adapters: list[Any],
    kernels: list[jax.Array],
    x: jax.Array,
) -> Contender:
    """Gradients of adapters and input, of a number that depends on all outputs."""

    def value(adapters: list[Any], kernels: list[jax.Array], x: jax.Array) -> Any:
        for adapter, kernel in zip(adapters, kernels, strict=True):
            x = product(adapter, kernel, x)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    grad = jax.value_and_grad(value, argnums=(0, 2))
    return Contender.compile(grad, adapters, kernels, x, trained=adapters)


def lora(adapter: Any, kernel: jax.Array, x: jax.Array) -> jax.Array:
    """A dense layer with LoRA."""
    return x @ kernel + lora_by_hand(adapter, x, kernel.shape[1])


def mora(config: MoRAConfig, m: Any, kernel: jax.Array, x: jax.Array) -> Any:
    """A dense layer with MoRA."""
    frozen = FrozenDense.from_config(kernel, config=config)
    return mora_jax.mora_apply({"kernel_mora": m}, frozen, x)


def contenders(case: Case, operators: list[str]) -> Iterator[tuple[str, Contender]]:
    """The layer alone, each operator both ways, and LoRA."""
    kernels, x = case.kernels(), case.random(case.rows, case.ins)
    plain = [None] * len(kernels)
    yield "no adapter", step(lambda _, kernel, x: x @ kernel, plain, kernels, x)
    for operator in operators:
        config = MoRAConfig(rank=case.rank, operator=operator)
        layers = [FrozenDense.from_config(kernel, config=config) for kernel in kernels]
        ms = [mora_jax.init(layer)["kernel_mora"].m + 0.01 for layer in layers]
        for way in WAYS:
            chosen = dataclasses.replace(config, execution=way)
            product = functools.partial(mora, chosen)
            for m, layer, kernel in zip(ms[:2], layers, kernels, strict=False):
                merged = kernel + mora_jax.delta_weight({"kernel_mora": m}, layer)
                rows = case.random(8, kernel.shape[0])
                check_close(product(m, kernel, rows), rows @ merged.astype(x.dtype))
            yield f"{operator}, {way}", step(product, ms, kernels, x)

    def factor(*shape: int) -> jax.Array:
        return 0.1 * case.random(*shape).astype(jnp.float32)

    shapes, rank = [kernel.shape for kernel in kernels], case.rank
    pairs = [(factor(ins, rank), factor(rank, outs)) for ins, outs in shapes]
    yield f"LoRA {case.rank}", step(lora, pairs, kernels, x)


def added_costs(case: Case, method: str) -> tuple[list[Cost], bool]:
    """Costs that a method adds to each layer, and whether "auto" takes it."""
    itemsize = jnp.dtype(case.dtype).itemsize
    operator, _, way = method.partition(", ")
    if way:
        config = MoRAConfig(rank=case.rank, operator=operator)
        shapes = [jax.ShapeDtypeStruct(size, case.dtype) for size in case.sizes]
        specs = [mora_jax.plan({"kernel": s}, config)["kernel"] for s in shapes]
        costs = [Cost.adapter(spec, case.rows, way, itemsize) for spec in specs]
        return costs, way_of_auto(specs[-1], case.rows, case.dtype) == way
    if method.startswith("LoRA"):
        sizes = (case.rank, case.rows, itemsize)
        return [Cost.lora(*size, *sizes) for size in case.sizes], False
    return [], False


def tabulate(case: Case, entered: dict[str, Contender], speed: float) -> list[Row]:
    """Measured times next to modelled ones, at the first contender's rate."""
    first = next(iter(entered.values()))
    itemsize = jnp.dtype(case.dtype).itemsize
    bases = [Cost.dense(*size, case.rows, itemsize) for size in case.sizes]
    measured = float(np.median(first.seconds))
    traffic = sum(b.bytes for b in bases) / speed
    rate = sum(b.flops for b in bases) / max(measured - traffic, measured / 2)
    rows = []
    for name, contender in entered.items():
        costs, is_auto = added_costs(case, name)
        added = sum(cost.seconds(rate, speed) for cost in costs)
        seconds = float(np.median(contender.seconds))
        rows.append(
            {
                "method": name,
                "kernel": f"{case.ins}x{case.outs}",
                "rows": case.rows,
                "rank": case.rank,
                "parameters": contender.trained,
                "milliseconds": 1e3 * seconds / len(case.sizes),
                "time": harness.ratio(contender, first),
                "model": 1 + added / measured,
                "auto": "auto" if is_auto else "",
            }
        )
    return rows


def kernel_shape(text: str) -> tuple[int, int]:
    """A shape such as 1024x4096."""
    ins, _, outs = text.partition("x")
    if not (ins.isdigit() and outs.isdigit() and int(ins) and int(outs)):
        raise argparse.ArgumentTypeError(f"must be like 1024x4096, got {text!r}")
    return int(ins), int(outs)


def arguments() -> argparse.Namespace:
    """The options."""
    parser = harness.options(__doc__, "out/one_layer.json")
    add, every = parser.add_argument, list(OPERATORS)
    sizes = [(1024, 1024), (2048, 2048), (4096, 4096)]
    add("--quick", action="store_true", help="one size, in a minute")
    add("--kernels", type=kernel_shape, nargs="+", default=sizes)
    add("--rows", type=positive, nargs="+", default=[128, 512, 2048])
    add("--ranks", type=positive, nargs="+", default=[8])
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--rounds", type=positive, default=9)
    add("--operators", nargs="+", choices=every, default=every)
    args = parser.parse_args()
    if args.quick:
        args.kernels, args.rows, args.rounds = [(1024, 1024)], [512], 5
        args.operators = ["sharing", "rotation"]
    return args


def main() -> None:
    """Print a table for each size as soon as it is measured."""
    args = arguments()
    speed, rows = bandwidth(), []
    sizes = itertools.product(args.kernels, args.rows, args.ranks)
    for (ins, outs), count, rank in sizes:
        case = Case(ins, outs, count, rank, args.dtype)
        made = contenders(case, args.operators)
        total = 2 + 2 * len(args.operators)
        entered = dict(tqdm(made, "compiling, checking", total))
        race(entered, args.rounds)
        table = tabulate(case, entered, speed)
        title = f"{ins}x{outs}, {count} rows, r = {rank}"
        columns = {title: "{method}", "ms": "{milliseconds:.2f}"}
        columns |= {"time": "{time:.2f}", "model": "{model:.2f}", "": "{auto}"}
        harness.show(columns, table)
        rows += table
    harness.save(rows, args, leave_out=["quick"], bytes_a_second=speed)


if __name__ == "__main__":
    main()
