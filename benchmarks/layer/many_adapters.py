"""Claim: a different adapter for each row costs little more than one for all rows.

One dense layer serves a batch whose rows choose among N adapters: by
`serving.select`, by kernels into which the adapters are merged (a copy for each of
them), and by LoRAs: of equal budget, which is what somebody would train instead, by
`serving.select` too; and of rank q, which is what MoRA's deltas are when they are
exported. Beside them stand the layer alone, and the layer with one adapter for all
rows. All are first checked against each other; then they run in turns, once for
decoding (a token for each row) and once for reading prompts. You will see seconds, the
time relative to the layer alone, and the memory that an adapter takes. A method whose
adapters need more memory than `--most-megabytes` is left out.

    python -m benchmarks.layer.many_adapters --quick

With `--chips` the same programs, in bfloat16, are compiled for chips that this machine
does not have, and priced as in `chips`: `.venv-chips` can do that, and `make
bench-chips` sets it up.

    python -m benchmarks.layer.many_adapters --chips v5e h100 --width 4096
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import mora_jax
from benchmarks.common import harness
from benchmarks.common.harness import Contender, Row, check_close, race
from models.options import positive
from mora_jax import MoRAConfig, linen, serving
from mora_jax._jax.tracing import chosen_platform, current_platform

FROZEN, ONE, EACH = "no adapter", "one adapter", "one for each row"
EQUAL, MERGED, LORA = "LoRA of equal budget", "merged copies", "LoRA of rank q"


@dataclasses.dataclass(frozen=True)
class Case:
    """The layer and the batch of one table."""

    width: int
    rank: int
    operator: str
    rows: int
    tokens: int
    slots: int
    dtype: Any

    @property
    def lora(self) -> "Case":
        """The same with a LoRA of this library, of the same budget."""
        return dataclasses.replace(self, operator="low_rank")

    @property
    def apply(self) -> Any:
        """The adapted layer."""
        layer = nn.Dense(self.width, use_bias=False, dtype=self.dtype)
        params = {"kernel": self.shape(self.width, self.width)}
        config = MoRAConfig(
            rank=self.rank, operator=self.operator, param_dtype=self.dtype
        )
        return linen.wrap(layer, mora_jax.plan(params, config))

    def shape(self, *sizes: int) -> jax.ShapeDtypeStruct:
        """The shape of an array."""
        return jax.ShapeDtypeStruct(sizes, self.dtype)

    def programs(self) -> Iterator[tuple[str, Callable[..., Any], Any]]:
        """Each method, its function of (adapters, w, x, index), and the adapters."""
        apply, n, width = self.apply, self.slots, self.width
        (spec,) = apply.plan.values()
        one = jax.eval_shape(lambda: mora_jax.init(apply.plan))
        q = spec.operator.square_rank
        pair = self.shape(n, width, q), self.shape(n, q, width)

        def adapted(adapters: Any, w: Any, x: Any, index: Any) -> Any:
            return apply(adapters, {"params": {"kernel": w}}, x)

        yield FROZEN, lambda _, w, x, index: x @ w, ()
        yield ONE, adapted, one
        yield EACH, *self.by_row()
        yield EQUAL, *self.lora.by_row()
        yield MERGED, lambda w, _, x, i: each_row(i, x, w), self.shape(n, width, width)
        yield LORA, lambda ab, w, x, i: x @ w + each_row(i, x, *ab), pair

    def by_row(self) -> tuple[Callable[..., Any], Any]:
        """The layer whose rows choose among adapters in slots, and the slots."""
        apply = self.apply
        new = [mora_jax.init(apply.plan)]
        slots = jax.eval_shape(lambda: serving.stack(new, slots=self.slots))

        def serve(stacked: Any, w: Any, x: Any, index: Any) -> Any:
            variables = {"params": {"kernel": w}}
            own = serving.select(stacked, index)
            return jax.vmap(lambda a, x: apply(a, variables, x[None])[0])(own, x)

        return serve, slots


def each_row(index: jax.Array, x: jax.Array, *kernels: jax.Array) -> jax.Array:
    """Products of each row with kernels of its own, in the way that is fast.

    Args:
      index: The number of the kernels for each row, (B,).
      x: (B, tokens, in).
      *kernels: Arrays (N, in, out), by which the rows are multiplied in turn.
    """

    def at_once(x: jax.Array, index: jax.Array) -> jax.Array:
        for w in kernels:
            x = jnp.einsum("bti,bio->bto", x, w[index])
        return x

    def in_loop(x: jax.Array, index: jax.Array) -> jax.Array:
        def one(row: Any) -> jax.Array:
            h, k = row
            for w in kernels:
                h = h @ jax.lax.dynamic_index_in_dim(w, k, keepdims=False)
            return h

        return jax.lax.map(one, (x, index))

    # A CPU copies kernels and multiplies batches of them slowly.
    return (in_loop if current_platform() == "cpu" else at_once)(x, index)


def megabytes(shapes: Any) -> float:
    """The memory of arrays."""
    return sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(shapes)) / 1e6


def kept(case: Case, most: float) -> Iterator[tuple[str, Callable[..., Any], Any]]:
    """The methods whose adapters fit into memory."""
    return (each for each in case.programs() if megabytes(each[2]) <= most)


def check(operator: str) -> None:
    """Raise SystemExit unless all methods give the same for the same deltas."""
    case = Case(48, 2, operator, 3, 2, 4, jnp.float32)
    programs = {name: run for name, run, _ in case.programs()}
    new = mora_jax.init(case.apply.plan)
    random = np.random.default_rng(0)
    w, x = (random.normal(size=s).astype("f4") for s in ((48, 48), (3, 2, 48)))
    adapters = [
        jax.tree.map(lambda m: jnp.asarray(random.normal(size=m.shape), m.dtype), new)
        for _ in range(case.slots)
    ]
    deltas = [mora_jax.delta_weight(one)["kernel"] for one in adapters]
    index = np.array([3, 0, 3])
    got = programs[EACH](serving.stack(adapters), w, x, index)
    expected = programs[MERGED](w + jnp.stack(deltas), w, x, index)
    check_close(got, expected)
    pairs = jnp.stack([jnp.eye(48)] * case.slots), jnp.stack(deltas)
    check_close(programs[LORA](pairs, w, x, index), expected)
    for row, k in enumerate(index):
        check_close(programs[ONE](adapters[k], w, x, index)[row], expected[row])


def measured(case: Case, args: argparse.Namespace) -> list[Row]:
    """A row for each method, by the clock."""
    random = np.random.default_rng(0)

    def numbers(shape: Any) -> jax.Array:
        made = random.standard_normal(shape.shape, dtype=np.float32)
        return jnp.asarray(case.width**-0.5 * made, shape.dtype)

    shared = numbers(case.shape(case.width, case.width))
    x = numbers(case.shape(case.rows, case.tokens, case.width))
    index = jnp.asarray(random.integers(0, case.slots, case.rows), jnp.int32)
    contenders, sizes = {}, {}
    for name, run, shapes in kept(case, args.most_megabytes):
        adapters = jax.tree.map(numbers, shapes)
        contenders[name] = Contender.compile(run, adapters, shared, x, index)
        sizes[name] = megabytes(shapes)
    race(contenders, args.rounds, show_progress=False)
    found = harness.results(contenders)
    return [row | {"megabytes": sizes[row["method"]]} for row in found]


def chip_shardings(chips: list[str]) -> dict[str, Any]:
    """{chip: the sharding of whole arrays on it}; before JAX computes anything."""
    if not chips:
        return {}
    from benchmarks.chips import topologies

    return {chip: topologies.on_first(topologies.devices(chip)) for chip in chips}


def priced(case: Case, chip: str, where: Any, args: argparse.Namespace) -> list[Row]:
    """A row for each method, by a roofline of its program for a chip."""
    from benchmarks.chips.roofline import measure
    from benchmarks.chips.topologies import platform_of

    shared = case.shape(case.width, case.width)
    x = case.shape(case.rows, case.tokens, case.width)
    index = jax.ShapeDtypeStruct((case.rows,), jnp.int32)
    rows: list[Row] = []
    for name, run, shapes in kept(case, args.most_megabytes):
        placed = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
            (shapes, shared, x, index),
        )
        # The baselines choose as they are traced.
        token = chosen_platform.set(platform_of(chip))
        lowered = jax.jit(run).lower(*placed)
        chosen_platform.reset(token)
        seconds = measure(lowered.compile(), chip).seconds
        time = seconds / rows[0]["seconds"] if rows else 1.0
        row = {"method": name, "seconds": seconds, "time": time}
        rows.append(row | {"megabytes": megabytes(shapes)})
    return rows


COLUMNS = {
    "method": "{method}",
    "milliseconds": "{milliseconds:.3f}",
    "relative to no adapter": "{time:.2f}",
    "tokens / s": "{throughput:,.0f}",
    "MB for each adapter": "{each:.3f}",
}


def main(argv: list[str] | None = None) -> None:
    """Check, measure, print and save."""
    parser = harness.options(__doc__, "out/many_adapters.json")
    parser.add_argument("--width", type=positive, default=2048)
    parser.add_argument("--rank", type=positive, default=8)
    parser.add_argument("--operator", default="auto")
    many = {"type": positive, "nargs": "+"}
    parser.add_argument("--slots", **many, default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--decode", type=positive, default=32, help="rows of 1 token")
    parser.add_argument("--prefill", **many, default=[4, 256], help="rows and tokens")
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--most-megabytes", type=positive, default=600)
    parser.add_argument("--chips", nargs="+", default=[], choices=["v5e", "h100"])
    parser.add_argument("--quick", action="store_true", help="a small layer")
    args = parser.parse_args(argv)
    if len(args.prefill) != 2:
        parser.error(f"--prefill must be rows and tokens, got {args.prefill}")
    if args.quick:
        args.width, args.rank, args.slots, args.rounds = 128, 2, [1, 8], 3
        args.prefill = [2, 16]
    places = chip_shardings(args.chips)
    for operator in (args.operator, "low_rank"):
        check(operator)
    prompts = args.prefill[0], args.prefill[1]
    phases = {"decode": (args.decode, 1), "prefill": prompts}
    results: list[Row] = []
    for chip, phase, slots in itertools.product(args.chips or [""], phases, args.slots):
        dtype = jnp.bfloat16 if chip else jnp.float32
        rows, tokens = phases[phase]
        layer = args.width, args.rank, args.operator
        case = Case(*layer, rows, tokens, slots, dtype)
        if chip:
            found = priced(case, chip, places[chip], args)
        else:
            found = measured(case, args)
        for row in found:
            copies = 1 if row["method"] in (FROZEN, ONE) else slots
            row |= {"phase": phase, "slots": slots, "chip": chip}
            row |= {"milliseconds": 1e3 * row["seconds"]}
            row |= {"each": row["megabytes"] / copies}
            row |= {"throughput": case.rows * case.tokens / row["seconds"]}
        title = f"{phase}, {case.rows} rows x {case.tokens} tokens, N = {slots}"
        harness.show(COLUMNS, found, f"{title}, {chip}" if chip else title)
        results += found
    harness.save(results, args)


if __name__ == "__main__":
    main()
