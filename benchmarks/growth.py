r"""Claim: an adapter's cost grows as arithmetic says, and planning as the kernels do.

A chain of L square Dense layers, T rows of w features, float32, k kernels adapted: loss
and gradients by adapters and input. The floor is the same chain frozen. One size grows
at a time, and p of y ~ x^p is fitted to the floor's time and temporary memory, and to
what adapters add to them: least squares of log y on log x over the upper half of the
sizes, at least three. Beside it is the p that arithmetic gives at the same sizes; for
times two, of operations and of numbers read or written (`Cost` in one_layer.py),
between which a time should lie. With q = sqrt(2 r w), where updates are folded:

    the floor  4 L T w^2 operations, L (2 w^2 + 4 T w) numbers; holds T w numbers
    rotation   adds 2 k T w q operations: M's gradient, 2 T q max(in, out) a kernel
    sharing    adds 2 k T q^2 operations
    both       add k (4 w^2 + 2 T w) numbers: two folds, and what M's gradient reads
    memory     rotation keeps k T w numbers, sharing k T q; both, one folded kernel

So p of added operations is 1 in layers, tokens and kernels; in width 1.5 for rotation
and 1 for sharing; in rank 0.5 and 1. Sizes are such that `execution="auto"` folds all
along, T >= w.

Then, in seconds of this process's own processor time: tracing and compiling a step, its
layers one by one (p is 1, where the start of a compilation is little beside the rest)
or in nn.scan (0); and `plan` and `init` of 100 to 10,000 kernels (1), which should take
less than a second together.

Each adapted step is checked against the frozen one with merged kernels; then all sizes
run in turns. You will see tables of exponents; a JSON file and a plot are written.

    python benchmarks/growth.py --quick
"""

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from harness import Contender, check_close, race, save
from one_layer import WAYS, Cost
from tqdm import tqdm

import mora_jax
from mora_jax import MoRAConfig, Plan, linen
from mora_jax.execution import folds
from mora_jax.operators import OPERATORS
from mora_jax.products import Contraction

Row = dict[str, Any]
FLOOR, ITEM = "frozen model", 4


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a chain, its input and its adapters; without `kernels` all are adapted."""

    layers: int = 4
    width: int = 256
    rank: int = 8
    tokens: int = 1024
    kernels: int | None = None


SIZES: dict[str, tuple[Size, tuple[int, ...]]] = {
    "layers": (Size(tokens=512), (2, 4, 8, 16, 32)),
    "width": (Size(), (64, 128, 256, 512, 1024)),
    "rank": (Size(width=512), (1, 2, 4, 8, 16, 32, 64)),
    "tokens": (Size(), (256, 512, 1024, 2048, 4096)),
    "kernels": (Size(layers=16, tokens=512), (1, 2, 4, 8, 16)),
}
COMPILED = (8, 16, 32, 64, 128, 256)
"""Layers to compile, at widths that do not matter."""


class Layer(nn.Module):
    """A Dense layer as `nn.scan` wants it."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """(..., width) -> (..., width), and nothing to stack."""
        return nn.Dense(self.width, use_bias=False)(x), None


def random_like(tree: Any, scale: float) -> Any:
    """Normal numbers of the shapes of `tree`."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jnp.asarray(scale * rng.standard_normal(s.shape), s.dtype), tree
    )


def loss(apply: Callable[..., Any], *args: Any) -> jax.Array:
    """Mean square of what `apply` gives."""
    y = apply(*args)
    return jnp.mean((y[0] if isinstance(y, tuple) else y) ** 2)


def chain(size: Size, scanned: bool) -> nn.Module:
    """Its layers, in `nn.scan` or one by one."""
    if scanned:
        settings: Any = {"variable_axes": {"params": 0}, "length": size.layers}
        return nn.scan(Layer, split_rngs={"params": True}, **settings)(size.width)
    dense = functools.partial(nn.Dense, size.width, use_bias=False)
    return nn.Sequential([dense() for _ in range(size.layers)])


