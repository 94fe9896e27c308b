"""Claim: on a mesh of devices MoRA needs about the memory and traffic of LoRA.

A training step (loss, gradient, adamw) of Llama 3's shapes is compiled for meshes of
host devices from shapes and shardings alone; no array of such a model exists. The base
is bfloat16; adapters and their optimizer state are float32 (full fine-tuning's is
bfloat16). Layers are scanned and rematerialised, and the devices along "model" share a
sequence. You will see what a device holds and receives for each model, mesh and method,
and how long more layers take to compile. Then a small model really runs on one device
and on eight: its losses must agree, and its memory is shown next to what was predicted.

Parameters, gradients and optimizer state follow from shardings. Temporaries, which
include gradients, are what XLA plans for CPUs. They are an upper bound for
accelerators, because attention is materialised and products are in float32. (XLA:CPU
would convert all layers' kernels and saved activations at once; the pass that takes
such work out of loops is off.) Traffic is counted as rings move it, and in 16 bits
where XLA:CPU sends 32. XLA:CPU makes no reduce-scatter, so the gradients of full
fine-tuning count twice.

    python -m benchmarks.mesh.scale --quick
    python -m benchmarks.mesh.scale --models 70b --devices 64 --methods sharing lora
"""

import argparse
import ctypes
import dataclasses
import itertools
import math
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from benchmarks.common.harness import Row, options, save, show
from benchmarks.common.plots import figure
from benchmarks.mesh.mesh_steps import MESHES, METHODS, RANK, SHAPES, Case, make_step
from benchmarks.mesh.traffic import SIZES, traffic

PARTS = ("parameters", "optimizer state", "temporaries")
COLUMNS = {
    "method": "{method}",
    "trained": "{trained:,}",
    "parameters": "{parameters:,.2f}",
    "gradients": "{gradients:,.2f}",
    "optimizer state": "{optimizer state:,.2f}",
    "temporaries": "{temporaries:,.2f}",
    "traffic": "{traffic:,.2f}",
    "compile": "{compile_seconds:.0f} s",
}


def held(tree: Any) -> int:
    """The bytes of one device's part."""
    return sum(
        math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize
        for s in jax.tree.leaves(tree)
    )


def on_paper(case: Case) -> Row:
    """Bytes that a device holds and receives."""
    step = make_step(case)
    compiled, seconds = step.compile()
    sent = traffic(compiled.as_text(), {**SIZES, "f32": 2})
    figures = {
        "mesh": "data {} x fsdp {} x model {}".format(*MESHES[case.devices]),
        "trained": sum(s.size for s in jax.tree.leaves(step.trained)),
        "parameters": held((step.trained, step.frozen)),
        "gradients": held(step.trained),
        "optimizer state": held(step.state),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "traffic": sum(sent.values()),
        "collectives": sent,
        "compile_seconds": seconds,
    }
    return case.row("step", **figures)


def compiling(case: Case) -> Row:
    """The seconds to compile, the better of two times."""
    seconds = min(make_step(case).compile()[1] for _ in range(2))
    return case.row("depth", compile_seconds=seconds)


def running(case: Case) -> Row:
    """The losses of two steps, and the process's memory next to the predicted one."""
    step, rng = make_step(case), np.random.default_rng(0)
    compiled, _ = step.compile()
    give_back_freed_memory()
    plan, before = compiled.memory_analysis(), memory("VmRSS")

    def numbers(s: Any) -> jax.Array:
        x = 0.02 * rng.standard_normal(s.shape, np.float32)
        return jax.device_put(x.astype(s.dtype), s.sharding)

    def zeros(s: Any) -> jax.Array:
        return jax.device_put(np.zeros(s.shape, s.dtype), s.sharding)

    trained, frozen = jax.tree.map(numbers, (step.trained, step.frozen))
    state, losses = jax.tree.map(zeros, step.state), []
    ids = rng.integers(0, case.shape.vocabulary, step.ids.shape, np.int32)
    ids = jax.device_put(ids, step.ids.sharding)
    jax.block_until_ready((trained, frozen, state, ids))
    give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak until here
    for _ in range(2):
        trained, state, loss = compiled(trained, state, frozen, ids)
        losses.append(float(loss))
    predicted = case.devices * (
        plan.argument_size_in_bytes
        + plan.temp_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
    )
    measured = memory("VmHWM") - before
    figures = {"predicted": predicted, "measured": measured}
    return case.row("real", losses=losses, ratio=measured / predicted, **figures)


def give_back_freed_memory() -> None:
    """Return to the system what the allocator keeps, so that it is not counted."""
    ctypes.CDLL(None).malloc_trim(0)


