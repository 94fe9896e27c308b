r"""Claim: the wider a layer and the more its rows, the less an adapter costs.

One dense layer of each size (a short chain of them, so that kernels come from memory as
in a model), adapted both ways that `execution=` knows: forward, and backward to the
adapter and the input. The baseline is the same without an adapter. First each adapter
is checked against the merged kernel, then all run in turns. You will see the
time of each way relative to the baseline, beside what a model of the cost gives that
knows arithmetic and memory traffic alone, and which way `execution="auto"` takes.

    python benchmarks/one_layer.py --quick

For an accelerator, layers as large as those of Llama-8B:

    python benchmarks/one_layer.py --dtype bfloat16 --rows 8192 32768 \
        --kernels 4096x4096 4096x14336 14336x4096
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import Contender, check_close, race, ratio, save
from tqdm import tqdm

from mora_jax import FrozenDense, MoRAConfig, delta_weight, init, mora_apply
from mora_jax.execution import folds
from mora_jax.operators import OPERATORS
from mora_jax.products import Contraction
from mora_jax.spec import AdapterSpec

WAYS = ("activation", "fold")


@dataclasses.dataclass(frozen=True)
class Case:
    """One table's layer."""

    ins: int
    outs: int
    rows: int
    dtype: str

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Of the kernels in the chain: there and back, some 64 MB of them."""
        back = [(self.ins, self.outs)]
        if self.ins != self.outs:
            back.append((self.outs, self.ins))
        size = jnp.dtype(self.dtype).itemsize * self.ins * self.outs
        return back * max(1, min(8, 64_000_000 // (size * len(back))))

    def random(self, *shape: int, scale: float = 1.0) -> jax.Array:
        """Normal numbers."""
        rng = np.random.default_rng(sum(shape))
        return jnp.asarray(scale * rng.standard_normal(shape), self.dtype)

    def kernels(self) -> list[jax.Array]:
        """Of the chain, no two of them alike."""
        return [
            self.random(ins, outs, scale=ins**-0.5) * (1 + k / 8)
            for k, (ins, outs) in enumerate(self.sizes)
        ]


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations and bytes, forward and backward: what cannot be avoided."""

    flops: float
    bytes: float

    @classmethod
    def dense(cls, ins: int, outs: int, rows: int, itemsize: int) -> "Cost":
        """The layer alone: its output and the gradient of its input."""
        traffic = 2 * ins * outs + 2 * rows * (ins + outs)
        return cls(4 * rows * ins * outs, itemsize * traffic)

    @classmethod
    def adapter(cls, spec: AdapterSpec, rows: int, way: str, itemsize: int) -> "Cost":
        """What the adapter adds; see benchmarks/README.md."""
        op, q = spec.operator, spec.operator.square_rank
        ins, outs = op.in_features, op.out_features
        blocks = min(-(-ins // q), -(-outs // q)) if op.block else 1
        by_m = 2 * rows * q * q * blocks
        # C and D as matrices, where they are no copies
        around = 2 * q * (ins + outs) if op.name in ("orthogonal", "hadamard") else 0
        if way == "activation":
            traffic = 3 * rows * (ins + outs)  # x, y twice; their gradients
            return cls(3 * by_m + 2 * rows * around, itemsize * traffic)
        matrices = 4 * ins * q * outs if around else 0
        traffic = 4 * ins * outs + rows * (ins + outs)  # two folds; x and y's gradient
        return cls(by_m + rows * around + matrices, itemsize * traffic)

    @classmethod
    def lora(cls, ins: int, outs: int, rank: int, rows: int, itemsize: int) -> "Cost":
        """LoRA: three products each with A and B."""
        traffic = 3 * rows * (ins + outs) + rows * (ins + outs)
        return cls(6 * rows * rank * (ins + outs), itemsize * traffic)

    def seconds(self, rate: float, bandwidth: float) -> float:
        """One after the other, as operations of few flops a byte cannot overlap."""
        return self.flops / rate + self.bytes / bandwidth


def bandwidth() -> float:
    """Bytes a second of an elementwise operation, read and written."""
    # A layer's worth: caches of a CPU hold it, those of an accelerator should not.
    size = 2**22 if jax.default_backend() == "cpu" else 2**28
    x = jnp.ones(size, jnp.float32)
    copy = Contender.compile(lambda x: x * 2, x)
    race({"copy": copy}, 5, show_progress=False)
    return 2 * x.nbytes / float(np.median(copy.seconds))


def chain(
    product: Callable[[Any, jax.Array, jax.Array], jax.Array],
) -> Callable[..., jax.Array]:
    """(adapters, kernels, x) -> a number that depends on all layers' outputs."""

    def value(adapters: list[Any], kernels: list[jax.Array], x: jax.Array) -> Any:
        for adapter, kernel in zip(adapters, kernels, strict=True):
            x = product(adapter, kernel, x)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    return value


def step(product: Any, adapters: list[Any], kernels: Any, x: Any) -> Contender:
    """Gradients by adapters and input."""
    grad = jax.value_and_grad(chain(product), argnums=(0, 2))
    return Contender.compile(grad, adapters, kernels, x, trained=adapters)


def plain(adapter: None, kernel: jax.Array, x: jax.Array) -> jax.Array:
    """A dense layer."""
    return x @ kernel


def lora(adapter: Any, kernel: jax.Array, x: jax.Array) -> jax.Array:
    """The same with LoRA, without its factor."""
    a, b = (one.astype(x.dtype) for one in adapter)
    return x @ kernel + (x @ a) @ b


def adapted(config: MoRAConfig, m: Any, kernel: jax.Array, x: jax.Array) -> Any:
    """The same with MoRA."""
    frozen = FrozenDense.from_config(kernel, config=config)
    return mora_apply({"kernel_mora": m}, frozen, x)


def contenders(
    case: Case, operators: list[str], rank: int
) -> Iterator[tuple[str, Contender]]:
    """The layer alone, each operator both ways, and LoRA."""
    kernels, x = case.kernels(), case.random(case.rows, case.ins)
    yield "no adapter", step(plain, [None] * len(kernels), kernels, x)
    for operator in operators:
        config = MoRAConfig(rank=rank, operator=operator)
        ms = []
        for kernel in kernels:
            frozen = FrozenDense.from_config(kernel, config=config)
            ms.append(jax.tree.map(lambda m: m + 0.01, init(frozen)["kernel_mora"]))
        for way in WAYS:
            product = functools.partial(
                adapted, dataclasses.replace(config, execution=way)
            )
            for m, kernel in zip(ms[:2], kernels[:2], strict=False):
                frozen = FrozenDense.from_config(kernel, config=config)
                merged = kernel + delta_weight({"kernel_mora": m}, frozen)
                rows = case.random(8, kernel.shape[0])
                check_close(product(m, kernel, rows), rows @ merged.astype(x.dtype))
            yield f"{operator}, {way}", step(product, ms, kernels, x)
    pairs = [
        (
            case.random(k.shape[0], rank).astype(jnp.float32),
            case.random(rank, k.shape[1]).astype(jnp.float32) * 0.01,
        )
        for k in kernels
    ]
    yield f"LoRA {rank}", step(lora, pairs, kernels, x)


def tabulate(
    case: Case, entered: dict[str, Contender], rank: int, speed: float
) -> list[dict[str, Any]]:
    """Measured beside modelled; the floor of the same run gives the rate."""
    first = next(iter(entered.values()))
    itemsize = jnp.dtype(case.dtype).itemsize
    bases = [Cost.dense(*size, case.rows, itemsize) for size in case.sizes]
    measured = float(np.median(first.seconds))
    traffic = sum(b.bytes for b in bases) / speed
    rate = sum(b.flops for b in bases) / max(measured - traffic, measured / 2)
    rows = []
    for name, one in entered.items():
        operator, _, way = name.partition(", ")
        added, auto = 0.0, ""
        for ins, outs in case.sizes:
            if way:
                config = MoRAConfig(rank=rank, operator=operator)
                spec = AdapterSpec.from_config(config, (ins, outs))
                cost = Cost.adapter(spec, case.rows, way, itemsize)
                x = jax.ShapeDtypeStruct((case.rows, ins), case.dtype)
                product = Contraction.from_axes("io", 2)
                chosen = WAYS[folds(spec, product, x, x.dtype)]
                auto = "auto" if chosen == way else ""
            elif name.startswith("LoRA"):
                cost = Cost.lora(ins, outs, rank, case.rows, itemsize)
            else:
                continue
            added += cost.seconds(rate, speed)
        rows.append(
            {
                "method": name,
                "kernel": f"{case.ins}x{case.outs}",
                "rows": case.rows,
                "rank": rank,
                "parameters": one.trained,
                "milliseconds": 1e3 * float(np.median(one.seconds)) / len(case.sizes),
                "time": ratio(one, first),
                "model": 1 + added / measured,
                "auto": auto,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print one case's rows as a Markdown table."""
    title = "{kernel}, {rows} rows, r = {rank}".format(**rows[0])
    print(f"\n| {title} | ms | time | model | |\n|---|---|---|---|---|")
    for row in rows:
        print(
            "| {method} | {milliseconds:.2f} | {time:.2f} | {model:.2f} | {auto} |"
            "".format(**row)
        )


def kernel_shape(text: str) -> tuple[int, int]:
    """A shape such as 1024x4096."""
    ins, _, outs = text.partition("x")
    if not (ins.isdigit() and outs.isdigit() and int(ins) and int(outs)):
        raise argparse.ArgumentTypeError(f"must be like 1024x4096, got {text!r}")
    return int(ins), int(outs)


def arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one size, a minute")
    parser.add_argument(
        "--kernels",
        type=kernel_shape,
        nargs="+",
        default=[(1024, 1024), (2048, 2048), (4096, 4096)],
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--operators", nargs="+", choices=list(OPERATORS), default=list(OPERATORS)
    )
    parser.add_argument("--out", type=Path, default=Path("out/one_layer.json"))
    args = parser.parse_args()
    if args.quick:
        args.kernels, args.rows, args.rounds = [(1024, 1024)], [512], 5
        args.operators = ["sharing", "rotation"]
    for name, values in (
        ("rows", args.rows),
        ("ranks", args.ranks),
        ("rounds", [args.rounds]),
    ):
        if min(values) < 1:
            parser.error(f"--{name} must be at least 1, got {min(values)}")
    return args


def main() -> None:
    """A table for each size, as soon as it is measured."""
    args = arguments()
    speed, report = bandwidth(), []
    for ins, outs in args.kernels:
        for rows in args.rows:
            for rank in args.ranks:
                case = Case(ins, outs, rows, args.dtype)
                total = 2 + 2 * len(args.operators)
                made = contenders(case, args.operators, rank)
                entered = dict(tqdm(made, "compiling, checking", total))
                race(entered, args.rounds)
                table = tabulate(case, entered, rank, speed)
                show(table)
                report += table
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "quick")}
    save(report, {**settings, "bytes_a_second": speed}, args.out)
    print(f"\nfigures in {args.out}")


if __name__ == "__main__":
    main()