@dataclasses.dataclass(frozen=True)
class Step:
    """A function to compile, its arguments, and the plan of its adapters."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    plan: Plan | None = None


def steps(
    size: Size, operators: Sequence[str], scanned: bool = False
) -> dict[str, Step]:
    """Loss and gradients: of the frozen chain, and with each operator."""
    model = chain(size, scanned)
    x = random_like(jax.ShapeDtypeStruct((size.tokens, size.width), jnp.float32), 1.0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = random_like(shapes, size.width**-0.5)
    value = functools.partial(loss, model.apply)
    made = {FLOOR: Step(jax.value_and_grad(value, argnums=1), (variables, x))}
    for operator in operators:
        config = MoRAConfig(rank=size.rank, operator=operator)
        if size.kernels:
            some = tuple(f"layers_{k}/kernel" for k in range(size.kernels))
            config = dataclasses.replace(config, targets=some)
        plan = linen.plan(model, variables, config, x)
        value = functools.partial(loss, linen.wrap(model, plan))
        args = random_like(mora_jax.init(plan), 0.01), variables, x
        made[operator] = Step(jax.value_and_grad(value, argnums=(0, 2)), args, plan)
    return made


def contenders(made: Mapping[str, Step]) -> dict[str, Contender]:
    """All compiled; the gradient by x is what merged kernels give, or it raises."""
    found = {k: Contender.compile(one.function, *one.args) for k, one in made.items()}
    for method, one in made.items():
        if one.plan:
            adapters, variables, x = one.args
            merged = mora_jax.merge(variables["params"], adapters, one.plan)
            _, expected = found[FLOOR].run({"params": merged}, x)
            check_close(found[method]()[1][1], expected)
    return found


def arithmetic(size: Size, plan: Plan | None) -> dict[str, list[float]]:
    """{quantity: what it is made of}, of the floor or of what a plan adds to it."""
    rows, width = size.tokens, size.width
    if plan is None:
        times, kept = size.layers, rows * width
        cost = Cost.dense(width, width, rows, ITEM)
    else:
        spec, x = plan.specs[0], jax.ShapeDtypeStruct((rows, width), jnp.float32)
        fold = folds(spec, Contraction.from_axes("io", 2), x, x.dtype)
        features = width if spec.operator.block else spec.operator.square_rank
        times, kept = len(plan), len(plan) * rows * features + fold * width**2
        cost = Cost.adapter(spec, rows, WAYS[fold], ITEM)
    return {"time": [times * cost.flops, times * cost.bytes], "memory": [ITEM * kept]}


def figures(one: Contender, floor: Contender) -> dict[str, float]:
    """Seconds and bytes of the floor, or of what another adds to it."""
    seconds, memory = one.seconds, one.run.memory_analysis().temp_size_in_bytes
    if one is not floor:
        seconds = np.subtract(seconds, floor.seconds)
        memory -= floor.run.memory_analysis().temp_size_in_bytes
    return {"time": float(np.median(seconds)), "memory": memory}


def upper(values: Any) -> Any:
    """The upper half, at least three: what exponents are fitted to."""
    return values[-max(3, math.ceil(len(values) / 2)) :]


def fit(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Of y ~ x^p the p; None where noise leaves less than two of y above zero."""
    pairs = [(a, b) for a, b in zip(upper(x), upper(y), strict=True) if b > 0]
    if len(pairs) < 2:
        return None
    by_x, by_y = np.log(pairs).T
    return float(np.polyfit(by_x, by_y, 1)[0])


def curve(names: Sequence[str], x: Any, y: Any, expected: Sequence[Any]) -> Row:
    """A row of the report, of one axis, quantity and method."""
    exponents = [round(p, 2) + 0.0 for p in expected]
    return {
        **dict(zip(("axis", "quantity", "method"), names, strict=True)),
        **{"x": list(x), "y": np.asarray(y).tolist(), "exponent": fit(x, y)},
        "arithmetic": [min(exponents), max(exponents)],
    }


def grow_steps(args: argparse.Namespace) -> list[Row]:
    """Time and memory over each size: the floor's, and what operators add."""
    return [row for axis in SIZES for row in grow_axis(axis, *SIZES[axis], args)]


