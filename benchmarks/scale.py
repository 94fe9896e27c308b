"""Claim: on a mesh of devices MoRA needs about the memory and traffic of LoRA.

On paper: a training step (loss, gradient, adamw) of Llama 3's shapes is compiled for
meshes of host devices from shapes and shardings alone; no array of such a model exists.
The base is bfloat16, adapters and their optimizer state are float32 (that of full
fine-tuning is bfloat16), layers are scanned and rematerialised, and the devices along
"model" share a sequence. You will see what a device holds and receives, for each model,
mesh and method; how long more layers take to compile; and a small model that really
runs on one device and on eight: its losses must agree, and its memory is put beside
what was predicted.

Parameters, gradients and optimizer state follow from shardings. Temporaries, gradients
among them, are what XLA plans for CPUs, an upper bound for accelerators: attention is
materialised and products are in float32. (XLA:CPU would convert all layers' kernels and
saved activations at once; the pass that takes such work out of loops is off.) Traffic
is counted as in rings, and in 16 bits where XLA:CPU sends 32. It makes no
reduce-scatter, so that full fine-tuning's gradients count twice.

    python benchmarks/scale.py --quick
    python benchmarks/scale.py --models 70b --devices 64 --methods sharing lora
"""

import argparse
import dataclasses
import itertools
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen import spmd
from flax.traverse_util import flatten_dict, unflatten_dict
from harness import save
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm
from traffic import SIZES, traffic

import mora_jax
from mora_jax import MoRAConfig, linen, sharding
from mora_jax.operators import OPERATORS

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import llama

Row = dict[str, Any]
RANK = 8
MESHES = {1: (1, 1, 1), 8: (1, 4, 2), 64: (1, 8, 8), 256: (1, 32, 8)}
"""Numbers of devices along the axes data, fsdp and model."""
SHAPES = {**llama.SHAPES, "real": llama.Shape(4, 1024, 2816, 8, 4, 8192)}
"""The last one really runs: its memory is not lost in that of the process."""
METHODS = {
    **{name: f"MoRA, {name}" for name in OPERATORS},
    **{f"{name}-split": f"MoRA, {name}, M split" for name in OPERATORS},
    "lora": "LoRA",
    "full": "every parameter",
}
PARTS = ("parameters", "optimizer state", "temporaries")
OPTIONS: Any = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One model, mesh and method.

    Attributes:
      model: of `SHAPES`.
      devices: of `MESHES`.
      method: of `METHODS`.
      tokens: of a sequence.
      layers: other than the model's.
      sequences: other than one for each part of the batch.
    """

    model: str
    devices: int
    method: str
    tokens: int
    layers: int = 0
    sequences: int = 0

    @property
    def shape(self) -> llama.Shape:
        """The model's size."""
        shape = SHAPES[self.model]
        return dataclasses.replace(shape, layers=self.layers or shape.layers)

    def row(self, kind: str, **figures: Any) -> Row:
        """What was found for it."""
        named = {"method": METHODS[self.method], "layers": self.shape.layers}
        return {"kind": kind, **dataclasses.asdict(self), **named, **figures}


class Step(NamedTuple):
    """A training step and its arguments, as shapes with shardings."""

    run: Callable[..., Any]
    trained: Any
    state: Any
    frozen: Any
    ids: Any

    @classmethod
    def of(cls, case: Case) -> "Step":
        """That of a case; nothing is computed."""
        mesh = llama.make_mesh(*MESHES[case.devices])
        model = llama.Llama(case.shape, mesh)
        rows = NamedSharding(mesh, PartitionSpec(llama.BATCH_AXES))
        size = case.sequences or math.prod(MESHES[case.devices][:2]), case.tokens
        ids = jax.ShapeDtypeStruct(size, jnp.int32, sharding=rows)
        boxed = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
        names, rules = nn.get_partition_spec(boxed), list(llama.RULES)
        places = spmd.logical_to_mesh_sharding(names, mesh, rules)
        params = jax.tree.map(placed, nn.unbox(boxed), places)
        if case.method == "full":
            apply, trained = lambda p, _, ids: model.apply({"params": p}, ids), params
        elif case.method == "lora":
            apply, trained = lora(model, params)
        else:
            with nn.logical_axis_rules(rules):
                apply, trained = mora(case.method, model, boxed, ids)
        tx = optax.adamw(1e-3)

        def loss(trained: Any, frozen: Any, ids: jax.Array) -> jax.Array:
            logits: Any = apply(trained, frozen, ids)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits[:, :-1], ids[:, 1:]
            ).mean()

        def run(trained: Any, state: Any, frozen: Any, ids: jax.Array) -> Any:
            value, grads = jax.value_and_grad(loss)(trained, frozen, ids)
            updates, state = tx.update(grads, state, trained)
            return optax.apply_updates(trained, updates), state, value

        whole = NamedSharding(mesh, PartitionSpec())
        state = optax.tree_map_params(
            tx,
            lambda s, one: placed(s, one.sharding),
            jax.eval_shape(tx.init, trained),
            trained,
            transform_non_params=lambda s: placed(s, whole),
        )
        return cls(run, trained, state, {} if trained is params else params, ids)

    def compile(self) -> tuple[Any, float]:
        """The program, and seconds of all cores to trace and compile it."""
        start = time.process_time()
        kept = jax.tree.map(lambda s: s.sharding, (self.trained, self.state))
        step = jax.jit(self.run, donate_argnums=(0, 1), out_shardings=(*kept, None))
        compiled = step.lower(*self[1:]).compile(compiler_options=OPTIONS)
        return compiled, time.process_time() - start


