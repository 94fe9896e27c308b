"""Claim: on TPUs and an H100 a Llama costs less with MoRA than with LoRA.

XLA compiles a Llama and a dense layer in bfloat16 for chips that this machine does not
have, and `roofline` reads from the compiled programs what they cost there: products in
the compiler's cycles, bytes at the bandwidth of the memory. Nothing is run on a chip.
First the same programs run on this CPU at small sizes, and must give what float64
gives. You will see a table for each layer and model, with the time relative to the
frozen layer or model, and temporary memory; then the seconds to compile a deeper model.
Last come training steps on eight TPUs, with the bytes that a device receives. A JSON
file and a plot are written as well.

`make bench-chips` sets up what it needs. NVIDIA's compiler is installed by hand;
without it the H100 is left out.

    python -m benchmarks.chips.compare --quick
    python -m benchmarks.chips.compare --chips v5e v6e --only llama
    python -m benchmarks.chips.compare --chips v5e v5p --only meshes
"""

import argparse
import dataclasses
import itertools
import textwrap
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from benchmarks.chips import on_meshes, topologies
from benchmarks.chips.programs import FROZEN, Layer, Llama, Method, gradient, shifted
from benchmarks.chips.roofline import CHIPS, measure
from benchmarks.common.harness import Row, check_close, options, random_like, save, show
from benchmarks.common.plots import figure
from models.options import positive
from mora_jax import Adapter
from mora_jax.operators import OPERATORS
from tests.support import oracle

ABOUT = """
These figures are rooflines. Each program is compiled for the chip by the chip's own
compiler. Each instruction of it takes the longer of two times: that of its products (on
TPUs in the compiler's cycles, on the H100 at its peak), and that of the bytes it reads
and writes. So they show what is really written to memory, what is fused, and how
products are padded. They are no measurements: latency, slow relayouts and traffic
between chips take no time here. Compare programs on one chip; where a real chip can be
had, its figure stands above these.
"""
PARTS = "layers", "llama", "compiling", "meshes"
SIZES = (4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024)
SMALL = {"width": 1024, "hidden": 2816, "heads": 16, "kv_heads": 4}
TINY = {"width": 256, "hidden": 512, "heads": 4, "kv_heads": 2, "vocabulary": 1024}
LLAMA_OPERATORS = "sharing", "rotation", "block_diagonal", "low_rank"

Case = Layer | Llama | on_meshes.MeshLlama


def cases_of(args: argparse.Namespace) -> dict[str, list[Case]]:
    """The layers and models of each part."""
    if args.quick:
        deep = Llama(1, 128, layers=4, **TINY)
        tiny = Llama(2, 512, **TINY)
        found = {
            "layers": [Layer(512, 512, 2048)],
            "llama": [tiny],
            "compiling": [deep],
            "meshes": [on_meshes.MeshLlama("tiny", 2, tokens=128)],
        }
    else:
        layers = [Layer(*size, 8192) for size in SIZES]
        llamas = [Llama(4, 2048), Llama(4, 2048, rank=64), Llama(1, 512)]
        llamas = llamas[: args.models]
        deep = [Llama(1, 512, layers=12, **SMALL)]
        meshes = [on_meshes.MeshLlama("8b", n) for n in (2, 32)]
        found = {"layers": layers, "llama": llamas, "compiling": deep, "meshes": meshes}
    return {part: found[part] for part in args.only}


def check(operators: Sequence[str]) -> None:
    """Raise SystemExit unless the programs give on this CPU what NumPy gives."""
    layer = Layer(24, 36, 10, rank=2, dtype=jnp.float32)
    methods = list(layer.methods(operators))[2:]
    for method in tqdm(methods, "checking layers on this CPU"):
        operator, _, way = method.name.partition(", ")
        frozen, args = layer.frozen(operator, way), random_like(list(method.args), 1.0)
        m, w, x, g = (np.asarray(a, np.float64) for a in args)
        factor, op = frozen.alpha * frozen.scale, frozen.operator
        kernel = w + factor * oracle.delta_of(op, m)
        by_m = factor * oracle.m_gradient_of(op, m, x, g)
        expected = x @ kernel, (by_m, g @ kernel.T)
        jax.tree.map(check_close, jax.jit(method.run)(*args), _as_jax(expected))
    model = Llama(2, 8, layers=1, dtype=jnp.float32, **{**TINY, "vocabulary": 64})
    module = model.module()
    params = random_like(model.params(module), 0.05)
    ids = np.random.default_rng(0).integers(0, 64, (2, 9)).astype(np.int32)
    base = jax.jit(gradient(shifted(module)))
    for operator in tqdm(LLAMA_OPERATORS, "checking models on this CPU"):
        plan, apply = model.mora(module, params, operator)
        merged: dict[Any, Any] = dict(flatten_dict(params))
        adapters: dict[Any, Any] = {}
        for path, spec in plan.specs.items():
            m = random_like(jax.ShapeDtypeStruct(spec.shape, jnp.float32), 0.05)
            delta = oracle.delta_of(spec.operator, m)
            adapters[*path[:-1], f"{path[-1]}_mora"] = Adapter(m, spec)
            merged[path] = jnp.asarray(merged[path] + spec.factor * delta, jnp.float32)
        loss, _ = jax.jit(gradient(apply))(unflatten_dict(adapters), params, ids)
        expected, _ = base(jnp.zeros(model.width), unflatten_dict(merged), ids)
        check_close(loss, expected)


def _as_jax(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


def compiled(method: Method, where: Any) -> tuple[Any, float]:
    """A program for a chip, and the seconds of all cores to trace and compile it.

    The program is None if it does not fit into the chip's memory.
    """
    args = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), method.args
    )
    start = time.process_time()
    try:
        program = jax.jit(method.run).lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        program = None
    return program, time.process_time() - start