def grow_axis(
    axis: str, base: Size, values: Sequence[int], args: argparse.Namespace
) -> list[Row]:
    """The same over one of them."""
    values = values[:: len(values) // 2 if args.quick else 1]
    sizes = [dataclasses.replace(base, **{axis: value}) for value in values]
    made = [steps(size, args.operators) for size in sizes]
    entered = [contenders(one) for one in tqdm(made, f"compiling, checking: {axis}")]
    for _ in tqdm(range(args.rounds), f"running: {axis}"):
        for one in entered:  # side by side, or noise would hide what is added
            race(one, 2, show_progress=False)
    rows = []
    for method in made[0]:
        found = [figures(one[method], one[FLOOR]) for one in entered]
        plans = [one[method].plan for one in made]
        counts = [arithmetic(*both) for both in zip(sizes, plans, strict=True)]
        for quantity in ("time", "memory"):
            y = [one[quantity] for one in found]
            parts = zip(*(one[quantity] for one in counts), strict=True)
            expected = [fit(values, part) for part in parts]
            rows.append(curve((axis, quantity, method), values, y, expected))
    return rows


def compile_seconds(step: Step) -> tuple[float, float]:
    """Tracing and compiling, nothing remembered."""
    jax.clear_caches()
    start = time.process_time()
    lowered = jax.jit(step.function).lower(*step.args)
    middle = time.process_time()
    lowered.compile()
    return middle - start, time.process_time() - middle


def grow_compilation(args: argparse.Namespace) -> list[Row]:
    """Tracing and compiling over layers, one by one and scanned."""
    values, rounds = COMPILED[: 3 if args.quick else None], 1 if args.quick else 3
    rows = []
    for scanned, way in enumerate(("unrolled", "scanned")):
        sizes = [Size(layers=k, width=64, tokens=64) for k in values]
        made = [steps(size, args.operators, bool(scanned)) for size in sizes]
        taken = [
            [[compile_seconds(step) for step in one.values()] for one in made]
            for _ in tqdm(range(rounds), f"compiling: {way}")
        ]
        median = np.median(taken, axis=0)  # of sizes, methods, and the two quantities
        for m, method in enumerate(made[0]):
            for k, quantity in enumerate(("trace", "compile")):
                names = "layers", f"{quantity}, {way}", method
                rows.append(curve(names, values, median[:, m, k], [1.0 - scanned]))
    return rows


def kernels(count: int) -> Any:
    """Shapes of as many kernels, seven in each layer."""
    sizes = {f"self_attn/{p}_proj": (64, 64) for p in "qkvo"}
    sizes |= {f"mlp/{p}_proj": (64, 192) for p in ("gate", "up")}
    sizes |= {"mlp/down_proj": (192, 64)}
    flat, layer = {}, [*sizes.items()]
    for k in range(count):
        name, size = layer[k % 7]
        shape = jax.ShapeDtypeStruct(size, jnp.float32)
        flat[f"model/layers/{k // 7}/{name}/kernel"] = shape
    return unflatten_dict(flat, sep="/")


def plan_seconds(shapes: Any) -> tuple[float, float, float]:
    """Of `plan`, of `init`, and of both."""
    start = time.process_time()
    plan = mora_jax.plan(shapes)
    middle = time.process_time()
    jax.block_until_ready(mora_jax.init(plan))
    end = time.process_time()
    return middle - start, end - middle, end - start


def grow_planning(args: argparse.Namespace) -> list[Row]:
    """Plans and adapters over kernels; the first round is reported apart."""
    counts, rounds = (10_000, 1_000, 100), min(args.rounds, 5)
    trees = {count: kernels(count) for count in counts}
    taken = [
        [plan_seconds(tree) for tree in trees.values()]
        for _ in tqdm(range(1 + rounds), "planning")
    ]
    first, median = taken[0][0], np.median(taken[1:], axis=0)[::-1]
    names = "plan", "init", "plan and init"
    return [
        curve(("kernels", name, "rotation"), counts[::-1], median[:, k], [1.0])
        | {"first": first[k]}
        for k, name in enumerate(names)
    ]


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "planning": grow_planning,
    "steps": grow_steps,
    "compilation": grow_compilation,
}