def placed(like: Any, where: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of `like`, with a sharding."""
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=where)


def mora(
    method: str, model: llama.Llama, boxed: Any, ids: Any
) -> tuple[Callable[..., Any], Any]:
    """The model as `linen.wrap` adapts it, and adapters."""
    operator, _, split = method.partition("-")
    config = MoRAConfig(rank=RANK, operator=operator)
    plan = linen.plan(model, {"params": boxed}, config, ids)
    mesh, square = model.mesh, ("model" if split else None, None)
    plan = sharding.plan_on_mesh(plan, boxed, batch_axes=llama.BATCH_AXES, mesh=mesh)
    places = sharding.adapter_shardings(plan, boxed, mesh=mesh, square=square)
    wrapped = linen.wrap(model, plan)

    def apply(adapters: Any, params: Any, ids: jax.Array) -> Any:
        return wrapped(adapters, {"params": params}, ids)

    adapters = jax.eval_shape(lambda: mora_jax.init(plan))
    return apply, jax.tree.map(placed, adapters, places)


def lora(model: nn.Module, params: Any) -> tuple[Callable[..., Any], Any]:
    """LoRA by hand on the same kernels; A and B are split as these are."""
    base: dict[Any, Any] = dict(flatten_dict(params))
    adapters = {}
    for path, kernel in base.items():
        if path[0] == "layers" and path[-1] == "kernel":
            (n, ins, outs), mesh = kernel.shape, kernel.sharding.mesh
            for name, size, axes in (
                ("lora_a", (n, ins, RANK), (*kernel.sharding.spec[:2], None)),
                ("lora_b", (n, RANK, outs), (None, None, kernel.sharding.spec[2])),
            ):
                where = NamedSharding(mesh, PartitionSpec(*axes))
                whole = jax.ShapeDtypeStruct(size, jnp.float32, sharding=where)
                adapters[*path[:-1], name] = whole

    def add(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        y, one = call(*args, **kwargs), context.module
        if not isinstance(one, nn.Dense) or not one.has_variable("params", "lora_a"):
            return y
        a, b = (one.get_variable("params", f"lora_{c}").astype(y.dtype) for c in "ab")
        return y + (args[0] @ a) @ b

    def apply(adapters: Any, params: Any, ids: jax.Array) -> Any:
        both = unflatten_dict(flatten_dict(params) | flatten_dict(adapters))
        with nn.intercept_methods(add):
            return model.apply({"params": both}, ids)

    return apply, unflatten_dict(adapters)


def held(tree: Any) -> int:
    """Bytes of one device's part."""
    return sum(
        math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize
        for s in jax.tree.leaves(tree)
    )


def on_paper(case: Case) -> Row:
    """What a device holds and receives."""
    step = Step.of(case)
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
    """Seconds to compile, the better of two."""
    seconds = min(Step.of(case).compile()[1] for _ in range(2))
    return case.row("depth", compile_seconds=seconds)


def running(case: Case) -> Row:
    """Two steps' losses, and the process's memory beside what was predicted."""
    step, rng = Step.of(case), np.random.default_rng(0)
    compiled, _ = step.compile()
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


def memory(name: str) -> int:
    """Bytes of this process as Linux counts them, now (VmRSS) or at most (VmHWM)."""
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
    """A row of each case, from a process for each mesh, or for each case alone."""
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


def show(title: str, columns: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Print a Markdown table; columns are formats of rows."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for row in rows:
        cells = (form.format(**row) for form in columns.values())
        print(f"| {' | '.join(cells)} |")


def divided(rows: Sequence[Row], names: Sequence[str], unit: float) -> list[Row]:
    """Rows with bytes in another unit."""
    return [{**row, **{name: row[name] / unit for name in names}} for row in rows]


def report(paper: Sequence[Row], depth: Sequence[Row], real: Sequence[Row]) -> None:
    """Print all tables."""
    bytes_ = "parameters", "gradients", "optimizer state", "temporaries", "traffic"
    large = max(row["temporaries"] for row in paper) > 1e9
    title = "{0[model]} on {0[devices]} devices, {0[mesh]}: "
    title += "GB a device" if large else "MB a device"
    columns = {"method": "{method}", "trained": "{trained:,}"}
    columns |= {name: f"{{{name}:,.2f}}" for name in bytes_}
    columns["compile"] = "{compile_seconds:.0f} s"
    for name, rows in itertools.groupby(paper, title.format):
        show(name, columns, divided(list(rows), bytes_, 1e9 if large else 1e6))
    columns = {"layers": "{layers}", "seconds": "{compile_seconds:.1f}"}
    columns["relative"] = "{relative:.2f}"
    title = "Compiling: {method}, width of {model}, {devices} devices"
    show(title.format(**depth[0]), columns, depth)
    bytes_ = "predicted", "measured"
    columns = {"method": "{method}", "devices": "{devices}"}
    columns |= {name: f"{{{name}:,.0f}}" for name in bytes_}
    columns |= {"ratio": "{ratio:.2f}", "losses": "{losses[0]:.4f}, {losses[1]:.4f}"}
    show("Really run: the process's memory in MB", columns, divided(real, bytes_, 1e6))


def check_losses(real: Sequence[Row]) -> None:
    """Raise unless each method has the same losses on all meshes."""
    first: dict[str, list[float]] = {}
    for row in real:
        expected = first.setdefault(row["method"], row["losses"])
        if not np.allclose(row["losses"], expected, rtol=1e-4, atol=0):
            raise SystemExit(f"{row['method']}: losses differ between meshes: {real}")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Bytes of a device, one stacked bar for each method, one panel for each mesh."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    models = list(dict.fromkeys(row["model"] for row in rows))
    devices = list(dict.fromkeys(row["devices"] for row in rows))
    figure, axes = plt.subplots(
        len(models),
        len(devices),
        figsize=(2 + 3.2 * len(devices), 0.8 + 1.6 * len(models)),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for row in rows:
        axis = axes[models.index(row["model"]), devices.index(row["devices"])]
        ends = itertools.accumulate((row[part] / 1e9 for part in PARTS), initial=0)
        for k, (left, right) in enumerate(itertools.pairwise(ends)):
            axis.barh(row["method"], right - left, left=left, color=f"C{k}")
        axis.set_title(f"{row['model']}, {row['devices']} devices", fontsize="medium")
    axes[0, 0].invert_yaxis()
    handles = [Patch(color=f"C{k}", label=part) for k, part in enumerate(PARTS)]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(PARTS))
    figure.supxlabel("GB a device", fontsize="medium")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    """The options."""
    usual = ["rotation", "rotation-split", "sharing", "lora", "full"]
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny on 8 devices, a minute or two")
    add("--models", nargs="+", choices=list(SHAPES), default=["8b", "70b", "405b"])
    add("--devices", nargs="+", type=int, choices=list(MESHES), default=[8, 64, 256])
    add("--methods", nargs="+", choices=list(METHODS), default=usual)
    add("--tokens", type=int, default=2048, help="of a sequence")
    add("--out", type=Path, default=Path("out/scale.json"))
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
    paper = [Case(m, d, method, args.tokens) for d, m, method in every]
    first = paper[0]
    depth = [dataclasses.replace(first, layers=n) for n in (2, 8, 32)]
    run = args.methods[:1] if args.quick else args.methods
    real = [Case("real", d, m, 256, sequences=4) for d in (1, 8) for m in run]
    tables = (
        sorted(
            rows_of(on_paper, paper), key=lambda row: args.models.index(row["model"])
        ),
        list(rows_of(compiling, depth)),
        list(rows_of(running, real, alone=True)),
    )
    for row in tables[1]:
        row["relative"] = row["compile_seconds"] / tables[1][0]["compile_seconds"]
    check_losses(tables[2])
    report(*tables)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "quick")}
    save(sum(tables, []), {**settings, "rank": RANK}, args.out)
    plot(tables[0], args.out.with_suffix(".png"))
    print(f"\nfigures and plot beside {args.out}")


if __name__ == "__main__":
    main()
