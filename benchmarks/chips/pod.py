"""Claim: on a pod of TPUs adapters cost what they cost on one chip.

Training steps (loss, gradient, adamw) of Llamas of 8B, 70B and 405B parameters are
compiled for slices of 8, 64 and 256 TPUs, as shapes with shardings, so that no array of
them exists. They are the steps of `mesh_steps`: layers are scanned and rematerialised,
the base is bfloat16, adapters are float32, and each group of chips that shares features
has one sequence. You will see the memory and the traffic of a chip, and the roofline of
a step relative to the frozen model's, which leaves out the time of collectives. Beside
it is the same ratio on one chip without the others, which has its share of the features
and all inputs of a kernel, in fewer layers. What does not fit a chip does not compile,
and the table says what it would need.

`make bench-pod` sets up what it needs. A program takes about a minute of two cores.

    python -m benchmarks.chips.pod --quick
    python -m benchmarks.chips.pod --models 405b --chips v6e --methods low_rank
"""

import argparse
import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from benchmarks.chips import topologies
from benchmarks.chips.on_meshes import KINDS, check_dtypes
from benchmarks.chips.roofline import CHIPS, measure
from benchmarks.common.harness import Row, claim, method_name, options, save, show
from benchmarks.mesh.mesh_steps import MESHES, RANK, Case, make_step
from models import llama
from models.options import positive

SLICES = {"tiny": "2x4", "8b": "2x4", "70b": "8x8", "405b": "16x16"}
"""The slice of each model, without the name of its chips."""
FROZEN = "frozen"
NAMES = {
    FROZEN: FROZEN,
    "lora": "LoRA, not folded",
    "directions": "a gradient for directions",
    "wide": "a step of that LoRA",
}
"""Others have those of `method_name`."""
METHODS = "block_diagonal", "sharing", "low_rank", "lora"
OTHERS = "directions", "wide"
"""Two that only `--methods` asks for."""
BOUND = 0.05
LAYERS = 8
"""The most layers of one chip alone."""
COLUMNS = {
    "method": "{name}",
    "arguments GB": "{arguments_GB:.2f}",
    "temporary GB": "{temporary_GB:.2f}",
    "received GB": "{all_received_GB:,.1f}",
    "of which all-reduce": "{all_reduce_GB:,.1f}",
    "time": "{time:.3f}",
    "one chip": "{alone:.3f}",
    "does not fit": "{needs}",
}