def show(rows: Sequence[Row], part: str) -> None:
    """Print a part's exponents as a Markdown table, with values at the largest size."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    heads = [m if part != "steps" or m == FLOOR else f"{m} adds" for m in methods]
    print(f"\n| {part} | | {' | '.join(heads)} |\n|---|---{'|---' * len(methods)}|")
    for axis, quantity in dict.fromkeys((r["axis"], r["quantity"]) for r in rows):
        some = [r for r in rows if (r["axis"], r["quantity"]) == (axis, quantity)]
        sizes = f"{axis}, {some[0]['x'][0]:,} to {some[0]['x'][-1]:,}"
        print(f"| {sizes} | {quantity} | {' | '.join(map(cell, some))} |")


def cell(row: Row) -> str:
    """Exponent, what arithmetic says, and the value at the largest size."""
    p = row["exponent"]
    measured = "noise" if p is None else f"{round(p, 2) + 0.0:.2f}"
    ends = " to ".join(dict.fromkeys(f"{p:g}" for p in row["arithmetic"]))
    unit, scale = ("MB", 1e-6) if row["quantity"] == "memory" else ("ms", 1e3)
    first = f", first {scale * row['first']:,.1f}" if "first" in row else ""
    return f"{measured} ({ends}): {scale * row['y'][-1]:,.1f}{first} {unit}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Points, fits, and the slopes that arithmetic gives (dotted), a panel for each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        kind, _, way = row["quantity"].partition(",")
        column = f"{row['axis']}, to compile" if way else row["axis"]
        column = f"{column}, to plan" if "first" in row else column
        if kind != "plan and init":
            panels.setdefault(column, {}).setdefault(kind, []).append(row)
    methods = sorted({row["method"] for row in rows}, key=lambda m: (m != FLOOR, m))
    settings: Any = {"layout": "constrained", "squeeze": False}
    settings["figsize"] = 1 + 2.4 * len(panels), 5
    figure, axes = plt.subplots(2, len(panels), **settings)
    for (column, kinds), pair in zip(panels.items(), axes.T, strict=True):
        for panel, (kind, some) in zip(pair, kinds.items(), strict=True):
            for row in some:
                draw(panel, row, f"C{methods.index(row['method'])}")
            unit = "bytes" if kind == "memory" else "s"
            panel.set(
                title=f"{kind}, {unit}", xlabel=column, xscale="log", yscale="log"
            )
            panel.set_xticks(some[0]["x"][::2], map(str, some[0]["x"][::2]))
            panel.minorticks_off()
    for k, method in enumerate(methods):
        axes[0, 0].plot([], [], "o-", color=f"C{k}", label=method)
    figure.legend(loc="outside lower center", ncols=len(methods))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(panel: Any, row: Row, colour: str) -> None:
    """One curve: all points, the fit, and dotted slopes through its middle."""
    x, y = np.asarray(row["x"], float), np.asarray(row["y"], float)
    panel.plot(x, y, "s" if "scanned" in row["quantity"] else "o", color=colour, ms=4)
    if row["exponent"] is None:
        return
    x, y = (np.asarray(upper(one)) for one in (x, y))
    middle = [np.exp(np.log(one[y > 0]).mean()) for one in (x, y)]
    slopes = {"-": [row["exponent"]], ":": sorted(set(row["arithmetic"]))}
    for style, several in slopes.items():
        for p in several:
            panel.plot(x, middle[1] * (x / middle[0]) ** p, style, color=colour, lw=1)


def arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few sizes, half a minute")
    parser.add_argument("--rounds", type=int, default=7, help="of two each")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument(
        "--operators", nargs="+", choices=[*OPERATORS], default=["sharing", "rotation"]
    )
    parser.add_argument("--out", type=Path, default=Path("out/growth.json"))
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    args.rounds = min(args.rounds, 2) if args.quick else args.rounds
    return args


def main() -> None:
    """Measure and print one part after another, then write all."""
    args = arguments()
    jax.config.update("jax_enable_compilation_cache", False)  # it would hide compiling
    rows: list[Row] = []
    for part in args.parts:
        made = PARTS[part](args)
        show(made, part)
        rows += made
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    save(rows, settings, args.out)
    plot(rows, args.out.with_suffix(".png"))
    print(f"\nfigures and plot beside {args.out}")


if __name__ == "__main__":
    main()