def rows_of(
    part: str, case: Case, chip: str, where: Any, operators: Sequence[str]
) -> Iterator[Row]:
    """A row for each method."""
    if isinstance(case, on_meshes.MeshLlama):
        yield from on_meshes.rows_of(case, chip, operators)
        return
    base = None
    for method in case.methods(operators):
        program, seconds = compiled(method, where)
        row: Row = {"kind": part, "case": str(case), "chip": chip}
        row |= {"method": method.name, "compile_seconds": seconds, "time": None}
        row["auto"] = isinstance(case, Layer) and case.is_auto(
            method.name, topologies.platform_of(chip)
        )
        if program is not None:
            found = measure(program, chip)
            base = found.seconds if method.name == FROZEN else base
            row |= {
                "time": base and found.seconds / base,
                "milliseconds": 1e3 * found.seconds,
                "moved_MB": found.moved / 1e6,
                "temporary_MB": found.temporary / 1e6,
                "notes": list(found.notes),
            }
        yield row


def report(rows: Sequence[Row]) -> None:
    """Print a table for each case, and what was not understood."""
    meshes = [row for row in rows if row["kind"] == "meshes"]
    alone = [row for row in rows if row["kind"] != "meshes"]
    by_case = itertools.groupby(alone, lambda row: (row["kind"], row["case"]))
    for (part, case), group in by_case:
        cells: dict[str, Row] = {}
        chips: dict[str, str] = {}
        for row in group:
            chips[row["chip"]] = f"{{{row['chip']}}}"
            line = cells.setdefault(row["method"], {"method": row["method"]})
            line[row["chip"]] = cell(row)
        what = "time, temporary MB (* is what auto takes)"
        if part == "compiling":
            what = "seconds to trace and compile"
        show({"method": "{method}", **chips}, list(cells.values()), f"{case}: {what}")
    on_meshes.report(meshes)
    notes = {note: row for row in rows for note in row.get("notes", ())}
    print(
        f"\n{len(notes)} things in the programs were not understood." if notes else ""
    )
    for note, row in notes.items():
        print(f"- {row['chip']}, {row['case']}, {row['method']}: {note}")


def cell(row: Row) -> str:
    """Text of a row in a table."""
    if row["kind"] == "compiling":
        return f"{row['compile_seconds']:.1f}"
    if row["time"] is None:
        return "does not fit"
    memory = row["temporary_MB"]
    digits = 0 if memory >= 10 else 1
    return f"{row['time']:.3f}{' *' if row['auto'] else ''}, {memory:,.{digits}f}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot the times, with a panel for each case and a mark for each chip."""
    rows = [row for row in rows if row["kind"] != "compiling" and row["time"]]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    if not cases:
        return
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    columns = min(2, len(cases))
    lines = -(-len(cases) // columns)
    size = 6.5 * columns, 0.6 + 4 * lines
    with figure(path, lines, columns, figsize=size) as (made, axes):
        for axis in axes.flat[len(cases) :]:
            axis.set_visible(False)
        for axis, case in zip(axes.flat, cases, strict=False):
            for mark, chip in zip("osD^", chips, strict=False):
                here = [r for r in rows if (r["case"], r["chip"]) == (case, chip)]
                times, names = zip(
                    *((r["time"], r["method"]) for r in here), strict=True
                )
                label = chip if case == cases[0] else None
                axis.plot(times, names, mark, label=label, alpha=0.8)
            axis.axvline(1, color="black", linewidth=0.8)
            axis.invert_yaxis()
            axis.grid(axis="x", alpha=0.3)
            axis.set_title(case, fontsize="medium")
        made.supxlabel("roofline, relative to the frozen layer or model")
        made.legend(loc="outside upper center", ncols=len(chips))


def arguments() -> argparse.Namespace:
    """The options."""
    parser, every = options(__doc__, "out/chips.json"), list(OPERATORS)
    add = parser.add_argument
    add("--quick", action="store_true", help="small sizes and one chip, in a minute")
    add("--chips", nargs="+", choices=list(CHIPS), help="all by default")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some parts")
    add("--operators", nargs="+", choices=every, default=every, help="in layers")
    every = ["auto", *every]
    add("--llama-operators", nargs="+", choices=every, default=LLAMA_OPERATORS)
    add("--models", type=positive, default=3, help="how many Llamas, the first ones")
    args = parser.parse_args()
    args.chips = args.chips or (["v5e"] if args.quick else list(CHIPS))
    return args


def main() -> None:
    """Check all, compile all, and report."""
    args = arguments()
    print(ABOUT)
    places = {}
    for chip in args.chips:
        try:
            places[chip] = topologies.on_first(topologies.devices(chip))
        except topologies.NoCompilerError as error:
            print(
                textwrap.fill(
                    f"{chip} is left out: {error}", 88, break_long_words=False
                )
            )
    if not places:
        raise SystemExit("no chip is left to compile for")
    if args.only != ["meshes"]:
        check(args.operators)
    rows: list[Row] = []
    for part, cases in cases_of(args).items():
        operators = args.operators if part == "layers" else args.llama_operators
        total = 2 * (1 + len(operators)) if part == "layers" else 2 + len(operators)
        for case, (chip, where) in itertools.product(cases, places.items()):
            if part == "meshes" and chip not in on_meshes.TOPOLOGIES:
                continue
            found = rows_of(part, case, chip, where, operators)
            rows += tqdm(found, f"{chip}: {case}", total)
    report(rows)
    libraries = {name: version(name) for name in ("libtpu", "transformers", "qwix")}
    figures = {name: dataclasses.asdict(CHIPS[name]) for name in places}
    save(rows, args, leave_out=["quick"], chip_figures=figures, libraries=libraries)
    plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