@dataclasses.dataclass(frozen=True)
class Alone(Case):
    """One chip of a mesh with its share of the features, and without the other chips.

    Attributes:
        of: The devices of the mesh.
    """

    of: int = 8

    @property
    def shape(self) -> llama.Shape:
        """The model with the features that are on one chip."""
        shape, (*_, model) = super().shape, MESHES[self.of]
        names = "hidden", "heads", "kv_heads", "vocabulary"
        share = {name: getattr(shape, name) // model for name in names}
        return dataclasses.replace(shape, layers=min(shape.layers, LAYERS), **share)


def cost_of(case: Case, topology: str) -> Row:
    """What a step costs a chip, or what it would need if it does not fit.

    Raises:
        SystemExit: Something in the program is not understood.
    """
    step = make_step(case, topologies.devices(topology))
    check_dtypes(step.frozen)
    names = "milliseconds", "arguments_GB", "temporary_GB", "all_received_GB"
    row: Row = dict.fromkeys((*names, "all_reduce_GB", "compile_seconds", "needs"))
    try:
        program, seconds = step.compile({})
    except Exception as error:  # JAX has no public name for that of a compiler
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needs = re.search(r"\(([\d.]+)G\) exceeds .* \(([\d.]+)G\)", str(error))
        assert needs is not None
        return row | {"needs": f"{needs[1]} of {needs[2]} GiB"}
    chip, _, _ = topology.partition(":")
    found, plan = measure(program, chip), program.memory_analysis()
    if found.notes:
        raise SystemExit(f"{case}: {found.notes}")
    received = {kind: found.received.get(kind, 0.0) / 1e9 for kind in KINDS}
    return row | {
        "compile_seconds": seconds,
        "milliseconds": 1e3 * found.seconds,
        "arguments_GB": plan.argument_size_in_bytes / 1e9,
        "temporary_GB": plan.temp_size_in_bytes / 1e9,
        "received_GB": received,
        "all_received_GB": sum(found.received.values()) / 1e9,
        "all_reduce_GB": received["all-reduce"],
    }


def rows_of(args: argparse.Namespace, model: str, chip: str) -> Iterator[Row]:
    """A row for the frozen step and for each method."""
    topology = f"{chip}:{SLICES[model]}"
    devices, bases = len(topologies.devices(topology)), {}
    for method in tqdm((FROZEN, *args.methods), topology):
        step = Case(model, devices, method, args.tokens)
        alone = Alone(model, 1, method, args.tokens, of=devices)
        cost, times = cost_of(step, topology), {"alone": None}
        if not args.slices_only:
            times["alone"] = cost_of(alone, chip)["milliseconds"]
        times["time"] = cost["milliseconds"]
        bases = times if method == FROZEN else bases
        pairs = {key: (time, bases[key]) for key, time in times.items()}
        ratios = {key: a / b if a and b else None for key, (a, b) in pairs.items()}
        name = NAMES.get(method) or method_name(method)
        row = {"name": name, **dataclasses.asdict(step), "topology": topology}
        yield row | cost | ratios | {"alone_milliseconds": times["alone"]}


def report(rows: Sequence[Row]) -> None:
    """Print a table for each model and slice, and how far one chip is from it."""
    cases = itertools.groupby(rows, lambda row: (row["model"], row["topology"]))
    for (model, topology), group in cases:
        here = list(group)
        data, fsdp, split = MESHES[here[0]["devices"]]
        batch = f"{data * fsdp} x {here[0]['tokens']:,} tokens, r = {RANK}"
        mesh = f"fsdp {fsdp} x model {split}"
        base = here[0]["milliseconds"]
        took = "" if base is None else f"; frozen: {base:,.0f} ms"
        show(COLUMNS, here, f"{model} on {topology}, {mesh}, {batch}{took}")
        pairs = [(row["name"], row["time"], row["alone"]) for row in here[1:]]
        for name, time, alone in pairs:
            if time and alone:
                text = f"{name} costs what it costs on one chip, within {BOUND:.0%}"
                off = time / alone - 1
                claim(text, abs(off) <= BOUND, f"{off:+.1%}")


def arguments() -> argparse.Namespace:
    """The options."""
    parser = options(__doc__, "out/pod.json")
    add, models = parser.add_argument, [name for name in SLICES if name != "tiny"]
    add("--quick", action="store_true", help="a small model on eight chips")
    add("--models", nargs="+", choices=list(SLICES), default=models)
    add("--chips", nargs="+", choices=["v5e", "v6e"], default=["v5e", "v6e"])
    add("--methods", nargs="+", choices=METHODS + OTHERS, default=list(METHODS))
    add("--tokens", type=positive, default=2048, help="the length of a sequence")
    add("--slices-only", action="store_true", help="no chip alone, in half the time")
    add("--add-to", type=Path, help="a file of an earlier run, whose rows come first")
    args = parser.parse_args()
    if args.quick:
        args.models, args.chips, args.tokens = ["tiny"], ["v5e"], 512
    return args


def main() -> None:
    """Compile all, and report."""
    args, rows = arguments(), []
    if args.add_to:
        rows = json.loads(args.add_to.read_text())["results"]
    figures = {name: dataclasses.asdict(CHIPS[name]) for name in args.chips}
    settings = {"chip_figures": figures, "libraries": {"libtpu": version("libtpu")}}
    for model, chip in itertools.product(args.models, args.chips):
        for row in rows_of(args, model, chip):
            rows.append(row)
            save(rows, args, leave_out=("quick", "add_to"), **settings)
    report(rows)


if __name__ == "__main__":
    main()