def memory(name: str) -> int:
    """The bytes of this process: now (VmRSS), or the most so far (VmHWM)."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def start(devices: int) -> None:
    """Give a process its devices, whose number cannot change afterwards."""
    os.environ.pop("XLA_FLAGS", None)
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_enable_compilation_cache", False)


def rows_of(
    function: Callable[[Case], Row], cases: Sequence[Case], *, alone: bool = False
) -> Iterator[Row]:
    """A row for each case, from one process for each mesh, or for each case `alone`."""
    context = multiprocessing.get_context("spawn")
    with tqdm(total=len(cases), desc=function.__name__) as bar:
        for devices, group in itertools.groupby(cases, lambda case: case.devices):
            limit = 1 if alone else None
            with ProcessPoolExecutor(
                1, context, start, (devices,), max_tasks_per_child=limit
            ) as pool:
                for row in pool.map(function, group):
                    bar.update()
                    yield row


def divided(rows: Sequence[Row], unit: float) -> list[Row]:
    """The rows with all numbers of bytes in another unit."""
    names = *PARTS, "gradients", "traffic", "predicted", "measured"
    return [{k: v / unit if k in names else v for k, v in r.items()} for r in rows]


def report(paper: Sequence[Row], depth: Sequence[Row], real: Sequence[Row]) -> None:
    """Print all tables."""
    large = max(row["temporaries"] for row in paper) > 1e9
    unit, name = (1e9, "GB") if large else (1e6, "MB")
    title = "{0[model]} on {0[devices]} devices, {0[mesh]}: " + f"{name} a device"
    for line, rows in itertools.groupby(paper, title.format):
        show(COLUMNS, divided(list(rows), unit), line)
    columns = {"layers": "{layers}", "seconds": "{compile_seconds:.1f}"}
    columns["relative"] = "{relative:.2f}"
    title = "Compiling: {method}, width of {model}, {devices} devices"
    show(columns, depth, title.format(**depth[0]))
    columns = {"method": "{method}", "devices": "{devices}"}
    columns |= {"predicted": "{predicted:,.0f}", "measured": "{measured:,.0f}"}
    columns |= {"ratio": "{ratio:.2f}", "losses": "{losses[0]:.4f}, {losses[1]:.4f}"}
    show(columns, divided(real, 1e6), "Really run: the process's memory in MB")


def check_losses(real: Sequence[Row]) -> None:
    """Raise SystemExit unless each method has the same losses on all meshes."""
    first: dict[str, list[float]] = {}
    for row in real:
        expected = first.setdefault(row["method"], row["losses"])
        if not np.allclose(row["losses"], expected, rtol=1e-4, atol=0):
            raise SystemExit(f"{row['method']}: losses differ between meshes: {real}")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot the bytes of a device, with a panel for each mesh."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    devices = list(dict.fromkeys(row["devices"] for row in rows))
    size = 2 + 3.2 * len(devices), 0.8 + 1.6 * len(models)
    settings = {"figsize": size, "sharey": True}
    with figure(path, len(models), len(devices), **settings) as (made, axes):
        for row in rows:
            axis = axes[models.index(row["model"]), devices.index(row["devices"])]
            left = 0.0
            for k, part in enumerate(PARTS):
                style = {"color": f"C{k}", "label": part if row is rows[0] else None}
                axis.barh(row["method"], width := row[part] / 1e9, left=left, **style)
                left += width
            title = f"{row['model']}, {row['devices']} devices"
            axis.set_title(title, fontsize="medium")
        axes[0, 0].invert_yaxis()
        made.legend(loc="outside upper center", ncols=len(PARTS))
        made.supxlabel("GB a device", fontsize="medium")


def arguments() -> argparse.Namespace:
    """The options."""
    usual = ["rotation", "rotation-split", "sharing", "lora", "full"]
    parser = options(__doc__, "out/scale.json")
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny on 8 devices, in a minute or two")
    add("--models", nargs="+", choices=list(SHAPES), default=["8b", "70b", "405b"])
    add("--devices", nargs="+", type=int, choices=list(MESHES), default=[8, 64, 256])
    add("--methods", nargs="+", choices=list(METHODS), default=usual)
    add("--tokens", type=int, default=2048, help="in each sequence")
    args = parser.parse_args()
    if args.quick:
        args.models, args.devices, args.tokens = ["tiny"], [8], 128
    if args.tokens < 2:
        parser.error(f"--tokens must be at least 2, got {args.tokens}")
    return args


def main() -> None:
    """Compile all, run what can be run, and report."""
    args = arguments()
    every = itertools.product(args.devices, args.models, args.methods)
    cases = [Case(m, d, method, args.tokens) for d, m, method in every]
    deeper = [dataclasses.replace(cases[0], layers=n) for n in (2, 8, 32)]
    run = args.methods[:1] if args.quick else args.methods
    small = [Case("real", d, m, 256, sequences=4) for d in (1, 8) for m in run]
    paper = list(rows_of(on_paper, cases))
    paper.sort(key=lambda row: args.models.index(row["model"]))
    depth = list(rows_of(compiling, deeper))
    for row in depth:
        row["relative"] = row["compile_seconds"] / depth[0]["compile_seconds"]
    real = list(rows_of(running, small, alone=True))
    check_losses(real)
    report(paper, depth, real)
    save(paper + depth + real, args, leave_out=["quick"], rank=RANK)
    plot(paper, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
